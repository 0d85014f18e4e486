"""One command for each thing that a user does.

Every command imports what it needs when it runs, so that `llm3d --help` does not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

import llm3d
from llm3d.cli import data, kernels, models, planning, training
from llm3d.stages import DESCRIPTIONS

__all__ = ["app", "main"]


def main() -> NoReturn:
    app(prog_name="llm3d")
    raise SystemExit(0)


def group(about: str, commands: dict[str, Callable[..., None]], add_completion: bool = False) -> typer.Typer:
    """Commands by their names. Plain help and tracebacks: rich would double the time that --help takes."""
    program = typer.Typer(
        help=about,
        no_args_is_help=True,
        add_completion=add_completion,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name, command in commands.items():
        program.command(name)(command)
    return program


app = group(
    "Train LLaMA models under tensor, pipeline and data parallelism.",
    {
        "config": training.show_config,
        **{stage: training.command_of(stage) for stage in DESCRIPTIONS},
        "eval": models.evaluate,
        "generate": models.generate,
        "export": models.export,
        "memory": planning.memory,
        "kernels": kernels.kernels,
    },
    add_completion=True,
)
GROUPS = {
    "tokenizer": group("Train a tokenizer.", {"train": data.tokenizer_train}),
    "data": group(
        "Prepare training data, and inspect it.", {"tokenize": data.data_tokenize, "show": data.data_show}
    ),
    "bench": group("Measure speed on this machine.", {"kernels": kernels.bench_kernels}),
}
for _name, _group in GROUPS.items():
    app.add_typer(_group, name=_name)


def show_version(requested: bool) -> None:
    if requested:
        print(f"llm3d {llm3d.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=show_version, is_eager=True),
    ] = False,
) -> None:
    pass
