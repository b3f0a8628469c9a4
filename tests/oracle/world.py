"""A random Qwen2-VL checkpoint on disk, with tokenizer and preprocessing, and PEFT adapters of every family on it.

``models.py`` makes models in memory; an engine wants folders.
"""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftConfig, PeftModel, get_peft_model
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen2VLPreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lora_runtime.checkpoint import fingerprint
from lora_runtime.engine.entry import AdapterReader
from lora_runtime.engine.prompts import Prepared
from lora_runtime.engine.protocol import AdapterRef, ChatPrompt, ImagePart, Message, TextPart
from lora_runtime.layout import BaseLayout
from lora_runtime.weights import AdapterWeights
from tests.oracle.models import apply_dense

SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LABELS = ("cat", "dog", "owl")
ALL_LM = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

FAMILIES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ALL_LM},
    "patterns": {
        "r": 4,
        "rank_pattern": {"layers.0.self_attn.q_proj": 7, "v_proj": 2},
        "alpha_pattern": {"q_proj": 3, r"layers\.1\.mlp\..*": 20},
        "target_modules": ["q_proj", "v_proj", "up_proj"],
    },
    "one_layer": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "regex": {"r": 4, "target_modules": r"^(?!.*visual).*(?:q_proj|o_proj).*"},
    "merger_lora": {"r": 4, "target_modules": ["q_proj", "merger.mlp.0", "merger.mlp.2"]},
    "tower": {"r": 3, "target_modules": ["qkv", "proj", "fc1", "fc2"]},
    "saved_merger": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["merger"]},
    "saved_head": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "saved_vocabulary": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved_norms": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["norm", "post_attention_layernorm"]},
    "saved_block": {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["visual.blocks.0"]},
    "vocabulary_lora": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "tokens": {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [3, 40, 7]},
    "all_biases": {"r": 4, "target_modules": ["q_proj"], "bias": "all"},
    "own_biases": {"r": 4, "target_modules": ["q_proj", "fc1"], "bias": "lora_only"},
    "lora_bias": {"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_bias": True},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "gate_proj", "merger.mlp.0"]},
}
METHODS: dict[str, PeftConfig] = {
    "loha": LoHaConfig(r=3, alpha=5, target_modules=["k_proj", "up_proj", "fc1"]),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": OFTConfig(oft_block_size=32, target_modules=["q_proj", "o_proj"], modules_to_save=["merger"]),
}
"""Adapters of other PEFT methods, which are served as saved modules."""
NAMES = (*FAMILIES, *METHODS)


class Qwen2VLForSequenceClassification(GenericForSequenceClassification, Qwen2VLPreTrainedModel):
    """A classifier on Qwen2-VL, built as transformers builds its own."""


@dataclass(frozen=True)
class World:
    """A base folder and its adapters' folders."""

    base: Path
    adapters: dict[str, Path]

    def ref(self, name: str, weight: float = 1.0) -> AdapterRef:
        path = self.adapters[name]
        return AdapterRef(version=fingerprint(path), path=str(path), name=name, weight=weight)

    def read(self, name: str) -> AdapterWeights:
        return AdapterReader(BaseLayout.from_config(self.base), str(self.base), 1 << 30).read(self.adapters[name])

    def load(self) -> Any:
        return AutoModelForImageTextToText.from_pretrained(self.base, dtype=torch.float32).eval()

    def classifier(self) -> nn.Module:
        """The base under an untrained ``score`` head."""
        loaded = self.load()
        loaded.config.num_labels = len(LABELS)
        model = Qwen2VLForSequenceClassification(loaded.config)
        model.model = loaded.model
        return model.eval()

    def peft(self, name: str) -> nn.Module:
        """The oracle: PEFT's own model with this adapter alone."""
        base = self.classifier() if name == "classifier" else self.load()
        return PeftModel.from_pretrained(base, self.adapters[name]).eval()

    def dense(self, shares: dict[str, float]) -> nn.Module:
        """The oracle of combinations: base + Σ w Δ, added into the weights in fp32."""
        model = self.load()
        deltas = [apply_dense(self.load(), self.read(name)) for name in shares]
        with torch.no_grad():
            own = {name: p.clone() for name, p in model.named_parameters()}
            for name, p in model.named_parameters():
                for share, changed in zip(shares.values(), deltas, strict=True):
                    p += share * (changed.get_parameter(name) - own[name])
        return model


def build_world(root: Path, *, tie: bool = False, qwen2_5: bool = False) -> World:
    """Write the base, an adapter of each family and a classifier; a few seconds.

    ``qwen2_5``: a Qwen2.5-VL, with windowed attention and gated MLPs in its tower, and no classifier.
    """
    world = World(write_base(root / "base", tie, qwen2_5), {})
    configs = {name: LoraConfig(**options) for name, options in FAMILIES.items()} | copy.deepcopy(METHODS)
    for seed, (name, config) in enumerate(configs.items(), start=100):
        if qwen2_5 and not isinstance(config.target_modules, str):
            # Its tower's MLPs have the names of the language model's.
            config.target_modules = set(config.target_modules) - {"fc1", "fc2"}
        world.adapters[name] = _write_adapter(world.load(), root / name, config, seed)
    if qwen2_5:
        return world
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    folder = _write_adapter(world.classifier(), root / "classifier", config, seed=7)
    (folder / "config.json").write_text(json.dumps({"id2label": dict(enumerate(LABELS))}))
    world.adapters["classifier"] = folder
    return world


@torch.no_grad()
def greedy(model: nn.Module, prepared: Prepared, count: int) -> tuple[list[int], list[float]]:
    """Token ids and log-probabilities by transformers' own cached decoding, one sequence alone."""
    tokens, logprobs = [], []
    output = model(**model_inputs(model, torch.tensor([prepared.ids]), prepared), use_cache=True)
    for _ in range(count):
        scores = output.logits[0, -1].float().log_softmax(-1)
        tokens.append(int(scores.argmax()))
        logprobs.append(float(scores[tokens[-1]]))
        following = torch.tensor([[tokens[-1]]])
        output = model(input_ids=following, past_key_values=output.past_key_values, use_cache=True)
    return tokens, logprobs


@torch.no_grad()
def label_probabilities(model: nn.Module, prepared: Prepared) -> list[float]:
    logits: Tensor = model(**model_inputs(model, torch.tensor([prepared.ids]), prepared)).logits[0]
    return logits.float().softmax(-1).tolist()


def picture(seed: int, width: int = 84, height: int = 56) -> bytes:
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def chat(text: str, *images: bytes) -> ChatPrompt:
    parts = (*(ImagePart(data=image) for image in images), TextPart(text=text))
    return ChatPrompt(messages=(Message(role="user", parts=parts),))


def model_inputs(model: nn.Module, ids: Tensor, prepared: Prepared) -> dict[str, Tensor]:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    inner.model.rope_deltas = None
    inputs = {"input_ids": ids}
    if prepared.images:
        inputs["pixel_values"] = torch.cat([image.pixels for image in prepared.images])
        inputs["image_grid_thw"] = torch.tensor([image.grid for image in prepared.images])
        inputs["mm_token_type_ids"] = (ids == inner.config.image_token_id).int()
    return inputs


def _write_adapter(model: nn.Module, path: Path, config: PeftConfig, seed: int) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, config)
        _randomise([(n, p) for n, p in wrapped.named_parameters() if p.requires_grad], seed)
        wrapped.save_pretrained(path, save_embedding_layers=False)
    return path


def write_base(path: Path, tie: bool = False, qwen2_5: bool = False) -> Path:
    """The base alone, with its tokenizer and preprocessing, in fp32."""
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(path)
    config = (_config_2_5 if qwen2_5 else _config)(tokenizer, tie)
    model = AutoModelForImageTextToText.from_config(config)
    _randomise(model.named_parameters(), seed=0)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(path)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112}).save_pretrained(path)
    return path


def _randomise(parameters: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (1.0 if "embed_tokens" in name and "lora" not in name else 0.12))
            else:
                parameter.copy_(noise * 0.2 + (1.0 if "norm" in name or "ln_q" in name else 0.0))


def _tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["What colour is the shape at the top left? red green blue"] * 4, trainer)
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    others: Sequence[str] = ["<|im_start|>", *SPECIALS[3:]]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=others
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _config(tokenizer: PreTrainedTokenizerFast, tie: bool) -> Qwen2VLConfig:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]},
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": tie,
    }
    vision = {"depth": 2, "embed_dim": 64, "num_heads": 2, "hidden_size": 128, "mlp_ratio": 2, "patch_size": 14}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie, **_image_tokens(ids))


def _config_2_5(tokenizer: PreTrainedTokenizerFast, tie: bool) -> Qwen2_5_VLConfig:
    """Windows of 2 x 2 merged patches, so that small pictures have several; the second block sees all of them."""
    like = _config(tokenizer, tie)
    vision = {
        **{"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 128},
        **{"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
    }
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    text = like.text_config.to_dict()
    del text["model_type"]
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie, **_image_tokens(ids))


def _image_tokens(ids: dict[str, int]) -> dict[str, int]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
