"""Adding an adapter into a model's own weights: the plainest meaning of :class:`AdapterWeights`."""

from __future__ import annotations

import torch
from torch import nn

from lora_runtime.weights import AdapterWeights


@torch.no_grad()
def add_into(model: nn.Module, weights: AdapterWeights) -> None:
    """parameter += Δ for every leaf that ``weights`` changes, in place and in the parameter's dtype.

    A head that is tied to the embedding is untied first: what changes one need not change the other.
    ``weights``'s own heads are left out; the base has no place for them.
    """
    _untie(model)
    for name, module in weights.saved.items():
        for parameter, tensor in module.parameters.items():
            model.get_parameter(f"{name}.{parameter}").copy_(tensor)
    for name, rows in weights.token_rows.items():
        model.get_parameter(f"{name}.weight")[rows.indices] = rows.rows.to(model.get_parameter(f"{name}.weight").dtype)
    for name, factors in weights.lora.items():
        leaf = model.get_submodule(name)
        own = model.get_parameter(f"{name}.weight")
        own.add_(factors.delta().reshape(own.shape))
        if factors.bias is not None:
            shift = factors.scaling * factors.bias.float()
            known = getattr(leaf, "bias", None)
            leaf.bias = nn.Parameter(shift.to(own.dtype) if known is None else known + shift.to(own.dtype))


def _untie(model: nn.Module) -> None:
    head = model.get_output_embeddings()  # type: ignore[operator]  # a transformers model
    if head is not None and head.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
