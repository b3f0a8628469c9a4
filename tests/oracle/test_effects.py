"""What the doctor says an engine's dtype rounds away, against PEFT's own merges in fp64, on a base stored in bf16."""

from __future__ import annotations

import pytest
import torch

from lora_runtime.checkpoint import OpenedAdapter
from lora_runtime.doctor import ROUNDED, diagnose
from lora_runtime.effects import effect_of, norm_of, share_lost
from lora_runtime.engine.entry import AdapterReader
from lora_runtime.engine.factory import create_examiner
from lora_runtime.errors import UnsupportedAdapter
from lora_runtime.layout import BaseLayout
from lora_runtime.materialise import Materialiser
from lora_runtime.merge.changes import Change
from lora_runtime.parameters import BaseParameters
from lora_runtime.weights import LoraFactors
from tests.oracle.methods import METHODS
from tests.oracle.small_changes import build_small_world, own_parameters, peft_merged
from tests.oracle.world import World


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_small_world(tmp_path_factory.mktemp("small"))


def reader(small: World, dtype: torch.dtype | None, max_bytes: int = 1 << 30) -> AdapterReader:
    return AdapterReader(BaseLayout.from_config(small.base), str(small.base), max_bytes, dtype)


def code_of(small: World, name: str, dtype: torch.dtype | None) -> str | None:
    """The severity of what is said of rounding, None where nothing is."""
    found = [f for f in reader(small, dtype).examine(small.adapters[name]).findings if f.code == "rounded-away"]
    return found[0].severity if found else None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_what_is_lost_is_what_fp64_says(small: World, name: str, dtype: torch.dtype) -> None:
    base = BaseParameters(small.base)
    opened = OpenedAdapter(small.adapters[name], BaseLayout.from_config(small.base), Materialiser(base, 1 << 30))
    effects = [effect_of(leaf, opened.weights({leaf}), base, dtype) for leaf in sorted(opened.modules)]
    own, merged = own_parameters(small), peft_merged(small, small.adapters[name])
    carried = lost = 0.0
    for effect in effects:
        of_leaf = [p for p in own if p.rpartition(".")[0] == effect.leaf]
        change = sum(float((merged[p] - own[p]).square().sum()) for p in of_leaf) ** 0.5
        rounded = sum(
            float((merged[p].to(dtype).double() - own[p].to(dtype).double() - merged[p] + own[p]).square().sum())
            for p in of_leaf
        )
        carried, lost = carried + change**2, lost + rounded
        assert effect.carried == pytest.approx(change, rel=1e-3)
        assert effect.share_lost == pytest.approx(rounded**0.5 / change, rel=1e-2, abs=1e-4)
        assert effect.size == pytest.approx(change / float(own[f"{effect.leaf}.weight"].norm()), rel=1e-3)
    assert share_lost(effects) == pytest.approx((lost / carried) ** 0.5, rel=1e-2, abs=1e-4)


def test_it_is_told_where_it_is_much(small: World) -> None:
    for name in ("dora", "loha", "ia3", "saved"):
        said = {dtype: code_of(small, name, dtype) for dtype in (torch.float32, torch.bfloat16, None)}
        assert said == {torch.float32: None, torch.bfloat16: "warning", None: "note"}, name
    for name in ("hra", "plain", "biases", "tokens", "lora bias"):  # large, or kept as differences
        assert code_of(small, name, torch.bfloat16) is None, name


def test_it_says_how_much_and_what_to_do(small: World) -> None:
    layout, base = BaseLayout.from_config(small.base), Materialiser(BaseParameters(small.base), 1 << 30)
    (finding,) = [f for f in diagnose(small.adapters["dora"], layout, base).findings if f.code == "rounded-away"]
    own, merged = own_parameters(small), peft_merged(small, small.adapters["dora"])
    changed = [p for p in own if not torch.equal(own[p], merged[p])]
    lost = torch.cat([(merged[p].bfloat16().double() - merged[p]).flatten() for p in changed]).norm()
    change = torch.cat([(merged[p] - own[p]).flatten() for p in changed]).norm()
    assert float(lost / change) > ROUNDED
    assert f"computes in bfloat16 loses {float(lost / change):.0%} of" in finding.message
    assert "float32" in finding.advice and len(finding.modules) == 7


@pytest.mark.parametrize(("options", "severity"), [({"device": "cpu"}, None), ({"dtype": "bfloat16"}, "warning")])
async def test_the_intake_knows_the_engine_by_its_configuration(small: World, options, severity) -> None:
    examiner = create_examiner("embedded", {"base_path": str(small.base), **options})
    info = await examiner.examine(str(small.adapters["dora"]))
    assert [f.severity for f in info.findings if f.code == "rounded-away"] == ([severity] if severity else [])


def test_what_is_kept_is_in_the_engines_dtype_and_counted_so(small: World) -> None:
    num_values = sum(tensor.numel() for tensor in small.read("dora").tensors())
    for dtype in (torch.bfloat16, torch.float32):
        size = num_values * dtype.itemsize
        exact = reader(small, dtype, size)
        assert {t.dtype for t in exact.read(small.adapters["dora"]).tensors()} == {dtype}
        assert exact.examine(small.adapters["dora"]).num_bytes == size
        for ask in (reader(small, dtype, size - 1).read, reader(small, dtype, size - 1).examine):
            with pytest.raises(UnsupportedAdapter, match="MB are allowed"):
                ask(small.adapters["dora"])


def test_factors_that_cancel_are_nothing() -> None:
    """x - x in other ranks: fp32's products of the parts are not 0, and the delta is."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 64, generator=generator), torch.randn(48, 4, generator=generator)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    factors = LoraFactors(a=torch.cat([a, turn @ a]), b=torch.cat([b, -(b @ turn.T)], dim=1), scaling=3.0)
    assert norm_of(factors) == Change(factors=factors).norm()
    alone = LoraFactors(a=a, b=b, scaling=-3.0, bias=torch.ones(48))
    assert norm_of(alone) == pytest.approx(3 * (float((b.double() @ a.double()).norm()) + 48**0.5), rel=1e-12)
