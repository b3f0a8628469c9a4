"""A slot is filled a little at a time, and is empty again whatever ends that early."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lora_runtime.engine.layers import SlotLinear
from lora_runtime.engine.routing import Router
from lora_runtime.errors import AdapterRejected, MemoryExceeded
from lora_runtime.weights import LoraFactors, SavedModule

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here; `make test-vllm` installs it"),
]
LEAVES = ("a", "b", "c")


class Reader:
    """Hands out adapters that were read already; "slow" ones at the second asking, "bad" ones never."""

    def __init__(self, staged) -> None:
        self.staged = staged
        self.dropped: list[str] = []
        self._asked: set[str] = set()
        self._reading: set[str] = set()

    @property
    def is_busy(self):
        return bool(self._reading)

    def take(self, path, version):
        if version == "bad":
            raise AdapterRejected("it is bad")
        if version.startswith("slow") and version not in self._asked:
            self._asked.add(version)
            self._reading.add(version)
            return None
        self._reading.discard(version)
        return self.staged(version)

    def drop(self, version):
        self.dropped.append(version)
        self._reading.discard(version)


@pytest.fixture
def manager(monkeypatch):
    from lora_runtime.engine.vllm import manager as module
    from lora_runtime.engine.vllm.fusion import FusedLeaf, LeafParts
    from lora_runtime.engine.vllm.leaves import WrappedLeaf
    from lora_runtime.engine.vllm.sharding import WHOLE
    from lora_runtime.engine.vllm.staging import Staged

    monkeypatch.setattr(module, "FILL_S", 0.0)
    config = SimpleNamespace(
        additional_config={"loom": {"base_path": "", "saved_bytes": 300, "compile": False}},
        model_config=SimpleNamespace(dtype=torch.float32),
    )
    made = module.SlotManager(config, torch.device("cpu"), {})
    for name in LEAVES:
        linear = nn.Linear(4, 4, bias=False)
        layer = SlotLinear(linear, "text", Router())
        leaf = FusedLeaf(parts=(name,), widths=(4,), shards=(WHOLE,))
        made._leaves[name] = WrappedLeaf(layer, leaf, linear, "forward", layer.forward)

    def staged(version):
        saved = SavedModule(parameters={"weight": torch.ones(4, 4)}) if "saved" in version else None
        factors = LoraFactors(a=torch.ones(2, 4), b=torch.ones(4, 2), scaling=1.0)
        part = LeafParts(lora=None if saved else factors, saved=saved, rows=None, ranks=(2,))
        return Staged(parts=dict.fromkeys(LEAVES, part), heads={})

    made._staging = Reader(staged)
    made._heads = SimpleNamespace(fill=lambda slot, heads: None, clear=lambda slot: None)
    return made


def filled(manager, slot: int) -> list[str]:
    return [name for name, wrapped in manager._leaves.items() if slot in wrapped.layer.owners]


def test_each_call_goes_on_where_the_last_one_stopped(manager):
    assert [manager.fill(0, "", "x") for _ in range(3)] == ["filling"] * 3
    assert manager.fill(0, "", "x") == "done" and filled(manager, 0) == list(LEAVES)
    assert manager.fill(0, "", "x") == "done", "it is there already"


def test_what_is_given_up_half_way_leaves_nothing(manager):
    assert [manager.fill(0, "", "x") for _ in range(2)] == ["filling"] * 2
    assert manager.fill(0, "", "y") == "filling" and filled(manager, 0) == ["a"]
    manager.clear(0)
    assert filled(manager, 0) == []
    assert manager.fill(0, "", "slow") == "reading"
    assert manager.fill(0, "", "y") == "filling" and manager._staging.dropped == ["slow"]


def test_a_leaf_stands_in_the_model_only_while_it_is_filled(manager):
    linear = manager._leaves["a"]._owner
    assert "forward" not in vars(linear)
    manager.fill(0, "", "x")
    manager.fill(1, "", "x")
    manager.clear(0)
    assert "forward" in vars(linear)
    manager.clear(1)
    assert "forward" not in vars(linear)


def test_a_bad_adapter_leaves_the_slot_clear_and_the_budget_as_it_was(manager):
    with pytest.raises(AdapterRejected):
        manager.fill(0, "", "bad")
    while manager.fill(0, "", "saved1") != "done":
        pass
    with pytest.raises(MemoryExceeded, match="the budget is") as refused:
        while manager.fill(1, "", "saved2") != "done":
            pass
    assert refused.value.facts["used"] == [[0, "saved1", manager._bytes[0]]] and refused.value.facts["wanted"] > 0
    assert filled(manager, 1) == [] and list(manager._bytes) == [0]
    manager.clear(0)
    assert manager.fill(1, "", "saved2") == "filling"


@pytest.mark.parametrize("next_version", ["slow", "other"])
def test_steps_leave_a_core_to_what_is_read_and_take_it_back(manager, next_version):
    asked = []
    manager._sharing = SimpleNamespace(give_one_up=asked.append)
    assert manager.fill(0, "", "slow") == "reading"
    assert asked == [True]
    while manager.fill(0, "", next_version) != "done":
        assert asked[-1] is False
    with pytest.raises(AdapterRejected):
        manager.fill(1, "", "bad")
    assert asked[-1] is False
