"""The language model compiled, with an operator behind each leaf that adapters may act on.

Compiled code is made once and asks nothing again, while what lies in which slots changes all the time. So there are
two of it: *plain* for steps of base rows, and *acting*, in which an operator that the compiler does not look into
makes each leaf's output that of the step's rows, in place. Each step takes the one it needs.

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
from lora_runtime.engine.vllm.leaves import VllmLinear, VllmNorm, WrappedLeaf, check_rows

log = logging.getLogger(__name__)

Kind = Literal["plain", "acting"]
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
_library.define("act(Tensor(y!) y, Tensor x, int number) -> ()")
_numbered: list[VllmLinear | VllmNorm] = []
"""Layers by the number that compiled code has for them."""


@torch.library.impl(_library, "act", "CPU")
def _act(y: Tensor, x: Tensor, number: int) -> None:
    """Make ``y`` (T, O), what the base's leaf makes of ``x`` (T, I), that of the step's rows."""
    layer = _numbered[number]
    routing = layer.current_routing()
    if routing is None:
        return
    if x.shape[0] != routing.num_tokens:
        count = check_rows(routing, x)
        y, x = y[:count], x[:count]
    layer.act(y, x, routing)


@torch.library.register_fake("loom::act")  # type: ignore[untyped-decorator]  # torch has no types for it
def _act_shape(y: Tensor, x: Tensor, number: int) -> None:
    """Nothing is returned."""


class CompiledDecoder:
    """Stands in for the ``forward`` of vLLM's language model, from embeddings to the last norm."""

    def __init__(self, decoder: Any, leaves: Mapping[str, WrappedLeaf], router: Router) -> None:
        """``leaves``: the linears and norms inside ``decoder``."""
        self._forward: Callable[..., Any] = decoder.forward
        self._router = router
        self._leaves = tuple(leaves.values())
        self._calls = {leaf: _call(leaf) for leaf in self._leaves}
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
        made = self._made.get(self._kind())
        if made is None or inputs_embeds is None or intermediate_tensors is not None:
            return self._forward(input_ids, positions, intermediate_tensors, inputs_embeds)
        return made(positions, inputs_embeds)

    def compile(self, run: Callable[[], None]) -> None:
        """Make both kinds; ``run`` must run the model once on several rows."""
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
        return "acting" if any(routing.active(leaf.layer.owners) for leaf in self._leaves) else "plain"

    def _making(self, kind: Kind) -> Callable[..., Any]:
        """Compiles at its first call, and is compiled code from then on."""
        forward = self._forward

        def decode(positions: Tensor, inputs_embeds: Tensor) -> Any:
            return forward(None, positions, None, inputs_embeds)

        # What is compiled is kept by code object, and nothing else tells one kind's from the other's.
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
        """Each leaf is followed by its operator, or is the base's own, whatever is in its slots."""
        with ExitStack() as stack:
            for leaf, call in self._calls.items():
                stack.enter_context(leaf.standing_in(call if kind == "acting" else None))
            yield


def _call(leaf: WrappedLeaf) -> Callable[..., Any]:
    """vLLM's own leaf, and the operator behind it."""
    layer, own = leaf.layer, leaf.own
    assert isinstance(layer, VllmLinear | VllmNorm)
    number = len(_numbered)
    _numbered.append(layer)

    def linear(module: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = own(module, x, bias)
        torch.ops.loom.act(y, x, number)
        return y

    def norm(x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            y = own(x)
            torch.ops.loom.act(y, x, number)
            return y
        y, total = own(x, residual)
        torch.ops.loom.act(y, total, number)
        return y, total

    return linear if isinstance(layer, VllmLinear) else norm
