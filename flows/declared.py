"""deployments/prefect.yaml: what a server is to hold, read strictly."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stsr_core.errors import ConfigurationError

MARK = "stsr"  # tag and prefix of what belongs to stsr on a server


class InfrastructureName(StrEnum):
    """Where runs take place."""

    process = "process"
    docker = "docker"
    kubernetes = "kubernetes"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Infrastructure(_Strict):
    """A work pool, variables of the jobs in it, and what replaces parts of Prefect's configuration of a job."""

    work_pool: str = Field(pattern=f"^{MARK}")
    type: InfrastructureName
    job_variables: dict[str, Any]
    job_configuration: dict[str, Any] = {}


class Queue(_Strict):
    """A work queue of the pool; 1 is the highest priority."""

    name: str
    priority: int = Field(ge=1)
    concurrency_limit: int | None = Field(default=None, ge=1)


class Schedule(_Strict):
    """When a deployment runs."""

    cron: str
    timezone: str
    slug: str


class Deployment(_Strict):
    """A flow that can be run from the UI."""

    name: str
    entrypoint: str = Field(pattern=r"^flows/\w+\.py:\w+$")
    description: str
    tags: tuple[str, ...]
    parameters: dict[str, Any]
    work_queue: str
    concurrency_limit: int = Field(ge=1)
    schedules: tuple[Schedule, ...]
    infrastructures: tuple[InfrastructureName, ...] = tuple(InfrastructureName)
    products: str | None = None  # parameter for which the form offers the products of catalog.yaml

    @property
    def module(self) -> str:
        """Module of the flow."""
        return self.entrypoint.split(":")[0].removesuffix(".py").replace("/", ".")

    @property
    def function(self) -> str:
        """Name of the flow's function."""
        return self.entrypoint.split(":")[1]


class Trigger(_Strict):
    """Events that are expected, or whose absence is noticed."""

    posture: Literal["Reactive", "Proactive"]
    expect: tuple[str, ...]
    after: tuple[str, ...] = ()
    tag: str | None = None
    resource: str = "prefect.flow-run.*"
    for_each_run: bool = False
    within_s: int = Field(default=0, ge=0)


class Automation(_Strict):
    """What the server does by itself."""

    name: str = Field(pattern=f"^{MARK}: ")
    description: str
    action: Literal["alert", "crash"]
    message: str
    trigger: Trigger
    per_product: bool = False


class Declared(_Strict):
    """All of prefect.yaml."""

    name: Literal["stsr"]
    prefect_version: float = Field(alias="prefect-version")
    infrastructures: dict[InfrastructureName, Infrastructure]
    work_queues: tuple[Queue, ...]
    limits: dict[str, int]
    deployments: tuple[Deployment, ...]
    automations: tuple[Automation, ...]

    @model_validator(mode="after")
    def _references(self) -> Self:
        queues = {queue.name for queue in self.work_queues}
        for deployment in self.deployments:
            if deployment.work_queue not in queues:
                raise ValueError(f"deployment {deployment.name} names queue {deployment.work_queue!r}; {queues}")
            if MARK not in deployment.tags:
                raise ValueError(f"deployment {deployment.name} lacks the tag {MARK!r} that marks it as ours")
        for limit in self.limits:
            if not limit.startswith(f"{MARK}-"):
                raise ValueError(f"limit {limit} does not start with {MARK!r}")
        return self

    def deployments_on(self, infrastructure: InfrastructureName) -> list[Deployment]:
        """Return what is deployed where runs take place so."""
        return [deployment for deployment in self.deployments if infrastructure in deployment.infrastructures]

    @classmethod
    def load(cls, path: Path) -> Declared:
        """Read and validate.

        Raises:
            ConfigurationError: no file, no YAML, or a value that is not understood; the message names it.
        """
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except OSError as e:
            raise ConfigurationError(f"{path} cannot be read ({e.strerror}). Name it with --file.") from e
        except yaml.YAMLError as e:
            raise ConfigurationError(f"{path} is no valid YAML: {e}. Mend it there.") from e
        except ValidationError as e:
            problems = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'file'}: {p['msg']}" for p in e.errors())
            raise ConfigurationError(f"{path} is not understood: {problems}. Mend these entries.") from e


def shipped_declaration() -> Path:
    """Return the prefect.yaml that came with this code: in the package when installed, else the repository's."""
    package = Path(__file__).parent
    installed = package / "prefect.yaml"
    return installed if installed.is_file() else package.parent / "deployments" / "prefect.yaml"
