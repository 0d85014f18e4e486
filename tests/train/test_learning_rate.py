"""Learning-rate schedules, by what their papers promise."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm3d.config import OptimConfig
from llm3d.train.learning_rate import learning_rate

Schedule = Literal["cosine", "linear", "wsd", "constant"]


@st.composite
def schedules(draw: st.DrawFn, *names: Schedule) -> tuple[OptimConfig, int, int]:
    """Settings, the number of steps, and the step after which the rate falls."""
    name = draw(st.sampled_from(names or ("cosine", "linear", "wsd", "constant")))
    steps = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, steps))
    decay = draw(st.integers(1, max(1, steps - warmup))) if name == "wsd" else None
    lr = draw(st.floats(1e-6, 1.0))
    config = OptimConfig(
        lr=lr,
        min_lr=lr * draw(st.floats(0, 1)),
        warmup_steps=warmup,
        schedule=name,
        decay_steps=decay,
    )
    return config, steps, warmup if decay is None else max(warmup, steps - decay)


def rates(config: OptimConfig, steps: int) -> list[float]:
    """Of steps 0 to the last; there is no step 0, which is where the warmup starts from."""
    return [0.0] + [learning_rate(step, steps, config) for step in range(1, steps + 1)]


@given(schedules())
def test_warmup_is_a_straight_line_to_the_peak(schedule: tuple[OptimConfig, int, int]) -> None:
    config, steps, _ = schedule
    warmup = rates(config, steps)[: config.warmup_steps + 1]
    assert warmup == pytest.approx([config.lr * i / max(1, config.warmup_steps) for i in range(len(warmup))])


@given(schedules())
def test_after_the_warmup_the_rate_never_rises_and_stays_in_its_bounds(
    schedule: tuple[OptimConfig, int, int],
) -> None:
    config, steps, _ = schedule
    after = rates(config, steps)[config.warmup_steps + 1 :]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(after))
    assert all(config.min_lr * (1 - 1e-9) - 1e-15 <= rate <= config.lr * (1 + 1e-12) for rate in after)


@given(schedules("cosine", "linear", "wsd"))
def test_the_last_step_has_the_smallest_rate(schedule: tuple[OptimConfig, int, int]) -> None:
    config, steps, start = schedule
    last = learning_rate(steps, steps, config)
    assert last == pytest.approx(config.min_lr if start < steps else config.lr, abs=1e-15)


@given(schedules("constant"))
def test_constant_stays_at_the_peak(schedule: tuple[OptimConfig, int, int]) -> None:
    config, steps, _ = schedule
    assert set(rates(config, steps)[config.warmup_steps + 1 :]) <= {config.lr}


@given(schedules("linear", "wsd"))
def test_linear_and_wsd_fall_by_equal_parts(schedule: tuple[OptimConfig, int, int]) -> None:
    config, steps, start = schedule
    all_rates = rates(config, steps)
    assert all_rates[config.warmup_steps + 1 : start + 1] == [config.lr] * (start - config.warmup_steps)
    part = (config.lr - config.min_lr) / max(1, steps - start)
    expected = [config.lr - part * i for i in range(1, steps - start + 1)]
    assert all_rates[start + 1 :] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(schedules("cosine"))
def test_cosine_is_symmetric_about_its_middle(schedule: tuple[OptimConfig, int, int]) -> None:
    config, steps, start = schedule
    falling = [config.lr, *rates(config, steps)[start + 1 :]]
    both = [a + b for a, b in zip(falling, reversed(falling), strict=True)]
    if start < steps:
        assert both == pytest.approx([config.lr + config.min_lr] * len(both), rel=1e-9)


def test_known_values() -> None:
    def at(step: int, **settings: object) -> float:
        return learning_rate(step, 100, OptimConfig(lr=1.0, min_lr=0.1, **settings))  # type: ignore[arg-type]

    assert at(50) == pytest.approx(0.55)
    assert at(25) == pytest.approx(0.1 + 0.9 * (1 + 2**-0.5) / 2)
    assert at(60, schedule="linear", warmup_steps=20) == pytest.approx(0.55)
    assert at(90, schedule="wsd") == 1.0 and at(95, schedule="wsd") == pytest.approx(0.55)
