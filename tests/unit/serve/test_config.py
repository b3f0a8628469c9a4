"""The configuration: file, environment, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from serve.config import ConfigurationError, DeploymentSettings, Settings, load_settings


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
    *("server.host", "auth.required", "base.name", "base.path", "store.url", "adapters.roots", "adapters.preload"),
    *("merges.url", "engine.options", "gateways.num_cpus", "engines.num_cpus", "engines.num_gpus"),
}
"""Where deploy/loom.yaml differs from the defaults on purpose."""


def test_the_deployed_configuration_names_every_setting():
    """And what it does not choose is the default."""
    file = Path(__file__).parents[3] / "deploy" / "loom.yaml"
    written, loaded, defaults = yaml.safe_load(file.read_text()), load_settings(file), load_settings()
    for section in set(Settings.model_fields) - {"state_dir"}:
        values = getattr(loaded, section)
        if not isinstance(values, DeploymentSettings):
            assert set(written[section]) == set(type(values).model_fields) - {"source_options"}, section
        for name in written[section]:
            if f"{section}.{name}" not in CHOSEN:
                assert getattr(values, name) == getattr(getattr(defaults, section), name), f"{section}.{name}"
