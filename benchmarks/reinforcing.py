"""What PPO learns on held-out prompts: an asked form, which a function checks, and what a trained reward model likes.

    python benchmarks/reinforcing.py --model SFT --reward-model REWARD --conversations gsm8k_train.jsonl --output DIR

SFT and REWARD are checkpoints of fine-tuning and of a reward model on grade-school mathematics (learning.py trains
both). The form is that of rewards.py: two lines with a calculation each, then the answer. The commands are shown as
they run; DIR gets the runs and reinforcing.png. In the end it says whether the goals are reached: the form's share
rises from under 20 % of the first step's replies to over 80 % on held-out prompts, whose replies stay within MAX_KL of
the starting model, and the reward model's score on held-out prompts rises from evaluation to evaluation.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path

from learning import curve, llm3d, rows, write

PROMPTS = 2000
MAX_KL = 25.0  # nats a reply, on average over the prompts of an evaluation
COMMON = (
    "data.sequence_length=256 generate.max_new_tokens=112 generate.max_sequences=64 batch.global=64 batch.micro=8 "
    "precision.compute=bf16 optim.lr=5e-5 optim.warmup_steps=2 optim.weight_decay=0 optim.schedule=constant "
    "train.eval_every=5 train.eval_steps=1 ppo.epochs=2 ppo.minibatches=2 ppo.lam=1.0 "
    "checkpoint.every=10 checkpoint.keep=1"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--reward-model", required=True)
    parser.add_argument("--conversations", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    output, form = arguments.output, Path(__file__).with_name("rewards.py")
    output.mkdir(parents=True, exist_ok=True)
    write(output / "prompts", rows(arguments.conversations)[:PROMPTS])
    rewards = {
        "form": ({"function": f"{form}:two_calculations"}, 40, 0.01),
        "model": ({"model": arguments.reward_model}, 20, 0.02),
    }
    for name, (source, steps, coefficient) in rewards.items():
        llm3d(
            f"ppo configs/stages/ppo.yaml model.path={arguments.model} data.train={output}/prompts.jsonl "
            f"data.valid={output}/prompts-held-out.jsonl {COMMON} "
            f"ppo.rewards={json.dumps([source], separators=(',', ':'))} "
            f"train.steps={steps} ppo.kl_coefficient={coefficient} ppo.critic_lr=1e-4 ppo.ema=0 "
            f"run.dir={output}/{name}"
        )
    draw(output)
    sys.exit(0 if reached(output) else 1)


def reached(output: Path) -> bool:
    """Whether each goal is reached; said for each."""
    first = curve(output / "form", "objective/scores")[1][0]
    form, model = (curve(output / name, "valid_objective/scores")[1] for name in ("form", "model"))
    furthest = max(curve(output / "form", "valid_objective/kl")[1])
    goals = {
        f"form from {first:.3f} to {form[-1]:.3f}": first < 0.2 and form[-1] > 0.8,
        f"form, KL at most {furthest:.1f} nats": furthest < MAX_KL,
        f"score {', '.join(f'{score:.2f}' for score in model)}": all(a < b for a, b in pairwise(model)),
    }
    for what, held in goals.items():
        print(f"{'reached' if held else 'NOT REACHED'}: {what}")
    return all(goals.values())


def draw(output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for axis, name, title in (
        (axes[0], "form", "Share of replies of the asked form"),
        (axes[1], "model", "Score of a trained reward model"),
    ):
        axis.plot(*curve(output / name, "objective/scores"), label="training prompts", alpha=0.4)
        axis.plot(*curve(output / name, "valid_objective/scores"), "o-", label="held-out prompts")
        axis.set(xlabel="step", title=title)
        axis.legend()
    for name in ("form", "model"):
        axes[2].plot(*curve(output / name, "valid_objective/kl"), "o-", label=name)
    axes[2].set(xlabel="step", title="KL of a reply from the starting model, held out")
    axes[2].legend()
    figure.savefig(output / "reinforcing.png", dpi=110)


if __name__ == "__main__":
    main()
