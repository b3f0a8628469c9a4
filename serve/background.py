"""Tasks that run beside requests."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any


async def ended(task: asyncio.Task[Any] | None) -> None:
    """Cancel ``task``, if there is one, and wait until it is over. Raises what it failed with."""
    if task is not None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
