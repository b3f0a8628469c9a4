"""The application as Ray's own code builds it, and what it refuses to deploy."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app as flattened

from serve import app
from serve.app import AppArguments, application, build_app
from serve.config import ConfigurationError
from serve.loading import load_settings

FAKE = {"engine": {"kind": "fake"}}


def built(arguments: dict[str, Any]) -> Any:
    """As ``serve run``, ``serve deploy`` and the REST API build it."""
    return call_user_app_builder_with_args_if_necessary(build_app, arguments)


def options_of(application: Any) -> dict[str, Any]:
    deployments = flattened(application, name="loom", make_deployment_handle=lambda *_: None).deployments
    return {deployment.name: deployment for deployment in deployments}


def test_ray_builds_it_from_a_dict(tmp_path: Path):
    file = tmp_path / "loom.yaml"
    file.write_text("engine: {kind: fake}\nengines: {replicas: 3}")
    assert options_of(built({"config": str(file)}))["Engine"].num_replicas == 3
    assert options_of(built({"settings": {**FAKE, "engines": {"replicas": 2}}}))["Engine"].num_replicas == 2
    assert set(options_of(built({}))) == {"Engine", "Gateway", "Intake"}


def test_ray_refuses_arguments_that_there_are_none_of():
    with pytest.raises(ValueError, match="konfig"):
        built({"konfig": "loom.yaml"})
    with pytest.raises(ConfigurationError, match="not both"):
        built({"config": "loom.yaml", "settings": {}})


def test_ray_is_given_no_secret(tmp_path: Path):
    file = tmp_path / "loom.yaml"
    file.write_text("registry: {url: 'postgresql+psycopg://u:sesame@db/loom'}\nexperiments: {unit_secret: sesame}")
    for deployment in options_of(built({"config": str(file)})).values():
        given = cloudpickle.dumps((deployment.init_args, deployment.init_kwargs, deployment.ray_actor_options))
        assert b"sesame" not in given


def test_a_secret_among_the_arguments_is_refused():
    """Ray keeps them, and shows them to whoever asks its dashboard."""
    settings = {"registry": {"url": "postgresql+psycopg://u:sesame@db/loom"}, "store": {"options": {"key": "sesame"}}}
    with pytest.raises(ConfigurationError, match=r"registry\.url, store\.options") as caught:
        built({"settings": settings})
    assert "sesame" not in str(caught.value)
    built({"settings": {"registry": {"url": "postgresql+psycopg://u@db/loom"}}})


def test_settings_that_ray_serve_would_ignore_are_refused_or_named(caplog: pytest.LogCaptureFixture):
    with pytest.raises(ConfigurationError, match=r"server\.tls_certificate.*http_options\.ssl_certfile"):
        built({"settings": {"server": {"tls_certificate": "a.pem", "tls_key": "b.pem"}}})
    with caplog.at_level(logging.WARNING):
        built({"settings": {"server": {"port": 9000}}})
    assert "server.port" in caplog.text and "http_options.port" in caplog.text and "server.host" not in caplog.text


def test_sqlite_is_refused_on_several_machines(monkeypatch: pytest.MonkeyPatch):
    machines = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    nodes = [{"NodeManagerAddress": address, "Alive": address != machines[2]} for address in machines]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    with pytest.raises(ConfigurationError, match=r"SQLite.*on 2 \(10\.0\.0\.1, 10\.0\.0\.2\).*PostgreSQL"):
        built({"settings": FAKE})
    built({"settings": {**FAKE, "registry": {"url": "postgresql+psycopg://u@db/loom"}}})
    nodes[1]["Alive"] = False
    built({"settings": FAKE})


def test_what_operators_need_reaches_ray():
    engines = {
        "num_gpus": 1,
        "memory_bytes": 1 << 30,
        "accelerator_type": "A100",
        "resources": {"engine": 1},
        "label_selector": {"zone": "a"},
        "max_replicas_per_node": 2,
        "rolling_update_percentage": 0.5,
        "max_surge_percent": 100,
    }
    placed = {"placement_bundles": [{"CPU": 1, "GPU": 1}, {"GPU": 1}], "placement_strategy": "STRICT_PACK"}
    found = options_of(application(load_settings({**FAKE, "engines": engines, "intake": placed})))
    engine, intake, gateway = found["Engine"], found["Intake"], found["Gateway"]
    assert engine.ray_actor_options["memory"] == 1 << 30
    assert engine.ray_actor_options["accelerator_type"] == "A100"
    assert engine.ray_actor_options["resources"]["engine"] == 1
    assert engine.ray_actor_options["label_selector"] == {"zone": "a"}
    assert engine._replica_config.max_replicas_per_node == 2
    assert engine._deployment_config.rolling_update_percentage == 0.5
    assert engine._deployment_config.max_surge_percent == 100
    assert intake._replica_config.placement_group_bundles == [{"CPU": 1, "GPU": 1}, {"GPU": 1}]
    assert intake._replica_config.placement_group_strategy == "STRICT_PACK"
    assert gateway._replica_config.max_replicas_per_node is None and gateway._deployment_config.max_surge_percent == 0
    with pytest.raises(ConfigurationError, match="max_replicas_per_node"):
        load_settings({"engines": {"placement_bundles": [{"CPU": 1}], "max_replicas_per_node": 1}})


def test_every_deployment_setting_has_an_effect():
    """No field of a deployment's section is left out where Ray is told of it."""
    fields = set(type(load_settings().gateways).model_fields)
    source = Path(app.__file__).read_text()
    assert [name for name in sorted(fields) if f"settings.{name}" not in source] == []
    assert AppArguments.model_config["extra"] == "forbid"
