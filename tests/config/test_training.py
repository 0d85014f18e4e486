"""What comes every so many steps or epochs."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm3d.config.training import Interval


@pytest.mark.parametrize(
    "interval", [Interval(3), Interval(None, 0.5), Interval(None, 1.0), Interval(None, 0.3)]
)
@given(a_pass=st.integers(1, 50), batch=st.integers(1, 60))
def test_it_comes_with_the_first_step_that_fills_it(interval: Interval, a_pass: int, batch: int) -> None:
    def epoch(step: int) -> float:
        return step * batch / a_pass

    came = [step for step in range(1, 30) if interval.ends_at(step, epoch)]
    for step in range(1, 30):
        intervals = step / interval.steps if interval.steps else epoch(step) / (interval.epochs or math.nan)
        assert any(at <= step for at in came) == (round(intervals, 6) >= 1)
        if interval.steps or batch <= a_pass * (interval.epochs or 0):  # else several end with a step
            assert sum(at <= step for at in came) == math.floor(round(intervals, 6))


def test_without_either_it_never_comes() -> None:
    assert not any(Interval(None).ends_at(step, float) for step in range(1, 9))
