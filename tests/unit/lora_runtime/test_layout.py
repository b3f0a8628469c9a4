"""What a base offers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_runtime.layout import BaseLayout
from tests.oracle.models import tiny_qwen2vl


@pytest.mark.parametrize("tie", [False, True])
def test_a_checkpoint_and_its_model_have_one_layout(tmp_path: Path, tie: bool) -> None:
    model = tiny_qwen2vl(tie=tie)
    model.save_pretrained(tmp_path)
    layout = BaseLayout.from_model(model)
    assert BaseLayout.from_config(tmp_path) == layout
    assert dict(layout.tied) == ({"lm_head": "model.language_model.embed_tokens"} if tie else {})


def test_every_parameter_belongs_to_one_leaf() -> None:
    model = tiny_qwen2vl()
    layout = BaseLayout.from_model(model)
    found = {f"{name}.{p}": shape for name, leaf in layout.leaves.items() for p, shape in leaf.parameters.items()}
    assert found == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert not set(layout.leaves) & layout.containers


def test_kinds_and_features() -> None:
    layout = BaseLayout.from_model(tiny_qwen2vl())
    leaves = layout.leaves
    convolution = leaves["model.visual.patch_embed.proj"]
    assert (convolution.kind, convolution.in_features, convolution.out_features) == ("conv", 3 * 2 * 4 * 4, 64)
    embedding = leaves[layout.embedding]
    assert (embedding.kind, embedding.in_features, embedding.out_features) == ("embedding", 320, 128)
    assert leaves["lm_head"].kind == "linear"
    assert leaves["model.visual.merger.ln_q"].kind == leaves["model.language_model.norm"].kind == "norm"
    assert (layout.vocab_size, layout.hidden_size) == (320, 128)


def test_a_model_without_memory_has_a_layout() -> None:
    with torch.device("meta"):
        model = type(tiny_qwen2vl())(tiny_qwen2vl().config)
    assert BaseLayout.from_model(model) == BaseLayout.from_model(tiny_qwen2vl())
