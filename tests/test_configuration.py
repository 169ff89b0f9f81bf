from pathlib import Path

import pytest

from stsr_core.configuration import Configuration, Declarations, shipped_catalog
from stsr_core.errors import ConfigurationError


def changed(tmp_path: Path, old: str, new: str) -> Path:
    path = tmp_path / "catalog.yaml"
    text = shipped_catalog().read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def test_the_shipped_catalogue_is_valid():
    configuration = Configuration.load(shipped_catalog())
    assert configuration.product("arpege-provence-1km").members == 8


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("members: 8", "memebrs: 8", "products.arpege-provence-1km.memebrs"),
        ("members: 8", "members: 0", "products.arpege-provence-1km.members.*greater than or equal to 1"),
        ("max_mm: 300.0", "max_mm: .inf", "gates.max_mm: .*finite number"),
        ("detail: [0.5, 2.0]", "detail: [0.5, .inf]", "like_card.detail.1: .*finite number"),
        ("missing_values: [65535]", "missing_values: [.nan]", "missing_values.0: .*finite number"),
        ("source: arpege-se-france", "source: arpege", "names source 'arpege'"),
        ("x_max: 1100000.0", "x_max: 1100000.5", "no whole number of cells"),
        ("crs: EPSG:2154", "crs: EPSG:999999", "grids.*crs: .*'EPSG:999999' is no CRS that is known; name a projected"),
        ("crs: EPSG:2154", "crs: EPSG:4326", "'EPSG:4326' is not projected; name a projected CRS in metres"),
        ("crs: EPSG:2154", "crs: EPSG:2263", "'EPSG:2263' is in units of US survey foot; name a CRS in metres"),
        ("crs: EPSG:2154", "crs: +proj=laea +units=km", "is in units of kilometre; name a CRS in metres"),
        ("sources:", "sources: [", "no valid YAML"),
        ("  arpege-provence-1km:", "  Provence:", "products.Provence.*should match pattern"),
        ("  arpege-provence-1km:", "  arpege.1km:", "products.arpege.1km.*should match pattern"),
        ("  arpege-provence-1km:", "  provence 1km:", "products.provence 1km.*should match pattern"),
        ("  arpege-provence-1km:", "  ../escaped:", r"products.../escaped.*should match pattern"),
        ("  arpege-provence-1km:", "  all:", "'all' means every product; name the product otherwise"),
        ("  arpege-provence-1km:", "  checkpoints:", "'checkpoints' is the folder of checkpoints"),
        ("license: etalab-2.0", 'license: ""', "sources.arpege-se-france.license: .*at least 1"),
        ("attribution: METEO FRANCE", 'attribution: "" #', "sources.arpege-se-france.attribution: .*at least 1"),
    ],
)
def test_a_mistake_is_named(tmp_path, old, new, message):
    with pytest.raises(ConfigurationError, match=message):
        Configuration.load(changed(tmp_path, old, new))


def test_a_missing_file_and_product_are_named(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Configuration.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigurationError, match="No product 'x'.*arpege-provence-1km"):
        Configuration.load(shipped_catalog()).product("x")


def test_a_catalogue_that_is_not_utf_8_is_refused_by_its_line(tmp_path):
    path = tmp_path / "catalog.yaml"
    path.write_bytes("sources: {}\n# Météo-France\n".encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"catalog.yaml is not UTF-8 \(line 2: .*Save it in UTF-8"):
        Configuration.load(path)


def test_declarations_are_lines_of_the_catalogue():
    found = Declarations.of(["units: mm/h", "select: {number: 0, scenario: ssp585}", "missing_values: [-9999]"])
    assert found.declared.units == "mm/h"
    assert found.declared.select == {"number": 0, "scenario": "ssp585"}
    assert found.declared.missing_values == (-9999.0,)


def test_dates_stay_as_they_are_written():
    found = Declarations.of(["period: [2001-01-01, 2001-02-01 06:00:00+02:00]", "select: {time: [2001-01-01, 3]}"])
    assert found.declared.period == ("2001-01-01", "2001-02-01 06:00:00+02:00")
    assert found.declared.select == {"time": ("2001-01-01", 3)}


def test_numbers_and_dates_are_read_as_people_write_them():
    found = Declarations.of(["missing_values: [1e20, 1e+20, -9.9e9, 7]", "max_negative_mm: 1e-2", "step_h: 3"])
    assert found.missing_values == (1e20, 1e20, -9.9e9, 7.0)
    assert (found.max_negative_mm, found.step_h) == (0.01, 3.0)
    assert Declarations.of(["period: [2000-02-26, 2000-02-30]"]).period == ("2000-02-26", "2000-02-30")  # of 360 days


def test_lines_that_select_add_up():
    found = Declarations.of(["select: {model: a}", "select: {scenario: ssp585}"])
    assert found.select == {"model": "a", "scenario": "ssp585"}


def test_a_catalogue_that_names_something_twice_is_refused(tmp_path):
    path = tmp_path / "catalog.yaml"
    path.write_text("sources: {}\ngrids: {}\nsources: {}\n")
    with pytest.raises(ConfigurationError, match="'sources' is there twice"):
        Configuration.load(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("time_label: end", "time_label is declared twice, and otherwise"),
        ("units", "no declaration"),
        ("unit: mm", "unit: .*There are units"),
        ("step_h: -1", "step_h"),
        ("a: [", "no YAML"),
    ],
)
def test_what_is_no_declaration_is_refused(line, message):
    with pytest.raises(ConfigurationError, match=message):
        Declarations.of(["time_label: start", line])
