"""What every engine does at its door: counts requests in, bounds their length, examines adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lora_runtime.checkpoint import read_adapter
from lora_runtime.engine.protocol import AdapterInfo
from lora_runtime.errors import ContextOverflow, Overloaded
from lora_runtime.layout import BaseLayout
from lora_runtime.materialise import Materialiser
from lora_runtime.parameters import BaseParameters
from lora_runtime.weights import AdapterWeights


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


Read = Callable[[Path], AdapterWeights]
"""How an engine reads an adapter's folder: against its base, with the limits of its configuration."""


def reader(layout: BaseLayout, base_path: str, max_materialised_bytes: int) -> Read:
    """Reads adapters for the base at ``base_path``."""
    materialiser = Materialiser(BaseParameters(base_path), max_materialised_bytes)
    return partial(read_adapter, layout=layout, materialiser=materialiser)


def examined(path: str, read: Read) -> AdapterInfo:
    """Read and validate the adapter at ``path``, and say what it holds. Raises AdapterRejected or AdapterMissing."""
    weights = read(Path(path))
    return AdapterInfo(
        version=weights.version,
        method=weights.method,
        num_bytes=weights.num_bytes,
        max_rank=max((factors.rank for factors in weights.lora.values()), default=0),
        lora_modules=len(weights.lora),
        saved_modules=tuple(sorted(weights.saved)),
        heads={name: head.labels for name, head in weights.heads.items()},
        touches_vision=weights.touches_vision,
    )
