"""Commands that use a model: evaluate it, have it write, export it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm3d.cli.common import (
    CheckOnly,
    ConfigOrModel,
    ConfigOrRun,
    Output,
    Overrides,
    Overwrite,
    StageOption,
    ends_as_promised,
    name_of,
    say,
    say_once,
    world_size_here,
)


@ends_as_promised
def evaluate(
    config: ConfigOrRun,
    overrides: Overrides = None,
    check_only: CheckOnly = False,
    stage: StageOption = None,
) -> None:
    """A stage's loss and other numbers on the validation data, by the run's latest checkpoint.

    By settings and run.dir in them, or by a run directory or a checkpoint, whose own settings name the data. The model
    is the first of: checkpoint.resume=PATH among the overrides; the checkpoint that is named, or the latest of the run
    directory; the latest in run.dir; model.path. A layout that does not fit the number of processes is left out.
    """
    from llm3d.config.uses import config_for_evaluation

    settings, remarks = config_for_evaluation(config, overrides or [], world_size_here(), name_of(stage))
    say(remarks)
    from llm3d.commands.evaluate import check, run

    if check_only:
        check(settings)
        say_once("nothing is wrong: the settings and the data can be used; nothing was computed")
    else:
        run(settings)


@ends_as_promised
def generate(
    config: ConfigOrModel,
    overrides: Overrides = None,
    prompt: Annotated[str | None, typer.Option(help="A text to reply to, or to continue.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="A file of prompts, .jsonl, .json or .parquet, by their columns.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk with the model.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue texts as they stand, without a template.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write the replies to --prompts here. [default: standard output]", show_default=False
        ),
    ] = None,
    overwrite: Overwrite = False,
    check_only: CheckOnly = False,
    stage: StageOption = None,
) -> None:
    """Write text; the section `generate` says how.

    The model is the first of: checkpoint.resume=PATH among the overrides; the checkpoint that is named, or the latest
    of the run directory; the latest in run.dir of the settings; model.path. A checkpoint brings its tokenizer and chat
    template, a Hugging Face directory also its generation_config.json; overrides come before these. A layout that
    does not fit the number of processes is left out.
    """
    from llm3d.config.uses import config_for_generation

    settings, remarks = config_for_generation(config, overrides or [], world_size_here(), name_of(stage))
    say(remarks)
    from llm3d.commands.generate import GenerateOptions, check, run

    options = GenerateOptions(prompt, prompts, chat, raw, output, overwrite)
    if check_only:
        check(settings, options)
        say_once("nothing is wrong: the settings and the prompts can be used; nothing was written")
    else:
        run(settings, options)


@ends_as_promised
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT|RUN",
            help="A checkpoint, a run directory or its settings (the latest one), or a PEFT directory.",
            show_default=False,
        ),
    ],
    output: Output,
    base: Annotated[
        str | None,
        typer.Option(
            help="The model that adapters are for. [default: the one that they name]", show_default=False
        ),
    ] = None,
    average: Annotated[
        bool,
        typer.Option("--average", help="The average of the weights over training, of a run with ppo.ema."),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint as a plain Hugging Face directory, adapters merged into their base."""
    from llm3d.config.uses import checkpoint_at

    checkpoint = checkpoint_at(checkpoint)
    from llm3d.commands.export import export

    print(export(checkpoint, output, base, overwrite, average))
