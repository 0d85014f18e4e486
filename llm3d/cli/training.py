"""Commands that train: a stage each; and the settings that they would have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm3d.cli.common import (
    CheckOnly,
    ConfigFile,
    Overrides,
    StageOption,
    ends_as_promised,
    kind_of_settings,
    load_for_this_world,
    say_once,
)
from llm3d.cli.planning import say_memory
from llm3d.errors import InputError


@ends_as_promised
def show_config(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG.yaml|RUN", help="Settings, or a run directory, by its own.", show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Check the layout against this many devices, too.")
    ] = None,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="Print the JSON Schema of settings files, of any stage or of --stage."),
    ] = False,
    stage: StageOption = None,
) -> None:
    """Print the settings as a run would have them, every default filled in."""
    import json

    from llm3d.config import config_to_yaml, json_schema, load_config
    from llm3d.config.uses import settings_at

    config, of_run = settings_at(config) if config is not None else (None, list[str]())
    kind = kind_of_settings(config, stage)
    if schema:
        print(json.dumps(json_schema(kind if config or stage else None), indent=2))
    elif config is None:
        raise InputError("config: give a CONFIG.yaml, or --schema")
    else:
        overrides = [*of_run, *(overrides or [])]
        print(config_to_yaml(load_config(config, overrides, world_size, kind)), end="")


@ends_as_promised
def pretrain(config: ConfigFile, overrides: Overrides = None, check_only: CheckOnly = False) -> None:
    """Train on tokens from `llm3d data tokenize`, or from Megatron."""
    train("pretrain", config, overrides, check_only)


@ends_as_promised
def sft(config: ConfigFile, overrides: Overrides = None, check_only: CheckOnly = False) -> None:
    """Fine-tune on conversations: learn the replies."""
    train("sft", config, overrides, check_only)


@ends_as_promised
def reward(config: ConfigFile, overrides: Overrides = None, check_only: CheckOnly = False) -> None:
    """Train a reward model on comparisons of replies."""
    train("reward", config, overrides, check_only)


@ends_as_promised
def dpo(config: ConfigFile, overrides: Overrides = None, check_only: CheckOnly = False) -> None:
    """Direct preference optimisation on comparisons of replies."""
    train("dpo", config, overrides, check_only)


@ends_as_promised
def ppo(config: ConfigFile, overrides: Overrides = None, check_only: CheckOnly = False) -> None:
    """Reinforcement learning from a reward model or a function: PPO, GRPO or RLOO."""
    train("ppo", config, overrides, check_only)


def train(stage: str, config: Path, overrides: list[str] | None, check_only: bool) -> None:
    """Run a stage of training, or only open what its settings name."""
    from llm3d.config import STAGES

    settings = load_for_this_world(config, overrides, STAGES[stage])
    if settings.reads == "prompts" and not check_only:  # several models stand beside each other
        say_memory(settings)
    from llm3d.stages.run import open_task, run_stage, summary

    if check_only:
        say_once(summary(open_task(settings)))
    else:
        run_stage(settings)
