"""Leaves that some rows replace in full: each version runs on its own rows. Tests hold an fp32 loop as oracle.

Shape legend: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lora_runtime.engine.routing import Group, Routing


def blend(
    x: Tensor,
    routing: Routing,
    saving: tuple[int, ...],
    own: Callable[[Tensor], Tensor],
    replacement: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """y[t] = (1 - Σ_s w[t,s]) · own(x[t]) + Σ_s w[t,s] · replacement_s(x[t]) over the saving slots.

    Equals the leaf with weights W₀ + Σ w_s (W_s - W₀), since a leaf's output is linear in its
    weights. Each version runs once, on its own tokens; ``own`` does not run where its share is 0.
    ``x`` has T first.
    """
    groups = [(routing.base_group(saving), own)]
    groups += [(routing.group(slot), _bind(replacement, slot)) for slot in saving]
    output: Tensor | None = None
    for group, function in groups:
        if group.is_empty:
            continue
        part = scaled(function(x[group.index]), group)
        if output is None:
            if part.shape[0] == routing.num_tokens:
                output = part
                continue
            output = part.new_zeros(routing.num_tokens, *part.shape[1:])
        output[group.index] += part
    if output is None:
        return own(x)
    return output


def _bind(replacement: Callable[[int, Tensor], Tensor], slot: int) -> Callable[[Tensor], Tensor]:
    return lambda part: replacement(slot, part)


def scaled(part: Tensor, group: Group) -> Tensor:
    if isinstance(group.weight, float):
        return part if group.weight == 1.0 else part * group.weight
    return part * group.weight.reshape(-1, *(1,) * (part.ndim - 1)).to(part.dtype)
