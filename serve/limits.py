"""How often, and how often at once, each API key may ask. What is over the limit is told when to come back."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from limits import RateLimitItemPerMinute
from limits.aio.strategies import MovingWindowRateLimiter
from limits.storage import storage_from_string

from lora_runtime.errors import Overloaded
from serve.identity import Identity

log = logging.getLogger(__name__)

CONCURRENCY_RETRY_S = 1.0


class RateLimited(Overloaded):
    """The API key's own limit is reached; others are served."""


class KeyLimits:
    """Limits of all keys. Rates are counted where ``storage`` says: in this process (``memory://``), or for all
    gateways together (``redis://host``). How many run at once is counted in this process. Used from one event loop.

    Where the storage fails, requests are let through: a limit is no reason to be down.
    """

    def __init__(self, storage: str) -> None:
        options: dict[str, Any] = {"implementation": "redispy"} if storage.startswith("redis") else {}
        self._limiter = MovingWindowRateLimiter(storage_from_string(f"async+{storage}", **options))
        self._running: Counter[str] = Counter()

    async def enter(self, identity: Identity) -> Callable[[], None]:
        """Count a request in; call what is returned, once, to count it out. Raises RateLimited."""
        limit = identity.max_concurrent
        if limit is not None and self._running[identity.id] >= limit:
            raise RateLimited(
                f"This API key has {limit} requests running, which is its limit; wait for one to end.",
                retry_after_s=CONCURRENCY_RETRY_S,
            )
        self._running[identity.id] += 1
        try:
            await self._count(identity)
        except BaseException:
            self._leave(identity)
            raise
        return partial(self._leave, identity)

    def _leave(self, identity: Identity) -> None:
        self._running[identity.id] -= 1
        if not self._running[identity.id]:
            del self._running[identity.id]

    async def _count(self, identity: Identity) -> None:
        if identity.requests_per_minute is None:
            return
        item = RateLimitItemPerMinute(identity.requests_per_minute)
        try:
            if await self._limiter.hit(item, "key", identity.id):
                return
            window = await self._limiter.get_window_stats(item, "key", identity.id)
        except Exception as error:  # whatever the storage's client raises
            log.error("rates are not limited, their storage failed: %s", type(error).__name__)
            return
        raise RateLimited(
            f"This API key may send {item.amount} requests a minute; wait until older ones are a minute ago.",
            retry_after_s=max(1.0, window.reset_time - time.time()),
        )
