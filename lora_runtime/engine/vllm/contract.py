"""What a worker proves before it serves: that each kind of leaf in vLLM's model does what dense weights say.

vLLM's internals move with every release. Here every leaf of the first layer of each part of the model, the
vocabulary, the final norm and the connector get random LoRA factors and random saved weights in two slots, and
one batch of base rows, rows of either slot and rows of both goes through vLLM's own module. The reference is
plain arithmetic on the checkpoint's tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_runtime.engine.routing import Router, Routing
from lora_runtime.engine.vllm.fusion import fused
from lora_runtime.engine.vllm.leaves import WrappedLeaf
from lora_runtime.errors import EngineFault
from lora_runtime.layout import BaseLayout
from lora_runtime.weights import AdapterWeights, BaseParameter, LoraFactors, SavedModule

LORA_SLOT, SAVED_SLOT = 1_000_000, 1_000_001
"""Slots that no lease ever names."""

SIGNATURES = (
    ((), 2), (((LORA_SLOT, 1.0),), 2), (((SAVED_SLOT, 1.0),), 1),
    (((LORA_SLOT, 0.7), (SAVED_SLOT, -0.4)), 2), ((), 1),
)  # fmt: skip
NUM_ROWS = sum(count for _, count in SIGNATURES)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest deviation allowed, as a share of the largest output."""

FIRST = re.compile(r"(?!.*\.(layers|blocks)\.[1-9])")


@torch.inference_mode()
def check_contract(
    model: nn.Module, leaves: Mapping[str, WrappedLeaf], layout: BaseLayout, base: BaseParameter, router: Router
) -> int:
    """Returns how many leaves were checked. Raises EngineFault naming those that deviate.

    Tensor-parallel workers must run it together: leaves exchange results.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = {name: leaf for name, leaf in leaves.items() if FIRST.match(name)}
    dtype, device = next(model.parameters()).dtype, next(model.parameters()).device
    routing = Routing(SIGNATURES, device=device, dtype=dtype)
    deviations: dict[str, float] = {}
    for name, wrapped in chosen.items():
        lora, saved = _adapters(wrapped, layout, base, generator)
        try:
            for slot, weights in ((LORA_SLOT, lora), (SAVED_SLOT, saved)):
                wrapped.fill(slot, fused(weights, wrapped.leaf, base))
            router.set(text=routing, logits=routing, patch=routing, merged=routing)
            x, got = _through_vllm(name, model, wrapped, layout, generator, dtype, device)
        finally:
            router.clear()
            for slot in (LORA_SLOT, SAVED_SLOT):
                wrapped.clear(slot)
        want = _expected(wrapped, layout, base, lora, saved, x)
        deviations[name] = float((got.float().cpu()[:, : want.shape[1]] - want).abs().max() / want.abs().max())
    # Not sooner: a worker that stopped alone would leave the others waiting for it.
    wrong = {name: deviation for name, deviation in deviations.items() if not deviation < TOLERANCE[dtype]}
    if wrong:
        worst = max(wrong, key=wrong.__getitem__)
        raise EngineFault(
            f"{len(wrong)} of vLLM's leaves, such as '{worst}', do not do here what their weights say: it deviates by "
            f"{wrong[worst]:.2g} of the largest output, where {TOLERANCE[dtype]:.2g} is rounding. This vLLM must not "
            "serve; use a supported version.",
            leaves=sorted(wrong),
            deviation=wrong[worst],
        )
    return len(chosen)


def _adapters(
    wrapped: WrappedLeaf, layout: BaseLayout, base: BaseParameter, generator: torch.Generator
) -> tuple[AdapterWeights, AdapterWeights]:
    """One with LoRA on every part (none for norms), one that saves every part."""
    lora, saved = {}, {}
    for part in wrapped.leaf.parts:
        leaf = layout.leaves[part]
        saved[part] = SavedModule(
            parameters={
                name: base(part, name).float() + 0.1 * torch.randn(shape, generator=generator)
                for name, shape in leaf.parameters.items()
            }
        )
        if leaf.kind != "norm":
            kind = "embedding" if leaf.kind == "embedding" else "linear"
            a = torch.randn(3, leaf.in_features, generator=generator) * leaf.in_features**-0.5
            b = torch.randn(leaf.out_features, 3, generator=generator)
            lora[part] = LoraFactors(a=a, b=b, scaling=0.5, kind=kind)  # type: ignore[arg-type]  # a literal
    return AdapterWeights(version="contract-lora", lora=lora), AdapterWeights(version="contract-saved", saved=saved)


def _through_vllm(
    name: str,
    model: Any,
    wrapped: WrappedLeaf,
    layout: BaseLayout,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Random rows and what vLLM's own module makes of them."""
    module = model.get_submodule(name)
    leaf = layout.leaves[wrapped.leaf.parts[0]]
    if wrapped.leaf.is_embedding:
        ids = torch.randint(0, leaf.in_features, (NUM_ROWS,), generator=generator)
        return ids, module(ids.to(device))
    x = torch.randn(NUM_ROWS, leaf.in_features, generator=generator).to(dtype)
    if wrapped.leaf.parts == ("lm_head",):
        return x.float(), module.quant_method.apply(module, x.to(device))
    if leaf.kind == "conv":
        shape = leaf.parameters["weight"][1:]
        return x.float(), module(x.to(device).reshape(NUM_ROWS, *shape)).reshape(NUM_ROWS, -1)
    columns = wrapped.leaf.shards[0].columns
    found = module(x.to(device) if columns is None else x[:, slice(*columns)].to(device))
    return x.float(), found[0] if isinstance(found, tuple) else found


def _expected(
    wrapped: WrappedLeaf,
    layout: BaseLayout,
    base: BaseParameter,
    lora: AdapterWeights,
    saved: AdapterWeights,
    x: Tensor,
) -> Tensor:
    """Each row through its own dense weights, W₀ + Σ w·Δ; the outputs that this worker holds."""
    rows = []
    row = 0
    for signature, count in SIGNATURES:
        shares = dict(signature)
        for _ in range(count):
            parts = [_row(layout, part, base, lora, saved, shares, x[row]) for part in wrapped.leaf.parts]
            if not wrapped.leaf.is_embedding:
                parts = [shard.outputs(y) for shard, y in zip(wrapped.leaf.shards, parts, strict=True)]
            rows.append(torch.cat(parts))
            row += 1
    return torch.stack(rows)


def _row(
    layout: BaseLayout,
    part: str,
    base: BaseParameter,
    lora: AdapterWeights,
    saved: AdapterWeights,
    shares: Mapping[int, float],
    x: Tensor,
) -> Tensor:
    leaf = layout.leaves[part]
    weights = {name: base(part, name).float() for name in leaf.parameters}
    for name, own in list(weights.items()):
        weights[name] = own + shares.get(SAVED_SLOT, 0.0) * (saved.saved[part].parameters[name].float() - own)
    weight = weights["weight"]
    if part in lora.lora:
        weight = weight + shares.get(LORA_SLOT, 0.0) * lora.lora[part].delta().reshape(weight.shape)
    bias = weights.get("bias", torch.zeros(leaf.out_features))
    if leaf.kind == "embedding":
        return weight[int(x)]
    if leaf.kind == "norm":
        is_rms = "bias" not in leaf.parameters
        centred = x if is_rms else x - x.mean()
        return centred * (centred.pow(2).mean() + 1e-6).rsqrt() * weight + bias
    return weight.reshape(leaf.out_features, -1) @ x + bias
