"""Fine-tuning and DPO beside TRL's trainers, one process each, same model, same samples.

    python benchmarks/against_trl.py sft --model MODEL --data conversations.jsonl [--compute fp32|bf16] [--rounds 5]
    python benchmarks/against_trl.py dpo --model MODEL --data preferences.jsonl

Figures count real tokens, prompts and replies: what is padding counts for nobody. A step is forward, backward, clipping
and AdamW on a batch that is ready in memory; of TRL it is `training_step` with what Trainer does around it, without its
callbacks and logging. TRL's SFTTrainer runs packed (bfd and wrapped) and padded, DPOTrainer with reference
log-probabilities computed beforehand, as llm3d's are. In bf16 both keep fp32 weights and moments; TRL runs under
autocast. llm3d tells glibc to keep freed memory (llm3d/train/host_memory.py), which a plain PyTorch script does not;
--same-allocator gives TRL that too. The contenders take turns, each in a process of its own; a figure is the median
over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from contenders import Step, report, take_turns

from llm3d.stages.stage import stage_of
from llm3d.train.host_memory import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=list(CONTENDERS))
    parser.add_argument("--model", required=True, help="a Hugging Face directory with a tokenizer")
    parser.add_argument(
        "--data", required=True, help="JSON lines: question and answer; prompt, chosen, rejected"
    )
    parser.add_argument("--compute", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument(
        "--batch", type=int, default=8, help="sequences of that length a step, or half as many pairs"
    )
    parser.add_argument("--samples", type=int, default=512, help="of the file's first, that are used")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="a contender's steps in a round")
    parser.add_argument("--same-allocator", action="store_true", help="TRL keeps freed memory too")
    arguments = parser.parse_args()
    print(
        f"{arguments.stage}, {arguments.compute}, transformers {version('transformers')}, TRL {version('trl')}"
    )
    contenders = {name: partial(make, arguments) for name, make in CONTENDERS[arguments.stage].items()}
    report(take_turns(contenders, arguments.rounds, arguments.steps))


def rows(arguments: argparse.Namespace) -> list[dict[str, str]]:
    with open(arguments.data, encoding="utf-8") as file:
        return [json.loads(line) for line in itertools.islice(file, arguments.samples)]


# ---- llm3d ----


def llm3d_step(arguments: argparse.Namespace) -> Step:
    from llm3d.checkpoint.starting import load_first_weights
    from llm3d.config import STAGES, make_config
    from llm3d.parallel.mesh import Mesh, start_process_group

    keep_freed_memory()  # as the commands do
    directory = tempfile.mkdtemp()
    data = os.path.join(directory, "samples.jsonl")
    with open(data, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(arguments))
    mean = mean_tokens(arguments)
    settings = {
        "run": {"dir": directory},
        "model": {"path": arguments.model},
        "precision": {"compute": arguments.compute},
        "data": {"train": [data], "sequence_length": arguments.sequence_length},
        "batch": {
            "global": max(1, round(arguments.batch * arguments.sequence_length / mean)),
            "micro": arguments.batch,
        },
        "optim": {"lr": 1e-6},
        "train": {"steps": 1000},
    }
    config = make_config(settings, 1, STAGES[arguments.stage])
    mesh = Mesh(device=start_process_group())
    task = stage_of(config).open(config)
    learner = task.learner(mesh)
    learner.prepare()
    load_first_weights(learner.model)
    steps = itertools.count(1)

    def step() -> int:
        batches = task.data.microbatches(next(steps), mesh)
        learner.step(batches, lr=1e-6)
        return sum(len(batch.tokens) for batch in batches)

    return step


def mean_tokens(arguments: argparse.Namespace) -> float:
    """Of a sample: what fills a step as full as the others' steps are."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    texts = [list(row.values()) for row in rows(arguments)]
    lengths = [sum(len(tokenizer(text)["input_ids"]) for text in some) for some in texts]
    if arguments.stage == "dpo":  # both replies come with the prompt
        lengths = [
            n + len(tokenizer(row["prompt"])["input_ids"])
            for n, row in zip(lengths, rows(arguments), strict=True)
        ]
    return statistics.mean(lengths)


# ---- TRL ----


def common_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.same_allocator:
        keep_freed_memory()
    return {
        "output_dir": tempfile.mkdtemp(),
        "max_length": arguments.sequence_length,
        "learning_rate": 1e-6,
        "report_to": [],
        "use_cpu": True,
        "bf16": arguments.compute == "bf16",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "optim": "adamw_torch_fused",
    }


def trl_sft_step(arguments: argparse.Namespace, packing: str | None) -> Step:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = tokenizer_with_padding(AutoTokenizer.from_pretrained(arguments.model))
    examples = [{"prompt": row["question"], "completion": row["answer"]} for row in rows(arguments)]
    packed = {"packing": True, "packing_strategy": packing} if packing else {}
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
        args=SFTConfig(
            **common_arguments(arguments), **packed, per_device_train_batch_size=batch_of(arguments, packing)
        ),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
    )
    return trl_step(trainer)


def batch_of(arguments: argparse.Namespace, packing: str | None) -> int:
    """Packs of the whole length, or as many samples as have as many tokens together."""
    if packing:
        return arguments.batch
    return max(1, round(arguments.batch * arguments.sequence_length / mean_tokens(arguments)))


def trl_dpo_step(arguments: argparse.Namespace) -> Step:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
        args=DPOConfig(
            **common_arguments(arguments),
            per_device_train_batch_size=batch_of(arguments, None),
            precompute_ref_log_probs=True,
        ),
        train_dataset=Dataset.from_list(rows(arguments)),
        processing_class=tokenizer_with_padding(AutoTokenizer.from_pretrained(arguments.model)),
    )
    return trl_step(trainer)


def tokenizer_with_padding(tokenizer: Any) -> Any:
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.chat_template = None  # the text as it stands
    return tokenizer


def trl_step(trainer: Any) -> Step:
    batches = endless(trainer)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # set by the loop that is not run here
    model = trainer.model
    model.train()

    def step() -> int:
        inputs = next(batches)
        tokens = real_tokens(inputs)
        trainer.training_step(model, inputs)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return tokens

    return step


def endless(trainer: Any) -> Iterator[dict[str, Any]]:
    while True:
        yield from trainer.get_train_dataloader()


def real_tokens(inputs: dict[str, Any]) -> int:
    mask = inputs.get("attention_mask")
    return int(mask.sum()) if mask is not None else inputs["input_ids"].numel()


CONTENDERS: dict[str, dict[str, Callable[[argparse.Namespace], Step]]] = {
    "sft": {
        "llm3d": llm3d_step,
        "TRL, packed (bfd)": partial(trl_sft_step, packing="bfd"),
        "TRL, packed (wrapped)": partial(trl_sft_step, packing="wrapped"),
        "TRL, padded": partial(trl_sft_step, packing=None),
    },
    "dpo": {"llm3d": llm3d_step, "TRL": trl_dpo_step},
}


if __name__ == "__main__":
    main()
