"""The files under deploy/ say what the code understands."""

from __future__ import annotations

import importlib
from pathlib import Path

import yaml
from ray._private import ray_constants
from ray.serve.schema import ServeDeploySchema

from serve.app import AppArguments
from serve.config import Settings
from serve.loading import load_settings

DEPLOY = Path(__file__).parents[3] / "deploy"


def test_the_example_configuration_is_accepted():
    settings = load_settings(DEPLOY / "loom.yaml")
    assert settings.base.name == "qwen2-vl"
    assert settings.engines.num_gpus == 1


def test_the_serve_config_is_rays_and_its_application_can_be_imported():
    raw = yaml.safe_load((DEPLOY / "serve-config.yaml").read_text())
    schema = ServeDeploySchema.model_validate(raw)
    assert set(raw["applications"][0]) <= set(schema.applications[0].model_fields)
    module, _, name = schema.applications[0].import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    AppArguments.model_validate(raw["applications"][0]["args"])


def test_prometheus_reads_the_file_in_which_ray_lists_its_nodes():
    jobs = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    (file,) = next(job for job in jobs if job["job_name"] == "ray")["file_sd_configs"][0]["files"]
    assert Path(file) == Path("/tmp/ray") / ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE
    (target,) = next(job for job in jobs if job["job_name"] == "loom")["static_configs"][0]["targets"]
    assert target == f"{Settings().server.host}:{Settings().server.port}"
