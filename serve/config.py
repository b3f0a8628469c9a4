"""One configuration, from a YAML file and the environment (``LOOM_SERVER__PORT=8080``), checked at the door.

The environment wins over the file. It is read here, and for the options of the command line in ``cli.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from lora_runtime.store.sources import SCHEMES
from lora_runtime.zoo import paths as zoo


class ConfigurationError(Exception):
    """The configuration cannot be used; the message names each setting and what is wrong with it."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSettings(_Section):
    """Where HTTP listens, and what it lets in. ``tls_certificate`` and ``tls_key``: PEM files; both or none.

    A body whose next bytes do not come within ``body_timeout_s`` gets 408, and so does one that takes longer than that
    in all and has come at less than ``body_bytes_per_s`` on average. Each gateway holds at most ``max_bodies_bytes`` of
    bodies, uploads aside, until their requests end.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    max_body_bytes: PositiveInt = 32 << 20
    max_header_bytes: PositiveInt = 32 << 10
    max_bodies_bytes: PositiveInt = 1 << 30
    body_timeout_s: PositiveFloat = 10.0
    body_bytes_per_s: PositiveFloat = 32 << 10
    request_timeout_s: PositiveFloat = 300.0
    tls_certificate: Path | None = None
    tls_key: Path | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> ServerSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together")
        return self

    @property
    def scheme(self) -> str:
        return "http" if self.tls_key is None else "https"


class ImageSettings(_Section):
    """Whether images that requests name by URL are fetched, and from where: public hosts, over https unless
    ``allow_http``, those that ``hosts`` names (``*.example.com``) if it names any."""

    fetch: bool = False
    allow_http: bool = False
    hosts: tuple[str, ...] = ()
    max_bytes: PositiveInt = 16 << 20
    timeout_s: PositiveFloat = 10.0


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


class EngineDeploymentSettings(DeploymentSettings):
    """Beyond what runs at once, up to ``max_waiting`` requests wait in each replica, where adapters take turns; so
    ``max_ongoing_requests``, at which Ray itself keeps them back in order of arrival, is larger."""

    max_ongoing_requests: PositiveInt = 512
    max_waiting: int = Field(default=128, ge=0)


class GatewaySettings(DeploymentSettings):
    """Gateways are light, and hold every request while its engine works."""

    num_cpus: float = Field(default=0.1, ge=0)
    max_ongoing_requests: PositiveInt = 512
    max_queued_requests: int = Field(default=-1, ge=-1)


class IntakeSettings(DeploymentSettings):
    """Who examines adapters and puts them in the store."""

    num_cpus: float = Field(default=0.1, ge=0)


class RegistrySettings(_Section):
    """The database of adapters; None is SQLite in ``state_dir``."""

    url: str | None = None


class AuthSettings(_Section):
    """Whether every request under ``/v1/`` needs an API key (``loom keys create`` makes them).

    ``rates``: where keys' requests a minute are counted: in each gateway, or for all together in ``redis://host``.
    ``isolate_caches``: prompts and images that engines keep are found again by requests of the same key only.
    """

    required: bool = False
    isolate_caches: bool = False
    rates: str = Field(default="memory://", pattern=r"^(memory://|rediss?://.+)$")


class StoreSettings(_Section):
    """Where adapters' content lies: a folder that every node mounts, or a bucket (``s3://bucket/loom``); None is a
    folder in ``state_dir``. ``options``: of the bucket's file system, as fsspec takes them.

    ``copies``, up to ``copies_bytes``: a bucket's versions on each node. What nobody names is collected every
    ``collect_every_s`` (0: never) once it is garbage for ``grace_s``.
    """

    url: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    copies: Path | None = None
    copies_bytes: PositiveInt = 50 << 30
    collect_every_s: float = Field(default=3600.0, ge=0)
    grace_s: PositiveFloat = 3600.0


class AdapterSettings(_Section):
    """``roots``: folders, and ``sources``: addresses (``s3://bucket/adapters``, ``hf://org``), that adapters may be
    registered from; ``source_options``: of their file systems, by scheme.

    ``preload``: name → folder, registered at start. ``max_bytes`` of one adapter may be taken in.
    """

    roots: tuple[Path, ...] = (zoo.ZOO,)
    sources: tuple[str, ...] = ()
    source_options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    preload: dict[str, Path] = Field(default_factory=lambda: dict(zoo.ADAPTERS))
    max_bytes: PositiveInt = 8 << 30

    @field_validator("sources")
    @classmethod
    def _of_known_schemes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            if address.partition("://")[0] not in SCHEMES:
                raise ValueError(f"'{address}' must begin with one of {', '.join(sorted(SCHEMES))} and '://'")
        return value


class ExperimentSettings(_Section):
    """``headers`` and ``metadata``: names that conditions of experiments may ask for. ``unit_secret``: keys what is
    stored of units, so that who reads the database cannot try out users' names.

    Every ``look_every_s`` the results are looked at, for guardrails, ramps and the pictures. ``shadows_at_once``:
    copies of requests that a gateway has under way at most; 0 for none. ``keep_s``: what was seen of an experiment
    stays for so long after it was archived; its results stay.
    """

    headers: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()
    unit_secret: SecretStr = SecretStr("")
    look_every_s: PositiveFloat = 30.0
    shadows_at_once: int = Field(default=2, ge=0)
    keep_s: PositiveFloat = 90 * 86400.0

    @field_serializer("unit_secret", when_used="json")
    def _reveal(self, value: SecretStr) -> str:
        return value.get_secret_value()  # settings travel to replicas as JSON, and are printed as text only


class MergeSettings(_Section):
    """``url``: where merged checkpoints lie and merges are staged: a folder that every node mounts, or a bucket with
    its file system's ``options``; None is a folder in ``state_dir``. ``roots``: folders that the example files of
    searches may be in.

    ``at_once``: jobs under way together. Each task of one takes ``num_cpus`` and ``resources`` (``{"merge": 1}`` keeps
    merges on nodes that have some). ``max_retries``: of a task whose node or process was lost. ``materialised_bytes``:
    of the base's weights that an adapter of another method than LoRA may change.
    """

    url: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    roots: tuple[Path, ...] = ()
    at_once: PositiveInt = 2
    num_cpus: PositiveFloat = 1.0
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    max_retries: int = Field(default=8, ge=0)
    materialised_bytes: PositiveInt = 64 << 30


class TelemetrySettings(_Section):
    """``otlp_endpoint``: a collector's address for traces (``http://collector:4318/v1/traces``), ``trace_share`` of
    requests are traced. ``adapter_labels``: adapters that metrics name; further ones are counted as "other"."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    otlp_endpoint: str | None = None
    trace_share: float = Field(default=1.0, ge=0, le=1)
    adapter_labels: int = Field(default=100, ge=0)


class Settings(BaseSettings):
    """The whole configuration; every field has a default, and the default serves the demo world."""

    model_config = SettingsConfigDict(env_prefix="LOOM_", env_nested_delimiter="__", extra="forbid", frozen=True)

    server: ServerSettings = ServerSettings()
    images: ImageSettings = ImageSettings()
    base: CheckpointSettings = CheckpointSettings()
    engine: EngineSettings = EngineSettings()
    gateways: GatewaySettings = GatewaySettings()
    engines: EngineDeploymentSettings = EngineDeploymentSettings()
    intake: IntakeSettings = IntakeSettings()
    registry: RegistrySettings = RegistrySettings()
    auth: AuthSettings = AuthSettings()
    store: StoreSettings = StoreSettings()
    adapters: AdapterSettings = AdapterSettings()
    experiments: ExperimentSettings = ExperimentSettings()
    merges: MergeSettings = MergeSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    state_dir: Path = Path(".loom")

    @field_validator("state_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()  # replicas run in working directories of their own

    @property
    def registry_url(self) -> str:
        return self.registry.url or f"sqlite:///{self.state_dir / 'registry.db'}"

    @property
    def engine_options(self) -> dict[str, Any]:
        """Of the configured engine, with the base's checkpoint where nothing else is said."""
        options = dict(self.engine.options)
        if self.engine.kind != "fake":
            options.setdefault("base_path", str(self.base.path.expanduser().absolute()))
        return options

    @property
    def store_url(self) -> str:
        return self.store.url or str(self.state_dir / "store")

    @property
    def merges_url(self) -> str:
        return self.merges.url or str(self.state_dir / "merges")

    @property
    def copies_folder(self) -> Path:
        return self.store.copies or self.state_dir / "copies"

    @model_validator(mode="after")
    def _grace_outlives_requests(self) -> Settings:
        if self.store.grace_s < 2 * self.server.request_timeout_s:
            raise ValueError("store.grace_s must be at least twice server.request_timeout_s")
        return self

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
