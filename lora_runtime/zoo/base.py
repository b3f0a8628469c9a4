"""The tiny base: Qwen2-VL's architecture, special tokens, chat template and file layout, untrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lora_runtime.zoo.pictures import SIDE
from lora_runtime.zoo.tasks import all_texts

HIDDEN = 128
HEADS = 4
CONTEXT = 2048
SYSTEM = "You are a helpful assistant."
SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen2's own split: contractions, words with one leading symbol or space, single digits, runs of symbols, newlines.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE over the zoo's texts with Qwen2-VL's special tokens; any text can be tokenized."""
    from tokenizers import Regex

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator([*all_texts(), SYSTEM, "system\nuser\nassistant\n"] * 2, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=[token for token in SPECIALS if token not in ("<|im_end|>", "<|endoftext|>")],
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_processor() -> Any:
    """Preprocessing that leaves the zoo's pictures at their own size."""
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": SIDE * SIDE})


def make_model(tokenizer: Any) -> Qwen2VLForConditionalGeneration:
    """About 1.2 M parameters, randomly initialised from torch's current seed."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIALS}
    half = HIDDEN // HEADS // 2
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": HIDDEN,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            # M-RoPE gives columns the slowest frequencies. Pictures are four tokens wide, so the slowest
            # must still turn visibly over four steps; Qwen2-VL's own 1e6 would make columns look alike.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 2.0,
                "mrope_section": [half // 4, half // 8 * 3, half // 8 * 3],
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "num_heads": 2,
            "hidden_size": HIDDEN,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


def save_around(path: Path, tokenizer: PreTrainedTokenizerFast, processor: Any) -> None:
    """Everything of a checkpoint but the weights."""
    tokenizer.save_pretrained(path)
    processor.save_pretrained(path)
