"""The check at start-up tells a leaf that does what its weights say from one that does not."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import nn

from lora_runtime.engine.layers import SlotLinear
from lora_runtime.engine.routing import Router
from lora_runtime.errors import EngineFault
from lora_runtime.layout import BaseLayout, Leaf

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here; `make test-vllm` installs it"),
]


@pytest.mark.parametrize("error", [None, "weight", "rows"])
def test_a_leaf_that_deviates_is_named(error):
    from lora_runtime.engine.vllm.contract import check_contract
    from lora_runtime.engine.vllm.fusion import FusedLeaf
    from lora_runtime.engine.vllm.leaves import WrappedLeaf
    from lora_runtime.engine.vllm.sharding import WHOLE

    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    router = Router()
    module = nn.Linear(5, 6, bias=False)
    module.weight.data = weight * 1.01 if error == "weight" else weight
    layer = SlotLinear(module, "text", router)

    leaf = Leaf(kind="linear", parameters={"weight": (6, 5)}, in_features=5, out_features=6)
    layout = BaseLayout(
        leaves={"down": leaf}, tied={}, containers=frozenset(), embedding="e", vocab_size=1, hidden_size=5
    )
    model = nn.ModuleDict({"down": nn.Linear(5, 6, bias=False)})
    replacement = (lambda x: layer(x.flip(0)).flip(0)) if error == "rows" else layer.forward
    fused_leaf = FusedLeaf(parts=("down",), widths=(6,), shards=(WHOLE,))
    leaves = {"down": WrappedLeaf(layer, fused_leaf, model["down"], "forward", replacement)}
    if error is None:
        assert check_contract(model, leaves, layout, lambda name, parameter: weight, router) == 1
    else:
        with pytest.raises(EngineFault, match="'down'"):
            check_contract(model, leaves, layout, lambda name, parameter: weight, router)
    assert not layer.owners


def test_other_versions_are_refused_in_one_line():
    from lora_runtime.engine.vllm.names import check_version

    check_version("0.32.0")
    check_version("0.33.1+cu130")
    with pytest.raises(EngineFault, match=r"0\.32 and 0\.33"):
        check_version("0.40.0")
