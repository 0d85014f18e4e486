"""Data of a few steps for a small model."""

from __future__ import annotations

from collections.abc import Iterator

from llm3d.data.pretraining import Microbatch
from llm3d.data.steps import Consumed, Steps
from llm3d.parallel.mesh import Mesh
from tests.parity.harness import Layout, microbatches

LAYOUT = Layout(micro=4, model=(("num_hidden_layers", 1), ("hidden_size", 24), ("intermediate_size", 16)))
TOKENS = 8 * 24  # a step


class Data:
    """Of LAYOUT's microbatches."""

    def __init__(self, last_step: int = 5, samples_a_pass: float | None = None) -> None:
        self.steps = Steps(8, last_step, a_pass=samples_a_pass)

    def consumed(self, step: int) -> Consumed:
        return Consumed(step * 8, step * TOKENS)

    def microbatches(self, step: int, mesh: Mesh) -> list[Microbatch]:
        return microbatches(LAYOUT, step, mesh.data_rank)

    def evaluation(self, mesh: Mesh) -> Iterator[list[Microbatch]]:
        yield self.microbatches(1000, mesh)
        yield self.microbatches(1001, mesh)[:1]
