"""What fine-tuning, a reward model and DPO learn, on held-out samples, from a base model and two files.

    python benchmarks/learning.py --model BASE --conversations gsm8k_train.jsonl \\
        --preferences gsm8k_preferences.jsonl --output DIR

BASE is a Hugging Face directory or a checkpoint; conversations have question and answer, preferences prompt, chosen
and rejected. Fine-tuning first; from its model a reward model and DPO, on the preferences and on two planted ones
made of the conversations: a keyword in the middle of an answer ("certainly" against "possibly"), and the longer of
two answers (whole against its first half). The commands are shown as they run; DIR gets the runs and learning.png.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

HELD_OUT = 300
PLANTED = 2400  # conversations that become planted preferences
REWARD_STEPS = 60
DPO = {"preferences": (60, 5e-5), "keyword": (60, 5e-5), "longer": (80, 1e-4)}  # steps and learning rate
COMMON = "precision.compute=bf16 batch.global=32 data.sequence_length=512 optim.warmup_steps=5 log.every=5"
Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--conversations", required=True, type=Path)
    parser.add_argument("--preferences", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--tuning-steps", type=int, default=120)
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    conversations = rows(arguments.conversations)
    write(output / "conversations", conversations)
    pairs = {
        "preferences": rows(arguments.preferences),
        "keyword": keyword(conversations[:PLANTED]),
        "longer": longer(conversations[:PLANTED]),
    }
    tune = settings(output, "conversations", arguments.model, arguments.tuning_steps)
    llm3d(f"eval configs/stages/sft.yaml {tune} run.dir={output}/before checkpoint.resume=none")
    llm3d(f"sft configs/stages/sft.yaml {tune} run.dir={output}/sft optim.lr=5e-4")
    tuned = sorted((output / "sft").glob("checkpoints/step-*"))[-1]
    for name, some in pairs.items():
        write(output / name, some)
        data = settings(output, name, str(tuned), REWARD_STEPS)
        llm3d(f"reward configs/stages/reward.yaml {data} run.dir={output}/{name}-reward optim.lr=1e-4")
        steps, rate = DPO[name]
        data = settings(output, name, str(tuned), steps)
        llm3d(f"dpo configs/stages/dpo.yaml {data} run.dir={output}/{name}-dpo optim.lr={rate}")
    draw(output, list(pairs))


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def keyword(conversations: list[Row]) -> list[Row]:
    """Answers that differ in one word."""
    pairs, draw_place = [], random.Random(1)
    for row in conversations:
        words = row["answer"].split()
        at = draw_place.randrange(len(words) + 1)
        chosen, rejected = (" ".join([*words[:at], word, *words[at:]]) for word in ("certainly", "possibly"))
        pairs.append({"prompt": row["question"], "chosen": chosen, "rejected": rejected})
    return pairs


def longer(conversations: list[Row]) -> list[Row]:
    """Whole answers, and the first half of their lines."""
    pairs = []
    for row in conversations:
        lines = row["answer"].split("####")[0].strip().split("\n")
        half = "\n".join(lines[: len(lines) // 2])
        if half:
            pairs.append({"prompt": row["question"], "chosen": "\n".join(lines), "rejected": half})
    return pairs


def write(path: Path, some: list[Row]) -> None:
    """PATH.jsonl and PATH-held-out.jsonl; no prompt is in both."""
    prompts = sorted({row.get("prompt", row.get("question", "")) for row in some})
    random.Random(0).shuffle(prompts)
    held_out = set(prompts[: min(HELD_OUT, len(prompts) // 8)])
    for suffix, inside in (("", False), ("-held-out", True)):
        chosen = [row for row in some if (row.get("prompt", row.get("question", "")) in held_out) == inside]
        text = "".join(json.dumps(row) + "\n" for row in chosen)
        path.with_name(f"{path.name}{suffix}.jsonl").write_text(text, encoding="utf-8")


def settings(output: Path, name: str, model: str, steps: int) -> str:
    return (
        f"model.path={model} data.train={output}/{name}.jsonl data.valid={output}/{name}-held-out.jsonl {COMMON} "
        f"train.steps={steps} train.eval_every={10 if steps < 100 else steps // 6}"
    )


def llm3d(command: str) -> None:
    print(f"$ llm3d {command}", flush=True)
    subprocess.run([sys.executable, "-m", "llm3d", *command.split()], check=True)


def draw(output: Path, names: list[str]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    left.plot(*curve(output / "sft", "valid_perplexity"), "ko-")
    left.set(
        xlabel="step",
        ylabel="perplexity of replies",
        title="Fine-tuning, held-out conversations",
        yscale="log",
    )
    for name in names:
        for stage, metric, line in (
            ("reward", "valid_accuracy", "-"),
            ("dpo", "valid_rewards/accuracies", "--"),
        ):
            right.plot(*curve(output / f"{name}-{stage}", metric), f"o{line}", label=f"{name}, {stage}")
    right.set(xlabel="step", ylabel="accuracy", title="Preferences, held-out prompts", ylim=(0.4, 1.02))
    right.legend(loc="center right", bbox_to_anchor=(1, 0.62))
    figure.savefig(output / "learning.png", dpi=110)


def curve(run: Path, metric: str) -> tuple[list[int], list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [(line["step"], line[metric]) for line in lines if metric in line]
    return [step for step, _ in found], [value for _, value in found]


if __name__ == "__main__":
    main()
