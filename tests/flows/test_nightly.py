"""The nightly flow against a real, temporary Prefect server."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pystac
import pytest
import xarray as xr
from typer.testing import CliRunner

from stsr_core.catalog.documents import Documents
from stsr_core.catalog.server import make_app
from stsr_core.catalog.snapshot import Loaded
from stsr_core.cli import app
from tests.real.listening import listening

NOWHERE = "127.0.0.1:9"
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SCRIPT = """
import sys
from pathlib import Path
from flows.embedded import run_embedded
from stsr_core.settings import Settings
for force in (False, False, True):
    settings = Settings(device="cpu", workers=1)
    print("RESULT", run_embedded(Path(sys.argv[1]), force=force, members=2, settings=settings))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory, checkpoints):
    """Three nightly runs with tiny networks: new data, nothing new, forced; beside an operator's settings."""
    root, folder, here = Path(__file__).parents[2], tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("operator")
    relative = os.path.relpath(checkpoints, here)
    lines = (
        f"STSR_CHECKPOINTS={relative}",
        f"STSR_SCHEDULER_ADDRESS={NOWHERE}",
        f"PREFECT_API_URL=http://{NOWHERE}/api",
    )
    (here / ".env").write_text("\n".join(lines))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)} | {
        "STSR_MAX_DEVICE_HOURS": "1e-12",
        "PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{NOWHERE}/prefect",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        capture_output=True, text=True, env=environment, check=False, cwd=here,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [line for line in done.stdout.splitlines() if line.startswith("RESULT")], done


def test_new_data_is_published_old_is_not_and_force_makes_version_2(published):
    _, results, done = published
    assert "version='v1'" in results[0]
    assert results[1] == "RESULT None"
    assert "version='v2'" in results[2]
    log = done.stdout + done.stderr
    assert re.search(
        r" new_source product=arpege-provence-1km run=[0-9a-f-]{36} source=package:\S+ fingerprint=\w+\n", log
    )
    assert re.search(r" published product=arpege-provence-1km run=\S+ version=v1 item=\S+/v1.json\n", log)
    assert re.search(r" nothing_new product=arpege-provence-1km run=\S+ source=\S+ version=v1\n", log)
    made = re.findall(r" shard_made product=arpege-provence-1km run=\S+ shard=(\S+) evaluations=", log)
    assert made == 2 * ["m0-t0-y0-x0"]


def test_the_published_versions_are_valid_linked_and_open(published):
    folder, _, _ = published
    catalog = pystac.Catalog.from_file(str(folder / "catalog.json"))
    items = {i.properties["version"]: i for i in catalog.get_items(recursive=True)}
    assert set(items) == {"v1", "v2"}
    assert items["v2"].get_single_link("predecessor-version") is not None
    item = items["v2"]
    assert item.properties["stsr:factor"] == [10, 1]
    assert item.properties["stsr:spacing_km"] == 1
    assert item.properties["stsr:noise"] == {"beside": 0.0, "before": 0.0}
    assert all(gate["passed"] for gate in item.properties["stsr:gates"])
    data = xr.open_zarr(item.assets["ensemble"].get_absolute_href())
    assert dict(data.sizes) == {"member": 2, "time": 24, "y": 250, "x": 250, "nv": 2}
    assert Path(item.assets["quicklook"].get_absolute_href()).read_bytes().startswith(b"\x89PNG")


def test_the_same_source_and_seed_give_the_same_version_again(published):
    folder, _, _ = published
    catalog = pystac.Catalog.from_file(str(folder / "catalog.json"))
    first, second = (
        xr.open_zarr(i.assets["ensemble"].get_absolute_href())["precipitation"].values
        for i in catalog.get_items(recursive=True)
    )
    assert (first == second).all()


def blocks(start, end):
    """Code blocks of the README between two of its lines, as (language, text)."""
    section = README[README.index(start) : README.index(end)]
    return re.findall(r"```(\w*)\n(.*?)```", section, flags=re.DOTALL)


@pytest.fixture
def demo(published, tmp_path, monkeypatch):
    """A copy of the catalogue where the README's code looks for it."""
    shutil.copytree(published[0], tmp_path / "stsr-demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "stsr-demo"


def told(text):
    """Output as the README shows it for its version 1 of 8 members; here version 2 of 2 members is the newest."""
    newest = "".join(line for line in text.splitlines(keepends=True) if "-v1 " not in line)
    return newest.replace("-v2 {'member': 2,", "-v1 {'member': 8,").replace("-v2 2604 2", "-v1 2604 8")


@pytest.mark.filterwarnings("default")
def test_the_readers_code_of_the_readme_runs_and_prints_what_it_shows(demo):
    [first] = [text for language, text in blocks("**Run the main job.**", "**Run the tests.**") if language == "python"]
    pieces = blocks("## Reading what is published", "## What is served")
    assert [language for language, _ in pieces] == ["python", "", "python", "", "sh"]
    names: dict[str, object] = {}  # as in one session: later pieces use what earlier ones import
    with listening(make_app(Loaded(Documents(str(demo))))) as url:
        for code, shown in ((first, None), *((pieces[i][1], pieces[i + 1][1]) for i in (0, 2))):
            out = io.StringIO()
            here = code.replace("http://127.0.0.1:8080", url).replace('"stsr:members" >= 8', '"stsr:members" >= 2')
            with contextlib.redirect_stdout(out):
                exec(compile(here, "README.md", "exec"), names)
            assert shown is None or told(out.getvalue()) == shown


def test_the_readers_commands_of_the_readme_run(demo, tmp_path):
    commands = blocks("## Reading what is published", "## What is served")[-1][1]
    values = {"CATALOG": str(demo), "PRODUCT": "arpege-provence-1km", "VERSION": "v1", "FOLDER": str(tmp_path / "to")}
    done = []
    for line in commands.replace(">= 8", ">= 2").splitlines():
        _, *words = shlex.split(line, comments=True)
        result = CliRunner().invoke(app, [values.get(word, word) for word in words])
        assert result.exit_code == 0, f"{line}: {result.output}"
        done.append(words[1])
    assert done == ["ls", "search", "verify", "cite", "withdraw", "export"]
