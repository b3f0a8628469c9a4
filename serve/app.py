"""Ray's coat: the deployments, and the application that ``serve run`` and ``loom serve`` deploy.

serve run serve.app:build_app config=deploy/loom.yaml
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from serve.config import DeploymentSettings, Settings, load_settings

APP_NAME = "loom"
ROUTER: dict[str, Any] = {"request_router_class": "serve.routing:AdapterRouter"}
ENGINE_HEALTH_PERIOD_S = 5
STREAM_DRAIN_WAIT_S = 1


class AppArguments(BaseModel):
    """Arguments of ``build_app``: a YAML file's path, or the settings themselves."""

    model_config = ConfigDict(extra="forbid")

    config: Path | None = None
    settings: dict[str, Any] | None = None


@ray_serve.ingress()
class Gateway:
    """One gateway replica; stateless but for a snapshot of the registry."""

    def __init__(self, settings: dict[str, Any], engines: DeploymentHandle[Any], intake: DeploymentHandle[Any]) -> None:
        self._settings = Settings.model_validate(settings)
        self._engines = engines
        self._intake = intake

    def __serve_build_asgi_app__(self) -> Any:
        from serve.assembly import gateway_app
        from serve.engine_client import HandleClient
        from serve.jobs.cluster import ensure_runner

        client = HandleClient(self._engines, self._intake)
        return gateway_app(self._settings, client, lambda: ensure_runner(self._settings))


def build_app(arguments: AppArguments) -> Any:
    """The Serve application. Raises ConfigurationError."""
    return application(load_settings(arguments.config or arguments.settings))


def application(settings: Settings) -> Any:
    """Gateway, engines and intake, bound."""
    from serve.intake_replica import IntakeReplica
    from serve.replica import EngineReplica

    engines: Any = ray_serve.deployment(
        EngineReplica,
        name="Engine",
        health_check_period_s=ENGINE_HEALTH_PERIOD_S,
        request_router_config=RequestRouterConfig(**ROUTER),
        **_deployment_options(settings.engines),
    )
    gateways: Any = ray_serve.deployment(Gateway, name="Gateway", **_deployment_options(settings.gateways))
    dumped = settings.model_dump(mode="json")
    intake: Any = ray_serve.deployment(IntakeReplica, name="Intake", **_deployment_options(settings.intake))
    return gateways.bind(dumped, engines.bind(dumped), intake.bind(dumped))


def _deployment_options(settings: DeploymentSettings) -> dict[str, Any]:
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        "max_ongoing_requests": settings.max_ongoing_requests,
        "max_queued_requests": settings.max_queued_requests,
        "graceful_shutdown_timeout_s": settings.graceful_shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": STREAM_DRAIN_WAIT_S,
    }
    if settings.autoscaling is None:
        options["num_replicas"] = settings.replicas
    else:
        options["autoscaling_config"] = AutoscalingConfig(**settings.autoscaling.model_dump())
    return options
