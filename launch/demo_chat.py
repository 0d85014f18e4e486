"""The demo's model learns to answer questions, and which answers are better: fine-tuning, a reward model, DPO.

    make demo-chat      # after, or with, make demo

The questions are about Python's standard library; its docstrings answer them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from demo import DEMO, HERE, RUN, docstrings, run, run_on, say

HELD_OUT = 200  # questions that no model sees in training
ASKED = 3  # of them, at the end
COMMON = "batch.global=32 batch.micro=16 data.sequence_length=256 optim.warmup_steps=5 log.every=10"


def main() -> None:
    os.chdir(HERE)
    started = time.monotonic()
    for earlier in ("sft", "reward", "dpo"):
        shutil.rmtree(DEMO / earlier, ignore_errors=True)
    say(
        "1. Questions about the standard library, with their answers, and pairs: an answer, and its words in disorder"
    )
    write_questions()
    base = latest(RUN)
    say("2. Supervised fine-tuning: of question and answer, the answer is learned")
    data = f"data.train={DEMO}/questions.jsonl data.valid={DEMO}/questions-held-out.jsonl {COMMON}"
    config = "configs/stages/sft.yaml"
    run(f"llm3d data show {config} model.path={base} {data} --samples 1")
    run(f"llm3d sft {config} model.path={base} {data} run.dir={DEMO}/sft optim.lr=5e-4 train.eval_every=60")
    tuned = latest(DEMO / "sft")
    say("3. A reward model, from the fine-tuned one: answers in order score higher. On two pipeline stages")
    data = (
        f"data.train={DEMO}/pairs.jsonl data.valid={DEMO}/pairs-held-out.jsonl {COMMON} train.eval_every=40"
    )
    config = "configs/stages/reward.yaml"
    run_on(
        2,
        f"reward {config} model.path={tuned} {data} run.dir={DEMO}/reward optim.lr=5e-4 parallel.pipeline=2",
    )
    say("4. DPO with low-rank adapters: the fine-tuned model itself prefers order. On two data ranks")
    config = "configs/stages/dpo.yaml"
    run_on(
        2,
        f"dpo {config} model.path={tuned} {data} run.dir={DEMO}/dpo optim.lr=1e-4 "
        "lora.rank=16 zero.stage=1 dpo.rpo_alpha=1",
    )
    say("5. The adapters merged into a plain Hugging Face directory")
    run(f"llm3d export {latest(DEMO / 'dpo')} --output {DEMO}/answers --overwrite")
    say("6. What it has learned to say")
    model = f"model.path={DEMO}/answers run.dir={DEMO}/answers"
    run(
        f"llm3d generate configs/stages/sft.yaml {model} --prompts {DEMO}/asked.jsonl generate.temperature=0 "
        "generate.max_new_tokens=60"
    )
    print(f"\nDone in {time.monotonic() - started:.0f} s. {DEMO}/answers is a model that transformers loads.")


def latest(run_dir: Path) -> Path:
    checkpoints = sorted(run_dir.glob("checkpoints/step-*"))
    if not checkpoints:
        sys.exit(f"{run_dir} holds no checkpoint: run `make demo` first")
    return checkpoints[-1]


def write_questions() -> None:
    """demo/questions.jsonl, demo/pairs.jsonl, and of each a file of held-out ones."""
    answers = dict(definitions())
    names = sorted(answers)
    random.Random(0).shuffle(names)
    for suffix, some in (("-held-out", names[:HELD_OUT]), ("", names[HELD_OUT:])):
        questions = [{"question": f"What is {name}?", "answer": answers[name]} for name in some]
        pairs = [
            {"prompt": f"What is {name}?", "chosen": answers[name], "rejected": in_disorder(answers[name])}
            for name in some
        ]
        for kind, rows in (("questions", questions), ("pairs", pairs)):
            path = DEMO / f"{kind}{suffix}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            print(f"  {path}: {len(rows):,} {kind}")

    asked = [json.dumps({"prompt": f"What is {name}?"}) + "\n" for name in names[:ASKED]]
    (DEMO / "asked.jsonl").write_text("".join(asked), encoding="utf-8")


def in_disorder(answer: str) -> str:
    """The same words, at least one of them elsewhere."""
    words = answer.split()
    random.Random(answer).shuffle(words)
    return " ".join(words) if words != answer.split() else f"{words[-1]} {' '.join(words[:-1])}"


def definitions() -> Iterator[tuple[str, str]]:
    """Names of the standard library, and the first paragraph of what is said of each."""
    for document in docstrings(Path(sysconfig.get_paths()["stdlib"])):
        name, _, text = document.partition("\n\n")
        answer = " ".join(text.split("\n\n")[0].split())
        if 20 <= len(answer) <= 300 and len(set(answer.split())) > 2 and "._" not in name:
            yield name, answer


if __name__ == "__main__":
    main()
