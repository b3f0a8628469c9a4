"""Which classification head a request means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from lora_runtime.combine import sum_heads
from lora_runtime.engine.protocol import AdapterRef
from lora_runtime.errors import InvalidCombination, NotFound
from lora_runtime.weights import Head


class CarriesHeads(Protocol):
    """An adapter's weights, or what is remembered of them."""

    @property
    def heads(self) -> Mapping[str, Head]: ...


def select_head(adapters: tuple[AdapterRef, ...], weights: Mapping[str, CarriesHeads], wanted: str | None) -> Head:
    """The head named ``wanted``, or the only one, of the target's adapters.

    A head has no base to differ from, so where several adapters carry it their combination is
    Σ wᵢ Wᵢ, as for any other delta; their labels must agree. Raises NotFound or InvalidCombination.
    """
    owners = [(ref, weights[ref.version]) for ref in adapters if ref.version in weights]
    names = sorted({name for _, adapter in owners for name in adapter.heads})
    if wanted is None and len(names) > 1:
        raise InvalidCombination(f"The target has the heads {', '.join(names)}; name one in 'head'.", near=names)
    name = wanted if wanted is not None else next(iter(names), None)
    if name is None or name not in names:
        served = ", ".join(ref.name for ref in adapters) or "the base"
        raise NotFound(
            f"No classification head {'' if wanted is None else repr(wanted) + ' '}in {served}. "
            "Name an adapter that was trained with one.",
            near=names,
        )
    return sum_heads(name, [(adapter.heads[name], ref.weight) for ref, adapter in owners if name in adapter.heads])
