"""One self-contained HTML page of an evaluation: bars, scores, pictures."""

from __future__ import annotations

import base64
import html
import io
import math
from typing import TYPE_CHECKING

import numpy as np

from stsr_core.evaluation.bootstrap import BLOCK_CELLS, BLOCK_STEPS, LEAST_BLOCKS
from stsr_core.evaluation.evaluate import BASELINES, OURS, RAINFARMS, Evaluation

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    from stsr_core.checkpoint import Checkpoint

# What a good checkpoint keeps to, as (lowest, highest); ratios are over truth.
BARS = {
    "spread_skill": (0.85, 1.15),
    "quantile_ratio_0.99": (0.85, 1.15),
    "quantile_ratio_0.999": (0.85, 1.15),
    "wet_fraction_ratio": (0.9, 1.1),
    "hourly_change_ratio": (0.9, 1.1),
    "spectrum_db": (0.0, 2.0),
    "seam_ratio": (0.95, 1.05),
    "closure_quanta": (0.0, 0.0),
}
BETTER = 1.0  # CRPS over every baseline, at least
CRPS_BARS = {  # CRPS over a baseline, for the factors that are compared from release to release
    "rainfarm": {(8, 3): 0.75, (10, 1): 0.85, (25, 6): 0.75},
    "linear": {(8, 3): 0.68, (10, 1): 0.80, (25, 6): 0.62},
}
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;font-variant-numeric:tabular-nums}
th,td{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child{text-align:left}.no{background:#fde2dd}.yes{background:#e3f3e3}
img{max-width:100%}caption{text-align:left;font-weight:600;padding:.4em 0}"""


def bars(evaluation: Evaluation) -> list[tuple[str, float, tuple[float, float], bool]]:
    """Rows (score, found, (lowest, highest), met) for every bar that the evaluation can judge."""
    scores, factor = evaluation.table[OURS], (evaluation.factor.space, evaluation.factor.time)
    over = {b: CRPS_BARS.get(b, {}).get(factor, BETTER) for b in BASELINES}
    wanted = {f"crps_over_{b}": (0.0, bar) for b, bar in over.items()} | BARS
    rows = []
    for name, (low, high) in wanted.items():
        if name in scores and not math.isnan(scores[name]):
            rows.append((name, scores[name], (low, high), low <= scores[name] <= high))
    return rows


def html_report(evaluation: Evaluation, checkpoint: Checkpoint) -> str:
    """Make the page: bars, all scores by method, rank histogram, spectra, one hour as pictures, the card."""
    factor = evaluation.factor
    title = f"Checkpoint {checkpoint.card.name} at factor {factor}"
    truth = evaluation.truth
    _, nt, ny, nx = truth.fine.shape
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{len(evaluation.fields[OURS])} members; {nt} steps of {ny} x {nx} cells of {truth.spacing_km:.2g} km "
        f"(networks are told {evaluation.told_km} km) at "
        f"{html.escape(', '.join(truth.names))}; checkpoint digest {checkpoint.digest[:12]}.</p>",
        _bar_table(evaluation),
        _picture(maps(evaluation), "The wettest hour of each place"),
        _score_table(evaluation),
        _picture(diagrams(evaluation), "Rank histogram and spectra"),
        _signal_table(evaluation),
        "<h2>Card</h2><pre>" + html.escape(checkpoint.card.model_dump_json(indent=1)) + "</pre>",
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def number_text(value: float | None) -> str:
    """Three decimals, two digits of what is smaller, nothing for what is undefined."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.2g}"


def interval_text(interval: tuple[float, float] | None, blocks: int) -> str:
    """`low to high`, or why it is unknown from so many blocks of the bootstrap; nothing without an interval."""
    if interval is None:
        return ""
    if not math.isnan(interval[0]):
        return " to ".join(map(number_text, interval))
    if blocks < LEAST_BLOCKS:
        return f"unknown: {LEAST_BLOCKS} blocks of {BLOCK_STEPS} steps and {BLOCK_CELLS} cells are needed, not {blocks}"
    return "unknown, as it hardly rains"


def _table(caption: str, head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<table><caption>{html.escape(caption)}</caption><tr>{cells}</tr>{body}</table>"


def _cell(text: str, css: str = "") -> str:
    return f'<td class="{css}">{html.escape(text)}</td>' if css else f"<td>{html.escape(text)}</td>"


def _bar_table(evaluation: Evaluation) -> str:
    rows = []
    for name, found, (low, high), met in bars(evaluation):
        between = interval_text(evaluation.intervals.get(name.removeprefix("crps_over_")), evaluation.blocks)
        needed = f"{low:g} to {high:g}"
        rows.append(
            [
                _cell(name),
                _cell(number_text(found)),
                _cell(between),
                _cell(needed),
                _cell("met" if met else "missed", "yes" if met else "no"),
            ]
        )
    return _table("What it must keep to", ["score", "found", "95 % interval", "needed", ""], rows)


def _score_table(evaluation: Evaluation) -> str:
    names = list(dict.fromkeys(n for scores in evaluation.table.values() for n in scores))
    rows = [[_cell(n), *(_cell(number_text(s.get(n))) for s in evaluation.table.values())] for n in names]
    return _table("All scores, mm per fine step", ["score", *evaluation.table], rows)


def _signal_table(evaluation: Evaluation) -> str:
    if not evaluation.signal:
        return ""
    names = list(next(iter(evaluation.signal.values())))
    rows = [[_cell(n), *(_cell(number_text(s[n])) for s in evaluation.signal.values())] for n in names]
    return _table("Response to a wetter input", ["statistic", *(f"x {k}" for k in evaluation.signal)], rows)


def _picture(figure: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<h2>{html.escape(caption)}</h2><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'


def maps(evaluation: Evaluation) -> Figure:
    """Coarse input, baselines, members and truth at the wettest hour of each place."""
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure

    truth, factor = evaluation.truth, evaluation.factor
    levels = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40]
    style = {"cmap": _colours(), "norm": BoundaryNorm(levels, 256, extend="max"), "interpolation": "nearest"}
    ours = evaluation.fields[OURS]
    columns = [
        "coarse",
        *(n for n in ("linear", *RAINFARMS) if n in evaluation.fields),
        "mean",
        "member 0",
        "member 1",
        "truth",
    ]
    figure = Figure(figsize=(3 * len(columns), 3.2 * len(truth.names)), layout="constrained")
    axes = figure.subplots(len(truth.names), len(columns), squeeze=False)
    for p, name in enumerate(truth.names):
        step = int(np.nansum(truth.fine[p], axis=(1, 2)).argmax())
        shown = {
            "coarse": truth.coarse[p, step // factor.time] / factor.time,
            **{n: f[0, p, step] for n, f in evaluation.fields.items() if n != OURS},
            "mean": ours[:, p, step].mean(axis=0), "member 0": ours[0, p, step],
            "member 1": ours[min(1, len(ours) - 1), p, step], "truth": truth.fine[p, step],
        }  # fmt: skip
        for axis, column in zip(axes[p], columns, strict=True):
            image = axis.imshow(shown[column], **style)
            axis.set(title=f"{name}\n{column}" if column == "coarse" else column, xticks=[], yticks=[])
    figure.colorbar(image, ax=axes.ravel().tolist(), label="mm per step", shrink=0.7, ticks=levels)
    return figure


def _colours() -> Colormap:
    import matplotlib

    return matplotlib.colormaps["turbo"].with_extremes(under="white", bad="0.8")


def diagrams(evaluation: Evaluation) -> Figure:
    """Rank histogram of the ensemble, and power spectra of every method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    ranks = evaluation.ranks
    left.bar(np.arange(len(ranks)), ranks, color="0.5")
    left.axhline(1 / len(ranks), color="k", lw=1)
    left.set(title="Rank of the truth among the members", xlabel="rank", ylabel="share")
    n = min(evaluation.truth.fine.shape[-2:])
    for name, power in evaluation.spectra.items():
        k = np.arange(1, n // 2 + 1)
        right.plot(
            n / k,
            power[1 : n // 2 + 1],
            label=name,
            color="k" if name == "truth" else None,
            lw=2 if name == OURS else 1,
        )
    right.set_xscale("log")
    if any(power[1:].any() for power in evaluation.spectra.values()):  # it rains somewhere
        right.set_yscale("log")
    right.axvline(2 * evaluation.factor.space, color="0.7", ls=":")
    right.invert_xaxis()
    right.set(title="Radially averaged power", xlabel="wavelength [cells]")
    right.legend()
    return figure
