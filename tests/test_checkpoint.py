import copy
import json
import math
import shutil
from datetime import timedelta

import pytest
import torch

from stsr_core.checkpoint import Checkpoint, Library, Measured, Teacher, with_measured, write_checkpoint
from stsr_core.downscaler import Downscaler
from stsr_core.errors import CheckpointError
from stsr_core.factors import Factor, recipe
from stsr_core.store.statistics import STATISTICS

FACTOR = Factor(space=4, time=1)
CPU = torch.device("cpu")


@pytest.fixture
def folder(checkpoints, tmp_path):
    return shutil.copytree(checkpoints, tmp_path / "c")


def test_a_library_knows_what_it_serves(library):
    assert {str(f) for f in library.family.factors} == {"(4,1)", "(4,3)", "(10,1)"}
    assert library.serving(FACTOR).card.serving(FACTOR).configuration.factor == FACTOR
    with pytest.raises(CheckpointError, match=r"No checkpoint serves \(9,9\)|No checkpoint serves \(9,6\)"):
        library.serving(Factor(space=9, time=6))


def test_changed_weights_are_refused(folder):
    path = folder / "tiny.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged or belongs to another card"):
        Library.open(folder).serving(FACTOR).weights()


def test_truncated_or_absent_weights_are_refused(folder):
    path = folder / "tiny.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        Library.open(folder).serving(FACTOR).weights()
    path.unlink()
    with pytest.raises(CheckpointError, match="no weights beside it"):
        Library.open(folder)


@pytest.mark.parametrize(
    ("change", "message"), [({"format": 3}, "format"), ({"format": 5}, "format"), ({"surprise": 1}, "surprise")]
)
def test_a_card_that_is_not_understood_is_refused(folder, change, message):
    path = folder / "tiny.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=f"no valid card: {message}"):
        Library.open(folder)


@pytest.mark.parametrize(
    ("where", "values"),
    [
        ("served.0.residual_scale", (-1, 0, math.nan, math.inf)),
        ("served.0.spread", (-1, 0, math.nan)),
        ("served.0.evaluations", (0, -3, 100_000)),
        ("served.0.teacher", ({"spread": 0.0}, {"spread": 1.0, "evaluations": 0})),
        ("served.0.configuration.beta", (0, 100, math.inf)),
        ("served.0.configuration.context_length", (0, 100_000)),
        ("served.0.configuration.conservation.threshold_mm", (-1, math.inf)),
        ("served.0.configuration.noise.beside", (math.inf,)),
        ("transform.scale_mm", (0, -1, math.nan)),
        ("architecture.mean_channels", ([], [0])),
        ("architecture.denoiser_channels", ([],)),
        ("spacings_km", ([], [0], [6])),
        ("fine_step_h", (0, -1, math.inf)),
    ],
)
def test_a_card_of_impossible_numbers_is_refused_by_the_name_of_the_field(folder, where, values):
    path = folder / "tiny.json"
    whole = json.loads(path.read_text())
    *parents, last = [int(key) if key.isdigit() else key for key in where.split(".")]
    for value in values:
        card = inner = copy.deepcopy(whole)
        for key in parents:
            inner = inner[key]
        inner[last] = value
        path.write_text(json.dumps(card))
        with pytest.raises(CheckpointError, match=f"no valid card: {where}"):
            Checkpoint.read(path)


def test_weights_that_are_not_finite_are_refused(folder):
    checkpoint = Checkpoint.read(folder / "tiny.json")
    weights = checkpoint.weights()
    name = sorted(weights)[3]
    weights[name].view(-1)[0] = math.nan
    broken = write_checkpoint(folder, checkpoint.card.model_dump(exclude={"weights_sha256"}), weights)
    with pytest.raises(CheckpointError, match=f"not finite, in {name}"):
        broken.weights()


def test_weights_of_other_shapes_than_the_card_are_refused(folder):
    path = folder / "tiny.json"
    card = json.loads(path.read_text())
    card["architecture"]["mean_channels"] = [16, 32]
    path.write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="do not fit the architecture.*mean network"):
        Downscaler.load(Library.open(folder).serving(FACTOR), FACTOR, CPU)


def test_a_factor_served_twice_is_refused(folder):
    card = json.loads((folder / "tiny.json").read_text())
    (folder / "twin.json").write_text(json.dumps({**card, "name": "twin"}))
    shutil.copy(folder / "tiny.safetensors", folder / "twin.safetensors")
    with pytest.raises(CheckpointError, match="several checkpoints"):
        Library.open(folder)


def test_what_is_measured_goes_to_the_card_by_factor_and_spacing(folder):
    here, there = Measured(scores={"crps": 0.1}), Measured(scores={"crps": 0.2}, statistics={"members": 0.6})
    before = Checkpoint.read(folder / "tiny.json")
    after = with_measured(with_measured(before, FACTOR, 4, there), FACTOR, 1, here)
    served = after.card.serving(FACTOR)
    assert served.measured_here == here
    assert served.told(4).measured_here == there
    assert served.told(2).measured_here == Measured()
    assert list(served.measured) == [1, 4]
    assert after.card.serving(Factor(space=10, time=1)).measured == {}
    assert after.weights().keys() == before.weights().keys()


def test_the_digest_is_of_card_and_weights(folder):
    path = folder / "tiny.json"
    before = Checkpoint.read(path)
    assert Checkpoint.read(path).digest == before.digest
    card = json.loads(path.read_text())
    card["served"][0]["residual_scale"] *= 2
    path.write_text(json.dumps(card))
    assert Checkpoint.read(path).digest != before.digest


def test_networks_are_told_the_nearest_spacing_that_they_were_trained_at(folder):
    card = Checkpoint.read(folder / "tiny.json").card.model_copy(update={"spacings_km": (1, 2, 4)})
    for km, told in ((0.3, 1), (1.3, 1), (1.5, 2), (2.7, 2), (3.0, 4), (9.0, 4)):
        assert card.serving(FACTOR, km).configuration.spacing_km == told


@pytest.mark.parametrize(
    ("km", "hours", "said"),
    [
        (1.0, 1, ""),
        (0.7, 1, ""),
        (5.9, 1, ""),
        (1.0, 24, "steps of 24 h, not 1 h"),
        (1.0, 0.5, "steps of 0.5 h, not 1 h"),
        (12.0, 1, "cells of 12 km, not 1 to 4 km"),
        (0.1, 3, "steps of 3 h, not 1 h; cells of 0.1 km, not 1 to 4 km"),
    ],
)
def test_a_fine_grid_unlike_those_of_training_is_told(folder, km, hours, said):
    card = Checkpoint.read(folder / "tiny.json").card.model_copy(update={"spacings_km": (1, 2, 4)})
    found = card.strange(km, timedelta(hours=hours))
    assert said in found
    assert bool(found) is bool(said)


def test_what_a_teacher_served_has_its_spread_and_evaluations_and_no_teacher(folder):
    served = Checkpoint.read(folder / "tiny.json").card.serving(FACTOR)
    student = served.model_copy(update={"spread": 0.9, "teacher": Teacher(spread=1.2, evaluations=8)})
    assert student.taught == served.model_copy(update={"spread": 1.2, "evaluations": 8})
    assert served.taught is served


def test_the_shipped_checkpoints_are_whole_and_serve_the_promised_factors():
    library = Library.open()
    assert {"(8,3)", "(10,1)", "(25,6)"} <= {str(f) for f in library.family.factors}
    for checkpoint in library.checkpoints:
        for served in checkpoint.card.served:
            Downscaler.load(checkpoint, served.configuration.factor, CPU)
            assert served.configuration == recipe(served.configuration.factor)
            for km in checkpoint.card.spacings_km:
                assert served.measured[km].scores["crps_over_linear"] < 1
                assert set(served.measured[km].statistics) <= set(STATISTICS)


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="No folder of checkpoints"):
        Library.open(tmp_path / "none")
