"""The base on its device: one step of packed tokens, and the encoding of images.

Shape legend: T packed tokens, H hidden, B rows sampled, V vocabulary, P patches, M merged patches.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from lora_runtime.engine.embedded.batch import Span, StepPlan
from lora_runtime.engine.embedded.cache import ATTENTION_NAME, Chunk, LaneCache, LaneStep, register_attention
from lora_runtime.engine.embedded.config import EmbeddedConfig
from lora_runtime.engine.embedded.sequence import Sequence
from lora_runtime.engine.images import Patches
from lora_runtime.engine.layers import SlotLayers, install
from lora_runtime.engine.routing import Router, Routing, Signature, Space
from lora_runtime.errors import EngineFault
from lora_runtime.layout import BaseLayout
from lora_runtime.weights import Head

MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")
DEFAULT_MAX_MODEL_LEN = 4096


class ModelRunner:
    """Holds the model, its slot layers and the key/value lanes. Only the step thread calls it once it serves."""

    def __init__(self, config: EmbeddedConfig) -> None:
        self.device, self.dtype = _placement(config)
        self.model = _load(config.base_path, self.device, self.dtype)
        text = self.model.config.get_text_config()
        if text.use_sliding_window:
            raise EngineFault("This base uses sliding-window attention, which the embedded engine does not compute.")
        self.eos_ids = _eos_ids(self.model)
        self.layout = BaseLayout.from_model(self.model)
        self.router = Router()
        self.layers: SlotLayers = install(self.model, self.router, prepack=config.prepack)
        register_attention()
        self._language: Any = self.model.model.language_model
        self._language.config._attn_implementation = ATTENTION_NAME
        self.max_model_len = min(text.max_position_embeddings, config.max_model_len or DEFAULT_MAX_MODEL_LEN)
        self.cache = LaneCache(
            num_layers=text.num_hidden_layers,
            num_lanes=config.max_batch_size,
            num_heads=text.num_key_value_heads,
            max_len=self.max_model_len,
            head_dim=text.hidden_size // text.num_attention_heads,
            dtype=self.dtype,
            device=self.device,
        )
        self._image_token: int = self.model.config.image_token_id
        self._merge = self.model.config.vision_config.spatial_merge_size**2

    @torch.inference_mode()
    def encode_images(self, images: Seq[tuple[Patches, Signature]]) -> list[Tensor]:
        """One pass of the tower and merger over images of different targets; returns (M_i, H) for each."""
        order = sorted(range(len(images)), key=lambda i: images[i][1])
        chosen = [images[i] for i in order]
        counts = [patches.pixels.shape[0] for patches, _ in chosen]
        self.router.set(
            patch=self._routing(
                "patch", [(signature, count) for (_, signature), count in zip(chosen, counts, strict=True)]
            ),
            merged=self._routing(
                "merged",
                [(signature, count // self._merge) for (_, signature), count in zip(chosen, counts, strict=True)],
            ),
        )
        pixels = torch.cat([patches.pixels for patches, _ in chosen]).to(self.device, self.dtype)
        grid = torch.tensor([patches.grid for patches, _ in chosen], device=self.device)
        features = self.model.model.visual(pixels, grid_thw=grid).pooler_output
        parts = features.split([count // self._merge for count in counts])
        found: list[Tensor] = [features] * len(images)
        for place, part in zip(order, parts, strict=True):
            found[place] = part
        return found

    @torch.inference_mode()
    def forward(self, plan: StepPlan[Sequence]) -> Tensor:
        """Compute the plan's tokens; returns the last hidden state (T, H) of each, in packing order."""
        sequences = [*plan.decode, *(span.sequence for span in plan.prefill)]
        counts = [1] * len(plan.decode) + [span.stop - span.start for span in plan.prefill]
        self.router.set(text=self._routing("text", [(s.signature, n) for s, n in zip(sequences, counts, strict=True)]))
        ids, positions = self._tokens(plan)
        embedded = self._language.embed_tokens(ids[None])
        self._place_images(embedded[0], plan)
        output = self._language(
            inputs_embeds=embedded,
            position_ids=positions[:, None],
            attention_mask={"full_attention": None},
            use_cache=False,
            lane_step=self._lane_step(plan),
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor, signatures: Seq[Signature]) -> Tensor:
        """``hidden`` (B, H), the target of each row; returns (B, V) fp32."""
        self.router.set(logits=self._routing("logits", [(signature, 1) for signature in signatures]))
        scores: Tensor = self.model.lm_head(hidden)
        return scores.float()

    @torch.inference_mode()
    def head_logits(self, hidden: Tensor, head: Head) -> Tensor:
        """``hidden`` (H,) through a classification head, in fp32; returns (L,)."""
        weight = head.weight.to(self.device, torch.float32)
        bias = None if head.bias is None else head.bias.to(self.device, torch.float32)
        return torch.nn.functional.linear(hidden.float(), weight, bias)

    def _routing(self, space: Space, signatures: Seq[tuple[Signature, int]]) -> Routing:
        return self.router.like_last(space, signatures, device=self.device, dtype=self.dtype)

    def _tokens(self, plan: StepPlan[Sequence]) -> tuple[Tensor, Tensor]:
        """Ids (T,) and M-RoPE positions (3, T)."""
        ids = [s.generated[-1] for s in plan.decode]
        decode = torch.tensor([s.position_of_next for s in plan.decode], dtype=torch.int64)
        positions = [decode.expand(3, -1)]
        for span in plan.prefill:
            prepared = span.sequence.job.prepared
            ids += prepared.ids[span.start : span.stop]
            positions.append(prepared.positions[:, span.start : span.stop])
        return torch.tensor(ids, device=self.device), torch.cat(positions, dim=1).to(self.device)

    def _place_images(self, embedded: Tensor, plan: StepPlan[Sequence]) -> None:
        """Overwrite placeholder rows of ``embedded`` (T, H) with image features."""
        start = len(plan.decode)
        for span in plan.prefill:
            features = span.sequence.image_features
            if features is not None:
                ids = torch.tensor(span.sequence.job.prepared.ids[: span.stop], device=self.device)
                is_image = ids == self._image_token
                before = int(is_image[: span.start].sum())
                here = is_image[span.start :].nonzero()[:, 0]
                embedded[start + here] = features[before : before + here.numel()].to(embedded.dtype)
            start += span.stop - span.start

    def _lane_step(self, plan: StepPlan[Sequence]) -> LaneStep:
        chunks, start = [], len(plan.decode)
        for span in plan.prefill:
            chunks.append(_chunk(span, start))
            start += span.stop - span.start
        lanes = [s.lane for s in plan.decode]
        return LaneStep(self.cache, lanes, [s.num_computed for s in plan.decode], chunks)


def _chunk(span: Span[Sequence], start: int) -> Chunk:
    return Chunk(start, start + span.stop - span.start, span.sequence.lane, span.start)


def _placement(config: EmbeddedConfig) -> tuple[torch.device, torch.dtype]:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if config.dtype != "auto":
        return device, getattr(torch, config.dtype)
    if device.type == "cpu":
        return device, torch.float32
    from transformers import AutoConfig

    stored = AutoConfig.from_pretrained(config.base_path).dtype
    return device, stored if isinstance(stored, torch.dtype) else torch.bfloat16


def _load(base_path: str, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    model_type = AutoConfig.from_pretrained(base_path).model_type
    if model_type not in MODEL_TYPES:
        raise EngineFault(
            f"The base at {base_path} is a '{model_type}' model; the embedded engine serves {', '.join(MODEL_TYPES)}."
        )
    model: Any = AutoModelForImageTextToText.from_pretrained(base_path, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval().requires_grad_(False)


def _eos_ids(model: Any) -> frozenset[int]:
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = model.config.get_text_config().eos_token_id
    return frozenset([ids] if isinstance(ids, int) else ids or [])
