"""Reading the configuration, from a YAML file, a folder of secrets and the environment (``LOOM_SERVER__PORT=8080``).

It is resolved once, by whoever deploys: the environment wins over ``LOOM_SECRETS_DIR``, which wins over the file. Other
processes are given the values (``handover.py``), and read only secrets for themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    NestedSecretsSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from serve.config import ConfigurationError, Settings

SECRETS_DIR = "LOOM_SECRETS_DIR"
"""The folder of secrets, one file each, named like ``registry__url``: as Kubernetes mounts a Secret."""


class Sources(BaseSettings):
    """Reads the environment, over the folder of secrets, over what it is given."""

    model_config = SettingsConfigDict(
        env_prefix="LOOM_",
        env_nested_delimiter="__",
        secrets_prefix="",
        secrets_nested_delimiter="__",
        secrets_dir_missing="error",
        extra="forbid",
        frozen=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        secrets = NestedSecretsSettingsSource(file_secret_settings, secrets_dir=os.environ.get(SECRETS_DIR))
        return env_settings, secrets, init_settings


_LoadedSettings: Any = create_model("LoadedSettings", __base__=(Settings, Sources))
"""The settings as they are read; :class:`Settings` is their value."""


def load_settings(source: Path | dict[str, Any] | None = None) -> Settings:
    """Settings from a YAML file, a mapping, or the defaults, under the environment. Raises ConfigurationError."""
    with refused("The configuration cannot be used"):
        settings = Settings.model_validate(dict(_LoadedSettings(**raw_settings(source))))
    if isinstance(source, Path):
        settings._source = source.expanduser().absolute()
    return settings


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Translates what is wrong with settings into ConfigurationError, which names fields and never shows values."""
    try:
        yield
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors()]
        raise ConfigurationError(f"{what}:\n  " + "\n  ".join(lines)) from None
    except SettingsError as error:
        raise ConfigurationError(f"{what}: {error}.") from None


def raw_settings(source: Path | dict[str, Any] | None) -> dict[str, Any]:
    """What ``source`` holds, unchecked. Raises ConfigurationError."""
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
