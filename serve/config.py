"""One configuration, from a YAML file and the environment (``LOOM_SERVER__PORT=8080``), checked at the door.

The environment wins over the file. It is read here and nowhere else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from lora_runtime.zoo import paths as zoo


class ConfigurationError(Exception):
    """The configuration cannot be used; the message names each setting and what is wrong with it."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSettings(_Section):
    """Where HTTP listens, and what it lets in."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    max_body_bytes: PositiveInt = 32 << 20
    request_timeout_s: PositiveFloat = 300.0


class CheckpointSettings(_Section):
    """The one base: the name clients use, and its checkpoint folder."""

    name: str = Field(default=zoo.BASE_NAME, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$", max_length=128)
    path: Path = zoo.BASE


class EngineSettings(_Section):
    """Which engine, and its own options (see ``loom serve --help`` and the engine's config class)."""

    kind: Literal["auto", "embedded", "vllm", "fake"] = "auto"
    options: dict[str, Any] = Field(default_factory=dict)


class AutoscalingSettings(_Section):
    """Ray Serve's autoscaling of one deployment; see its documentation for the words."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: PositiveInt = 1
    target_ongoing_requests: PositiveFloat = 8.0
    upscale_delay_s: float = Field(default=10.0, ge=0)
    downscale_delay_s: float = Field(default=600.0, ge=0)


class DeploymentSettings(_Section):
    """How one Ray Serve deployment runs. ``autoscaling`` takes the place of ``replicas``."""

    replicas: PositiveInt = 1
    autoscaling: AutoscalingSettings | None = None
    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    max_ongoing_requests: PositiveInt = 64
    max_queued_requests: int = Field(default=128, ge=-1)
    graceful_shutdown_timeout_s: float = Field(default=60.0, ge=0)


class GatewaySettings(DeploymentSettings):
    """Gateways are light, and hold every request while its engine works."""

    num_cpus: float = Field(default=0.1, ge=0)
    max_ongoing_requests: PositiveInt = 512
    max_queued_requests: int = Field(default=-1, ge=-1)


class RegistrySettings(_Section):
    """The database of adapters; None is SQLite in ``state_dir``."""

    url: str | None = None


class AdapterSettings(_Section):
    """``roots``: folders that registered adapters may lie in. ``preload``: name → folder, registered at start."""

    roots: tuple[Path, ...] = (zoo.ZOO,)
    preload: dict[str, Path] = Field(default_factory=lambda: dict(zoo.ADAPTERS))


class Settings(BaseSettings):
    """The whole configuration; every field has a default, and the default serves the demo world."""

    model_config = SettingsConfigDict(env_prefix="LOOM_", env_nested_delimiter="__", extra="forbid", frozen=True)

    server: ServerSettings = ServerSettings()
    base: CheckpointSettings = CheckpointSettings()
    engine: EngineSettings = EngineSettings()
    gateways: GatewaySettings = GatewaySettings()
    engines: DeploymentSettings = DeploymentSettings()
    registry: RegistrySettings = RegistrySettings()
    adapters: AdapterSettings = AdapterSettings()
    state_dir: Path = Path(".loom")

    @field_validator("state_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()  # replicas run in working directories of their own

    @property
    def registry_url(self) -> str:
        return self.registry.url or f"sqlite:///{self.state_dir / 'registry.db'}"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings


def load_settings(source: Path | dict[str, Any] | None = None) -> Settings:
    """Settings from a YAML file, a mapping, or the defaults, under the environment. Raises ConfigurationError."""
    try:
        return Settings(**_raw(source))
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()]
        raise ConfigurationError("The configuration cannot be used:\n  " + "\n  ".join(lines)) from error


def _raw(source: Path | dict[str, Any] | None) -> dict[str, Any]:
    if not isinstance(source, Path):
        return source or {}
    try:
        loaded = yaml.safe_load(source.read_text())
    except OSError as error:
        raise ConfigurationError(f"{source} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{source} is no valid YAML: {error}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise ConfigurationError(f"{source} must hold a mapping of sections, such as 'server:'.")
    return loaded or {}
