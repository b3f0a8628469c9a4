"""Takes the place of vLLM's LoRA manager in a worker: slots under Loom's leases instead of vLLM's own cache.

vLLM asks it to prepare the model once, and before each step tells it which request's rows lie where. It never
loads, evicts or touches a file in a step; slots are filled between steps by :mod:`.worker`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lora_runtime.checkpoint import fingerprint
from lora_runtime.engine import threads
from lora_runtime.engine.entry import AdapterReader
from lora_runtime.engine.routing import Router, Routing, Space
from lora_runtime.engine.vllm.binding import SCHEME, Binding
from lora_runtime.engine.vllm.compiled import CompiledDecoder
from lora_runtime.engine.vllm.contract import check_contract
from lora_runtime.engine.vllm.fusion import LeafParts, fused
from lora_runtime.engine.vllm.heads import HeadLogits
from lora_runtime.engine.vllm.leaves import WrappedLeaf, wrap_leaves
from lora_runtime.engine.vllm.names import LoRAMappingType
from lora_runtime.engine.vllm.probe import probe_weights
from lora_runtime.engine.vllm.staging import Staged, Staging
from lora_runtime.errors import AdapterRejected, EngineFault, MemoryExceeded
from lora_runtime.layout import BaseLayout
from lora_runtime.parameters import BaseParameters
from lora_runtime.weights import AdapterWeights, Head

BASE = Binding(signature=())
FILL_S = 0.005
"""How long a step may wait for a slot that is being filled, but for one leaf more."""

DECODER = "language_model.model"
"""What of vLLM's model is compiled: all that runs for each token but the vocabulary's head."""

Progress = Literal["reading", "filling", "done"]


@dataclass(slots=True, eq=False)
class Filling:
    """An adapter on its way into a slot: the leaves that are still to be filled."""

    version: str
    parts: Iterator[tuple[str, LeafParts]]
    heads: Mapping[str, Head]


class SlotManager:
    """The worker's side of the slots. The methods that vLLM calls keep vLLM's names and arguments."""

    def __init__(self, vllm_config: Any, device: torch.device, embedding_modules: dict[str, str]) -> None:
        options = vllm_config.additional_config["loom"]
        self._base_path: str = options["base_path"]
        self._budget: int = options["saved_bytes"]
        self._is_compiled: bool = options["compile"]
        self._decoder: CompiledDecoder | None = None
        self._dtype: torch.dtype = vllm_config.model_config.dtype
        self._device = device
        self._router = Router()
        self._bytes: dict[int, int] = {}
        self._versions: dict[int, str] = {}
        self._awaited: dict[int, str] = {}
        """Versions being read, by the slot they are for."""
        self._filling: dict[int, Filling] = {}
        self._staging = Staging(self._prepared)
        self._sharing = threads.Sharing(threads.available() if device.type == "cpu" else 1)
        self.num_encoded = 0
        """Images that went through the tower."""
        self._leaves: dict[str, WrappedLeaf] = {}

    def create_lora_manager(self, model: nn.Module, vllm_config: Any) -> nn.Module:
        """Wrap the model's leaves; vLLM calls this once, after its weights are loaded."""
        self._layout = BaseLayout.from_config(self._base_path)
        self._parameters = BaseParameters(self._base_path)
        self._reader = AdapterReader(self._layout, self._base_path, self._budget, self._dtype)
        self._leaves = wrap_leaves(model, self._layout, self._router)
        self._heads = HeadLogits(model)
        self._model = model
        if self._is_compiled:
            inside = {name: leaf for name, leaf in self._leaves.items() if name.startswith(f"{DECODER}.layers.")}
            inside[f"{DECODER}.norm"] = self._leaves[f"{DECODER}.norm"]
            self._decoder = CompiledDecoder(model.get_submodule(DECODER), inside, self._router)
        return model

    def compile(self, run: Callable[[], None]) -> None:
        """Compile the language model where that was asked for; ``run`` must run it once on several rows."""
        if self._decoder is not None:
            self._decoder.compile(run)

    def check(self) -> int:
        """Prove the leaves against dense weights; see :mod:`.contract`. Returns how many, raises EngineFault."""
        return check_contract(self._model, self._leaves, self._layout, self._parameters, self._router)

    def fill(self, slot: int, path: str, version: str) -> Progress:
        """Put the adapter at ``path`` into ``slot``, all or nothing; to be called until it is "done".

        A call takes about ``FILL_S``: what is left waits for the next one, and steps go between. Nobody uses the
        slot until then. Raises AdapterRejected for content other than ``version``, MemoryExceeded beyond the
        budget, and then the slot is clear.
        """
        try:
            return self._fill(slot, path, version)
        finally:
            # Here, since it is between steps: a step's attention is planned for a number of threads.
            self._sharing.give_one_up(self._staging.is_busy)

    def _fill(self, slot: int, path: str, version: str) -> Progress:
        if self._versions.get(slot) == version:
            return "done"
        filling = self._filling.get(slot)
        if filling is None or filling.version != version:
            if (other := self._awaited.pop(slot, version)) != version:
                self._staging.drop(other)
            self.clear(slot)
            staged = self._staging.take(path, version)
            if staged is None:
                self._awaited[slot] = version
                return "reading"
            self._bytes[slot] = self._affordable(staged.num_saved * self._dtype.itemsize)
            filling = self._filling[slot] = Filling(version, iter(staged.parts.items()), staged.heads)
        end = time.monotonic() + FILL_S
        try:
            for name, part in filling.parts:
                self._leaves[name].fill(slot, part)
                if time.monotonic() > end:
                    return "filling"
            self._heads.fill(slot, filling.heads)
        except BaseException:
            self.clear(slot)
            raise
        del self._filling[slot]
        self._versions[slot] = version
        return "done"

    def fill_probe(self, slot: int) -> None:
        """Put the adapter of :mod:`.probe` into ``slot``, which must be clear."""
        staged = self._staged(probe_weights(self._layout))
        for name, part in staged.parts.items():
            self._leaves[name].fill(slot, part)

    def _prepared(self, path: str, version: str) -> Staged:
        """Runs beside the step, on a thread of its own."""
        # Copied out of the mapped file before it is hashed: one that changes meanwhile hashes otherwise, and
        # one that is cut short later cannot take the process down.
        weights = self._reader.read(path).cloned()
        if (found := fingerprint(Path(path))) != version:
            raise AdapterRejected(
                f"The adapter changed on disk since it was registered ({version[:12]}, now {found[:12]}).",
                registered=version,
                found=found,
            )
        return self._staged(weights)

    def _staged(self, weights: AdapterWeights) -> Staged:
        parts = {name: fused(weights, wrapped.leaf, self._parameters) for name, wrapped in self._leaves.items()}
        return Staged(
            parts={name: part.in_dtype(self._dtype) for name, part in parts.items() if not part.is_empty},
            heads=weights.heads,
        )

    def _affordable(self, wanted: int) -> int:
        used = sum(self._bytes.values())
        if used + wanted > self._budget:
            raise MemoryExceeded(
                f"The adapter's saved modules take {wanted / 1e6:.1f} MB, and those of the other resident adapters "
                f"{used / 1e6:.1f} MB; the budget is {self._budget / 1e6:.1f} MB.",
                wanted=wanted,
                used=[[slot, self._version(slot), taken] for slot, taken in self._bytes.items()],
                budget=self._budget,
            )
        return wanted

    def _version(self, slot: int) -> str:
        """What is in ``slot``, or being filled into it."""
        return self._filling[slot].version if slot in self._filling else self._versions[slot]

    def clear(self, slot: int) -> None:
        """Empty ``slot``."""
        for leaf in self._leaves.values():
            if slot in leaf.layer.owners:
                leaf.clear(slot)
        self._heads.clear(slot)
        self._bytes.pop(slot, None)
        self._versions.pop(slot, None)
        self._filling.pop(slot, None)

    def set_active_adapters(self, requests: set[Any], mapping: Any) -> None:
        """Route the rows of what runs next. vLLM's warm-up requests are base rows.

        Raises EngineFault for an id without a request: rows would silently be the base's.
        """
        bindings = {0: BASE}
        for request in requests:
            is_ours = request.lora_path.startswith(SCHEME)
            bindings[request.lora_int_id] = _parsed(request.lora_path) if is_ours else BASE
        if mapping.type is LoRAMappingType.TOWER:
            self.num_encoded += len(mapping.prompt_mapping)
            self._router.set(patch=self._routing("patch", mapping.index_mapping, bindings))
        elif mapping.type is LoRAMappingType.CONNECTOR:
            self._router.set(merged=self._routing("merged", mapping.index_mapping, bindings))
        else:
            self._router.set(
                text=self._routing("text", mapping.index_mapping, bindings),
                logits=self._routing("logits", mapping.prompt_mapping, bindings),
            )
            self._heads.route([_of(bindings, number) for number in mapping.prompt_mapping])

    def _routing(self, space: Space, ids: Sequence[int], bindings: Mapping[int, Binding]) -> Routing:
        runs = [(_of(bindings, number).signature, sum(1 for _ in same)) for number, same in groupby(ids)]
        return self._router.like_last(space, runs, device=self._device, dtype=self._dtype)

    def supports_tower_connector_lora(self) -> bool:
        return True

    def add_adapter(self, lora_request: Any) -> bool:
        """Nothing is loaded here: a request's slots were filled before it was sent."""
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        return False

    def remove_all_adapters(self) -> None:
        """vLLM calls this after its warm-up."""
        self._router.clear()

    def pin_adapter(self, adapter_id: int) -> bool:
        return True

    def list_adapters(self) -> set[int]:
        return set()

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        yield

    def add_dummy_lora(self, lora_request: Any, rank: int) -> bool:
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank


_parsed = lru_cache(maxsize=4096)(Binding.from_path)


def _of(bindings: Mapping[int, Binding], number: int) -> Binding:
    found = bindings.get(int(number))
    if found is None:
        raise EngineFault(f"A step has rows of target {number}, but no request names it.")
    return found
