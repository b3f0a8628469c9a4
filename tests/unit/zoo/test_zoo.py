"""The demo world as it is shipped."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_runtime.zoo import paths
from lora_runtime.zoo.base import CHAT_TEMPLATE, SPECIALS, make_tokenizer
from lora_runtime.zoo.pictures import POSITIONS, SIDE
from lora_runtime.zoo.tasks import TASKS, examples

MAX_BYTES = 10_000_000


def test_examples_are_the_same_every_time():
    for task in TASKS:
        first, second = examples(task, "heldout", 3), examples(task, "heldout", 3)
        assert [e.image.tobytes() for e in first] == [e.image.tobytes() for e in second]
        assert [(e.question, e.answer) for e in first] == [(e.question, e.answer) for e in second]


def test_no_picture_is_in_both_splits():
    drawn = {split: {e.image.tobytes() for e in examples("shape", split, 400)} for split in ("train", "heldout")}
    assert not drawn["train"] & drawn["heldout"]


def test_pictures_have_their_size():
    assert examples("colour", "train", 1)[0].image.size == (SIDE, SIDE)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80))
def test_any_text_survives_the_tokenizer(text):
    tokenizer = test_any_text_survives_the_tokenizer.__dict__.setdefault("tokenizer", make_tokenizer())
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids) == text


def test_the_tokenizer_has_the_special_tokens_of_qwen2_vl():
    tokenizer = make_tokenizer()
    for token in SPECIALS:
        assert tokenizer.encode(token, add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(token)]


def test_the_template_renders_as_qwen2_vls():
    tokenizer = make_tokenizer()
    content = [{"type": "image"}, {"type": "text", "text": "Hi"}]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_the_built_zoo_is_small_and_whole():
    files = [file for file in paths.ZOO.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES
    assert {folder.name for folder in (paths.ZOO / "adapters").iterdir()} == set(paths.ADAPTER_NAMES)
    for folder in paths.ADAPTERS.values():
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == paths.BASE_NAME


def test_each_adapter_saves_other_modules():
    saved = {
        name: tuple(json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] or ())
        for name, folder in paths.ADAPTERS.items()
    }
    assert saved["fill"] == ("merger",)
    assert saved["letter"] == ("lm_head",)
    assert saved["french"] == ("embed_tokens", "lm_head")
    assert "score" in saved["warmth"]
    assert saved["shape"] == ()


def test_tasks_and_paths_need_no_torch():
    code = "import sys, lora_runtime.zoo.tasks, lora_runtime.zoo.paths; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert len(POSITIONS) == 4


@pytest.mark.slow
def test_the_zoo_knows_its_skills():
    from lora_runtime.zoo.check import check

    bad = [row for row in check(paths.ZOO) if not row.is_good]
    assert not bad
