"""What each pipeline schedule asks of the settings; `llm3d.parallel.schedules` has what it runs."""

from __future__ import annotations

from typing import Literal, NamedTuple

ScheduleName = Literal["gpipe", "1f1b", "interleaved"]


class ScheduleRules(NamedTuple):
    """interleaves: whether each rank takes turns between several chunks of the model.

    Microbatches then go through the chunks in groups as large as the pipeline: their number is a multiple of it.
    """

    interleaves: bool = False

    def microbatch_multiple(self, num_ranks: int) -> int:
        """What the number of a step's microbatches is a multiple of, on so many pipeline ranks."""
        return num_ranks if self.interleaves else 1


SCHEDULES: dict[ScheduleName, ScheduleRules] = {
    "gpipe": ScheduleRules(),
    "1f1b": ScheduleRules(),
    "interleaved": ScheduleRules(interleaves=True),
}
