"""The Python API: load settings, train, generate text.

    from llm3d import api

    config = api.load_config("configs/stages/pretrain-small.yaml", ["train.steps=100"])
    checkpoint = api.train(config)
    print(api.generate(checkpoint, ["Once upon a time"]))

Under torchrun every rank calls the same functions. `InputError` says what the caller got wrong, `TrainingAborted` why
training cannot go on (llm3d.errors).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from llm3d import config as settings
from llm3d.commands.generate import PromptEncoder, TextGenerator
from llm3d.config import Config
from llm3d.config.places import latest_checkpoint
from llm3d.config.uses import config_for_generation
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.mesh import Mesh, process_group, whole_world
from llm3d.stages.run import run_stage
from llm3d.text.conversations import Message

__all__ = ["generate", "load_config", "train"]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a settings file with `section.key=value` overrides; its sections tell which stage it is for.

    The layout is checked for the ranks of this launch: WORLD_SIZE in the environment, else one. Raises InputError.
    """
    return settings.load_config(path, overrides, _world_size(), settings.kind_of(path))


def train(config: Config) -> Path:
    """Train to the last step, from the latest checkpoint in run.dir if there is one; return the latest checkpoint.

    Raises InputError and TrainingAborted.
    """
    run_stage(config)
    checkpoint = latest_checkpoint(Path(config.run.dir))
    assert checkpoint is not None, "a run that ends has saved"
    return checkpoint


def generate(
    path: str | Path, prompts: Sequence[str], overrides: Sequence[str] = (), raw: bool = False
) -> list[list[str]]:
    """Generate replies to prompts with a model; return those to each prompt, generate.num_replies of them.

    path: a run directory (its latest checkpoint), a checkpoint, a Hugging Face or PEFT directory, or a settings file.
    overrides: `section.key=value`, such as generate.temperature=0.
    raw: continue the prompts as texts, also where the model has a chat template.

    Raises InputError.
    """
    config, _ = config_for_generation(Path(path), overrides, _world_size())
    with process_group(config.run.device) as device:
        with input_errors_on_all(whole_world()):
            encoder = PromptEncoder(config, raw)
            tokens = [encoder.tokens([Message("user", prompt)]) for prompt in prompts]
        generator = TextGenerator(encoder, Mesh(config.parallel.tensor, config.parallel.pipeline, device))
        replies: list[list[str]] = [[] for _ in prompts]
        for completion in generator.write(tokens):
            replies[completion.prompt].append(completion.text)
        return replies


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))
