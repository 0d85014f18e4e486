"""The training stages: a file of its name for each, and what runs any of them."""

DESCRIPTIONS = {
    "pretrain": "Train on tokens from `llm3d data tokenize`, or from Megatron.",
    "sft": "Fine-tune on conversations: learn the replies.",
    "reward": "Train a reward model on comparisons of replies.",
    "dpo": "Direct preference optimisation on comparisons of replies.",
    "orpo": "Odds ratio preference optimisation on comparisons of replies; needs no reference model.",
    "kto": "Kahneman-Tversky optimisation on replies that are labelled desirable or not.",
    "ppo": "Reinforcement learning from a reward model or a function: PPO, GRPO or RLOO.",
}
