"""One self-contained HTML page of an evaluation: bars, scores, pictures."""

from __future__ import annotations

import base64
import html
import io
import math
from typing import TYPE_CHECKING

import numpy as np

from stsr_core.evaluation.baselines import RAINFARMS
from stsr_core.evaluation.bootstrap import LEAST_BLOCKS, Block, Day
from stsr_core.evaluation.evaluate import OF_TRUTH, OURS, Evaluation
from stsr_core.evaluation.variants import HOW

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    from stsr_core.checkpoint import Checkpoint
    from stsr_core.evaluation.truth import Truth

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;font-variant-numeric:tabular-nums;display:block}
table{overflow-x:auto;white-space:nowrap}
th,td{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child{text-align:left}.no{background:#fde2dd}.yes{background:#e3f3e3}
img{max-width:100%}caption{text-align:left;font-weight:600;padding:.4em 0}"""


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
        _score_tables(evaluation),
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


def interval_text(interval: tuple[float, float] | None, blocks: int, block: Block) -> str:
    """`low to high`, or why it is unknown from so many blocks of the bootstrap; nothing without an interval."""
    if interval is None:
        return ""
    if not math.isnan(interval[0]):
        return " to ".join(map(number_text, interval))
    if blocks < LEAST_BLOCKS:
        return f"unknown: {LEAST_BLOCKS} {block} are needed, not {blocks}"
    return "unknown, as it hardly rains"


def _table(caption: str, head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f"<table><caption>{html.escape(caption)}</caption><tr>{cells}</tr>{body}</table>"


def _cell(text: str, css: str = "") -> str:
    return f'<td class="{css}">{html.escape(text)}</td>' if css else f"<td>{html.escape(text)}</td>"


def _bar_table(evaluation: Evaluation) -> str:
    css = {True: "yes", False: "no", None: ""}
    rows = [
        [
            _cell(bar.score),
            _cell(number_text(bar.found)),
            _cell(interval_text(evaluation.intervals.get(bar.score), evaluation.blocks, evaluation.block)),
            _cell(f"{bar.low:g} to {bar.high:g}"),
            _cell(bar.verdict, css[bar.met]),
        ]
        for bar in evaluation.bars
    ]
    table = _table("What it must keep to", ["score", "found", "95 % interval", "needed", ""], rows)
    return (
        f"{table}<p>Intervals by bootstrap over {evaluation.blocks} {evaluation.block}{_doubt(evaluation.block)}.</p>"
    )


def _doubt(block: Block) -> str:
    if isinstance(block, Day):
        return ""
    return f", as there are fewer than {LEAST_BLOCKS} days of places; of other days and places they are wider"


def _score_tables(evaluation: Evaluation) -> str:
    names = list(dict.fromkeys(n for scores in evaluation.table.values() for n in scores))
    skill = [name for name in names if name.startswith("fss_")]
    variants = ", ".join(evaluation.ablations)
    said = [_days(evaluation.truth), *([f"Variants ({variants}): {HOW}"] if variants else [])]
    return (
        _scores("All scores, mm per fine step", [name for name in names if name not in skill], evaluation)
        + "".join(f"<p>{html.escape(line)}</p>" for line in said)
        + _scores("Fractions skill score of amounts and squares of cells", skill, evaluation)
    )


def _scores(caption: str, names: list[str], evaluation: Evaluation) -> str:
    rows = [[_cell(n), *(_cell(number_text(s.get(n))) for s in evaluation.table.values())] for n in names]
    return _table(caption, ["score", *evaluation.table], rows)


def _days(truth: Truth) -> str:
    """What days of the indices are, and why indices are missing."""
    steps, day = truth.fine.shape[1], truth.steps_per_day
    said = (
        "Closure is the largest of a coarse cell, in mm before storage and in quanta after it. Spells are of steps, or "
        "of days; days, those of rx1day and sdii too, are 24 h from the first step that is scored."
    )
    if steps >= 2 * day:
        return said
    lacking = "There are none" if steps < day else "There are no spells of days"
    return f"{said} {lacking}: {day if steps < day else 2 * day} steps are needed, {steps} are scored."


def _signal_table(evaluation: Evaluation) -> str:
    if not evaluation.signal:
        return ""
    names = [n for n in next(iter(evaluation.signal.values())) if not n.endswith(OF_TRUTH)]
    rows = [
        [_cell(n), *(_cell(number_text(s[n + of])) for s in evaluation.signal.values() for of in ("", OF_TRUTH))]
        for n in names
    ]
    head = ["statistic", *(f"{of}x {k}" for k in evaluation.signal for of in ("", "truth "))]
    return _table("Response to a wetter input", head, rows)


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
    ranks = evaluation.ranks[OURS]
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
