"""Settings on their way through Ray: values as resolved, secrets from each process's own environment."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml

from serve.config import ConfigurationError
from serve.handover import handed_over, secret_fields, taken_over
from serve.loading import load_settings

SECRET = {
    "registry": {"url": "postgresql+psycopg://loom:sesame@db/loom"},
    "auth": {"rates": "redis://:sesame@cache"},
    "telemetry": {"otlp_endpoint": "http://u:sesame@traces/v1/traces"},
    "experiments": {"unit_secret": "sesame"},
    "store": {"options": {"secret": "sesame"}},
    "merges": {"options": {"secret": "sesame"}},
    "adapters": {"source_options": {"s3": {"secret": "sesame"}}},
}


def write(folder: Path) -> Path:
    file = folder / "loom.yaml"
    file.write_text(yaml.safe_dump(SECRET))
    return file


def test_every_setting_whose_name_sounds_like_a_secret_is_one():
    found = {f"{section}.{name}" for section, name, _ in secret_fields()}
    assert found == {f"{section}.{name}" for section, values in SECRET.items() for name in values}


def test_values_are_as_they_were_resolved(monkeypatch: pytest.MonkeyPatch):
    """A process's own environment changes none of them."""
    handover = handed_over(load_settings({"server": {"port": 1}, "engines": {"replicas": 3}}))
    monkeypatch.setenv("LOOM_SERVER__PORT", "9")
    monkeypatch.setenv("LOOM_ENGINES__REPLICAS", "not a number")
    monkeypatch.setenv("LOOM_REGISTRY__URL", "sqlite:///elsewhere.db")
    settings = taken_over(pickle.loads(pickle.dumps(handover)))
    assert (settings.server.port, settings.engines.replicas, settings.registry.url) == (1, 3, None)


def test_no_secret_is_handed_over(tmp_path: Path):
    settings = load_settings(write(tmp_path))
    handover = handed_over(settings)
    assert b"sesame" not in pickle.dumps(handover)
    assert len(handover.secrets) == sum(len(values) for values in SECRET.values())
    assert taken_over(handover) == settings  # the file is there for this process as well


def test_each_process_reads_its_own_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = write(tmp_path)
    handover = handed_over(load_settings(file))
    file.unlink()
    with pytest.raises(ConfigurationError, match="LOOM_") as caught:
        taken_over(handover)
    assert "sesame" not in str(caught.value)
    monkeypatch.setenv("LOOM_REGISTRY__URL", "postgresql+psycopg://loom:another@db/loom")
    monkeypatch.setenv("LOOM_AUTH__RATES", "redis://:another@cache")
    monkeypatch.setenv("LOOM_TELEMETRY__OTLP_ENDPOINT", "http://u:another@traces/v1/traces")
    monkeypatch.setenv("LOOM_STORE__OPTIONS", '{"secret": "another"}')
    monkeypatch.setenv("LOOM_MERGES__OPTIONS", '{"secret": "another"}')
    (tmp_path / "experiments__unit_secret").write_text("another")
    (tmp_path / "adapters__source_options").write_text('{"s3": {"secret": "another"}}')
    monkeypatch.setenv("LOOM_SECRETS_DIR", str(tmp_path))
    settings = taken_over(handover)
    assert settings.registry_url == "postgresql+psycopg://loom:another@db/loom"
    assert settings.experiments.unit_secret.get_secret_value() == "another"
    assert settings.adapters.source_options.get_secret_value() == {"s3": {"secret": "another"}}


def test_a_secret_of_another_database_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two halves of a service would write to two registries."""
    handover = handed_over(load_settings({"registry": SECRET["registry"]}))
    monkeypatch.setenv("LOOM_REGISTRY__URL", "postgresql+psycopg://loom:sesame@other/loom")
    with pytest.raises(ConfigurationError, match=r"other/loom.*db/loom") as caught:
        taken_over(handover)
    assert "sesame" not in str(caught.value)
