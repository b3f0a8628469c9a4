"""What every engine does at its door: counts requests in, bounds their length, examines adapters."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from lora_runtime.checkpoint import AdapterOutline, OpenedAdapter, outline_adapter, read_adapter
from lora_runtime.doctor import base_dtype, oddities
from lora_runtime.effects import effect_of
from lora_runtime.engine.protocol import AdapterInfo
from lora_runtime.errors import ContextOverflow, Overloaded
from lora_runtime.layout import BaseLayout
from lora_runtime.materialise import Materialiser
from lora_runtime.parameters import BaseParameters
from lora_runtime.weights import AdapterWeights, touches_vision


class Admission:
    """How many requests are inside an engine, and no more than ``limit``. Used from one event loop."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.num_inside = 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Count one in while the context lasts. Raises Overloaded at the limit."""
        if self.num_inside >= self._limit:
            raise Overloaded(f"The engine already has {self.num_inside} requests; try again shortly.", retry_after_s=1)
        self.num_inside += 1
        try:
            yield
        finally:
            self.num_inside -= 1


def room_for(prompt_tokens: int, wanted: int | None, limit: int) -> int:
    """Tokens that may be generated after the prompt: ``wanted``, or up to ``limit``. Raises ContextOverflow."""
    if prompt_tokens + (1 if wanted is None else wanted) > limit:
        raise ContextOverflow(
            f"The prompt has {prompt_tokens} tokens and {wanted or 1} more are asked for, but the context holds "
            f"{limit}. Shorten the prompt, send smaller images, or lower max_tokens.",
            param="messages",
            prompt_tokens=prompt_tokens,
            limit=limit,
        )
    return limit - prompt_tokens if wanted is None else wanted


def dtype_named(name: str | None) -> torch.dtype | None:
    """torch's dtype of that name, None for None."""
    return None if name is None else getattr(torch, name)


class ThreadedExaminer:
    """Implements :class:`lora_runtime.engine.protocol.Examiner` with a reader, one adapter at a time."""

    def __init__(self, reader: AdapterReader) -> None:
        self._reader = reader
        self._executor = ThreadPoolExecutor(1, "examine")

    async def examine(self, path: str) -> AdapterInfo:
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._reader.examine, path)


class AdapterReader:
    """How one engine reads adapters: against its base, with the limits of its configuration. For any thread."""

    def __init__(
        self, layout: BaseLayout, base_path: str, max_materialised_bytes: int, dtype: torch.dtype | None = None
    ) -> None:
        """``dtype``: what the engine computes in, and keeps weights in; None where that is not known."""
        self._layout = layout
        self._dtype = dtype
        self._materialiser = Materialiser(BaseParameters(base_path), max_materialised_bytes, dtype or torch.float32)

    def read(self, path: str | Path) -> AdapterWeights:
        """The adapter in the folder ``path``, what is made of the base in the engine's dtype. Raises AdapterRejected
        or AdapterMissing."""
        return read_adapter(path, self._layout, self._materialiser)

    def outline(self, path: str | Path) -> AdapterOutline:
        """What is known of it without reading what it makes of the base. Raises as :meth:`read`."""
        return outline_adapter(path, self._layout)

    def examine(self, path: str | Path) -> AdapterInfo:
        """Read and validate the adapter, and say what it holds and what is odd about it. Raises as :meth:`read`.

        Goes leaf by leaf, in fp32, so that what the engine's dtype rounds away is seen and little memory is held.
        """
        own = self._materialiser
        opened = OpenedAdapter(path, self._layout, Materialiser(own.base, sys.maxsize))
        dtype = self._dtype or base_dtype(opened, own)
        opened.check_affordable(Materialiser(own.base, own.max_bytes, dtype))
        effects = [effect_of(leaf, opened.weights({leaf}), own.base, dtype) for leaf in sorted(opened.modules)]
        return AdapterInfo(
            version=opened.version,
            method=opened.method,
            num_bytes=sum(e.carried_bytes + e.other_bytes for e in effects)
            + sum(head.num_bytes for head in opened.heads.values()),
            max_rank=max(opened.ranks.values(), default=0),
            lora_modules=len(opened.ranks),
            saved_modules=tuple(effect.leaf for effect in effects if effect.carried_bytes),
            heads={name: head.labels for name, head in opened.heads.items()},
            touches_vision=touches_vision(opened.modules),
            findings=tuple(
                oddities(Path(path), opened, effects, self._layout, dtype, is_certain=self._dtype is not None)
            ),
        )
