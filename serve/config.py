"""The configuration: its sections, fields and defaults. ``loading.py`` reads it, ``handover.py`` hands it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    field_validator,
    model_validator,
)

from lora_runtime.store.sources import SCHEMES
from lora_runtime.zoo import paths as zoo
from serve.secret_values import SecretOptions, SecretText, SecretUrl


class ConfigurationError(Exception):
    """The configuration cannot be used; the message names each setting and what is wrong with it."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _without_credentials(url: str | None) -> str | None:
    if url is not None and SecretUrl(url).is_secret:
        raise ValueError("must not hold credentials; put them in the options, which are kept secret")
    return url


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
    """How one Ray Serve deployment runs. ``autoscaling`` takes the place of ``replicas``.

    Where replicas run: ``num_cpus``, ``num_gpus``, ``memory_bytes``, ``accelerator_type`` (``A100``) and custom
    ``resources`` are what each takes of its node; ``label_selector`` names labels that its node must have. At most
    ``max_replicas_per_node`` run on one node. ``placement_bundles`` reserves a placement group for each replica, whose
    first bundle holds the replica itself, laid out by ``placement_strategy``.

    An update replaces ``rolling_update_percentage`` (0 to 1) of the replicas at a time; with ``max_surge_percent``
    (0 to 100) new replicas start before old ones stop.
    """

    replicas: PositiveInt = 1
    autoscaling: AutoscalingSettings | None = None
    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    memory_bytes: PositiveInt | None = None
    accelerator_type: str | None = None
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    label_selector: dict[str, str] = Field(default_factory=dict)
    max_replicas_per_node: int | None = Field(default=None, ge=1, le=100)
    placement_bundles: tuple[dict[str, float], ...] = ()
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    rolling_update_percentage: float = Field(default=0.2, gt=0, le=1)
    max_surge_percent: int = Field(default=0, ge=0, le=100)
    max_ongoing_requests: PositiveInt = 64
    max_queued_requests: int = Field(default=128, ge=-1)
    graceful_shutdown_timeout_s: float = Field(default=60.0, ge=0)

    @model_validator(mode="after")
    def _placed_one_way(self) -> DeploymentSettings:
        if self.placement_bundles and self.max_replicas_per_node is not None:
            raise ValueError("placement_bundles and max_replicas_per_node cannot be combined in Ray Serve")
        return self


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
    """The database of adapters; None is SQLite in ``state_dir``, which serves the nodes of one machine only.

    A gateway that could not read it for ``max_age_s`` is not ready, and honours no API keys until it can: a key may
    have been revoked since. Where no keys are required, it goes on answering from what it read last.
    """

    url: SecretUrl | None = None
    max_age_s: float = Field(default=30.0, ge=2)


class AuthSettings(_Section):
    """Whether every request under ``/v1/`` needs an API key (``loom keys create`` makes them).

    ``rates``: where keys' requests a minute are counted: in each gateway, or for all together in ``redis://host``.
    ``isolate_caches``: prompts and images that engines keep are found again by requests of the same key only.
    """

    required: bool = False
    isolate_caches: bool = False
    rates: SecretUrl = SecretUrl("memory://")

    @field_validator("rates")
    @classmethod
    def _memory_or_redis(cls, value: SecretUrl) -> SecretUrl:
        url = value.get_secret_value()
        if url != "memory://" and not url.startswith(("redis://", "rediss://")):
            raise ValueError("must be 'memory://', or begin with 'redis://' or 'rediss://'")
        return value


class StoreSettings(_Section):
    """Where adapters' content lies: a folder that every node mounts, or a bucket (``s3://bucket/loom``); None is a
    folder in ``state_dir``. ``options``: of the bucket's file system, as fsspec takes them.

    ``copies``, up to ``copies_bytes``: a bucket's versions on each node. What nobody names is collected every
    ``collect_every_s`` (0: never) once it is garbage for ``grace_s``.
    """

    url: str | None = None
    options: SecretOptions = SecretOptions({})
    copies: Path | None = None
    copies_bytes: PositiveInt = 50 << 30
    collect_every_s: float = Field(default=3600.0, ge=0)
    grace_s: PositiveFloat = 3600.0

    _url = field_validator("url")(_without_credentials)


class AdapterSettings(_Section):
    """``roots``: folders, and ``sources``: addresses (``s3://bucket/adapters``, ``hf://org``), that adapters may be
    registered from; ``source_options``: of their file systems, by scheme.

    ``preload``: name → folder, registered at start. ``max_bytes`` of one adapter may be taken in.
    """

    roots: tuple[Path, ...] = (zoo.ZOO,)
    sources: tuple[str, ...] = ()
    source_options: SecretOptions = SecretOptions({})
    preload: dict[str, Path] = Field(default_factory=lambda: dict(zoo.ADAPTERS))
    max_bytes: PositiveInt = 8 << 30

    @field_validator("sources")
    @classmethod
    def _of_known_schemes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            _without_credentials(address)
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
    unit_secret: SecretText = SecretText("")
    look_every_s: PositiveFloat = 30.0
    shadows_at_once: int = Field(default=2, ge=0)
    keep_s: PositiveFloat = 90 * 86400.0


class MergeSettings(_Section):
    """``url``: where merged checkpoints lie and merges are staged: a folder that every node mounts, or a bucket with
    its file system's ``options``; None is a folder in ``state_dir``. ``roots``: folders that the example files of
    searches may be in.

    ``at_once``: jobs under way together. Each task of one takes ``num_cpus`` and ``resources`` (``{"merge": 1}`` keeps
    merges on nodes that have some). ``max_retries``: of a task whose node or process was lost. ``materialised_bytes``:
    of the base's weights, in fp32, that an adapter of another method than LoRA may change.
    """

    url: str | None = None
    options: SecretOptions = SecretOptions({})
    roots: tuple[Path, ...] = ()
    at_once: PositiveInt = 2
    num_cpus: PositiveFloat = 1.0
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    max_retries: int = Field(default=8, ge=0)
    materialised_bytes: PositiveInt = 64 << 30

    _url = field_validator("url")(_without_credentials)


class TelemetrySettings(_Section):
    """``otlp_endpoint``: a collector's address for traces (``http://collector:4318/v1/traces``), ``trace_share`` of
    requests are traced. ``adapter_labels``: adapters that metrics name; further ones are counted as "other"."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    otlp_endpoint: SecretUrl | None = None
    trace_share: float = Field(default=1.0, ge=0, le=1)
    adapter_labels: int = Field(default=100, ge=0)


class Settings(_Section):
    """The whole configuration; every field has a default, and the default serves the demo world.

    A plain value: making one reads neither files nor the environment (:func:`serve.loading.load_settings` does).
    """

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

    _source: Path | None = PrivateAttr(default=None)

    @property
    def source(self) -> Path | None:
        """The file that the settings were read from."""
        return self._source

    @property
    def _registry(self) -> SecretUrl:
        return self.registry.url or SecretUrl(f"sqlite:///{self.state_dir / 'registry.db'}")

    @property
    def registry_url(self) -> str:
        """With its password: for the database's driver only."""
        return self._registry.get_secret_value()

    @property
    def registry_name(self) -> str:
        """Which registry it is, without its password."""
        return self._registry.shown

    @property
    def registry_is_a_file(self) -> bool:
        return self.registry_url.startswith("sqlite")

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
