import json
from contextlib import contextmanager

from flows import artifacts
from flows import evaluate as flow
from stsr_core.factors import Factor
from tests.evaluation.test_evaluate import write


@contextmanager
def unseen(*_):
    yield lambda *_: None


def test_the_flow_takes_a_checkpoint_and_a_seed_shows_bars_and_writes_numbers(tmp_path, checkpoints, monkeypatch):
    shown = {}
    monkeypatch.setattr(flow, "patient", lambda task, *_, **__: task.fn)
    monkeypatch.setattr(flow, "event", lambda *_, **__: None)
    monkeypatch.setattr(artifacts, "live_progress", unseen)
    monkeypatch.setattr(artifacts, "table", lambda key, rows, _: shown.update({key: rows}))
    monkeypatch.delenv("STSR_CHECKPOINTS", raising=False)
    table = flow.evaluate.fn(
        Factor(space=4, time=3), [write(tmp_path / "a.nc", hours=6, cells=16)], members=2, hours=6, cells=16,
        declare=["units: mm"], seed=5, checkpoints=checkpoints, numbers=tmp_path / "s.json",
    )  # fmt: skip
    numbers = json.loads((tmp_path / "s.json").read_text())
    assert (numbers["checkpoint"]["name"], numbers["seed"]) == ("tiny", 5)
    assert numbers["scores"]["stsr"]["crps"] == table["stsr"]["crps"]
    assert {"bar": "closure_quanta", "wanted": "0 to 0", "found": "0.000", "met": "met"} in shown["bars-4x3"]
    assert "crps" in {row["score"] for row in shown["scores-4x3"]}
