"""Bytes a rank in the phases of a step of reinforcement learning, whose models take turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llm3d.config import Config
from llm3d.config.uses import generation_layout
from llm3d.generate.cache import BLOCK_SIZE
from llm3d.generate.engine import MAX_PREFILL_TOKENS
from llm3d.models.build import DTYPES, spread_layers
from llm3d.plan.memory import Memory, memory_of_stages
from llm3d.stages.stage import ModelRole


@dataclass(frozen=True)
class MemoryByPhase:
    """Of a pipeline stage's first rank: what each trained model takes, the weights of each that is frozen, and bytes on
    the device at the peak of each phase, by name.
    """

    trained: dict[str, Memory]
    frozen: dict[str, int]
    peaks: dict[str, int]


def phases_of_stages(
    roles: Sequence[ModelRole], world_size: int, device_type: str = "cuda"
) -> list[MemoryByPhase]:
    """For each pipeline stage. Frozen models are offloaded to host memory, but on a CPU.

    roles: the policy first.
    """
    plans = {role.name: memory_of_stages(role, world_size, device_type) for role in roles}
    layout = next((role.config for role in roles if role.kind == "rollout"), roles[0].config)
    writing = bytes_of_generation(generation_layout(layout))
    # In another layout a rank may be of any of its stages.
    handed = max([0, *(memory.parameters for r in roles if r.kind == "rollout" for memory in plans[r.name])])
    phases = []
    for i in range(len(plans["policy"])):
        trained = {role.name: plans[role.name][i] for role in roles if role.kind == "trained"}
        frozen = {role.name: plans[role.name][i].parameters for role in roles if role.kind == "frozen"}
        phases.append(
            MemoryByPhase(trained, frozen, _peaks(trained, frozen, handed + writing, device_type != "cpu"))
        )
    return phases


def _peaks(
    trained: dict[str, Memory], frozen: dict[str, int], writing: int, offloaded: bool
) -> dict[str, int]:
    """writing: bytes that there are only while replies are written; gradients then take none."""
    passing = {name: memory.activations + memory.buffers for name, memory in trained.items()}
    connected = max(memory.communicators for memory in trained.values())  # all models share them
    kept = connected + sum(
        memory.on_device - memory.communicators - passing[name] for name, memory in trained.items()
    )
    always = 0 if offloaded else sum(frozen.values())
    scoring = max(frozen.values(), default=0) if offloaded else always
    updates = {f"update of the {name}": kept + always + size for name, size in passing.items()}
    return {
        "writing": kept + always - trained["policy"].gradients + writing,
        "scoring": kept + scoring + max(passing.values()),
        **updates,
    }


def bytes_of_generation(layout: Config) -> int:
    """Keys and values, and activations of prompts being read, on the rank with most layers; not the weights.

    layout: the settings that replies are written with.
    """
    settings, model, size = layout.generate, layout.model, DTYPES[layout.precision.compute].itemsize
    sequences, tensor = max(settings.max_sequences, settings.num_replies), layout.parallel.tensor
    heads = max(1, model.num_key_value_heads // tensor)
    stages = layout.parallel.layers_per_stage
    num_layers = max(stages or spread_layers(model.num_hidden_layers, layout.parallel.pipeline))
    block = 2 * BLOCK_SIZE * heads * model.head_dim * size * num_layers
    cache = block * sequences * -(-layout.data.sequence_length // BLOCK_SIZE)
    cache = cache if settings.cache_bytes is None else min(cache, settings.cache_bytes)
    longest = layout.data.sequence_length - settings.max_new_tokens
    tokens = min(sequences * longest, max(MAX_PREFILL_TOKENS, longest))
    attended = max(model.hidden_size, model.num_attention_heads * model.head_dim)
    width = 3 * (model.hidden_size + attended) + 3 * model.intermediate_size // tensor
    logits = sequences * (model.vocab_size or 0) // tensor
    return cache + tokens * width * size + 3 * logits * 4


def table(stages: Sequence[MemoryByPhase]) -> str:
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
    rows += [(name, [stage.frozen[name] for stage in stages]) for name in stages[0].frozen]
    rows += [(f"peak, {name}", [stage.peaks[name] for stage in stages]) for name in stages[0].peaks]
    return "\n".join(
        [
            "GiB a rank on its device, by role and by phase",
            f"{'':28}" + "".join(f"{f'stage {i}':>12}" for i in range(len(stages))),
            *(f"{name:28}" + "".join(f"{size / 2**30:12.3f}" for size in sizes) for name, sizes in rows),
            "without the CUDA context, libraries' workspaces and what the allocator loses to fragments",
        ]
    )
