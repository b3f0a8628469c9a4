"""Settings on their way to replicas, tasks and actors: resolved values, without secrets.

What Ray is given for a process to start with lies in its control store (GCS), readable by whoever reaches the cluster,
and in Redis where that backs it. So a process is told which secrets there are, and reads them for itself: from its own
environment, its folder of secrets, or the configuration file where that is mounted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ConfigDict, create_model

from serve.config import ConfigurationError, Settings
from serve.loading import SECRETS_DIR, Sources, raw_settings, refused
from serve.secret_values import SECRETS


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """Settings as Ray may know them.

    ``values``: JSON, in which secrets are hidden. ``secrets``: the settings that hide something (``registry.url``).
    ``source``: the configuration file they were read from, which other machines may have as well.
    """

    values: str
    secrets: tuple[str, ...] = ()
    source: str | None = None


def handed_over(settings: Settings) -> Handover:
    """``settings`` for other processes."""
    hidden = tuple(
        f"{section}.{name}"
        for section, name, _ in secret_fields()
        if (value := getattr(getattr(settings, section), name)) is not None and value.is_secret
    )
    values = settings.model_dump(mode="json")
    for section, name, _ in secret_fields():
        if values[section][name] == "":
            del values[section][name]  # an empty secret is the default
    source = None if settings.source is None else str(settings.source)
    return Handover(values=json.dumps(values, sort_keys=True), secrets=hidden, source=source)


def taken_over(handover: Handover) -> Settings:
    """The settings that were handed over, with the secrets that this process reads for itself.

    Nothing else is taken from its environment. Raises ConfigurationError for a secret that it lacks, or that belongs to
    other values than those handed over.
    """
    values: dict[str, dict[str, Any]] = json.loads(handover.values)
    own = _own_secrets(handover.source) if handover.secrets else None
    for setting in handover.secrets:
        section, name = setting.split(".")
        secret = getattr(getattr(own, section, None), name, None)
        variable = f"LOOM_{section}__{name}".upper()
        if secret is None or not secret.is_secret:
            raise ConfigurationError(
                f"{setting} holds a secret, which is not passed through Ray, and this process has none. Set {variable} "
                f"on every node, or mount a folder that {SECRETS_DIR} names with the file {section}__{name}, or the "
                "configuration file at the same path."
            )
        if secret.shown != values[section].get(name):
            raise ConfigurationError(
                f"{setting} is '{secret.shown}' in this process, and '{values[section].get(name)}' where the "
                f"application was built. Give every node the same {variable}."
            )
        values[section][name] = secret
    with refused("The configuration that was handed over cannot be used"):
        settings = Settings.model_validate(values)
    settings._source = None if handover.source is None else Path(handover.source)
    return settings


def secret_fields() -> Iterator[tuple[str, str, type[Any]]]:
    """Section, name and class of every setting that may hold a secret."""
    for section, field in Settings.model_fields.items():
        for name, inner in getattr(field.annotation, "model_fields", {}).items():
            for kind in (inner.annotation, *get_args(inner.annotation)):
                if kind in SECRETS:
                    yield section, name, kind


def _own_secrets(source: str | None) -> Any:
    """What this process itself can read of secrets, as a model of sections."""
    sections: dict[str, dict[str, Any]] = {}
    for section, name, kind in secret_fields():
        sections.setdefault(section, {})[name] = (kind | None, None)
    ignoring = ConfigDict(extra="ignore")
    models: dict[str, Any] = {
        section: (create_model(f"Own_{section}", __config__=ignoring, **fields) | None, None)
        for section, fields in sections.items()
    }
    own = create_model("OwnSecrets", __base__=Sources, **models)
    has_file = source is not None and Path(source).is_file()
    raw = raw_settings(Path(str(source))) if has_file else {}
    with refused("The secrets of this process cannot be read"):
        return own(**{section: values for section, values in raw.items() if section in sections})
