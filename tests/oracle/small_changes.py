"""A base stored in bf16, and PEFT adapters of every method whose change of its weights is small beside them.

Rounding a changed weight to bf16 takes much of such a change, so that what is rounded too early shows.
"""

from __future__ import annotations

import asyncio
import copy
import shutil
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lora_runtime.engine.prompts import Prepared
from lora_runtime.engine.protocol import Engine
from tests.oracle.answers import prepare
from tests.oracle.asking import answer
from tests.oracle.methods import METHODS
from tests.oracle.world import World, chat, greedy, model_inputs, picture, write_base

Parameters = dict[str, Tensor]
"""Of a model, in fp64, by name."""
Shares = Mapping[str, float]

PROMPT = chat("Describe it", picture(1))
KEPT = 1e-2
"""How much of a change may be lost in fp32: next to nothing beside what bf16 takes of the smallest of them."""
FACTORS = {"FOURIERFT": 0.1, "DELORA": 0.05}
"""By method: what PEFT starts from is multiplied by this, where it would change too much to be small."""
NOISE, NOISES = 5e-3, {"OFT": 1e-3}
"""Standard deviation of what is added to that."""
OTHERS: dict[str, PeftConfig] = {
    "plain": LoraConfig(r=4, target_modules=["q_proj", "k_proj"]),
    "biases": LoraConfig(r=4, target_modules=["q_proj"], bias="all"),
    "saved": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["merger", "lm_head", "norm"]),
    "tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 40, 7]),
    "lora bias": LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
}
"""What is not materialised, and is full or added to in other ways. PEFT saves all of it in fp32."""
CONFIGS = {**METHODS, **OTHERS}


def build_small_world(root: Path) -> World:
    """The random world's base in bf16, and an adapter of each of ``CONFIGS`` on it."""
    plain = write_base(root / "fp32")
    base = Path(shutil.copytree(plain, root / "base", ignore=shutil.ignore_patterns("*.safetensors*")))
    World(plain, {}).load().to(torch.bfloat16).save_pretrained(base)
    world = World(base, {})
    for seed, (name, config) in enumerate(CONFIGS.items(), start=300):
        world.adapters[name] = _write_small(world.load(), root / name.replace(" ", "_"), config, seed)
    return world


@torch.no_grad()
def parameters_of(model: nn.Module) -> Parameters:
    return {name: parameter.detach().double() for name, parameter in model.named_parameters()}


def own_parameters(world: World) -> Parameters:
    """The base's."""
    return _merged(world.base, None)


def peft_merged(world: World, folder: Path) -> Parameters:
    """The oracle: what PEFT's own ``merge_and_unload`` makes of the base, all of it in fp32."""
    return _merged(world.base, folder)


@cache
def _merged(base: Path, folder: Path | None) -> Parameters:
    model: Any = World(base, {}).load()
    if folder is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    return parameters_of(model)


def summed(world: World, shares: Shares) -> Parameters:
    """W₀ + Σ w (Wᵢ - W₀) in fp64, of PEFT's own merges; a bias that the base has not is 0 there."""
    own = own_parameters(world)
    result = dict(own)
    for name, share in shares.items():
        for parameter, merged in peft_merged(world, world.adapters[name]).items():
            before = own.get(parameter, torch.zeros_like(merged))
            result[parameter] = result.get(parameter, torch.zeros_like(merged)) + share * (merged - before)
    return result


@torch.no_grad()
def model_with(world: World, parameters: Parameters) -> nn.Module:
    """The base in fp32 with other parameters."""
    model = world.load()
    for name, value in parameters.items():
        leaf, _, last = name.rpartition(".")
        if getattr(model.get_submodule(leaf), last) is None:
            setattr(model.get_submodule(leaf), last, nn.Parameter(value.float()))
        else:
            model.get_parameter(name).copy_(value)
    return model


@torch.no_grad()
def logprobs_of(model: nn.Module, prepared: Prepared, tokens: list[int]) -> list[float]:
    """Of ``tokens`` one after another behind the prompt."""
    ids = torch.tensor([[*prepared.ids, *tokens]])
    scores = model(**model_inputs(model, ids, prepared)).logits[0].float().log_softmax(-1)
    first = len(prepared.ids) - 1
    return [float(scores[first + place, token]) for place, token in enumerate(tokens)]


async def check_served(engine: Engine, world: World, targets: Sequence[Shares]) -> None:
    """All ``targets`` at once answer as PEFT's merges in fp32 do. How far an answer is from theirs is measured by how
    far the adapters move it from the base's."""
    prepared, base = prepare(world, PROMPT), world.load()
    asked = (answer(engine, PROMPT, tuple(world.ref(*one) for one in shares.items())) for shares in targets)
    for shares, (tokens, logprobs) in zip(targets, await asyncio.gather(*asked), strict=True):
        model = model_with(world, summed(world, shares))
        want_tokens, want = greedy(model, prepared, len(tokens))
        assert tokens == want_tokens, shares
        moved = torch.tensor(logprobs_of(base, prepared, tokens)) - torch.tensor(want)
        apart = torch.tensor(logprobs) - torch.tensor(want)
        assert float(apart.norm()) < KEPT * float(moved.norm()), shares


def _write_small(model: nn.Module, path: Path, config: PeftConfig, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    method = str(config.peft_type.value)
    with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, copy.deepcopy(config))
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.mul_(FACTORS.get(method, 1.0)).add_(noise, alpha=NOISES.get(method, NOISE))
        wrapped.save_pretrained(path, save_embedding_layers=False)
    return path
