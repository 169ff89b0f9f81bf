"""What makes a version stale besides a new source, read off its item."""

import json

import pytest

from stsr_core.catalog.changes import changes
from stsr_core.checkpoint import Library
from stsr_core.configuration import Static
from stsr_core.errors import FactorError
from stsr_core.factors import Factor
from tests.catalog.made import ENTRIES
from tests.conftest import random_checkpoint

STATIC = Static(url="z.nc", variable="z", description="", license="CC0", attribution="")


@pytest.fixture
def properties(library):
    """Properties of an item as it lies in a catalogue, made with one static field."""
    entries = ENTRIES.model_copy(update={"statics": {"orography": STATIC}})
    return {
        "stsr:configuration": json.loads(entries.model_dump_json()),
        "stsr:requested_factor": [9.4, 1.0],
        "stsr:factor": [10, 1],
        "stsr:checkpoint_digest": library.serving(Factor(space=10, time=1)).digest,
        "stsr:statics": {"orography": "f" * 64},
    }


def found(properties, library, part=None, prints="f" * 64, **update):
    """Changes where one part of the entries is updated."""
    now = ENTRIES.model_copy(update={"statics": {"orography": STATIC}})
    if part is not None:
        now = now.model_copy(update={part: getattr(now, part).model_copy(update=update)})
    return changes(properties, now, {"orography": prints}, library, 1.5)


@pytest.mark.parametrize(
    ("part", "update", "expected"),
    [
        (None, {}, []),
        ("product", {"title": "Other", "keywords": ("a",)}, []),
        ("source", {"url": "s3://elsewhere/in.nc", "description": "Same data"}, []),
        ("product", {"members": 4}, ["product.members"]),
        ("product", {"seed": 2, "conserve": False}, ["product.seed", "product.conserve"]),
        ("source", {"units": "mm/day"}, ["source.units"]),
        ("source", {"select": {"number": 1}}, ["source.select"]),
        ("grid", {"x_max": 858_000.0}, ["grid.x_max"]),
    ],
)
def test_what_determines_the_bytes_is_compared_and_nothing_else(properties, library, part, update, expected):
    assert found(properties, library, part, **update) == expected


def test_other_static_fields_are_a_change(properties, library):
    assert found(properties, library, prints="e" * 64) == ["static orography"]
    assert changes(properties, ENTRIES, {}, library, 1.5) == ["static orography"]


def test_another_checkpoint_or_a_nearer_factor_is_a_change(properties, library, tmp_path):
    random_checkpoint(tmp_path, [(10, 1), (9, 1)])
    assert found(properties, Library.open(tmp_path)) == ["checkpoint"]
    other = Library.open(tmp_path)
    properties["stsr:checkpoint_digest"] = other.serving(Factor(space=9, time=1)).digest
    assert found(properties, other) == ["factor"]


def test_a_product_that_is_no_longer_served_is_an_error(properties, tmp_path):
    random_checkpoint(tmp_path, [(2, 1)])
    with pytest.raises(FactorError, match=r"nearest that is served is \(2,1\)"):
        found(properties, Library.open(tmp_path))


def test_an_item_that_does_not_say_how_it_was_made_counts_as_changed(properties, library):
    del properties["stsr:configuration"]["grid"]
    assert found(properties, library) == ["configuration"]
