"""PEFT configurations of every family that is served, each saved by PEFT on a tied or an untied base."""

from __future__ import annotations

from typing import Any

from peft.utils.constants import DUMMY_TARGET_MODULES

UNTIED: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r"^(?!.*visual).*(?:q_proj|o_proj|gate_proj).*"},
    "all linear": {"target_modules": "all-linear", "exclude_modules": ["visual.merger.mlp.0", "o_proj"]},
    "excluded by regex": {"target_modules": ["q_proj", "qkv"], "exclude_modules": r".*layers\.0\..*"},
    "one layer": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "one layer of both towers": {"target_modules": ["q_proj", "qkv"], "layers_to_transform": 0},
    "rslora": {"r": 6, "lora_alpha": 5, "target_modules": ["q_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": r".*(q_proj|gate_proj|fc1)",
        "rank_pattern": {"layers.0.*q_proj": 2, "fc1": 3, "q_proj": 5},
        "alpha_pattern": {r".*layers\.1\..*": 5, "model.visual.blocks.0.mlp.fc1": 11},
        "use_rslora": True,
    },
    "tower and convolution": {"target_modules": ["qkv", "proj", "fc1", "fc2"]},
    "merger": {"target_modules": ["merger.mlp.0", "merger.mlp.2"]},
    "vocabulary": {"target_modules": ["embed_tokens", "lm_head"]},
    "lora bias": {"target_modules": ["q_proj", "o_proj", "proj"], "lora_bias": True},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "all biases and a saved merger": {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["merger"]},
    "own biases": {"target_modules": ["q_proj", "o_proj", "qkv"], "bias": "lora_only"},
    "saved merger": {"target_modules": ["q_proj"], "modules_to_save": ["merger"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved vocabulary": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved norms by bare suffix": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "saved tower": {"target_modules": ["q_proj", "qkv"], "modules_to_save": ["visual"]},
    "nothing but a saved head": {"target_modules": DUMMY_TARGET_MODULES, "modules_to_save": ["lm_head"]},
    "nothing but tokens": {"target_modules": DUMMY_TARGET_MODULES, "trainable_token_indices": [3, 70, 5]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 70, 5]},
    "tokens by module": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 70], "lm_head": [9, 3, 200]},
    },
    "tokens and a saved head": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": [3, 70, 5],
        "modules_to_save": ["lm_head"],
    },
    "gaussian start": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "tying asked for in vain": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}

TIED: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "embedding, tying": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "head, tying": {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True},
    "regex, tying": {"target_modules": r".*embed_tokens|.*q_proj", "ensure_weight_tying": True},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding, tying": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "saved head, tying": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 70, 5]},
    "tokens of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 70, 5]}},
    "equal tokens of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 70], "lm_head": [3, 70]},
    },
    "other tokens of each": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 70], "lm_head": [3, 9]},
    },
}
