"""Content that is registered again as it was changes nothing, and the audit does not say that it did."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from lora_runtime.engine.protocol import AdapterInfo, AdapterRef
from lora_runtime.store.protocol import Store
from serve.catalog import Catalog
from serve.engine_client import EngineClient
from serve.follower import Follower
from serve.intake import Admitted, Source
from serve.registry.database import Database
from serve.registry.repository import Repository

VERSION = "5" * 64
INFO = AdapterInfo(
    version=VERSION,
    num_bytes=10,
    max_rank=8,
    lora_modules=4,
    saved_modules=("lm_head", "visual.merger"),
    heads={"score": ("no", "yes")},
    touches_vision=True,
)


class Engines:
    """An intake that finds the same adapter everywhere."""

    async def admit(self, source: Source) -> Admitted:
        return Admitted(info=INFO, location="/store/versions/5")

    async def prefetch(self, adapter: AdapterRef) -> None:
        """Nothing is to be brought anywhere."""


async def test_registering_known_content_again_leaves_no_row_in_the_audit(url: str):
    repository = Repository(Database(url))
    store = SimpleNamespace(holds=lambda version: True)
    catalog = Catalog(
        repository,
        cast(EngineClient, Engines()),
        cast(Store, store),
        Follower(repository.revision),
        base_name="base",
    )
    first, is_new = await catalog.register("ours", Source(address="/adapters/ours"), actor="ada")
    assert is_new
    audit = repository.audit()
    again, is_new = await catalog.register("ours", Source(address="/adapters/ours"), actor="ada")
    assert not is_new and again.versions == first.versions
    assert repository.audit() == audit
