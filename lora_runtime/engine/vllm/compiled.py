"""The language model compiled, with an operator in place of each leaf that adapters may act on.

Compiled code is made once and asks nothing again, while which leaf has what in its slots changes all the time. So
there are three of it, and each step takes the one it needs: *plain* for steps of base rows, *linears* where
adapters act on linears only, *everything* where one has a norm. An operator is opaque to the compiler: inside it the
leaf routes its rows as it would without.

Shape legend: T token rows, I in features, O out features, D width.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lora_runtime.engine.routing import Router
from lora_runtime.engine.vllm.leaves import VllmNorm, WrappedLeaf, routed

log = logging.getLogger(__name__)

Kind = Literal["plain", "linears", "everything"]
KINDS: tuple[Kind, ...] = get_args(Kind)

OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "dce": True,
    "size_asserts": False,
    "nan_asserts": False,
    "epilogue_fusion": True,
    "cpp.dynamic_threads": True,
}
"""Of inductor; vLLM's own for CPUs."""

_library = torch.library.Library("loom", "DEF")
_library.define("linear(Tensor x, int number) -> Tensor")
_library.define("norm(Tensor x, int number) -> Tensor")
_numbered: list[WrappedLeaf] = []
"""Leaves by the number that compiled code has for them."""


@torch.library.impl(_library, "linear", "CompositeExplicitAutograd")
def _linear(x: Tensor, number: int) -> Tensor:
    """x (T, I) → (T, O)."""
    return routed(_numbered[number].layer, x)


@torch.library.register_fake("loom::linear")  # type: ignore[untyped-decorator]  # torch has no types for it
def _linear_shape(x: Tensor, number: int) -> Tensor:
    return x.new_empty(x.shape[0], sum(_numbered[number].leaf.widths))


@torch.library.impl(_library, "norm", "CompositeExplicitAutograd")
def _norm(x: Tensor, number: int) -> Tensor:
    """x (T, D) → (T, D), in memory of its own."""
    layer = _numbered[number].layer
    assert isinstance(layer, VllmNorm)
    return layer.normed(x)


@torch.library.register_fake("loom::norm")  # type: ignore[untyped-decorator]  # as above
def _norm_shape(x: Tensor, number: int) -> Tensor:
    return torch.empty_like(x)


class CompiledDecoder:
    """Stands in for the ``forward`` of vLLM's language model, from embeddings to the last norm."""

    def __init__(self, decoder: Any, leaves: Mapping[str, WrappedLeaf], router: Router) -> None:
        """``leaves``: those inside ``decoder``."""
        self._forward: Callable[..., Any] = decoder.forward
        self._router = router
        self._norms = [leaf for leaf in leaves.values() if isinstance(leaf.layer, VllmNorm)]
        self._linears = [leaf for leaf in leaves.values() if not isinstance(leaf.layer, VllmNorm)]
        self._calls = {leaf: self._call(leaf) for leaf in leaves.values()}
        self._made: dict[Kind, Callable[..., Any]] = {}
        self._wanted: Kind | None = None
        decoder.forward = self

    def __call__(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """Arguments by vLLM's names."""
        if inputs_embeds is None or intermediate_tensors is not None:
            return self._forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        made = self._made.get(self._kind())
        if made is None:
            return self._forward(None, positions, None, inputs_embeds)
        return made(positions, inputs_embeds)

    def compile(self, run: Callable[[], None]) -> None:
        """Make all kinds; ``run`` must run the model once on several rows."""
        for kind in KINDS:
            start = time.monotonic()
            self._made[kind] = self._making(kind)
            self._wanted = kind
            try:
                run()
            finally:
                self._wanted = None
            log.info("compiled the language model for steps of kind '%s' in %.1f s", kind, time.monotonic() - start)

    def _kind(self) -> Kind:
        if self._wanted is not None:
            return self._wanted
        routing = self._router.get("text")
        if routing is None or not routing.slots:
            return "plain"
        if any(routing.active(leaf.layer.owners) for leaf in self._norms):
            return "everything"
        return "linears" if any(routing.active(leaf.layer.owners) for leaf in self._linears) else "plain"

    def _making(self, kind: Kind) -> Callable[..., Any]:
        """Compiles at its first call, and is compiled code from then on."""
        forward = self._forward

        def decode(positions: Tensor, inputs_embeds: Tensor) -> Any:
            return forward(None, positions, None, inputs_embeds)

        # What is compiled is kept by code object, and nothing tells one kind's from another's.
        own = FunctionType(decode.__code__.replace(co_name=f"decode_{kind}"), globals(), None, None, decode.__closure__)
        # As vLLM does it: guards would ask after every module of the model in each step.
        options = {**OPTIONS, "guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        compiled = torch.compile(own, fullgraph=True, dynamic=False, backend="inductor", options=options)

        def first(positions: Tensor, inputs_embeds: Tensor) -> Any:
            torch._dynamo.mark_dynamic(positions, positions.ndim - 1)
            torch._dynamo.mark_dynamic(inputs_embeds, 0)
            with self._replaced(kind):
                result = compiled(positions, inputs_embeds)
            self._made[kind] = compiled
            return result

        return first

    @contextmanager
    def _replaced(self, kind: Kind) -> Iterator[None]:
        """Each leaf calls its operator, or computes as the base's, whatever is in its slots."""
        opaque = {"plain": [], "linears": self._linears, "everything": [*self._linears, *self._norms]}[kind]
        with ExitStack() as stack:
            for leaf, call in self._calls.items():
                stack.enter_context(leaf.standing_in(call if leaf in opaque else None))
            yield

    @staticmethod
    def _call(leaf: WrappedLeaf) -> Callable[..., Any]:
        number = len(_numbered)
        _numbered.append(leaf)
        if not isinstance(leaf.layer, VllmNorm):
            return lambda module, x, bias=None: torch.ops.loom.linear(x, number)

        def norm(x: Tensor, residual: Tensor | None = None) -> Any:
            if residual is None:
                return torch.ops.loom.norm(x, number)
            total = x + residual
            return torch.ops.loom.norm(total, number), total

        return norm
