"""Commands that train: a stage each; and the settings that they would have."""

from __future__ import annotations

from collections.abc import Callable
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
from llm3d.stages import DESCRIPTIONS


@ends_as_promised
def show_config(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG.yaml|RUN",
            help="Settings file, or a run directory, whose own settings are used.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Number of devices to check the layout against, too.")
    ] = None,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema", help="Print the JSON Schema of settings files, for any stage or for --stage."
        ),
    ] = False,
    stage: StageOption = None,
) -> None:
    """Print the settings of a run, every default included."""
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


def command_of(stage: str) -> Callable[..., None]:
    """The command that runs a training stage."""

    @ends_as_promised
    def run(config: ConfigFile, overrides: Overrides = None, check_only: CheckOnly = False) -> None:
        train(stage, config, overrides, check_only)

    run.__doc__ = DESCRIPTIONS[stage]
    return run


def train(stage: str, config: Path, overrides: list[str] | None, check_only: bool) -> None:
    """Run a stage of training, or only open what its settings name."""
    from llm3d.config import STAGES

    settings = load_for_this_world(config, overrides, STAGES[stage])
    if settings.reads == "prompt" and not check_only:  # several models stand beside each other
        say_memory(settings)
    from llm3d.stages.run import open_task, run_stage, summary

    if check_only:
        say_once(summary(open_task(settings)))
    else:
        run_stage(settings)
