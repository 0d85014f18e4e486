"""A small model that knows a chat template, files to train it on after pretraining, and the stages that do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import tokenizers
import torch
import torch.distributed as dist

from llm3d.config import STAGES, make_config
from llm3d.corpus.tokenizer_training import train_tokenizer
from llm3d.parallel.mesh import Mesh
from llm3d.stages.run import open_task, train_task
from llm3d.text.templates import BUILT_IN
from llm3d.text.tokenizer import load_tokenizer
from tests.stages.common import Settings, silent

SEQUENCE_LENGTH = 96
MARKS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SHAPE: dict[str, Any] = {
    "vocab_size": 291,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
Row = dict[str, Any]


# ---- what a run starts from ----


def write_tokenizer(directory: Path, template: str | None = "chatml") -> Path:
    """A tokenizer of bytes and a few words, with the special tokens of all templates, and maybe a template."""
    text = directory.with_suffix(".txt")
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("What comes after one? It is two, of course.\n" * 9)
    with silent():
        train_tokenizer([text], directory, "byte-level", 282)
    made = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    made.add_special_tokens(list(MARKS))
    made.save(str(directory / "tokenizer.json"))
    load_tokenizer(directory).save_to(directory)
    if template is not None:
        (directory / "chat_template.jinja").write_text(BUILT_IN[template])
    return directory


def write_model(directory: Path, template: str | None = "chatml", seed: int = 0, **changes: Any) -> Path:
    """A Hugging Face directory: a random LLaMA with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM  # here, so that the pool's ranks do without

    write_tokenizer(directory, template)
    tokenizer = load_tokenizer(directory)
    torch.manual_seed(seed)
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = AutoConfig.for_model(**{"model_type": "llama", **SHAPE, **ends, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def write_reward_model(directory: Path, policy: Path, seed: int = 1) -> Path:
    """A random LlamaForSequenceClassification with the tokenizer of another model."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = LlamaConfig.from_pretrained(policy, num_labels=1, pad_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained(directory)
    load_tokenizer(policy).save_to(directory)
    return directory


# ---- what it is trained on ----


def question(i: int) -> str:
    return f"What comes after {NUMBERS[i % 9]}" + "?" * (1 + i % 4)


def answer(i: int) -> str:
    return f"{NUMBERS[(i + 1) % 10]}"


def conversations(count: int) -> list[Row]:
    """Of one question and of two, in turn."""
    rows = []
    for i in range(count):
        turns = [(question(i + k), answer(i + k)) for k in range(1 + i % 2)]
        messages = [
            {"role": role, "content": text}
            for pair in turns
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        rows.append({"messages": messages})
    return rows


def comparisons(count: int) -> list[Row]:
    return [
        {"prompt": question(i), "chosen": answer(i), "rejected": answer(i + 3) + " or so" * (i % 3)}
        for i in range(count)
    ]


def rankings(count: int, replies: int = 3) -> list[Row]:
    """Prompts with several replies, of which the first two are as good as each other."""
    return [
        {
            "prompt": question(i),
            "responses": [answer(i + k) + "." * k for k in range(replies)],
            "ranks": [max(0, k - 1) for k in range(replies)],
        }
        for i in range(count)
    ]


def write_rows(path: Path, rows: Sequence[Row]) -> str:
    """In the format that the path's ending names; -> the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(list(rows)))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(model: Path, train: str, run_dir: Path, /, **changes: Any) -> Settings:
    """Four steps of four samples; changes as section={...}."""
    made: Settings = {
        "run": {"dir": str(run_dir), "seed": 5},
        "model": {"path": str(model)},
        "data": {"train": [train], "sequence_length": SEQUENCE_LENGTH},
        "batch": {"global": 4, "micro": 2},
        "optim": {"lr": 1e-2, "warmup_steps": 1},
        "train": {"steps": 4},
        "log": {"tensorboard": False},
    }
    return {name: {**made.get(name, {}), **changes.get(name, {})} for name in {**made, **changes}}


# ---- on each rank of the pool ----


def opened_task(stage: str, given: Settings) -> Any:
    return open_task(make_config(given, dist.get_world_size(), STAGES[stage]))


def train_on_rank(stage: str, given: Settings) -> str:
    """What `llm3d STAGE` does under torchrun, in a world that is there already; -> what the rank said."""
    task = opened_task(stage, given)
    parallel = task.config.parallel
    with silent() as said:
        train_task(task, Mesh(parallel.tensor, parallel.pipeline))
    return said.getvalue()
