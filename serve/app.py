"""The Ray Serve deployments, and the application that ``serve run``, ``serve deploy`` and ``loom serve`` deploy.

serve run --name loom serve.app:build_app config=deploy/loom.yaml

No ``from __future__ import annotations`` here: Ray makes a builder's argument a model only where its annotation is a
class, and postponed annotations are text.
"""

import logging
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from serve.config import ConfigurationError, DeploymentSettings, Settings
from serve.handover import Handover, handed_over, taken_over
from serve.loading import load_settings
from serve.ray_internals import listen_as_the_node_does

APP_NAME = "loom"
ROUTER: dict[str, Any] = {"request_router_class": "serve.routing:AdapterRouter"}
ENGINE_HEALTH_PERIOD_S = 5
STREAM_DRAIN_WAIT_S = 1

log = logging.getLogger(__name__)


class AppArguments(BaseModel):
    """Arguments of ``build_app``: a YAML file's path, or the settings themselves."""

    model_config = ConfigDict(extra="forbid")

    config: Path | None = None
    settings: dict[str, Any] | None = None


@ray_serve.ingress()
class Gateway:
    """One gateway replica; stateless but for a snapshot of the registry."""

    def __init__(self, settings: Handover, engines: DeploymentHandle[Any], intake: DeploymentHandle[Any]) -> None:
        """Raises ConfigurationError."""
        listen_as_the_node_does()
        self._settings = taken_over(settings)
        _check_registry(self._settings)  # machines may have joined since it was deployed
        self._engines = engines
        self._intake = intake

    def __serve_build_asgi_app__(self) -> Any:
        from serve.assembly import gateway_app
        from serve.engine_client import HandleClient
        from serve.jobs.cluster import ensure_runner

        client = HandleClient(self._engines, self._intake)
        return gateway_app(self._settings, client, lambda: ensure_runner(self._settings))


def build_app(arguments: AppArguments) -> Any:
    """The Serve application, for Ray's own commands and its REST API. Raises ConfigurationError."""
    if arguments.config is not None and arguments.settings is not None:
        raise ConfigurationError("Give 'config' or 'settings', not both.")
    settings = load_settings(arguments.config or arguments.settings)
    _check_given_to_ray(arguments.settings or {}, settings)
    _check_listening(settings)
    return application(settings)


def application(settings: Settings) -> Any:
    """Gateway, engines and intake, bound. Raises ConfigurationError."""
    from serve.intake_replica import IntakeReplica
    from serve.replica import EngineReplica

    _check_registry(settings)
    engines: Any = ray_serve.deployment(
        EngineReplica,
        name="Engine",
        health_check_period_s=ENGINE_HEALTH_PERIOD_S,
        request_router_config=RequestRouterConfig(**ROUTER),
        **_deployment_options(settings.engines),
    )
    gateways: Any = ray_serve.deployment(Gateway, name="Gateway", **_deployment_options(settings.gateways))
    intake: Any = ray_serve.deployment(IntakeReplica, name="Intake", **_deployment_options(settings.intake))
    handover = handed_over(settings)
    return gateways.bind(handover, engines.bind(handover), intake.bind(handover))


def _check_given_to_ray(given: dict[str, Any], settings: Settings) -> None:
    """Arguments of a Serve application are kept by Ray in plain text."""
    hidden = [name for name in handed_over(settings).secrets if name.split(".")[1] in given.get(name.split(".")[0], {})]
    if hidden:
        raise ConfigurationError(
            f"{', '.join(hidden)} holds a secret, and Ray would keep it in plain text as an argument of the "
            "application. Set it in the environment of every node, in a folder of secrets, or in the file that "
            "'config' names."
        )


def _check_listening(settings: Settings) -> None:
    """Where Ray Serve listens is said in its own ``http_options`` here."""
    said = settings.server.model_fields_set
    if {"tls_certificate", "tls_key"} & said and settings.server.tls_key is not None:
        raise ConfigurationError(
            "server.tls_certificate and server.tls_key have no effect on an application that Ray deploys: its proxies "
            "would answer without TLS. Set http_options.ssl_certfile and ssl_keyfile of the Serve configuration, and "
            "leave them out here."
        )
    for name in sorted({"host", "port"} & said):
        log.warning(
            "server.%s has no effect on an application that Ray deploys; http_options.%s of the Serve configuration "
            "says where its proxies listen.",
            name,
            name,
        )


def _check_registry(settings: Settings) -> None:
    """A SQLite file is on one machine only, and each node would have a registry of its own."""
    if not settings.registry_is_a_file or not ray.is_initialized():
        return
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    machines = sorted({node["NodeManagerAddress"] for node in nodes if node["Alive"]})
    if len(machines) > 1:
        raise ConfigurationError(
            f"registry.url is SQLite, a file of one machine, and this cluster has nodes on {len(machines)} "
            f"({', '.join(machines[:4])}). Set registry.url to a PostgreSQL database that all nodes reach."
        )


def _deployment_options(settings: DeploymentSettings) -> dict[str, Any]:
    actor = {
        "num_cpus": settings.num_cpus,
        "num_gpus": settings.num_gpus,
        "memory": settings.memory_bytes,
        "accelerator_type": settings.accelerator_type,
        "resources": dict(settings.resources) or None,
        "label_selector": dict(settings.label_selector) or None,
    }
    options: dict[str, Any] = {
        "ray_actor_options": {name: value for name, value in actor.items() if value is not None},
        "max_ongoing_requests": settings.max_ongoing_requests,
        "max_queued_requests": settings.max_queued_requests,
        "graceful_shutdown_timeout_s": settings.graceful_shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": STREAM_DRAIN_WAIT_S,
        "rolling_update_percentage": settings.rolling_update_percentage,
        "max_surge_percent": settings.max_surge_percent,
    }
    if settings.max_replicas_per_node is not None:
        options["max_replicas_per_node"] = settings.max_replicas_per_node
    if settings.placement_bundles:
        options["placement_group_bundles"] = [dict(bundle) for bundle in settings.placement_bundles]
        options["placement_group_strategy"] = settings.placement_strategy
    if settings.autoscaling is None:
        options["num_replicas"] = settings.replicas
    else:
        options["autoscaling_config"] = AutoscalingConfig(**settings.autoscaling.model_dump())
    return options
