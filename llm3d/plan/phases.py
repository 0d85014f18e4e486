"""Bytes a rank in the phases of a step of reinforcement learning, whose models take turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llm3d.config import Config
from llm3d.plan.memory import Memory, SampleBatch, Work, memory_of_stages
from llm3d.train.objective import Objective


class Role(Protocol):
    """`llm3d.rl.roles.Role` is one."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def config(self) -> Config: ...
    @property
    def objective(self) -> Objective: ...
    @property
    def microbatch(self) -> SampleBatch: ...
    @property
    def averaged(self) -> bool: ...


@dataclass(frozen=True)
class Phases:
    """Of a pipeline stage's first rank: what each trained model takes, the weights of each that is asked, and bytes on
    the device at the peak of each phase, by name.
    """

    trained: dict[str, Memory]
    asked: dict[str, int]
    peaks: dict[str, int]


def phases_of_stages(
    roles: Sequence[Role], writing: int, world_size: int, device_type: str = "cuda"
) -> list[Phases]:
    """For each pipeline stage. Models that are only asked are parked in host memory, but on a CPU.

    writing: bytes that writing replies takes beside weights.
    """
    plans = {
        role.name: memory_of_stages(
            role.config,
            Work(role.objective, role.microbatch, averaged=role.averaged),
            world_size,
            device_type,
        )
        for role in roles
    }
    # In another layout a rank may be of any of its stages.
    handed = max([0, *(memory.parameters for r in roles if r.kind == "writing" for memory in plans[r.name])])
    found = []
    for i in range(len(plans["policy"])):
        trained = {role.name: plans[role.name][i] for role in roles if role.kind == "trained"}
        asked = {role.name: plans[role.name][i].parameters for role in roles if role.kind == "asked"}
        found.append(Phases(trained, asked, _peaks(trained, asked, handed + writing, device_type != "cpu")))
    return found


def _peaks(trained: dict[str, Memory], asked: dict[str, int], writing: int, parked: bool) -> dict[str, int]:
    """writing: bytes that there are only while replies are written; gradients then take none."""
    passing = {name: memory.activations + memory.buffers for name, memory in trained.items()}
    connected = max(memory.communicators for memory in trained.values())  # all models share them
    kept = connected + sum(
        memory.on_device - memory.communicators - passing[name] for name, memory in trained.items()
    )
    always = 0 if parked else sum(asked.values())
    scoring = max(asked.values(), default=0) if parked else always
    updates = {f"update of the {name}": kept + always + size for name, size in passing.items()}
    return {
        "writing": kept + always - trained["policy"].gradients + writing,
        "scoring": kept + scoring + max(passing.values()),
        **updates,
    }


def table(stages: Sequence[Phases]) -> str:
    """Lines for people: a column for each pipeline stage, in GiB."""
    rows: list[tuple[str, list[int]]] = []
    for name in stages[0].trained:
        parts = ("parameters", "gradients", "master", "moments", "activations")
        rows += [
            (f"{name}, {part}", [getattr(stage.trained[name], part) for stage in stages]) for part in parts
        ]
    rows += [
        ("NCCL (estimate)", [max(each.communicators for each in stage.trained.values()) for stage in stages])
    ]
    rows += [(name, [stage.asked[name] for stage in stages]) for name in stages[0].asked]
    rows += [(f"peak, {name}", [stage.peaks[name] for stage in stages]) for name in stages[0].peaks]
    return "\n".join(
        [
            "GiB a rank on its device, by role and by phase",
            f"{'':28}" + "".join(f"{f'stage {i}':>12}" for i in range(len(stages))),
            *(f"{name:28}" + "".join(f"{size / 2**30:12.3f}" for size in sizes) for name, sizes in rows),
            "without the CUDA context, libraries' workspaces and what the allocator loses to fragments",
        ]
    )
