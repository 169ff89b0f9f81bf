"""The only reader of the environment and of .env; flows and the command line build it, the core gets values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, DotEnvSettingsSource, SettingsConfigDict

from stsr_core.errors import ConfigurationError
from stsr_core.home import at_home

DeviceName = Literal["auto", "cpu", "cuda"]
OTHERS = {"DEBUG"}  # variables with the prefix of settings that the command line reads itself


class Settings(BaseSettings):
    """Settings of one process, from environment variables named STSR_... or a file .env.

    Raises:
        ConfigurationError: a value is not understood, the message names its variable; or .env cannot be read.
    """

    model_config = SettingsConfigDict(
        env_prefix="STSR_", env_file=".env", env_ignore_empty=True, frozen=True, extra="ignore"
    )

    catalog_file: Path | None = Field(
        default=None, description="catalog.yaml to use; without it ./catalog.yaml, else the one shipped with stsr."
    )
    destination: str = Field(
        default="stsr-output", description="Folder or s3://bucket/prefix that holds the published catalogue."
    )
    public_url: str | None = Field(
        default=None, description="Address at which browsers find the destination, if not that of the object store."
    )
    sole_publisher: bool = Field(
        default=False, description="Nobody else publishes there: accept a store without conditional writes."
    )
    checkpoints: str | None = Field(
        default=None, description="Folder of checkpoints; without it the ones shipped with stsr."
    )
    scheduler_address: str | None = Field(
        default=None, description="Address of an existing Dask scheduler; without it a local cluster is started."
    )
    device: DeviceName = Field(default="auto", description="Where the networks run.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="In which the networks compute; auto is bfloat16 on GPUs and float32 on CPUs."
    )
    workers: int = Field(default=0, ge=0, description="Local workers; 0 means one per core or per GPU.")
    device_rate: float = Field(
        default=1.3e6,
        gt=0,
        description="Fine cell-evaluations per second and device, for estimates: "
        "cell_evaluations_per_s_in_networks of `stsr bench`.",
    )
    max_device_hours: float | None = Field(
        default=None, gt=0, description="A run whose plan is estimated above this is refused."
    )
    price_per_device_hour: float = Field(default=0.0, ge=0, description="For the cost that plans show.")
    match_limit: float = Field(
        default=1.5, gt=1.0, description="Largest ratio on an axis between the factor asked for and the one used."
    )
    s3_endpoint: str | None = Field(default=None, description="Endpoint of the object store, if not AWS.")
    s3_region: str | None = Field(
        default=None, description="Region of the object store; without it that of the environment or ~/.aws."
    )
    s3_access_key_id: SecretStr | None = Field(default=None, description="Access key of the object store.")
    s3_secret_access_key: SecretStr | None = Field(default=None, description="Secret key of the object store.")
    s3_anonymous: bool = Field(default=False, description="Read the object store without credentials.")
    source_s3_endpoint: str | None = Field(
        default=None, description="Endpoint that s3:// sources are read from, where it is not that of the object store."
    )
    source_s3_profile: str | None = Field(
        default=None, description="Profile of ~/.aws that s3:// sources are read with, instead of the keys above."
    )
    source_s3_anonymous: bool = Field(default=False, description="Read s3:// sources without credentials.")
    alert_url: SecretStr | None = Field(
        default=None, description="Webhook that alerts are posted to as JSON {text: ...}; without it none are sent."
    )
    repository: str = Field(
        default=".", description="Git repository that `redeploy` takes references from: a folder or a URL."
    )
    releases: Path = Field(
        default=Path("stsr-releases"), description="Folder that `redeploy` keeps the code of references in."
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as e:
            problems = "; ".join(f"STSR_{'_'.join(map(str, p['loc'])).upper()}: {p['msg']}" for p in e.errors())
            raise ConfigurationError(
                f"Settings are not understood: {problems}. Change them in the environment or in .env."
            ) from None  # the cause may hold a key
        except (OSError, UnicodeError) as e:
            path = Path(values.get("_env_file", ".env")).absolute()
            raise ConfigurationError(
                f"{path} cannot be read ({e}). It must be UTF-8 text that this user may read."
            ) from None  # likewise

    @field_validator("catalog_file", "destination", "checkpoints", "repository", "releases")
    @classmethod
    def _at_home(cls, place: str | Path | None) -> str | Path | None:
        return at_home(place)

    @property
    def s3_options(self) -> dict[str, object]:
        """Storage options for s3fs (`endpoint_url`, `client_kwargs`, `key`, `secret`, `anon`), as far as set."""
        options: dict[str, object] = {}
        if self.s3_region:
            options["client_kwargs"] = {"region_name": self.s3_region}
        if self.s3_endpoint:
            options["endpoint_url"] = self.s3_endpoint
        if self.s3_access_key_id and self.s3_secret_access_key:
            options["key"] = self.s3_access_key_id.get_secret_value()
            options["secret"] = self.s3_secret_access_key.get_secret_value()
        if self.s3_anonymous:
            options["anon"] = True
        return options

    @property
    def source_s3_options(self) -> dict[str, object]:
        """Storage options for s3:// sources: where a setting of sources is there, none of the object store's holds."""
        found: dict[str, object] = {
            "endpoint_url": self.source_s3_endpoint,
            "profile": self.source_s3_profile,
            "anon": self.source_s3_anonymous or None,
        }
        own = {name: value for name, value in found.items() if value is not None}
        return own or self.s3_options

    def options_of(self, url: str) -> dict[str, object]:
        """Storage options for a catalogue or a store; none for folders."""
        return self.s3_options if url.startswith("s3://") else {}

    def source_options(self, url: str) -> dict[str, object]:
        """Storage options for a source; filesystems other than S3 find their credentials in the environment."""
        return self.source_s3_options if url.startswith("s3://") else {}


def unknown_names() -> list[str]:
    """Variables in the environment and in .env that look like settings and are none: slips of the pen."""
    prefix, known = Settings.model_config["env_prefix"], {name.upper() for name in Settings.model_fields}
    written = DotEnvSettingsSource(Settings, env_file=Settings.model_config["env_file"]).env_vars
    names = {name.upper() for name in (*os.environ, *written)}
    return sorted(n for n in names if n.startswith(prefix) and n.removeprefix(prefix) not in known | OTHERS)


def settings_table() -> str:
    """All settings as a Markdown page, for infra/settings.md."""
    rows = ["| variable | default | what it is |", "|---|---|---|"]
    for name, found in Settings.model_fields.items():
        default = "" if found.default is None else f"`{found.default}`"
        rows.append(f"| `STSR_{name.upper()}` | {default} | {found.description} |")
    head = (
        "# Settings\n\nRead from the environment, else from `.env`, where a command or run is. Empty is unset.\n"
        "In `.env` `${NAME}` stands for the variable NAME, quoted or not: a key with such characters must be given\n"
        "in the environment.\n"
    )
    written = "Written by `python -m stsr_core.settings > infra/settings.md`.\n"
    return "\n".join([head, *rows, "", written])


if __name__ == "__main__":
    print(settings_table(), end="")
