"""A small corpus, settings for a run over it, and stages run from the command line or on the pool's ranks."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
import yaml
from typer.testing import CliRunner

from llm3d.checkpoint.load import load_pretrained
from llm3d.cli import app
from llm3d.config import Config, make_config
from llm3d.corpus.indexed import IndexedWriter
from llm3d.data.language import ValidationData
from llm3d.parallel.mesh import Mesh
from llm3d.stages.run import open_task, train_task
from llm3d.stages.stage import ModelRole, stage_of
from llm3d.train.objective import Tally
from llm3d.train.trainer import ShardedModel

VOCAB_SIZE = 61
SEQUENCE_LENGTH = 16

MODEL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}

Settings = dict[str, Any]


def write_corpus(prefix: Path, num_tokens: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> str:
    """Documents of random lengths that count upwards, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        left = num_tokens
        while left:
            length = min(left, int(generator.integers(1, 40)))
            writer.add_document((generator.integers(vocab_size) + np.arange(length)) % vocab_size)
            left -= length
    return str(prefix)


def write_empty_corpus(prefix: Path) -> str:
    with IndexedWriter(prefix, np.uint16):
        pass
    return str(prefix)


def settings(directory: Path, **changes: Any) -> Settings:
    """A run of 6 steps in directory/run over directory/train and directory/valid; changes as section={...}."""
    made: Settings = {
        "run": {"dir": str(directory / "run"), "seed": 3},
        "model": MODEL,
        "data": {
            "train": [str(directory / "train")],
            "valid": [str(directory / "valid")],
            "sequence_length": SEQUENCE_LENGTH,
        },
        "batch": {"global": 4},
        "optim": {"lr": 1e-2, "warmup_steps": 1},
        "train": {"steps": 6},
        "log": {"tensorboard": False},
    }
    return {name: {**made.get(name, {}), **changes.get(name, {})} for name in {**made, **changes}}


# ---- from the command line, in this process ----


class Ended(NamedTuple):
    code: int
    stdout: str
    stderr: str


def command(name: str, given: Settings, *overrides: str) -> Ended:
    """`llm3d NAME CONFIG.yaml OVERRIDES...` for a world of one; a bug's exception is raised here."""
    with TemporaryDirectory() as directory:
        config = Path(directory) / "config.yaml"
        config.write_text(yaml.safe_dump(given))
        result = CliRunner().invoke(app, [*name.split(), str(config), *overrides])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


class Evaluated(NamedTuple):
    source: str
    numbers: dict[str, float]  # to four decimal places
    counted: str  # on how much


def evaluated(ended: Ended) -> Evaluated:
    """What `llm3d eval` said."""
    source, _, rest = ended.stdout.partition(": ")
    numbers, _, counted = rest.rstrip("\n").rpartition(" on ")
    pairs = (part.rsplit(" ", 1) for part in numbers.split(", "))
    return Evaluated(source, {name: float(number) for name, number in pairs}, counted)


def metrics(given: Settings) -> list[dict[str, Any]]:
    text = (Path(given["run"]["dir"]) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def examples(given: Settings) -> list[dict[str, Any]]:
    text = (Path(given["run"]["dir"]) / "examples.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def snapshot(directory: Path) -> dict[str, bytes | None]:
    """Every file's content; None for a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


def trained_model(config: Config) -> ModelRole:
    """The model that a run of these settings is about."""
    return stage_of(config).models(config).roles[0]


# ---- on each rank of the pool ----


@contextmanager
def silent() -> Iterator[io.StringIO]:
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        yield said


def pretrain_on_rank(given: Settings) -> str:
    """What `llm3d pretrain` does under torchrun, in a world that is there already; -> what the rank said."""
    task = open_task(make_config(given, dist.get_world_size()))
    parallel = task.config.parallel
    with silent() as said:
        train_task(task, Mesh(parallel.tensor, parallel.pipeline))
    return said.getvalue()


def evaluate_on_rank(given: Settings, checkpoint: Path) -> Tally:
    """What `llm3d eval` does under torchrun, in a world that is there already."""
    config = make_config(given, dist.get_world_size())
    model = ShardedModel(config, Mesh(config.parallel.tensor, config.parallel.pipeline))
    load_pretrained(checkpoint, model)
    return model.evaluate_all(ValidationData(config).evaluation(model.mesh))
