"""The configuration: file, environment, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from serve.config import ConfigurationError, DeploymentSettings, Settings
from serve.loading import load_settings


def test_the_defaults_serve_the_demo():
    settings = load_settings()
    assert settings.base.path.name == "base"
    assert settings.registry_url.startswith("sqlite:///")
    assert set(settings.adapters.preload) >= {"shape", "french"}


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "loom.yaml"
    file.write_text("server: {port: 1234, host: 0.0.0.0}\nengine: {options: {max_slots: 3}}")
    monkeypatch.setenv("LOOM_SERVER__PORT", "4321")
    settings = load_settings(file)
    assert (settings.server.port, settings.server.host) == (4321, "0.0.0.0")
    assert settings.engine.options == {"max_slots": 3}


def test_a_mapping_in_the_file_takes_the_place_of_the_default():
    settings = load_settings({"adapters": {"preload": {"mine": "/adapters/mine"}}})
    assert set(settings.adapters.preload) == {"mine"}
    assert load_settings({"gateways": {"replicas": 2}}).gateways.max_ongoing_requests == 512


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("server: {prot: 1}", "server.prot"),
        ("server: {port: 99999}", "server.port"),
        ("nonsense: 1", "nonsense"),
        ("engine: {kind: magic}", "engine.kind"),
        ("[1, 2]", "mapping"),
        ("a: [", "YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content, words):
    file = tmp_path / "loom.yaml"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match=words):
        load_settings(file)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_settings(tmp_path / "none.yaml")


CHOSEN = {
    *("auth.required", "base.name", "base.path", "store.url", "adapters.roots", "adapters.preload"),
    *("merges.url", "engine.options", "gateways.num_cpus", "engines.num_cpus", "engines.num_gpus"),
}
"""Where deploy/loom.yaml differs from the defaults on purpose."""


SAID_ELSEWHERE = {"source_options", "host", "port", "tls_certificate", "tls_key"}
"""Credentials, and where HTTP listens, which is Ray Serve's to say."""


def test_the_deployed_configuration_names_every_setting():
    """And what it does not choose is the default."""
    file = Path(__file__).parents[3] / "deploy" / "loom.yaml"
    written, loaded, defaults = yaml.safe_load(file.read_text()), load_settings(file), load_settings()
    for section in set(Settings.model_fields) - {"state_dir"}:
        values = getattr(loaded, section)
        if not isinstance(values, DeploymentSettings):
            assert set(written[section]) == set(type(values).model_fields) - SAID_ELSEWHERE, section
        for name in written[section]:
            if f"{section}.{name}" not in CHOSEN:
                assert getattr(values, name) == getattr(getattr(defaults, section), name), f"{section}.{name}"


def test_settings_are_values_and_read_no_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOOM_SERVER__PORT", "9")
    assert Settings.model_validate({"server": {"port": 1}}).server.port == 1
    assert Settings().server.port == 8000


def test_secrets_come_from_a_mounted_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As Kubernetes mounts them: links to a hidden folder, beside files of others."""
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..2026" / "registry__url").write_text("postgresql+psycopg://loom:one%40two@db/loom\n")
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "registry__url").symlink_to("..data/registry__url")
    (tmp_path / "store__options").write_text('{"key": "AKIA", "secret": "sesame"}')
    (tmp_path / "unrelated").write_text("x")
    monkeypatch.setenv("LOOM_SECRETS_DIR", str(tmp_path))
    settings = load_settings({"registry": {"url": "sqlite:///other.db"}})
    assert settings.registry_url == "postgresql+psycopg://loom:one%40two@db/loom"
    assert settings.store.options.get_secret_value() == {"key": "AKIA", "secret": "sesame"}
    monkeypatch.setenv("LOOM_REGISTRY__URL", "sqlite:///mine.db")
    assert load_settings().registry_url == "sqlite:///mine.db"
    monkeypatch.setenv("LOOM_SECRETS_DIR", str(tmp_path / "none"))
    with pytest.raises(ConfigurationError, match="none"):
        load_settings()


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("registry", "url", "postgresql+psycopg://loom:sesame@db/loom"),
        ("registry", "url", "postgresql+psycopg://loom@db/loom?password=sesame"),
        ("registry", "url", "postgresql+psycopg://loom:ses@me/sesame@db/loom"),
        ("auth", "rates", "rediss://:sesame@cache:6379/0"),
        ("telemetry", "otlp_endpoint", "https://collector:sesame@traces/v1/traces"),
        ("experiments", "unit_secret", "sesame"),
        ("store", "options", {"key": "AKIA", "secret": "sesame"}),
        ("merges", "options", {"client_kwargs": {"aws_secret_access_key": "sesame"}}),
        ("adapters", "source_options", {"hf": {"token": "sesame"}}),
    ],
)
def test_no_text_of_settings_shows_a_secret(section: str, name: str, value):
    settings = load_settings({section: {name: value}})
    shown = [repr(settings), str(settings), settings.model_dump_json(), str(settings.model_dump(mode="json"))]
    assert not [text for text in shown if "sesame" in text]
    assert getattr(getattr(settings, section), name).get_secret_value() == value


def test_what_is_wrong_with_a_secret_does_not_show_it():
    with pytest.raises(ConfigurationError) as caught:
        load_settings({"auth": {"rates": "http://:sesame@x"}, "store": {"options": "sesame"}, "registry": {"url": 5}})
    assert "sesame" not in str(caught.value)
    assert all(name in str(caught.value) for name in ("auth.rates", "store.options", "registry.url"))
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("setting", [("store", "url"), ("merges", "url"), ("adapters", "sources")])
def test_addresses_hold_no_credentials(setting: tuple[str, str]):
    address = "s3://key:sesame@bucket/loom"
    section, name = setting
    with pytest.raises(ConfigurationError, match=f"{section}.{name}") as caught:
        load_settings({section: {name: [address] if name == "sources" else address}})
    assert "sesame" not in str(caught.value)
