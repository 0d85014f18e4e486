"""Commands that plan a run before it starts: the memory that it will take."""

from __future__ import annotations

import os
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from llm3d.cli.common import (
    ConfigOrModel,
    Overrides,
    StageOption,
    ends_as_promised,
    name_of,
    world_size_among,
    world_size_here,
)
from llm3d.errors import InputError

if TYPE_CHECKING:
    from llm3d.config import Config


class Where(str, Enum):
    cuda = "cuda"
    cpu = "cpu"


@ends_as_promised
def memory(
    config: ConfigOrModel,
    overrides: Overrides = None,
    device: Annotated[Where, typer.Option(help="Kind of device that will run the training.")] = Where.cuda,
    stage: StageOption = None,
) -> None:
    """Estimate the memory of each rank, before a run.

    The estimate is by kind, for a rank of each pipeline stage. world_size=N among the overrides gives the number of
    ranks.
    """
    from llm3d.config.uses import config_for_plan

    requested_size, others = world_size_among(overrides)
    world_size = 1 if requested_size is None else requested_size
    settings, _ = config_for_plan(config, others, world_size, name_of(stage))
    if settings.model.vocab_size is None:
        from llm3d.data.run_tokenizer import open_tokenizer

        settings, _ = open_tokenizer(settings)
    from llm3d.plan.report import memory_report

    print(memory_report(settings, world_size, device.value))


def say_memory(settings: Config) -> None:
    """What a run will need, said by rank 0 before it starts; what is wrong with the settings is said by the run."""
    from llm3d.parallel.mesh import device_of_this_process
    from llm3d.plan.report import memory_report

    if os.environ.get("RANK", "0") == "0":
        with suppress(InputError):
            device = device_of_this_process(settings.run.device)
            print(memory_report(settings, world_size_here(), device.type), flush=True)
