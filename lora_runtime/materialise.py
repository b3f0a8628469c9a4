"""What a PEFT method other than LoRA makes of a leaf: PEFT's own layer around the base's weight, merged.

The merged weight is then a saved module like any other. PEFT computes it in fp32 from the base's weight as stored, and
fp32 it stays: in a base's bf16 a third of a small change would be gone. Only who keeps it in a narrower dtype, as an
engine that computes in one does, rounds it, once. It takes as much memory as the leaf itself, whatever the adapter's
own size, and is bounded before it is computed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lora_runtime.config import AdapterConfig
from lora_runtime.errors import MalformedAdapter, NonFiniteWeights, UnsupportedAdapter
from lora_runtime.folder import CONFIG_NAME
from lora_runtime.layout import BaseLayout, Leaf
from lora_runtime.names import listed, shown
from lora_runtime.targets import Matcher
from lora_runtime.weights import BaseParameter, SavedModule, is_finite

MAX_TERMS = 64
"""Of a series that a config may ask for; PEFT's default is 5."""


@dataclass(frozen=True, slots=True)
class Materialiser:
    """The base's own weights; ``dtype``, in which what is made of them is kept; and how many bytes of that there may be
    of one adapter. While a leaf is made, its weight is held in fp32 several times over beside that."""

    base: BaseParameter
    max_bytes: int
    dtype: torch.dtype = torch.float32

    def check_affordable(self, names: Iterable[str], layout: BaseLayout, method: str) -> None:
        """Raise UnsupportedAdapter where the leaves ``names`` take more than ``max_bytes`` in ``dtype``."""
        names = sorted(names)
        shapes = [shape for name in names for shape in layout.leaves[name].parameters.values()]
        wanted = self.dtype.itemsize * sum(math.prod(shape) for shape in shapes)
        if wanted > self.max_bytes:
            raise UnsupportedAdapter(
                f"{method} is served by keeping the weights that it changes: {len(names)} modules of "
                f"{wanted / 1e6:.1f} MB ({listed(names, 3)}), where {self.max_bytes / 1e6:.1f} MB are allowed. Raise "
                "the limit, target fewer modules, or train it as LoRA.",
                wanted=wanted,
                limit=self.max_bytes,
            )


class MethodLayer:
    """One leaf under a config's method, as PEFT builds it."""

    def __init__(self, config: AdapterConfig, matcher: Matcher, key: str, leaf: Leaf) -> None:
        """``key``: the leaf's name as the config knows it. Raises UnsupportedAdapter or MalformedAdapter."""
        self._key = key
        self._leaf = leaf
        self._peft_config = _single(config, matcher, key)
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._method = config.method.name if config.method else "LORA"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that PEFT saves for this leaf; computed without memory for them."""
        if self._shapes is None:
            with self._refusing(), torch.device("meta"):
                saved = self._saved(self._built(None))
            self._shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
        return self._shapes

    @torch.no_grad()
    def merged(self, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> SavedModule:
        """The leaf's parameters in fp32 after PEFT merged ``tensors`` into ``base``, whatever dtypes those have.

        ``tensors`` must have the names and shapes of :meth:`shapes`.
        """
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.save_and_load import set_peft_model_state_dict

        state = {f"{self._key}.{name}": tensor.float() for name, tensor in tensors.items()}
        with self._refusing():
            tree = self._built({name: tensor.to(torch.float32, copy=True) for name, tensor in base.items()})
            result: Any = set_peft_model_state_dict(tree, state)
            layer = next(module for module in tree.modules() if isinstance(module, BaseTunerLayer))
            layer.merge()
        assert not result.unexpected_keys, "shapes() said otherwise"
        found = dict(layer.get_base_layer().named_parameters())
        changed = {name: found[name].detach() for name in base}
        if not all(is_finite(tensor) for tensor in changed.values()):
            raise NonFiniteWeights(
                f"{self._method} makes NaN or infinity of '{shown(self._key)}'; use an earlier checkpoint.",
                tensors=[self._key],
            )
        return SavedModule(parameters=changed)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """What PEFT raises over a config's options is the config's fault."""
        try:
            yield
        except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AttributeError) as error:
            raise UnsupportedAdapter(
                f"PEFT cannot put {self._method} with these options on '{shown(self._key)}' ({shown(str(error))}).",
                module=self._key,
            ) from error

    def _built(self, base: Mapping[str, Tensor] | None) -> nn.Module:
        """The leaf with PEFT's layer around it, at its place in an otherwise empty model. None: no values."""
        from peft import inject_adapter_in_model

        tree = node = nn.Module()
        *outer, last = self._key.split(".")
        for part in outer:
            node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.add_module(last, _bare(self._leaf, base))
        # Not PEFT's low_cpu_mem_usage: it patches torch for all threads of the process.
        inject_adapter_in_model(copy.deepcopy(self._peft_config), tree)
        return tree.eval()

    def _saved(self, tree: nn.Module) -> dict[str, Tensor]:
        from peft.utils.save_and_load import get_peft_model_state_dict

        prefix = f"{self._key}."
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in get_peft_model_state_dict(tree, save_embedding_layers=False).items()
        }


def _bare(leaf: Leaf, base: Mapping[str, Tensor] | None) -> nn.Module:
    """A plain module of the leaf's shapes, with the parameters ``base``, or on "meta"."""
    shape = leaf.parameters["weight"]
    with_bias = "bias" in leaf.parameters
    module: nn.Module
    with torch.device("meta"):
        if leaf.kind == "embedding":
            module = nn.Embedding(shape[0], shape[1])
        elif leaf.kind == "conv":
            conv = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
            kernel: Any = shape[2:]
            module = conv(shape[1], shape[0], kernel, stride=kernel, bias=with_bias)
        else:
            module = nn.Linear(shape[1], shape[0], bias=with_bias)
    for name, tensor in (base or {}).items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    return module


def _single(config: AdapterConfig, matcher: Matcher, key: str) -> Any:
    """PEFT's config for the module ``key`` alone: patterns resolved here, so that no hostile one runs in PEFT."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType

    method = config.method
    assert method is not None
    cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(config.peft_type)]
    options = dict(config.options)
    if not isinstance(terms := options.get("num_cayley_neumann_terms", 0), int) or terms > MAX_TERMS:
        raise MalformedAdapter(f"{CONFIG_NAME}: num_cayley_neumann_terms must be at most {MAX_TERMS}.")
    if method.alpha is not None:
        options["r"], options[method.alpha] = matcher.rank_and_alpha(key)
    if "feedforward_modules" in method.options:
        feedforward = config.feedforward_modules
        options["feedforward_modules"] = [key] if feedforward and matcher.is_named(feedforward, key) else []
    known = {field.name for field in fields(cls)}
    try:
        return cls(target_modules=[key], **{name: value for name, value in options.items() if name in known})
    except (ValueError, TypeError, ArithmeticError) as error:
        raise MalformedAdapter(f"{CONFIG_NAME} is refused by PEFT: {shown(str(error))}") from error
