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
    from llm3d.config import PPOConfig


class Where(str, Enum):
    cuda = "cuda"
    cpu = "cpu"


@ends_as_promised
def memory(
    config: ConfigOrModel,
    overrides: Overrides = None,
    device: Annotated[Where, typer.Option(help="What will run it.")] = Where.cuda,
    stage: StageOption = None,
) -> None:
    """Bytes that a rank of each pipeline stage will need, by kind; world_size=N among the settings says of how many."""
    from llm3d.config import PPOConfig
    from llm3d.config.uses import config_for_plan

    asked, others = world_size_among(overrides)
    world_size = 1 if asked is None else asked
    settings, _ = config_for_plan(config, others, world_size, name_of(stage))
    if settings.model.vocab_size is None:
        from llm3d.data.run_tokenizer import open_tokenizer

        settings, _ = open_tokenizer(settings)
    if isinstance(settings, PPOConfig):
        print(memory_of_phases(settings, world_size, device.value))
        return
    from llm3d.plan.memory import Work, memory_of_stages, table
    from llm3d.stages.by_settings import largest_microbatch, objective_of
    from llm3d.stages.dpo import needs_second_model

    work = Work(objective_of(settings), largest_microbatch(settings), needs_second_model(settings))
    print(table(settings, work, world_size, memory_of_stages(settings, work, world_size, device.value)))


def memory_of_phases(settings: PPOConfig, world_size: int, device: str) -> str:
    from llm3d.plan.phases import phases_of_stages, table
    from llm3d.rl.roles import bytes_of_writing, planned_models, roles_of

    models, remarks = planned_models(settings)
    phases = phases_of_stages(roles_of(models), bytes_of_writing(settings), world_size, device)
    return "\n".join([*remarks, table(phases)])


def say_memory(settings: PPOConfig) -> None:
    """What a run will need, said by rank 0 before it starts; what is wrong with the settings is said by the run."""
    from llm3d.parallel.mesh import device_of_this_process

    if os.environ.get("RANK", "0") == "0":
        with suppress(InputError):
            device = device_of_this_process(settings.run.device)
            print(memory_of_phases(settings, world_size_here(), device.type), flush=True)
