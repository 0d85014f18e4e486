"""PPO beside TRL's PPOTrainer: replies a second through whole steps, on the same models and prompts.

    python benchmarks/ppo_against_trl.py --model SFT --reward-model REWARD --data prompts.jsonl [--rounds 5]

A step writes a batch of replies, has them scored, and trains policy and critic on them. In bf16 both keep fp32 weights
and moments; TRL runs under autocast. TRL 1.9 is the last with a PPOTrainer (trl.experimental.ppo); it runs its own
loop, held up between steps, without saving or logging to files. Both write at most --new-tokens to each prompt, with
the same temperature, epochs and microbatches. llm3d tells glibc to keep freed memory, and so is TRL here. The two take
turns, each in a process of its own; a figure is the median over rounds of the ratio within a round. llm3d also says
which parts of its step take how much of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import queue
import tempfile
import threading
from collections import defaultdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from contenders import Step, report, take_turns

from llm3d.stages.stage import stage_of
from llm3d.train.host_memory import keep_freed_memory

MICRO = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a Hugging Face directory with a tokenizer")
    parser.add_argument("--reward-model", required=True, help="the same, for sequence classification")
    parser.add_argument("--data", required=True, help="JSON lines with a question or prompt each")
    parser.add_argument("--compute", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batch", type=int, default=32, help="replies a step")
    parser.add_argument("--new-tokens", type=int, default=53)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{arguments.compute}, {arguments.epochs} epochs, transformers {version('transformers')}")
    contenders = {"llm3d": partial(llm3d_step, arguments), "TRL": partial(trl_step, arguments)}
    report(take_turns(contenders, arguments.rounds, 1), "replies")


def prompts(arguments: argparse.Namespace) -> list[str]:
    with open(arguments.data, encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, 512)]
    return [row.get("prompt") or row["question"] for row in rows]


def llm3d_step(arguments: argparse.Namespace) -> Step:
    from llm3d.checkpoint.starting import load_first_weights
    from llm3d.config import STAGES, make_config
    from llm3d.parallel.mesh import Mesh, start_process_group

    keep_freed_memory()  # as the command does
    directory = Path(tempfile.mkdtemp())
    data = directory / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts(arguments)))
    settings = {
        "run": {"dir": str(directory)},
        "model": {"path": arguments.model},
        "precision": {"compute": arguments.compute},
        "data": {"train": [str(data)], "sequence_length": 512, "template": "alpaca"},
        "batch": {"global": arguments.batch, "micro": MICRO},
        "generate": {
            "max_new_tokens": arguments.new_tokens,
            "temperature": 0.7,
            "max_sequences": arguments.batch,
        },
        "optim": {"lr": 3e-6, "schedule": "constant"},
        "train": {"steps": 1000},
        "ppo": {"rewards": [{"model": arguments.reward_model}], "epochs": arguments.epochs},
    }
    config = make_config(settings, 1, STAGES["ppo"])
    task = stage_of(config).open(config)
    learner = task.learner(Mesh(device=start_process_group()))
    learner.prepare()
    load_first_weights(learner.model)
    steps, seconds = itertools.count(1), defaultdict[str, float](float)

    def step() -> int:
        number = next(steps)
        result = learner.step(task.data.microbatches(number, learner.model.mesh), lr=3e-6)
        for name, value in result.metrics.items():
            if name.startswith("timing_s/"):
                seconds[name.removeprefix("timing_s/")] += value
        whole = sum(seconds.values())
        print(
            "llm3d:",
            ", ".join(f"{name} {100 * value / whole:.0f} %" for name, value in seconds.items()),
            flush=True,
        )
        return arguments.batch

    return step


def trl_step(arguments: argparse.Namespace) -> Step:
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    keep_freed_memory()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token or tokenizer.eos_token
    asked = "### Instruction:\n{}\n\n### Response:\n"
    ids = [{"input_ids": tokenizer(asked.format(text))["input_ids"]} for text in prompts(arguments)]
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32) for _ in range(2)
    )
    scores = partial(
        AutoModelForSequenceClassification.from_pretrained,
        arguments.reward_model,
        num_labels=1,
        dtype=torch.float32,
    )
    go, done = queue.Queue[None](), queue.Queue[None]()

    class Held(TrainerCallback):  # type: ignore[misc]
        """Lets the loop do a step at a time."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            go.get()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            done.put(None)
            go.get()

    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(),
            report_to=[],
            use_cpu=True,
            bf16=arguments.compute == "bf16",
            gradient_checkpointing=False,
            learning_rate=3e-6,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=arguments.batch // MICRO,
            num_mini_batches=1,
            num_ppo_epochs=arguments.epochs,
            local_rollout_forward_batch_size=arguments.batch,
            response_length=arguments.new_tokens,
            temperature=0.7,
            total_episodes=arguments.batch * 1000,
            num_sample_generations=0,
            save_strategy="no",
            optim="adamw_torch_fused",
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=scores(),
        value_model=scores(),
        train_dataset=Dataset.from_list(ids),
        eval_dataset=Dataset.from_list(ids[: arguments.batch]),
        callbacks=[Held()],
    )
    threading.Thread(target=trainer.train, daemon=True).start()

    def step() -> int:
        go.put(None)
        done.get()
        return arguments.batch

    return step


if __name__ == "__main__":
    main()
