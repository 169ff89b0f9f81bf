import re

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from stsr_core.checkpoint import Library
from stsr_core.cli import app
from stsr_core.configuration import Configuration, shipped_catalog
from stsr_core.errors import SourceError
from stsr_core.inspection import inspect
from stsr_core.sources.declared import Declared
from stsr_core.sources.harmonise import read_cube
from stsr_core.sources.open import open_dataset

CATALOG = Configuration.load(shipped_catalog())
LIBRARY = Library.open()


def look(dataset, variable=None, declared=None):
    return inspect(dataset, variable, declared or Declared(), CATALOG, LIBRARY)


def test_the_shipped_sample_has_no_doubts_and_names_its_factor():
    with open_dataset("package:samples/arpege_fc1h_20180501_SE.nc") as dataset:
        found = look(dataset)
    facts = dict(found.facts)
    assert facts["steps"].startswith("24 of 1 h, 2018-05-01 00:00:00 to 2018-05-02")
    assert "53 x 80 regular cells of 0.1 x 0.1 degrees, WGS 84" in facts["grid"]
    assert "needs factor (9.44,1.00); (10,1) serves it" in facts["product"]
    assert found.doubts == []
    assert len(found.picture) == 14
    assert "No doubts" in found.text()
    assert len(found.text().splitlines()) < 40  # one screen


def test_fine_steps_that_the_networks_do_not_know_are_told():
    ((name, grid),) = CATALOG.grids.items()
    shorter = CATALOG.model_copy(update={"grids": {name: grid.model_copy(update={"fine_step_h": 1 / 3})}})
    with open_dataset("package:samples/arpege_fc1h_20180501_SE.nc") as dataset:
        texts = [inspect(dataset, None, Declared(), c, LIBRARY).text() for c in (CATALOG, shorter)]
    assert "was not trained on" not in texts[0]
    assert "(10,3) serves it" in texts[1]
    assert "was not trained on such a fine grid: steps of 0.333333 h, not 1 h." in texts[1]


@pytest.fixture
def bare():
    values = np.random.default_rng(0).gamma(0.5, 2.0, (6, 20, 30))
    values[:, :2] = -999.0
    time = np.datetime64("2001-01-01", "ns") + np.arange(6) * np.timedelta64(1, "h")
    coords = {"time": time, "y": 1e4 * np.arange(20.0), "x": 1e4 * np.arange(30.0)}
    return xr.Dataset({"rain": (("time", "y", "x"), values)}, coords)


def test_every_doubt_comes_with_the_line_that_settles_it(bare):
    found = look(bare)
    lines = [d.line for d in found.doubts]
    assert [line.split(":")[0] for line in lines] == ["time_label", "units", "missing_values", "crs"]
    import yaml

    settled = {k: v for line in lines for k, v in yaml.safe_load(line).items()}
    assert settled["crs"] == ""  # nobody can guess it: pasted as it is, it is refused
    declared = Declared(**{**settled, "missing_values": tuple(settled["missing_values"]), "crs": "EPSG:2154"})
    assert look(bare, declared=declared).doubts == []
    assert np.isnan(read_cube(bare, "rain", declared).amount).mean() == pytest.approx(0.1)


@pytest.mark.parametrize("declared", [{"units": "mm"}, {"units": "mm/h"}, {"units": "m", "accumulated": "run"}])
def test_missing_values_are_those_that_the_error_is_about_not_those_of_the_first_records(bare, declared):
    bare["rain"][:, :2] = 0.0
    if declared["units"] == "m":
        bare["rain"] = bare["rain"].cumsum("time") / 1000
    bare["rain"][5, 2:4] = -9999.0
    found = look(bare, declared=Declared(time_label="end", crs="EPSG:2154", **declared))
    assert [d.line.partition(" ")[::2] for d in found.doubts] == [
        ("missing_values:", "[-9999.0]   # if this marks missing cells")
    ]


def test_dry_cells_are_never_proposed_as_missing(bare):
    bare["rain"][:, :2] = 0.0
    bare["rain"][3, :2] = 500.0
    sums = bare["rain"].clip(0.0).cumsum("time") * (np.arange(6) != 4)[:, None, None]  # falls to 0 everywhere
    found = look(bare.assign(rain=sums), declared=Declared(units="mm", time_label="end", accumulated="run"))
    assert [d.line for d in found.doubts] == [""]
    assert "values are the same" in found.doubts[0].what


def test_the_line_for_a_doubt_keeps_what_the_file_means(bare):
    rain = bare["rain"].where(bare["rain"] >= 0)
    rate = (rain / 3600).assign_attrs(units="kg m-2 s-1", cell_methods="time: point")
    found = look(bare.assign(rain=rate), declared=Declared(time_label="end", crs="EPSG:2154"))
    assert [d.line.split(" #")[0].strip() for d in found.doubts] == ["units: kg m-2 s-1"]
    time = np.datetime64("2001-01-01T01", "ns") + np.arange(48) * np.timedelta64(1, "h")
    hourly = np.random.default_rng(0).gamma(0.5, 2.0, (2, 24, 20, 30))
    sums = (("time", "y", "x"), hourly.cumsum(axis=1).reshape(48, 20, 30), {"units": "mm"})
    days = xr.Dataset({"rain": sums}, {"time": time, "y": bare["y"], "x": bare["x"]})
    found = look(days, declared=Declared(time_label="end", crs="EPSG:2154"))
    assert [d.line.split(" #")[0].strip() for d in found.doubts] == ["accumulated: day"]


def test_stamps_of_running_sums_need_no_declaration_of_their_own(bare):
    sums = bare.assign(rain=bare["rain"].where(bare["rain"] >= 0).cumsum("time").assign_attrs(units="mm"))
    found = look(sums, declared=Declared(crs="EPSG:2154"))
    assert [d.line.split(" #")[0].strip() for d in found.doubts] == ["accumulated: run"]
    half_past = bare.assign_coords(time=bare["time"] + np.timedelta64(30, "m"))
    found = look(half_past, declared=Declared(crs="EPSG:2154", units="mm", missing_values=(-999.0,)))
    assert [d.line.split(" #")[0].strip() for d in found.doubts] == ["time_label: middle"]


def test_broken_bounds_are_settled_by_two_lines_under_one_doubt(bare):
    rain = bare.where(bare >= 0).assign_coords(time=bare["time"].values[0] + np.arange(6) * np.timedelta64(3, "h"))
    rain["rain"].attrs["units"] = "mm"
    rain["time"].attrs["bounds"] = "time_bnds"
    rain["time_bnds"] = ("time", "nv"), np.stack([rain["time"].values] * 2, axis=1)
    found = look(rain, declared=Declared(crs="EPSG:2154"))
    assert [d.line.split(" #")[0].strip() for d in found.doubts] == ["step_h: 3.0", "time_label: end"]
    assert found.text().count("have no length") == 1


def test_units_that_are_read_in_two_ways_are_proposed_in_brackets(bare):
    rain = bare.where(bare >= 0)
    rain["rain"].attrs["units"] = "mm/3h"
    found = look(rain, declared=Declared(crs="EPSG:2154", time_label="end"))
    assert [d.line.split(" #")[0].strip() for d in found.doubts] == ["units: mm (3 h)-1"]


def test_precipitation_is_known_by_its_description_where_names_say_nothing(bare):
    declared = Declared(time_label="end", crs="EPSG:2154", units="mm", missing_values=(-999.0,))
    described = bare.rename(rain="RAINNC").assign(t2=bare["rain"])
    described["RAINNC"].attrs["description"] = "ACCUMULATED TOTAL GRID SCALE PRECIPITATION"
    assert dict(look(described, declared=declared).facts)["variable"].startswith("RAINNC (")
    both = described.assign(RAINC=described["RAINNC"])
    with pytest.raises(SourceError, match=r"RAINC, RAINNC look like precipitation.*joined by \+, as 'cp \+ lsp'"):
        look(both)
    bucket = both.assign(I_RAINC=both["RAINC"].assign_attrs(units="1"))
    with pytest.raises(SourceError, match="I_RAINC, RAINC, RAINNC look like.*no total among"):
        look(bucket)
    named = bare.rename(rain="precipitation_acc")
    assert dict(look(named, declared=declared).facts)["variable"].startswith("precipitation_acc (")


def test_the_map_of_cells_has_no_gaps(bare):
    lon, lat = np.meshgrid(4 + 0.1 * np.arange(30), 43 + 0.1 * np.arange(20))
    places = {"lat": (("y", "x"), lat, {"units": "degrees_north"}), "lon": (("y", "x"), lon, {"units": "degrees_east"})}
    curved = bare.drop_vars(("y", "x")).assign_coords(places)
    found = look(curved, declared=Declared(time_label="end", units="mm", missing_values=(-999.0,)))
    rows = [row.rstrip() for row in found.picture]
    assert len(rows) > 5
    assert not any(" " in row for row in rows)


def test_what_no_declaration_mends_is_said_to_be_refused(bare):
    bare["rain"] = bare["rain"].where(bare["rain"] > 0, -200.0 * np.arange(1, 21)[:, None])
    found = look(bare, declared=Declared(time_label="end", units="mm"))
    assert found.doubts[-1].what.startswith("It would be refused: Negative precipitation")
    assert found.doubts[-1].line == ""
    with pytest.raises(SourceError, match="No variable 'snow'"):
        look(bare, "snow")
    with pytest.raises(SourceError, match="None of the variables looks like precipitation; there are t"):
        look(bare.rename(rain="t"))


def test_the_command_prints_one_screen():
    sample = str(shipped_catalog().parent / "stsr_core" / "samples" / "arpege_fc1h_20180501_SE.nc")
    done = CliRunner().invoke(app, ["inspect", sample])
    assert done.exit_code == 0, done.output
    assert re.search(r"product +arpege-provence-1km: needs factor", done.output)
    assert len(done.output.splitlines()) < 40
