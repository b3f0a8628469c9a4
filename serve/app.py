"""Ray's coat: the deployments, and the application that ``serve run`` and ``loom serve`` deploy.

serve run serve.app:build_app config=deploy/loom.yaml
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig
from ray.serve.handle import DeploymentHandle

from serve.config import DeploymentSettings, Settings, load_settings

APP_NAME = "loom"
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

    def __init__(self, settings: dict[str, Any], engines: DeploymentHandle[Any]) -> None:
        self._settings = Settings.model_validate(settings)
        self._engines = engines

    def __serve_build_asgi_app__(self) -> Any:
        from serve.catalog import Catalog
        from serve.engine_client import HandleClient
        from serve.gateway.app import create_app
        from serve.gateway.generation import Services
        from serve.registry.repository import Repository
        from serve.telemetry import Metrics

        settings = self._settings
        client = HandleClient(self._engines)
        catalog = Catalog(
            Repository(settings.registry_url), client, base_name=settings.base.name, roots=settings.adapters.roots
        )
        services = Services(
            catalog=catalog,
            engines=client,
            metrics=Metrics(),
            base_name=settings.base.name,
            timeout_s=settings.server.request_timeout_s,
        )
        return create_app(
            services,
            max_body_bytes=settings.server.max_body_bytes,
            preload=settings.adapters.preload,
            behind_proxy=True,
        )


def build_app(arguments: AppArguments) -> Any:
    """The Serve application. Raises ConfigurationError."""
    return application(load_settings(arguments.config or arguments.settings))


def application(settings: Settings) -> Any:
    """Gateway and engines, bound."""
    from serve.replica import EngineReplica

    options = dict(settings.engine.options)
    if settings.engine.kind != "fake":
        options.setdefault("base_path", str(settings.base.path.expanduser().absolute()))
    engines: Any = ray_serve.deployment(
        EngineReplica,
        name="Engine",
        health_check_period_s=ENGINE_HEALTH_PERIOD_S,
        **_deployment_options(settings.engines),
    )
    gateways: Any = ray_serve.deployment(Gateway, name="Gateway", **_deployment_options(settings.gateways))
    bound = engines.bind(settings.engine.kind, options)
    return gateways.bind(settings.model_dump(mode="json"), bound)


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
