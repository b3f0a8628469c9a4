"""PEFT methods other than plain LoRA that are served, each through what it makes of a leaf's own weight.

A method is here if PEFT can merge it leaf by leaf: what it does to one leaf follows from that leaf's weight and
its own tensors alone. Methods that share tensors between leaves (VeRA, VB-LoRA, RandLoRA) or that act on the
prompt are not, nor BOFT, whose shapes PEFT cannot tell without building it in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """``prefix`` begins the names of its tensors. ``options`` are the fields of PEFT's config that decide what
    it computes, besides where it acts. ``alpha`` is its field for alpha where rank and alpha may differ by module.
    """

    name: str
    prefix: str
    options: frozenset[str]
    alpha: str | None = None


def _method(name: str, prefix: str, *options: str, alpha: str | None = None) -> Method:
    return Method(name=name, prefix=prefix, options=frozenset(options), alpha=alpha)


DORA = _method("DORA", "lora_", "use_rslora", "use_dora", alpha="lora_alpha")
"""DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5), which PEFT has as an option of LoRA."""

BY_TYPE: Mapping[str, Method] = {
    method.name: method
    for method in (
        _method("LOHA", "hada_", "use_effective_conv2d", alpha="alpha"),
        _method("LOKR", "lokr_", "use_effective_conv2d", "decompose_both", "decompose_factor", alpha="alpha"),
        _method("IA3", "ia3_", "feedforward_modules"),
        _method(
            *("OFT", "oft_", "r", "oft_block_size", "coft", "eps", "block_share"),
            *("use_cayley_neumann", "num_cayley_neumann_terms"),
        ),
        _method("HRA", "hra_", "r", "apply_GS"),
        _method("FOURIERFT", "fourierft_", "n_frequency", "scaling", "random_loc_seed"),
        _method("DELORA", "delora_", "r", "delora_lambda"),
    )
}
"""Methods with a ``peft_type`` of their own."""

INERT = frozenset(
    {
        *("rank_dropout", "module_dropout", "rank_dropout_scale", "lora_dropout"),
        *("init_weights", "init_ia3_weights"),
    }
)
"""Options of these methods that act in training alone."""


def method_of(raw: Mapping[str, Any]) -> Method | None:
    """The method of a config, None for plain LoRA. Raises KeyError for a ``peft_type`` that is not served."""
    kind = str(raw.get("peft_type"))
    if kind == "LORA":
        return DORA if raw.get("use_dora") else None
    return BY_TYPE[kind]
