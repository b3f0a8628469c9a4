"""Tiny random Qwen2-VL bases and PEFT adapters of every family, seeded, and PEFT's own answer for them.

A base takes about 50 ms to build. Adapters are made by PEFT itself; every trainable tensor gets noise,
so that no part of an adapter is a no-op and a lost tensor always shows in the logits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from lora_runtime.weights import AdapterWeights

IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 316, 317, 318, 319
VOCABULARY = 320
ALWAYS_READ = (3, 70, 5)
"""Tokens that every sample contains, so that training them shows."""

ModelFactory = Callable[[], Qwen2VLForConditionalGeneration]


def tiny_qwen2vl(
    tie: bool = False,
    seed: int = 0,
    *,
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocabulary: int = VOCABULARY,
    vision_layers: int = 2,
    num_labels: int | None = None,
    head_bias: bool = False,
) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL with random weights in fp32, equal for equal arguments; head_dim is hidden / heads.

    ``num_labels`` adds a ``score`` layer on the last hidden state, as classifiers have it.
    """
    head_dim = hidden // heads
    text = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [head_dim // 4, head_dim // 8, head_dim // 8],
        },
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": tie,
    }
    vision = {
        "depth": vision_layers,
        "embed_dim": 64,
        "num_heads": 2,
        "hidden_size": hidden,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tie,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config).eval()
        if num_labels is not None:
            model.score = nn.Linear(hidden, num_labels, bias=head_bias)
        _perturb(model.parameters(), matrix=0.05, vector=0.1)
    return model


def save_adapter(
    model_factory: ModelFactory, config: LoraConfig, path: str | Path, seed: int = 1, adapter_name: str = "default"
) -> Path:
    """Make an adapter of ``config`` with PEFT on a fresh base, randomise all that trains, save it at ``path``."""
    folder = Path(path)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = get_peft_model(model_factory(), config, adapter_name=adapter_name)
        _perturb((p for p in model.parameters() if p.requires_grad), matrix=0.08, vector=0.2)
        model.save_pretrained(folder)
    return folder if adapter_name == "default" else folder / adapter_name


def sample_inputs(seed: int = 0, with_image: bool = True) -> dict[str, Tensor]:
    """One sequence of text around an image of 4 merged tokens (16 patches), or of text alone."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(2, 300, (12,), generator=generator)
    text[[1, 4, 8]] = torch.tensor(ALWAYS_READ)
    if not with_image:
        return {"input_ids": text[None]}
    image = torch.tensor([VISION_START, *[IMAGE_TOKEN] * 4, VISION_END])
    ids = torch.cat([text[:5], image, text[5:]])[None]
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
    }


@torch.no_grad()
def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits (T, V) of one sequence. Resets the position state that Qwen2-VL keeps between calls."""
    for module in model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None
    result: Tensor = model(**inputs).logits[0]
    return result


def peft_logits(model_factory: ModelFactory, path: str | Path, inputs: dict[str, Tensor]) -> Tensor:
    """The oracle: PEFT alone loads the adapter at ``path`` onto a fresh base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(model_factory(), str(path)).eval()
    return logits_of(model, inputs)


def dense_logits(model_factory: ModelFactory, weights: AdapterWeights, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of a fresh base with ``weights`` added into its parameters, leaf by leaf."""
    return logits_of(apply_dense(model_factory(), weights), inputs)


@torch.no_grad()
def apply_dense(model: nn.Module, weights: AdapterWeights, share: float = 1.0) -> nn.Module:
    """Add ``share`` times the delta of ``weights`` to each parameter of ``model``, in place."""
    if model.get_submodule("lm_head").weight is model.get_submodule("model.language_model.embed_tokens").weight:
        head = model.get_submodule("lm_head")
        head.weight = nn.Parameter(head.weight.clone())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for name, module in weights.saved.items():
        for parameter, tensor in module.parameters.items():
            own = before[f"{name}.{parameter}"]
            model.get_parameter(f"{name}.{parameter}").add_(share * (tensor.float() - own))
    for name, rows in weights.token_rows.items():
        own = before[f"{name}.weight"][rows.indices]
        model.get_parameter(f"{name}.weight")[rows.indices] += share * (rows.rows.float() - own)
    for name, factors in weights.lora.items():
        leaf = model.get_submodule(name)
        leaf.weight.add_(share * factors.delta().reshape(leaf.weight.shape))
        if factors.bias is not None:
            shift = share * factors.scaling * factors.bias.float()
            leaf.bias = nn.Parameter(shift if leaf.bias is None else leaf.bias + shift)
    return model


@torch.no_grad()
def _perturb(parameters: Iterable[nn.Parameter], *, matrix: float, vector: float) -> None:
    for parameter in parameters:
        parameter.add_(torch.randn_like(parameter) * (matrix if parameter.ndim > 1 else vector))
