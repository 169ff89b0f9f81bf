"""What holds of the project as a whole: code style, types, and files that name each other."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_the_code_is_clean(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_deployments_name_flows_and_parameters_that_exist():
    declared = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
    products = yaml.safe_load((ROOT / "catalog.yaml").read_text())["products"]
    for deployment in declared["deployments"]:
        path, name = deployment["entrypoint"].split(":")
        flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
        assert set(deployment["parameters"]) <= set(inspect.signature(flow.fn).parameters)
        assert deployment["parameters"].get("product", "all") in {"all", *products}


def test_the_container_copies_what_exists():
    text = (ROOT / "infra" / "Containerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name


def test_the_readme_names_files_and_commands_that_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    for marker in ("main-job", "tests"):
        assert re.search(rf"<!-- {marker} -->\n```sh\npython3 .+\n```", text)
