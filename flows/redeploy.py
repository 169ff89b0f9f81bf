"""The redeploy flow: another git reference or image of this code is checked, shown and put to work."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_client, task
from prefect.cache_policies import NO_CACHE
from prefect.deployments import run_deployment
from prefect.states import Cancelling
from pydantic import Field

from flows import artifacts
from flows.declared import Declared, shipped_declaration
from flows.deploy import Release, deploy, deployed
from flows.log import event
from flows.parameters import ALL, ProductName, SmokeMembers
from stsr_core.errors import OperatorError
from stsr_core.settings import Settings

Reference = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]{0,299}$")]
SMOKE_S = 3600  # seconds that a smoke run may take
CHECK_S = 900
GIT_S = 600
SLACK_S = 60  # seconds that a task has beyond its commands, whose own errors say more
BEGUN = "clone-"  # begins names of folders that are not whole yet
IMPORTS = """
import importlib, stsr_core
from flows.declared import Declared, shipped_declaration
for deployment in Declared.load(shipped_declaration()).deployments:
    importlib.import_module(deployment.module)
print(stsr_core.__file__)
"""
SHOWN = 6000  # characters of an output that artifacts show
RUN = ("PREFECT__",)  # beginnings of the variables that are this run's own,
SERVER = ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILES_PATH")  # that lead to its server,
SETTINGS = ("STSR_",)  # and that are an operator's, which need not fit the shipped sample


class RedeployError(OperatorError):
    """Code that must not be put to work; what was deployed before still is."""


@dataclass(frozen=True)
class Fetched:
    """Code of a reference in a folder of its own."""

    reference: str
    commit: str
    folder: Path


@flow(name="redeploy", flow_run_name="redeploy {reference}", validate_parameters=True)
def redeploy(
    reference: Reference,
    dry_run: bool = False,
    products: ProductName = ALL,
    smoke_members: SmokeMembers = 2,
) -> Release | None:
    """Check a git reference or an image and deploy it. To roll back, give an earlier one.

    The code is fetched into a folder of its own, or its image started, and must import, pass `stsr doctor` and
    publish the shipped sample. If that fails nothing changes; if registering fails, what was deployed before is
    registered again.

    Args:
        reference: branch, tag or commit of the repository in the settings; where runs are containers, an image, or a
            tag of the image that is deployed.
        dry_run: check and show the difference, but deploy nothing.
        products: product whose source the new code must read and match, or "all".
        smoke_members: members of the smoke run.

    Returns:
        What is deployed now, None after a dry run.
    """
    before = asyncio.run(deployed())
    if before is not None and before.image is not None:
        new = _try_image(before, image_of(reference, before.image), products, smoke_members, dry_run=dry_run)
    else:
        new = _try_reference(before, reference, products, smoke_members, dry_run=dry_run)
    if dry_run:
        event("dry_run_passed", reference=new.reference)
        return None
    return new


def _try_reference(before: Release | None, reference: str, products: str, members: int, *, dry_run: bool) -> Release:
    settings = Settings()
    new = fetch.with_options(task_run_name=f"fetch {reference}")(reference, settings.repository, settings.releases)
    home = Path(before.home) if before and before.home else Path.cwd()
    release = Release(reference=f"{reference} ({new.commit[:12]})", code=str(new.folder), home=str(home))
    artifacts.page("redeploy", difference(before, new), f"What changes with {reference}")
    check_imports.with_options(task_run_name=f"import {reference}")(new.folder)
    examine.with_options(task_run_name=f"doctor of {reference}")(new.folder, home, products)
    smoke_run.with_options(task_run_name=f"smoke run of {reference}")(new.folder, members)
    if not dry_run:
        try:
            register.with_options(task_run_name=f"register {reference}")(release)
        except Exception:  # whatever it is, half of it may be registered
            if before is not None:
                register.with_options(task_run_name=f"roll back to {before.reference}")(before)
            raise
    return release


def _try_image(before: Release, image: str, products: str, members: int, *, dry_run: bool) -> Release:
    release = Release(reference=image, image=image, infrastructure=before.infrastructure)
    artifacts.page("redeploy", f"From image **{before.image}** to **{image}**", f"What changes with {image}")
    asked = {"products": products, "smoke_members": members}
    run_in_image.with_options(task_run_name=f"check {image}")(image, asked)
    if not dry_run:
        try:
            run_in_image.with_options(task_run_name=f"register {image}")(
                image, {"release": release.model_dump(mode="json")}
            )
        except Exception:  # likewise
            register_again.with_options(task_run_name=f"roll back to {before.reference}")(before)
            raise
    return release


def image_of(reference: str, deployed: str) -> str:
    """Image that a reference names: itself, or what is deployed with another tag."""
    if any(c in reference for c in "/:@"):
        return reference
    path, _, name = deployed.partition("@")[0].rpartition("/")
    return "/".join(part for part in (path, f"{name.partition(':')[0]}:{reference}") if part)


@task(name="run in image", cache_policy=NO_CACHE)
def run_in_image(image: str, parameters: dict[str, Any]) -> None:
    """Run the flow `check` in an image, by the code in it."""
    run: Any = run_deployment(
        "check/check", parameters=parameters, job_variables={"image": image}, timeout=SMOKE_S, poll_interval=2
    )
    found = f"{run.state.name}: {run.state.message}" if run.state else "no state"
    if run.state is None or not run.state.is_final():
        with get_client(sync_client=True) as client:  # else it may register the image when nobody expects it any more
            client.set_flow_run_state(run.id, Cancelling())
        raise RedeployError(
            f"Run {run.name} in {image} was not over after {SMOKE_S} s ({found}), so it is cancelled. Check that a "
            "worker serves its pool and can pull the image."
        )
    if not run.state.is_completed():
        raise RedeployError(f"Run {run.name} in {image} ended as {found}. Mend it there; see its log.")


@task(name="register again", cache_policy=NO_CACHE, timeout_seconds=CHECK_S)
def register_again(before: Release) -> None:
    """Register what was deployed before: this very code."""
    asyncio.run(deploy(Declared.load(shipped_declaration()), before))


@task(name="fetch", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=5, timeout_seconds=CHECK_S)
def fetch(reference: str, repository: str, releases: Path) -> Fetched:
    """Fetch a reference into a folder named after its commit; there already, it is used again."""
    releases = releases.resolve()
    releases.mkdir(parents=True, exist_ok=True)
    mirror = releases / "repository.git"
    with _alone(releases):
        if not _is_mirror(mirror):
            with _beside(mirror) as new:
                _git("clone", "--quiet", "--mirror", repository, str(new))
        mirror.chmod(0o700)  # its address may hold a token
        _git("-C", str(mirror), "remote", "set-url", "origin", repository)
        _git("-C", str(mirror), "fetch", "--quiet", "--prune", "origin")
        commit = _git("-C", str(mirror), "rev-parse", "--verify", "--end-of-options", f"{reference}^{{commit}}").strip()
        folder = releases / commit[:12]
        if not (folder / ".git").exists():
            with _beside(folder) as new:
                _git("clone", "--quiet", "--no-checkout", str(mirror), str(new))
                _git("-C", str(new), "checkout", "--quiet", "--detach", commit)
    changed = _git("-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    if changed:
        raise RedeployError(f"{folder} was changed by hand ({changed.split()[1]}). Remove it; it is fetched again.")
    return Fetched(reference, commit, folder)


@contextmanager
def _alone(releases: Path) -> Iterator[None]:
    """Be the only run that fetches there, and remove what one that was killed began."""
    with (releases / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for begun in releases.glob(f"{BEGUN}*"):
            shutil.rmtree(begun, ignore_errors=True)
        yield


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Make a folder beside and rename it, so that the target is whole once it is there."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=BEGUN) as folder:
        new = Path(folder) / target.name
        yield new
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)


def _is_mirror(folder: Path) -> bool:
    """Whether a folder has a remote to fetch from; what a killed clone leaves has none."""
    return "origin" in _run_git("--git-dir", str(folder), "remote").stdout.split()


@task(name="imports", cache_policy=NO_CACHE, timeout_seconds=CHECK_S + SLACK_S)
def check_imports(folder: Path) -> None:
    """Import every flow that the new code declares, and make sure that it is the new code."""
    found = _python(folder, "-c", IMPORTS, limit_s=CHECK_S)
    if not Path(found.strip().splitlines()[-1]).is_relative_to(folder):
        raise RedeployError(f"stsr_core was imported from {found.strip()}, not from {folder}. Check PYTHONPATH.")


@task(name="doctor", cache_policy=NO_CACHE, timeout_seconds=CHECK_S + SLACK_S)
def examine(folder: Path, home: Path, product: str) -> None:
    """Run the new code's `stsr doctor` where runs take place."""
    found = _stsr(folder, "doctor", "--product", product, cwd=home, limit_s=CHECK_S)
    artifacts.page("redeploy-doctor", f"```\n{found}\n```", "stsr doctor of the new code")


@task(name="smoke run", cache_policy=NO_CACHE, timeout_seconds=SMOKE_S + CHECK_S + SLACK_S)
def smoke_run(folder: Path, members: int) -> None:
    """Publish the shipped sample with the new code in a folder that is thrown away, whatever the settings are here."""
    with tempfile.TemporaryDirectory(prefix="stsr-smoke-") as temporary:
        home, without, catalogue = Path(temporary), RUN + SERVER + SETTINGS, str(Path(temporary, "catalogue"))
        demo = ("demo", "--to", catalogue, "--members", str(members), "--workers", "1")
        _stsr(folder, *demo, limit_s=SMOKE_S, cwd=home, without=without)
        found = _stsr(folder, "catalog", "ls", "--catalog", catalogue, limit_s=CHECK_S, cwd=home, without=without)
    event("smoke_run_passed", published=found.strip())


@task(name="register", cache_policy=NO_CACHE, timeout_seconds=CHECK_S + SLACK_S)
def register(release: Release) -> None:
    """Register the deployments of a release, by its own code."""
    event("registered", reference=release.reference, changes=register_by_its_code(release))


def register_by_its_code(release: Release, *options: str) -> str:
    """Run `stsr deploy` of a release's own code, and return what it prints.

    Raises:
        RedeployError: it fails; the message ends with what it said.
    """
    assert release.code is not None
    assert release.home is not None
    return _stsr(
        Path(release.code), "deploy", "--code", release.code, "--home", release.home,
        "--reference", release.reference, *options, cwd=Path(release.home), limit_s=CHECK_S, without=RUN,
    ).strip()  # fmt: skip


def difference(before: Release | None, new: Fetched) -> str:
    """Commits, files and requirements between what is deployed and what is to be, as Markdown."""
    mirror = new.folder.parent / "repository.git"
    old = _commit_of(before)
    header = f"From **{before.reference if before else 'nothing'}** to **{new.reference}** (`{new.commit[:12]}`)"
    if old is None or not _knows(mirror, old):
        return f"{header}\n\nThe code before is no commit of the repository, so there is nothing to compare."
    span = f"{old}..{new.commit}"
    log = _git("-C", str(mirror), "log", "--oneline", "--no-decorate", span) or "none"
    dropped = _git("-C", str(mirror), "log", "--oneline", "--no-decorate", f"{new.commit}..{old}")
    files = _git("-C", str(mirror), "diff", "--stat", old, new.commit) or "none"
    needs = _git("-C", str(mirror), "diff", "--unified=0", old, new.commit, "--", "pyproject.toml")
    parts = {"Commits that come": log, "Commits that go": dropped, "Files": files, "Requirements": needs}
    return "\n\n".join([header, *(f"### {t}\n```\n{text[:SHOWN]}\n```" for t, text in parts.items() if text)])


def _commit_of(release: Release | None) -> str | None:
    if release is None or release.code is None or not (Path(release.code) / ".git").exists():
        return None
    return _git("-C", release.code, "rev-parse", "HEAD").strip()


def _knows(mirror: Path, commit: str) -> bool:
    return _run_git("-C", str(mirror), "cat-file", "-e", f"{commit}^{{commit}}").returncode == 0


def _git(*arguments: str) -> str:
    done = _run_git(*arguments)
    if done.returncode:
        raise RedeployError(
            f"git {_subcommand(arguments)} failed: {done.stderr.strip()[-500:]}. Check the reference, and "
            "STSR_REPOSITORY."
        )
    return done.stdout


def _run_git(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in a session without a terminal, where neither it nor ssh waits for a password."""
    try:
        return subprocess.run(
            ["git", *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=GIT_S,
            start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RedeployError(
            f"git {_subcommand(arguments)} took longer than {GIT_S} s. Check that STSR_REPOSITORY answers."
        ) from None  # the command may hold a password


def _subcommand(arguments: Sequence[str]) -> str:
    return arguments[2 if arguments[0] in ("-C", "--git-dir") else 0]


def _stsr(
    folder: Path, *arguments: str, limit_s: float, cwd: Path | None = None, without: tuple[str, ...] = RUN + SERVER
) -> str:
    return _python(folder, "-m", "stsr_core.cli", *arguments, limit_s=limit_s, cwd=cwd, without=without)


def _python(
    folder: Path, *arguments: str, limit_s: float, cwd: Path | None = None, without: tuple[str, ...] = RUN + SERVER
) -> str:
    """Run Python with the code of a folder and nothing else of ours; returns what it prints."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", *arguments],
            cwd=cwd or folder, env=_environment(folder, without), capture_output=True, text=True, check=False,
            timeout=limit_s,
        )  # fmt: skip
    except subprocess.TimeoutExpired as e:
        raise RedeployError(f"`{' '.join(arguments)[:100]}` took longer than {limit_s:.0f} s. Nothing changed.") from e
    if done.returncode:
        shown = (done.stdout + done.stderr).strip()[-2000:]
        raise RedeployError(f"`{' '.join(arguments)[:100]}` failed in {folder}:\n{shown}\nMend it there.")
    return done.stdout


def _environment(folder: Path, without: tuple[str, ...]) -> Mapping[str, str]:
    """This process's environment with other code, and without variables that begin so."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(without)}
    return {**kept, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
