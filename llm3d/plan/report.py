"""What `llm3d memory` prints of a run of any stage."""

from __future__ import annotations

from llm3d.config import Config
from llm3d.plan import memory, phases
from llm3d.stages.stage import stage_of


def memory_report(config: Config, world_size: int, device_type: str) -> str:
    """Lines for people. Where several models take turns, memory is told by phase, else of a step.

    device_type: cuda or cpu.
    """
    roles, remarks = stage_of(config).models(config)
    if config.reads == "prompt":
        return "\n".join([*remarks, phases.table(phases.phases_of_stages(roles, world_size, device_type))])
    stages = memory.memory_of_stages(roles[0], world_size, device_type, roles[1:])
    return "\n".join([*remarks, memory.table(config, world_size, stages)])
