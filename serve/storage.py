"""The store and what stands around it, from the configuration: the same in gateways and in engine replicas."""

from __future__ import annotations

from lora_runtime.store.copies import LocalCopies
from lora_runtime.store.factory import open_store
from lora_runtime.store.protocol import Store
from lora_runtime.store.sources import Sources
from serve.config import Settings


def store_of(settings: Settings) -> Store:
    return open_store(settings.store_url, settings.copies_folder / "staging", settings.store.options.get_secret_value())


def copies_of(settings: Settings) -> LocalCopies:
    return LocalCopies(settings.copies_folder, settings.store.copies_bytes, settings.store.options.get_secret_value())


def sources_of(settings: Settings) -> Sources:
    """What may be registered, and what the configuration itself names at start."""
    adapters = settings.adapters
    return Sources(
        adapters.roots,
        adapters.sources,
        preloaded=tuple(adapters.preload.values()),
        max_bytes=adapters.max_bytes,
        options=adapters.source_options.get_secret_value(),
    )
