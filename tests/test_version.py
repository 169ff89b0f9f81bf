import shutil
import subprocess
import sys
from pathlib import Path

from stsr_core.version import code_version

ROOT = Path(__file__).parents[1]


def elsewhere(folder: Path) -> str:
    command = [sys.executable, "-P", "-c", "from stsr_core.version import code_version; print(code_version())"]
    done = subprocess.run(command, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_same_code_elsewhere_has_the_same_version_and_changed_code_another(tmp_path):
    shutil.copytree(ROOT / "stsr_core", tmp_path / "stsr_core", ignore=shutil.ignore_patterns("__pycache__"))
    assert elsewhere(tmp_path) == code_version()
    with (tmp_path / "stsr_core" / "conservation.py").open("a") as opened:
        opened.write("\n")
    changed = elsewhere(tmp_path)
    assert changed != code_version()
    assert changed.split("+")[0] == code_version().split("+")[0]
