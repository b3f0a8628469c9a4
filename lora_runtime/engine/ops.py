"""The arithmetic of slot layers. Each function states its semantics; tests hold an fp32 loop as oracle.

Shape legend: T tokens, I in features, O out features, R summed rank of the slots in play.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lora_runtime.engine.routing import Group, Routing


class Factors(NamedTuple):
    """One slot's low-rank factors, scaling folded into ``b``: ``a`` (R, I), ``b`` (R, O)."""

    a: Tensor
    b: Tensor


class Packed(NamedTuple):
    """Factors of several slots side by side: ``a`` (R, I), ``b`` (R, O), ``ranks`` by slot."""

    slots: tuple[int, ...]
    ranks: tuple[int, ...]
    a: Tensor
    b: Tensor


def pack(factors: Mapping[int, Factors], slots: tuple[int, ...]) -> Packed:
    """Concatenate along the rank, so that slots of different ranks need no padding."""
    members = [factors[slot] for slot in slots]
    ranks = tuple(member.a.shape[0] for member in members)
    if len(members) == 1:
        return Packed(slots, ranks, members[0].a, members[0].b)
    return Packed(slots, ranks, torch.cat([m.a for m in members]), torch.cat([m.b for m in members]))


def add_lora_dense(y: Tensor, x: Tensor, packed: Packed, mask: Tensor) -> None:
    """y += ((x · Aᵀ) ∘ M) · B, with M[t, block(s)] = w[t, s].

    ``y`` (T, O) is updated in place, ``x`` (T, I), ``mask`` M (T, R). Three kernels whatever the mix; the
    work grows with the summed rank of all slots in the step, also for tokens that use none of them.
    """
    hidden = torch.nn.functional.linear(x, packed.a)
    hidden *= mask
    y.addmm_(hidden, packed.b)


def add_lora_by_run(y: Tensor, x: Tensor, factors: Mapping[int, Factors], routing: Routing) -> None:
    """y[run] += Σ_s w_s · (x[run] · A_sᵀ) · B_s for each run of tokens with one signature.

    Same result as :func:`add_lora_dense`; no token pays for another's rank, but each run costs
    its own kernels. Best for prefill, where runs are long.
    """
    for start, stop, signature in routing.runs:
        for slot, weight in signature:
            if slot in factors:
                member = factors[slot]
                hidden = torch.nn.functional.linear(x[start:stop], member.a)
                y[start:stop].addmm_(hidden, member.b, alpha=weight)


def prefers_runs(packed: Packed, routing: Routing, width: int, launch_flops: float) -> bool:
    """Whether :func:`add_lora_by_run` costs less than the dense form.

    Counts multiply-adds; ``width`` is I + O, ``launch_flops`` what one kernel launch is worth.
    """
    token_ranks, num_parts = routing.low_rank_work(packed.slots, packed.ranks)
    dense = float(routing.num_tokens * sum(packed.ranks) * width) + 3 * launch_flops
    return token_ranks * width + 2 * num_parts * launch_flops < dense


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
