"""How the base and each adapter are trained. Every adapter saves other modules, on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_runtime.zoo.train import Schedule

LANGUAGE = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
QUIET_ON = ("colour", "colours", "codes", "shape", "size", "fill", "letter", "french")
"""Questions on which each adapter but its own learns to leave the base as it is."""

BASE = Schedule(
    steps=2600,
    batch_size=32,
    learning_rate=3e-3,
    # Lists teach positions and features fastest; single codes tie features to named positions.
    mix={"colour": 0.2, "code": 0.3, "colours": 0.15, "codes": 0.35},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """``lora`` are PEFT's ``LoraConfig`` fields.

    ``beside`` names an earlier adapter (LoRA alone) that is added to the base in every other step: the new
    one learns its skill, and to leave the other's alone, with and without it, so that their sum keeps both.
    """

    lora: dict[str, Any]
    steps: int = 400
    learning_rate: float = 3e-3
    num_silent: int = 12
    beside: str | None = None

    def schedule(self, task: str) -> Schedule:
        silent = {other: 1.0 for other in QUIET_ON if other != task} if self.num_silent else {}
        if self.beside is not None:
            silent[self.beside] = float(len(silent))
        return Schedule(
            steps=self.steps,
            batch_size=24 + self.num_silent,
            learning_rate=self.learning_rate,
            mix={task: 1.0},
            silent=silent,
            num_silent=self.num_silent,
        )


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
            "r": 6,
            "lora_alpha": 12,
            "rank_pattern": {"down_proj": 8},
            "alpha_pattern": {"down_proj": 16},
            "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
            "modules_to_save": ["merger"],
        },
        steps=500,
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
        },
        steps=900,
        num_silent=16,
        beside="shape",
    ),
    "warmth": Recipe(
        lora={
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
            "modules_to_save": ["score"],
            "task_type": "SEQ_CLS",
        },
        num_silent=0,
    ),
}
