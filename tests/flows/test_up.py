"""`stsr up` ends what it started; the processes here stand in for servers that do not want to end."""

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.up import _environment

ROOT = Path(__file__).parents[2]
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
UP = f"""
import subprocess, sys
from pathlib import Path
from flows.up import Child, _interrupt, _on_end, stop, wait_for_end

def stubborn():
    process = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    return process

with _on_end(_interrupt):
    children = [Child(name, stubborn(), Path("log")) for name in ("server", "worker")]
    try:
        print("up", flush=True)
        wait_for_end(children)
    except KeyboardInterrupt:
        pass  # it came before the wait began
    finally:
        print("stopping", flush=True)
        stop(children)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_kills_at_once_and_leaves_no_process(number):
    up = subprocess.Popen([sys.executable, "-c", UP], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert up.stdout.readline() == "up\n"
    family = psutil.Process(up.pid).children()
    assert len(family) == 2
    up.send_signal(number)
    assert up.stdout.readline() == "stopping\n"
    began = time.monotonic()
    time.sleep(1)
    assert all(p.is_running() for p in family)  # the first signal waits for them
    up.send_signal(number)
    assert up.wait(15) == 0
    assert time.monotonic() - began < 15
    assert not [p for p in family if p.is_running()]
    up.stdout.close()


def test_files_and_folders_of_the_settings_are_those_of_where_it_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "up"
    folder.mkdir()

    def start():
        found = _environment(folder, 4200, "catalogue", None, 8333)
        return found, [line for line in (folder / ".env").read_text().splitlines() if "CATALOG_FILE" in line]

    assert start()[1] == []
    (tmp_path / "catalog.yaml").touch()
    monkeypatch.setenv("STSR_CATALOG_FILE", "other.yaml")
    monkeypatch.setenv("STSR_CHECKPOINTS", "mine")
    monkeypatch.setenv("STSR_RELEASES", "~/releases")
    found, lines = start()
    assert [found[f"STSR_{name}"] for name in ("CATALOG_FILE", "CHECKPOINTS", "RELEASES")] == [
        f"{tmp_path}/other.yaml", f"{tmp_path}/mine", str(Path("~/releases").expanduser()),
    ]  # fmt: skip
    assert lines == []
    monkeypatch.delenv("STSR_CATALOG_FILE")
    for _ in range(2):
        assert start()[1] == [f"STSR_CATALOG_FILE={tmp_path}/catalog.yaml"]
    (folder / ".env").unlink()
    (folder / "catalog.yaml").touch()
    assert start()[1] == []


def test_what_an_operator_added_to_the_settings_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def start(port):
        _environment(tmp_path, 4200, "s3://stsr/catalogue", ("K", "S"), port)
        return (tmp_path / ".env").read_text()

    written = start(8333)
    added = "# mine\nSTSR_CATALOG_FILE=/srv/catalog.yaml\n\nexport STSR_MAX_DEVICE_HOURS=2"
    (tmp_path / ".env").write_text(f"{written}{added}")
    assert start(8334) == written.replace("8333", "8334") + added + "\n"
    assert start(8333) == f"{written}{added}\n"
    (tmp_path / ".env").write_text(f"export STSR_DESTINATION=elsewhere\n{added}\n")  # `up` decides where it publishes
    assert start(8333) == f"{written}{added}\n"
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600


def test_settings_that_others_could_read_are_closed_and_outlast_a_full_disk(tmp_path, monkeypatch):
    (tmp_path / ".env").write_text("STSR_WORKERS=2\n")
    (tmp_path / ".env").chmod(0o644)
    _environment(tmp_path, 4200, "s3://stsr/catalogue", ("K", "S"), 8333)
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    written = (tmp_path / ".env").read_text()
    assert "STSR_WORKERS=2" in written

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Path, "write_text", full)
        _environment(tmp_path, 4201, "s3://stsr/catalogue", ("K", "S"), 8334)
    assert (tmp_path / ".env").read_text() == written
