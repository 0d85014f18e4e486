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
    """Evaluate a model on the validation data.

    The data are named by a settings file, or by the own settings of a run directory or of a checkpoint. The model is
    the first of: checkpoint.resume=PATH among the overrides; the named checkpoint, or the latest one of the named run
    directory; the latest one in run.dir; model.path. A layout that does not fit the number of processes is ignored.
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
    prompt: Annotated[str | None, typer.Option(help="Prompt to reply to, or text to continue.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="File of prompts: .jsonl, .json or .parquet, whose columns name the prompts."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Start an interactive chat with the model.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Output file of the replies to --prompts. [default: standard output]", show_default=False
        ),
    ] = None,
    overwrite: Overwrite = False,
    check_only: CheckOnly = False,
    stage: StageOption = None,
) -> None:
    """Generate text with a model.

    The section `generate` of the settings says how. The model is the first of: checkpoint.resume=PATH among the
    overrides; the named checkpoint, or the latest one of the named run directory; the latest one in run.dir of
    the settings; model.path. A checkpoint brings its tokenizer and chat template, a Hugging Face directory also
    its generation_config.json; overrides take precedence over these. A layout that does not fit the number of
    processes is ignored.
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
            help="Checkpoint, run directory or its settings (the latest checkpoint is used), or PEFT directory.",
            show_default=False,
        ),
    ],
    output: Output,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model of the adapters. [default: the one that the adapters name]", show_default=False
        ),
    ] = None,
    average: Annotated[
        bool,
        typer.Option("--average", help="Export the moving average of the weights, of a run with ppo.ema."),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Export a checkpoint to a Hugging Face directory.

    Adapters are merged into their base model.
    """
    from llm3d.config.uses import checkpoint_at

    checkpoint = checkpoint_at(checkpoint)
    from llm3d.commands.export import export

    print(export(checkpoint, output, base, overwrite, average))
