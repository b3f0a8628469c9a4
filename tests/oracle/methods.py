"""PEFT configurations of the methods that are served by materialising."""

from __future__ import annotations

from peft import (
    DeloraConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
)

METHODS: dict[str, PeftConfig] = {
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "gate_proj", "qkv", "merger.mlp.0"]),
    "dora with patterns": LoraConfig(
        r=4,
        use_dora=True,
        use_rslora=True,
        target_modules=r".*(q_proj|down_proj)",
        rank_pattern={"layers.0.*q_proj": 2},
        alpha_pattern={"down_proj": 3},
    ),
    "dora on the vocabulary": LoraConfig(r=4, use_dora=True, target_modules=["embed_tokens", "lm_head"]),
    "dora on the convolution": LoraConfig(r=4, use_dora=True, target_modules=["patch_embed.proj"]),
    "dora and a saved merger": LoraConfig(r=4, use_dora=True, target_modules=["v_proj"], modules_to_save=["merger"]),
    "loha": LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "fc1"], rank_pattern={"fc1": 2}),
    "lokr": LoKrConfig(r=3, alpha=5, target_modules=["q_proj", "up_proj"], decompose_both=True, decompose_factor=4),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3, patterns": IA3Config(target_modules=r".*(k_proj|up_proj)", feedforward_modules=r".*up_proj"),
    "oft": OFTConfig(oft_block_size=32, target_modules=["q_proj", "o_proj"]),
    "oft, exact": OFTConfig(
        oft_block_size=16, target_modules=["q_proj"], use_cayley_neumann=False, modules_to_save=["lm_head"]
    ),
    "hra": HRAConfig(r=4, apply_GS=True, target_modules=["q_proj", "v_proj"]),
    "fourierft": FourierFTConfig(n_frequency=50, scaling=20.0, target_modules=["q_proj", "v_proj"]),
    "delora": DeloraConfig(r=4, delora_lambda=3, target_modules=["q_proj", "v_proj"]),
}
