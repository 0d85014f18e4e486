"""What all commands share: how they end, the arguments that they take, and settings for the ranks of this launch."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from llm3d.errors import InputError, TrainingAborted
from llm3d.stages import DESCRIPTIONS

if TYPE_CHECKING:
    from llm3d.config import Config

C = TypeVar("C", bound="Config")


def ends_as_promised(command: Callable[..., None]) -> Callable[..., None]:
    """Exit code 2 and the message for wrong input, 3 for aborted training, 130 for Ctrl-C; a bug's traceback.

    Every rank ends with the code; the first one speaks.
    """

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except InputError as error:
            end(str(error), 2)
        except TrainingAborted as error:
            end(str(error), 3)
        except KeyboardInterrupt as error:
            end(str(error) or "interrupted", 130)

    return guarded


def end(message: str, code: int) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        for line in message.splitlines():
            print(f"llm3d: {line}", file=sys.stderr)
    raise typer.Exit(code)


# ---- arguments ----

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Settings file.", show_default=False)]
ConfigOrRun = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG.yaml|RUN",
        help="Settings file, or a run directory, whose own settings are used.",
        show_default=False,
    ),
]
ConfigOrModel = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG.yaml|RUN|MODEL",
        help="Settings file, run directory (its latest checkpoint), checkpoint, or Hugging Face or PEFT directory.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="section.key=value",
        help="Overrides of single settings, such as parallel.tensor=2. "
        "model.preset and model.path replace the whole model section.",
        show_default=False,
    ),
]
CheckOnly = Annotated[
    bool,
    typer.Option("--check", help="Check the settings, the data and the files that they name, then exit."),
]
Output = Annotated[Path, typer.Option(help="Output directory.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]


Stage = Enum("Stage", {name: name for name in DESCRIPTIONS}, type=str)  # type: ignore[misc]
StageOption = Annotated[
    Stage | None,
    typer.Option(
        help="Training stage of the settings. [default: the stage whose section the file has, else pretrain]"
    ),
]


# ---- what is said ----


def say_once(line: str) -> None:
    """On the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


def say(remarks: list[str]) -> None:
    """On standard error, by the first rank."""
    for remark in remarks if os.environ.get("RANK", "0") == "0" else ():
        print(remark, file=sys.stderr)


# ---- settings ----


def load_for_this_world(config: Path, overrides: list[str] | None, kind: type[C]) -> C:
    """The settings, checked before torch is imported; torchrun says how many ranks there are."""
    from llm3d.config import load_config

    return load_config(config, overrides or [], world_size_here(), kind)


def world_size_here() -> int:
    return whole_number("environment variable WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))


def world_size_among(overrides: list[str] | None) -> tuple[int | None, list[str]]:
    """What world_size=N among the overrides says, if it is there, and the other overrides."""
    given = [text for text in overrides or [] if text.startswith("world_size=")]
    others = [text for text in overrides or [] if text not in given]
    return whole_number("world_size", given[-1].removeprefix("world_size=")) if given else None, others


def kind_of_settings(config: Path | None, stage: Stage | None) -> type[Config]:
    """Of the stage that is named, or else whose section the file has."""
    from llm3d.config import STAGES, PretrainConfig, kind_of

    if stage is not None:
        return STAGES[stage.value]
    return PretrainConfig if config is None else kind_of(config)


def name_of(stage: Stage | None) -> str | None:
    return None if stage is None else stage.value


def whole_number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"{name}: {text!r} is not a whole number")
    return int(text)
