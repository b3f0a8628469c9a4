"""Rules of the convention "mergekit" against mergekit's own code, where there is one: its pins differ from ours, so it
lives in an environment of its own, whose Python ``LOOM_TEST_MERGEKIT`` names."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_runtime.merge.rules import RULES, Options

PYTHON = os.environ.get("LOOM_TEST_MERGEKIT", "")
SHAPE = (24, 31)
SIGNED, POSITIVE = [0.7, -0.4, 1.1], [0.7, 0.4, 1.1]

SCRIPT = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
from mergekit.merge_methods import registry

given = load_file(sys.argv[1])
name, density, extra, weights = sys.argv[2], float(sys.argv[3]), json.loads(sys.argv[4]), json.loads(sys.argv[5])
uniform = iter([given[f"uniform{i}"] for i in range(len(weights))])
torch.bernoulli = lambda probabilities: (next(uniform) < probabilities).to(probabilities.dtype)
method = registry.get(name)

class Entry:
    def __init__(self, tensor, identifier):
        self.tensor, self.id = tensor, identifier

class Group:
    base = Entry(torch.zeros_like(given["delta0"]), "base")
    non_base = [Entry(given[f"delta{i}"], i) for i in range(len(weights))]

parameters = {"int8_mask": False, "lambda": 1.0, "normalize": method.default_normalize,
              "rescale": method.default_rescale, "weight": dict(enumerate(weights)),
              "density": dict.fromkeys(range(len(weights)), density)}
parameters |= {key: dict.fromkeys(range(len(weights)), value) for key, value in extra.items()}
save_file({"merged": method.merge_group(Group(), **parameters)}, sys.argv[6])
"""


@pytest.mark.skipif(not PYTHON, reason="no mergekit to compare with (LOOM_TEST_MERGEKIT: its environment's Python)")
@pytest.mark.parametrize(
    ("name", "options", "weights"),
    [
        ("ties", {}, POSITIVE),
        ("dare_linear", {}, SIGNED),
        ("dare_ties", {}, SIGNED),
        ("della", {"epsilon": 0.15}, POSITIVE),
        ("breadcrumbs", {"gamma": 0.05}, SIGNED),
    ],
)
@pytest.mark.parametrize("density", [0.4, 0.7])
def test_rules_of_its_convention_are_mergekits(
    tmp_path: Path, name: str, options: dict[str, float], weights: list[float], density: float
):
    """With weights of both signs where a recipe takes them: ``ties`` and ``della`` as mergekit divides them do not."""
    drawn = torch.Generator().manual_seed(5)
    deltas = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1))
    uniform = [torch.rand(SHAPE, generator=drawn, dtype=torch.float64) for _ in weights]
    given = {f"delta{i}": delta.clone() for i, delta in enumerate(deltas)}
    given |= {f"uniform{i}": values for i, values in enumerate(uniform)}
    save_file(given, tmp_path / "given.safetensors")
    (tmp_path / "script.py").write_text(SCRIPT)
    extra = "{" + ", ".join(f'"{key}": {value}' for key, value in options.items()) + "}"
    arguments = ["given.safetensors", name, str(density), extra, str(weights), "out.safetensors"]
    done = subprocess.run(
        [PYTHON, "script.py", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    want = load_file(tmp_path / "out.safetensors")["merged"]
    rule = RULES[name]
    got = rule.apply(
        deltas.double(),
        torch.tensor(weights, dtype=torch.float64),
        Options(density=density, convention="mergekit", **options),
        torch.Generator().manual_seed(5),
    )
    assert torch.allclose(got.float(), want, atol=2e-6), float((got.float() - want).abs().max())
