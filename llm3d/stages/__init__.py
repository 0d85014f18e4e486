"""The training stages: a file of its name for each, and what runs any of them."""

DESCRIPTIONS = {
    "pretrain": "Pretrain on tokenized text.\n\nThe tokens are those of `llm3d data tokenize`, or of Megatron.",
    "sft": "Fine-tune on conversations (SFT): learn the replies.",
    "reward": "Train a reward model on comparisons of replies.",
    "dpo": "Train by DPO on comparisons of replies.\n\nDirect preference optimization: Rafailov et al. 2023.",
    "orpo": "Train by ORPO on comparisons of replies.\n\nOdds ratio preference optimization; no reference model.",
    "simpo": "Train by SimPO on comparisons of replies.\n\nSimple preference optimization; no reference model.",
    "kto": "Train by KTO on replies labeled good or bad.\n\nKahneman-Tversky optimization: Ethayarajh et al. 2024.",
    "ppo": "Train by PPO, GRPO or RLOO from rewards.\n\nRewards come from a reward model or a function.",
}
