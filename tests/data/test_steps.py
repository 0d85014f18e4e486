"""What a run has read is counted in samples; so is where its learning-rate schedule is, when its end is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm3d.data.steps import Steps


@given(
    end=st.integers(1, 500),
    parts=st.lists(st.tuples(st.integers(1, 64), st.integers(0, 20)), min_size=1, max_size=5),
)
def test_the_schedule_follows_the_samples_however_often_the_batch_changes(
    end: int, parts: list[tuple[int, int]]
) -> None:
    """At each step the schedule is where the samples are, to less than a step, and its end is the run's end."""
    steps = Steps(parts[0][0], end=end)
    for size, count in [*parts, (7, 500)]:
        steps = Steps(size, end=end).after(steps.step, steps.samples)
        stop = min(steps.step + count, steps.last)
        for step in range(steps.step + 1, stop + 1):
            position, length = steps.schedule(step)
            read = steps.read_by(step)
            assert (position - 1) * size < read <= position * size
            assert position == length if step == steps.last else position <= length
        steps = steps.after(stop, steps.read_by(stop))
    assert steps.samples == end


def test_the_schedule_of_a_run_of_given_steps_is_in_steps() -> None:
    steps = Steps(16, last_given=10).after(4, 8)
    assert [steps.schedule(step) for step in (5, 10)] == [(5, 10), (10, 10)]
