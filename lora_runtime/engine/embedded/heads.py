"""Which classification head a request means."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lora_runtime.engine.protocol import AdapterRef
from lora_runtime.errors import InvalidCombination, NotFound
from lora_runtime.weights import AdapterWeights, Head


def select_head(
    adapters: tuple[AdapterRef, ...], weights: Mapping[str, AdapterWeights], wanted: str | None
) -> Head:
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
    carriers = [(ref.weight, adapter.heads[name]) for ref, adapter in owners if name in adapter.heads]
    if len(carriers) == 1 and carriers[0][0] == 1.0:
        return carriers[0][1]
    return _blended(name, carriers)


def _blended(name: str, carriers: list[tuple[float, Head]]) -> Head:
    labels = carriers[0][1].labels
    if any(head.labels != labels for _, head in carriers):
        raise InvalidCombination(f"The adapters' heads '{name}' have different labels and cannot be combined.")
    weight = sum((share * head.weight.float() for share, head in carriers), torch.zeros(()))
    with_bias = [(share, head.bias) for share, head in carriers if head.bias is not None]
    bias = sum((share * b.float() for share, b in with_bias), torch.zeros(())) if with_bias else None
    return Head(name=name, weight=weight, bias=bias, labels=labels)
