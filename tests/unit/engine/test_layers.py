"""Slot layers against an fp32 loop: every token, one by one, on dense merged weights."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from lora_runtime.engine import low_rank
from lora_runtime.engine.layers import SlotConv, SlotEmbedding, SlotLayer, SlotLayers, SlotLinear, SlotNorm, space_of
from lora_runtime.engine.routing import Router, Routing, Signature
from lora_runtime.weights import AdapterWeights, LoraFactors, SavedModule, TokenRows

NUM_SLOTS = 5
CPU = torch.device("cpu")


def routing(signatures: list[tuple[Signature, int]]) -> Routing:
    return Routing(signatures, device=CPU, dtype=torch.float32)


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[Signature, int]]:
    weights = st.floats(-2, 2, width=32).filter(lambda w: abs(w) > 1e-3)
    signature = st.dictionaries(st.integers(0, NUM_SLOTS - 1), weights, max_size=3).map(
        lambda shares: tuple(sorted(shares.items()))
    )
    return draw(st.lists(st.tuples(signature, st.integers(0, 4)), min_size=1, max_size=8))


def linear_parts(seed: int, layer: nn.Linear) -> dict[int, tuple]:
    """Slot 0: LoRA; 1: LoRA of another rank, with a bias; 2: saved weight; 3: saved bias; 4: all of it."""
    g = torch.Generator().manual_seed(seed)
    out_features, in_features = layer.weight.shape

    def factors(rank: int, with_bias: bool = False) -> LoraFactors:
        return LoraFactors(
            a=torch.randn(rank, in_features, generator=g),
            b=torch.randn(out_features, rank, generator=g),
            scaling=0.7 * rank,
            bias=torch.randn(out_features, generator=g) if with_bias else None,
        )

    weight = torch.randn(out_features, in_features, generator=g)
    bias = torch.randn(out_features, generator=g)
    both = SavedModule(parameters={"weight": weight, "bias": bias})
    return {
        0: (factors(2), None, None),
        1: (factors(5, with_bias=True), None, None),
        2: (None, SavedModule(parameters={"weight": weight * 0.5}), None),
        3: (None, SavedModule(parameters={"bias": bias * 2}), None),
        4: (factors(3), both, None),
    }


def dense(base: nn.Module, parts: dict[int, tuple], signature: Signature) -> dict[str, Tensor]:
    """base + Σ w Δ, parameter by parameter."""
    merged = {name: p.detach().clone() for name, p in base.named_parameters()}
    for slot, share in signature:
        lora, saved, rows = parts[slot]
        if lora is not None:
            merged["weight"] += share * lora.delta().reshape(merged["weight"].shape)
            if lora.bias is not None:
                merged["bias"] += share * lora.scaling * lora.bias
        for name, tensor in (saved.parameters if saved else {}).items():
            merged[name] += share * (tensor - dict(base.named_parameters())[name])
        if rows is not None:
            merged["weight"][rows.indices] += share * (rows.rows - base.weight[rows.indices])
    return merged


def one_by_one(base: nn.Module, parts: dict[int, tuple], step: list[tuple[Signature, int]], x: Tensor) -> Tensor:
    outputs, position = [], 0
    for signature, count in step:
        merged = dense(base, parts, signature)
        for row in x[position : position + count]:
            outputs.append(functional_call(base, merged, (row[None],))[0])
        position += count
    return torch.stack(outputs) if outputs else x.new_zeros(0, 1)


def check(layer: SlotLayer, parts: dict[int, tuple], step: list[tuple[Signature, int]], x: Tensor) -> None:
    base = copy.deepcopy(layer.base)
    for slot, (lora, saved, rows) in parts.items():
        layer.fill(slot, lora, saved, rows)
    layer._router.set(text=routing(step))
    with torch.no_grad():
        want = one_by_one(base, parts, step, x)
        # Steps that are routed alike may take a shorter way from the second on.
        layer(x)
        got = layer(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@settings(max_examples=150, deadline=None)
@given(step=steps(), seed=st.integers(0, 1000), form=st.sampled_from(["dense", "by_run", "by_slot"]))
def test_linear_equals_dense_weights_token_by_token(step, seed, form):
    torch.manual_seed(seed)
    base = nn.Linear(6, 4)
    x = torch.randn(sum(count for _, count in step), 6)
    if x.shape[0] == 0:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank, "cheapest", lambda *_: form)
        check(SlotLinear(base, "text", Router()), linear_parts(seed, base), step, x)


@settings(max_examples=60, deadline=None)
@given(
    order=st.permutations([0, 1, 4]),
    shares=st.sampled_from([(1.0, 1.0, 1.0), (0.5, 1.0, -2.0)]),
    rows=st.integers(1, 3),
)
def test_rows_of_one_slot_each_equal_dense_weights(order, shares, rows):
    """As in decoding, where most rows have a slot to themselves."""
    torch.manual_seed(rows)
    base = nn.Linear(6, 4)
    step = [(((slot, share),), 1) for slot, share in zip(order, shares, strict=True)][:rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank, "cheapest", lambda *_: "by_slot")
        check(SlotLinear(base, "text", Router()), linear_parts(rows, base), step, torch.randn(rows, 6))


@settings(max_examples=60, deadline=None)
@given(step=steps(), seed=st.integers(0, 1000))
def test_token_rows_of_a_tied_head_equal_dense_weights(step, seed):
    torch.manual_seed(seed)
    base = nn.Linear(6, 9, bias=False)
    rows = {
        slot: (None, None, TokenRows(indices=torch.tensor([slot, 8]), rows=torch.randn(2, 6)))
        for slot in range(NUM_SLOTS)
    }
    x = torch.randn(sum(count for _, count in step), 6)
    if x.shape[0]:
        check(SlotLinear(base, "text", Router()), rows, step, x)


@settings(max_examples=60, deadline=None)
@given(step=steps(), seed=st.integers(0, 1000))
def test_embedding_equals_dense_weights(step, seed):
    torch.manual_seed(seed)
    base = nn.Embedding(9, 6)
    lora = LoraFactors(a=torch.randn(3, 9), b=torch.randn(6, 3), scaling=0.5, kind="embedding")
    parts = {
        0: (lora, None, None),
        1: (None, SavedModule(parameters={"weight": torch.randn(9, 6)}), None),
        2: (None, None, TokenRows(indices=torch.tensor([7, 1]), rows=torch.randn(2, 6))),
        3: (lora, SavedModule(parameters={"weight": torch.randn(9, 6)}), None),
        4: (None, None, TokenRows(indices=torch.tensor([0]), rows=torch.randn(1, 6))),
    }
    ids = torch.randint(0, 9, (sum(count for _, count in step),))
    if ids.shape[0]:
        check(SlotEmbedding(base, "text", Router()), parts, step, ids)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6)])
@settings(max_examples=40, deadline=None)
@given(step=steps(), seed=st.integers(0, 1000))
def test_norms_equal_dense_weights(norm, step, seed):
    torch.manual_seed(seed)
    base = copy.deepcopy(norm)
    names = [name for name, _ in base.named_parameters()]
    parts = {
        slot: (None, SavedModule(parameters={name: torch.randn(6) for name in names}), None)
        for slot in range(NUM_SLOTS)
    }
    x = torch.randn(sum(count for _, count in step), 6)
    if x.shape[0]:
        check(SlotNorm(base, "text", Router()), parts, step, x)


def test_patch_convolution_equals_dense_weights():
    torch.manual_seed(0)
    base = nn.Conv3d(3, 5, kernel_size=(2, 4, 4), stride=(2, 4, 4), bias=False)
    lora = LoraFactors(a=torch.randn(2, 96), b=torch.randn(5, 2), scaling=0.5)
    saved = SavedModule(parameters={"weight": torch.randn(5, 3, 2, 4, 4)})
    parts = {0: (lora, None, None), 1: (None, saved, None), 2: (lora, saved, None)}
    step: list[tuple[Signature, int]] = [((), 2), (((0, 0.5), (1, -1.0)), 3), (((2, 1.0),), 2), (((0, 1.0),), 1)]
    check(SlotConv(base, "text", Router()), parts, step, torch.randn(8, 3, 2, 4, 4))


def test_a_layer_without_adapters_gives_exactly_the_base():
    base = nn.Linear(6, 4)
    layer = SlotLinear(base, "text", Router())
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), base(x))


def test_a_base_row_between_adapters_is_not_touched():
    torch.manual_seed(0)
    base = nn.Linear(6, 4)
    layer = SlotLinear(base, "text", Router())
    for slot, (lora, saved, rows) in linear_parts(0, base).items():
        layer.fill(slot, lora, saved, rows)
    layer._router.set(text=routing([(((s, 1.0),), 1) for s in range(NUM_SLOTS)] + [((), 1)]))
    x = torch.randn(6, 6)
    assert torch.allclose(layer(x)[5], base(x)[5], atol=1e-6)


def test_clearing_and_refilling_a_slot_leaves_nothing_behind():
    torch.manual_seed(0)
    base = nn.Linear(6, 4)
    layer = SlotLinear(base, "text", Router())
    layers = SlotLayers({"m": layer})
    parts = linear_parts(0, base)
    weights = AdapterWeights(version="a", lora={"m": parts[4][0]}, saved={"m": parts[4][1]})
    layers.fill(2, weights)
    layer._router.set(text=routing([(((2, 1.0),), 3)]))
    x = torch.randn(3, 6)
    assert not torch.allclose(layer(x), base(x))
    layers.clear(2)
    assert torch.equal(layer(x), base(x))
    assert not layer.owners


def test_a_failed_fill_leaves_the_slot_clear():
    base = nn.Linear(6, 4)
    layer = SlotLinear(base, "text", Router())
    layers = SlotLayers({"m": layer})
    bad = LoraFactors(a=torch.randn(2, 6), b=torch.randn(4, 2), scaling=1.0)
    with pytest.raises(KeyError, match="nowhere"):
        layers.fill(0, AdapterWeights(version="a", lora={"m": bad, "nowhere": bad}))
    assert not layer.owners


def test_names_tell_the_space_of_their_rows():
    assert space_of("lm_head") == "logits"
    assert space_of("model.visual.merger.ln_q") == "patch"
    assert space_of("model.visual.merger.mlp.2") == "merged"
    assert space_of("model.visual.blocks.0.attn.qkv") == "patch"
    assert space_of("model.language_model.layers.0.mlp.up_proj") == "text"


@pytest.mark.parametrize("form", ["dense", "by_run", "by_slot"])
@settings(max_examples=60, deadline=None)
@given(step=steps(), seed=st.integers(0, 1000), alike=st.sampled_from([None, (2, 2, 2), (3, 0, 3)]))
@example(step=[(((3, 1.0),), 1)], seed=263, alike=None)  # factors for one of the outputs only
@example(step=[(((0, 1.0),), 3)], seed=4, alike=None)  # one slot, some tokens, every output
@example(step=[(((1, 1.0),), 1), (((0, 1.0),), 1)], seed=5, alike=(2, 2, 2))  # one token each
@example(step=[(((1, 0.5),), 1), (((0, 1.0),), 1)], seed=6, alike=(2, 2, 2))  # the same, weighted
def test_fused_leaves_equal_their_parts(form, step, seed, alike):
    """Three outputs in one leaf; each slot has factors for some of them, of its own ranks or of ranks ``alike``."""
    generator = torch.Generator().manual_seed(seed)
    widths = (4, 2, 6)
    base = nn.Linear(6, sum(widths))
    layer = SlotLinear(base, "text", Router())
    layer.set_widths(widths)
    parts = {}
    for slot in range(NUM_SLOTS):
        ranks = alike or tuple(int(torch.randint(0, 4, (), generator=generator)) for _ in widths)
        if not sum(ranks):
            parts[slot] = (None, None, None)
            continue
        a, b = torch.randn(sum(ranks), 6, generator=generator), torch.zeros(sum(widths), sum(ranks))
        row = column = 0
        for rank, width in zip(ranks, widths, strict=True):
            b[row : row + width, column : column + rank] = torch.randn(width, rank, generator=generator)
            row, column = row + width, column + rank
        parts[slot] = (LoraFactors(a=a, b=b, scaling=0.5), None, None)
        layer.fill(slot, *parts[slot], ranks)
    x = torch.randn(sum(count for _, count in step), 6, generator=generator)
    if x.shape[0] == 0:
        return
    layer._router.set(text=routing(step))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank, "cheapest", lambda *_: form)
        expected = one_by_one(base, parts, step, x)
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        # The second step that is routed alike takes the short way, and rows may lie apart in memory.
        torch.testing.assert_close(layer(x.T.contiguous().T), expected, rtol=1e-4, atol=1e-4)


def test_the_cheapest_form_is_chosen_by_cost():
    factors = {slot: low_rank.Factors(torch.randn(8, 64), torch.randn(8, 64), (8,)) for slot in range(4)}
    slots = (0, 1, 2, 3)

    def chosen(step):
        return low_rank.cheapest(routing(step), slots, factors, (64,), 5e4)

    everyone = tuple((slot, 0.25) for slot in slots)
    assert chosen([(((slot, 1.0),), 500 + 400 * slot) for slot in slots]) == "by_run"
    assert chosen([(everyone, 2)]) == "dense"
    factors = {slot: low_rank.Factors(torch.randn(8, 2048), torch.randn(8, 64), (8,)) for slot in range(4)}
    assert chosen([(((slot, 1.0),), 4) for slot in slots]) == "by_slot"


@pytest.mark.parametrize("leaf", [nn.Linear(4, 3), nn.LayerNorm(3)], ids=["linear", "norm"])
def test_a_small_change_of_a_bias_is_no_rounding_of_it(leaf: nn.Module) -> None:
    """In bf16 1 + 0.001 is 1; sixty-four times the change is still 0.064."""
    leaf = copy.deepcopy(leaf).to(torch.bfloat16).requires_grad_(False)
    leaf.bias.fill_(1.0)
    leaf.weight.fill_(0.0)
    router = Router()
    layer = (SlotLinear if isinstance(leaf, nn.Linear) else SlotNorm)(leaf, "text", router)
    layer.fill(0, None, SavedModule(parameters={"bias": torch.full((3,), 1.001)}), None)
    router.set(text=Routing([(((0, 64.0),), 2)], device=CPU, dtype=torch.bfloat16))
    assert layer(torch.zeros(2, leaf.weight.shape[-1], dtype=torch.bfloat16)).eq(1.0625).all()
