"""What holds of the project as a whole: code style, types, and files that name each other."""

import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from stsr_core.cli import app

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
    for folder in (ROOT, ROOT / "stsr_core" / "checkpoints"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", (folder / "README.md").read_text()):
            assert (folder / target).exists(), target
    text = (ROOT / "README.md").read_text()
    for marker in ("main-job", "tests"):
        assert re.search(rf"<!-- {marker} -->\n```sh\npython3 .+\n```", text)


def test_options_in_the_readme_are_those_of_the_commands():
    root = typer.main.get_command(app)
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        for line in block.splitlines()
    ]
    checked = []
    for line in lines:
        words = shlex.split(line, comments=True)
        at = next((i for i, word in enumerate(words) if word.endswith("stsr") or word == "stsr_core.cli"), None)
        if at is None:
            continue
        command, names = root, words[at + 1 :]
        while commands := getattr(command, "commands", None):
            command, names = commands[names[0]], names[1:]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in names if word.startswith("--")} <= known, line
        checked.append(words[at + 1])
    assert set(checked) == {"demo", "inspect", "downscale", "catalog", "train", "evaluate", "up"}


def test_scores_in_the_readme_are_those_of_the_card():
    """Each row of its table, as far as the card has the scores: the card holds no intervals."""
    served = {
        (each["configuration"]["factor"]["space"], each["configuration"]["factor"]["time"]): each["measured"]["1"]
        for each in json.loads((ROOT / "stsr_core" / "checkpoints" / "small.json").read_text())["served"]
    }
    rows = re.findall(r"^\| \((\d+),(\d+)\) \|(.+)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {(int(s), int(t)) for s, t, _ in rows} == set(served)
    names = [
        *("crps_over_linear", "crps_over_rainfarm", "spread_skill"),
        *("quantile_ratio_0.99", "quantile_ratio_0.999", "wet_fraction_ratio", "hourly_change_ratio"),
    ]
    for s, t, row in rows:
        cells = [cell for i, cell in enumerate(row.split("|")) if i != 2]  # over smoothed RainFARM, of later scoring
        shown = re.findall(r"\d\.\d\d", re.sub(r"\(.*?\)", "", "|".join(cells)))
        scores = served[int(s), int(t)]["scores"]
        assert [float(text) for text in shown[: len(names)]] == [
            pytest.approx(scores[name], abs=0.00501) for name in names
        ], (s, t)
