"""The rules that say which leaf a config means, against PEFT's own functions on many configs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from lora_runtime.config import AdapterConfig
from lora_runtime.errors import MalformedAdapter
from lora_runtime.layout import BaseLayout
from lora_runtime.names import spellings
from lora_runtime.targets import Matcher
from tests.oracle.models import tiny_qwen2vl

LAYOUT = BaseLayout.from_model(tiny_qwen2vl(layers=3))
NAMES = [*LAYOUT.leaves, *LAYOUT.containers]

SUFFIXES = ("q_proj", "v_proj", "self_attn.q_proj", "qkv", "proj", "mlp.0", "merger.mlp.2", "fc1", "lm_head", "nothing")
MODULES = ("merger", "norm", "mlp", "visual", "layers.1", "self_attn", "model.language_model.layers.0", "rm", "0")
EXPRESSIONS = (
    ".*q_proj", r"^(?!.*visual).*(?:q_proj|down_proj).*", "(?:.*)qkv", r"model\.visual\..*", "q_proj", ".*[02]$", "",
)  # fmt: skip
PATTERNS = (
    "q_proj",
    r"layers\.0\..*",
    "model.language_model.layers.1.self_attn.q_proj",
    ".*",
    "roj",
    "^fc1",
    "v_proj|qkv",
)

names = st.lists(st.sampled_from(SUFFIXES + MODULES), min_size=1, max_size=4)
targets = st.one_of(names, st.sampled_from(EXPRESSIONS))


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    wanted = draw(targets)
    layers = draw(st.one_of(st.none(), st.integers(0, 3), st.lists(st.integers(0, 3), max_size=2)))
    patterns = draw(st.one_of(st.none(), st.just("layers"), st.just("blocks"), st.just(["blocks", "layers"])))
    is_list = isinstance(wanted, list)
    return {
        "target_modules": wanted,
        "exclude_modules": draw(st.one_of(st.none(), targets)),
        "modules_to_save": draw(st.one_of(st.none(), names)),
        "layers_to_transform": layers if is_list else None,
        "layers_pattern": patterns if is_list and layers is not None else None,
    }


@settings(max_examples=150, deadline=None)
@given(configs())
def test_targets(config: dict[str, Any]) -> None:
    theirs = LoraConfig(**config)
    want = {name for name in NAMES if check_target_module_exists(theirs, name)}
    got = Matcher(AdapterConfig(peft_type="LORA", **config), LAYOUT)._targets(0)
    assert got.required | set(got.refused) == want
    assert got.required <= set(LAYOUT.leaves)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 64), max_size=4),
    st.dictionaries(st.sampled_from(PATTERNS), st.integers(1, 64), max_size=4),
    st.sampled_from(sorted(LAYOUT.leaves)),
    st.booleans(),
)
def test_ranks_and_scalings(ranks: dict[str, int], alphas: dict[str, int], key: str, use_rslora: bool) -> None:
    config = AdapterConfig(peft_type="LORA", rank_pattern=ranks, alpha_pattern=alphas, use_rslora=use_rslora)
    rank = ranks.get(get_pattern_key(ranks.keys(), key), 8)
    alpha = alphas.get(get_pattern_key(alphas.keys(), key), 8)
    want = rank, alpha / rank**0.5 if use_rslora else alpha / rank
    assert Matcher(config, LAYOUT).rank_and_scaling(key) == pytest.approx(want)


@settings(max_examples=100, deadline=None)
@given(names)
def test_saved_modules_are_matched_by_bare_suffix(wanted: list[str]) -> None:
    matcher = Matcher(AdapterConfig(peft_type="LORA", modules_to_save=wanted), LAYOUT)
    roots = [name for name in NAMES if any(name.endswith(end) for end in wanted)]  # _set_trainable in peft/utils/other
    want = {leaf for leaf in LAYOUT.leaves for root in roots if leaf == root or leaf.startswith(f"{root}.")}
    assert set().union(*(matcher.saved_leaves(name) for name in matcher.saved_names())) == want


@given(st.sampled_from(sorted(LAYOUT.leaves)))
def test_patterns_in_old_names_mean_the_same_leaf(name: str) -> None:
    old = spellings(name)[1]
    assume(LAYOUT.leaves[name].kind != "norm")
    matcher = Matcher(AdapterConfig(peft_type="LORA", target_modules=[old]), LAYOUT)
    assert matcher.targets([name], {name: old}).keys == {name: old}


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_patterns_that_never_end(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    monkeypatch.setattr("lora_runtime.targets.MATCHING_BUDGET_S", 0.3)
    hostile = r"(?:(?:.|.)+)+[^a-z._0-9]"
    config = AdapterConfig(peft_type="LORA", **{"target_modules": ["q_proj"], field: hostile})
    with pytest.raises(MalformedAdapter, match="too long to match"):
        Matcher(config, LAYOUT).targets([], {})
