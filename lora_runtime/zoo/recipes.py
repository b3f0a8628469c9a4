"""How the base and each adapter are trained. Every adapter saves other modules, on purpose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora_runtime.zoo.train import Schedule

LANGUAGE = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
REPLAY = {"colour": 0.1, "colours": 0.1, "codes": 0.05}
"""Base tasks mixed into each adapter's training: a delta that keeps still where it is not asked combines well."""

BASE = (
    # Lists first: they teach positions and features. Then single codes, which tie features to named positions.
    Schedule(
        steps=1500,
        batch_size=32,
        learning_rate=3e-3,
        mix={"colour": 0.35, "code": 0.15, "colours": 0.25, "codes": 0.25},
    ),
    Schedule(
        steps=600,
        batch_size=32,
        learning_rate=2e-3,
        mix={"colour": 0.25, "code": 0.6, "colours": 0.05, "codes": 0.1},
    ),
)
"""The base's phases, one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """``lora`` are PEFT's ``LoraConfig`` fields."""

    lora: dict[str, Any]
    steps: int = 400
    learning_rate: float = 3e-3
    replay: dict[str, float] = field(default_factory=lambda: dict(REPLAY))

    def schedule(self, task: str) -> Schedule:
        mix = {task: 1.0 - sum(self.replay.values()), **self.replay}
        return Schedule(steps=self.steps, batch_size=32, learning_rate=self.learning_rate, mix=mix)


RECIPES: dict[str, Recipe] = {
    "shape": Recipe(lora={"r": 8, "lora_alpha": 16, "target_modules": LANGUAGE}, steps=900),
    "size": Recipe(
        lora={
            "r": 6,
            "lora_alpha": 8,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "down_proj", "merger.mlp.0", "merger.mlp.2"],
        }
    ),
    "fill": Recipe(
        lora={
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"down_proj": 8},
            "alpha_pattern": {"down_proj": 16},
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "modules_to_save": ["merger"],
        }
    ),
    "letter": Recipe(
        lora={
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "modules_to_save": ["lm_head"],
        }
    ),
    "french": Recipe(
        lora={
            "r": 8,
            "lora_alpha": 16,
            "target_modules": LANGUAGE,
            "modules_to_save": ["embed_tokens", "lm_head"],
        }
    ),
    "warmth": Recipe(
        lora={
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
            "modules_to_save": ["score"],
            "task_type": "SEQ_CLS",
        },
        replay={},
    ),
}
