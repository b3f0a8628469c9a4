"""Following the registry: what a gateway holds in memory is read again when the registry's revision moves."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

from lora_runtime.errors import LoomError
from serve.background import ended
from serve.registry.errors import RegistryBusy, RegistryStale

log = logging.getLogger(__name__)

POLL_S = 0.5
LIMIT_S = 30.0
"""A refresh fails after so long. The database's own limits are shorter; this one holds for whatever they miss."""
MAX_AGE_S = 30.0


class Follower:
    """Polls one number, and calls what was added when it moved, all within one snapshot of the database.

    Used from one event loop; reads run in one thread of their own. While the database is away, what was read last is
    kept, and :meth:`check_fresh` says when that is too old to rely on.
    """

    def __init__(
        self,
        revision: Callable[[], int],
        *,
        snapshot: Callable[[], AbstractContextManager[object]] = nullcontext,
        max_age_s: float = MAX_AGE_S,
        limit_s: float = LIMIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``snapshot``: a context in which reads see one state of the database. ``clock``: monotonic, in seconds."""
        self._read_revision = revision
        self._snapshot = snapshot
        self._max_age_s = max_age_s
        self._limit_s = limit_s
        self._clock = clock
        self._reloads: list[Callable[[], None]] = []
        self._revision = -1
        self._fresh_at: float | None = None
        self._thread = ThreadPoolExecutor(1, "registry")
        self._reading: asyncio.Future[Exception | None] | None = None
        self._turn = asyncio.Lock()
        self._poller: asyncio.Task[None] | None = None
        self._begun = 0
        self._ended = 0
        self._failure: Exception | None = None

    def add(self, reload: Callable[[], None]) -> None:
        """Have ``reload``, which may block, called at the first refresh and whenever the registry changed."""
        self._reloads.append(reload)

    @property
    def age_s(self) -> float:
        """How long ago the last successful read began; infinite before the first."""
        return math.inf if self._fresh_at is None else self._clock() - self._fresh_at

    def check_fresh(self) -> None:
        """Raises RegistryStale where the last successful read is more than ``max_age_s`` ago."""
        if (age_s := self.age_s) > self._max_age_s:
            raise RegistryStale(
                f"This gateway could not read the registry for {age_s:.0f} s, more than the {self._max_age_s:g} s of "
                "registry.max_age_s. It recovers by itself once the registry's database answers.",
                retry_after_s=5,
                age_s=None if math.isinf(age_s) else round(age_s, 1),
            )

    async def refresh(self) -> None:
        """Be as new as the registry is now. Raises what the database raises, and RegistryBusy after ``limit_s``.

        However many ask at once, the database is asked twice at most: those who come while it is being read, which
        may have begun too early for them, share the next reading.
        """
        needed = self._begun + 1
        async with self._turn:
            if self._ended < needed:
                self._begun += 1
                self._note(await self._read())
                self._ended = self._begun
            if self._failure is not None:
                raise self._failure

    async def catch_up(self) -> None:
        """:meth:`refresh`, or what is known already where the database is not to be reached."""
        try:
            await self.refresh()
        except LoomError:
            return  # noted, and logged when it began
        except Exception as error:  # a fault in a reload: what was read last is kept, and the view ages
            log.error("reading the registry failed", exc_info=error)

    async def _read(self) -> Exception | None:
        """One reading, in the thread; what it failed with. Ends within ``limit_s`` also where the thread hangs: the
        next reading waits for it then, so that there is never more than one."""
        ends = self._clock() + self._limit_s
        if self._reading is not None and not self._reading.done():
            await asyncio.wait([self._reading], timeout=self._limit_s)
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().run_in_executor(self._thread, self._read_all)
            await asyncio.wait([self._reading], timeout=max(0.0, ends - self._clock()))
        if self._reading.done():
            return self._reading.result()
        return RegistryBusy(f"The registry's database did not answer within {self._limit_s:g} s.", retry_after_s=2)

    def _read_all(self) -> Exception | None:
        """Errors are returned: a StopIteration could not be raised through a future, which would never be done."""
        begun = self._clock()
        try:
            with self._snapshot():
                revision = self._read_revision()
                if revision != self._revision:
                    for reload in self._reloads:
                        reload()
                    self._revision = revision
        except StopIteration as error:
            failure = RuntimeError("a reload raised StopIteration")
            failure.__cause__ = error
            return failure
        except Exception as error:
            return error
        self._fresh_at = begun
        return None

    def _note(self, failure: Exception | None) -> None:
        if failure is not None and self._failure is None:
            log.warning("the registry cannot be read, what was read last is kept: %s", type(failure).__name__)
        if failure is None and self._failure is not None:
            log.info("the registry can be read again")
        self._failure = failure

    async def start(self) -> None:
        """Read once, then follow."""
        await self.refresh()
        self._poller = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        await ended(self._poller)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self.catch_up()
