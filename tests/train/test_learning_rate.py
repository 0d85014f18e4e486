"""Learning-rate schedules, by what their papers promise and by what transformers makes of them."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from llm3d.config import OptimConfig
from llm3d.train.learning_rate import learning_rate, phases, shortened

Schedule = Literal["cosine", "linear", "wsd", "constant"]


@st.composite
def schedules(draw: st.DrawFn, *names: Schedule) -> tuple[OptimConfig, int, int]:
    """Settings, the number of steps, and the step after which the rate falls."""
    name = draw(st.sampled_from(names or ("cosine", "linear", "wsd", "constant")))
    steps = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, steps - (name == "wsd")))
    decay = draw(st.integers(1, steps - warmup)) if name == "wsd" else None
    lr = draw(st.floats(1e-6, 1.0))
    config = OptimConfig(
        lr=lr,
        min_lr=lr * draw(st.floats(0, 1)),
        warmup_steps=warmup,
        schedule=name,
        decay_steps=decay,
    )
    return config, steps, warmup if decay is None else steps - decay


def rates(config: OptimConfig, steps: int) -> list[float]:
    """Of steps 0 to the last; there is no step 0, which is where the warmup starts from."""
    return [0.0] + [learning_rate(step, steps, config) for step in range(1, steps + 1)]


def falling(config: OptimConfig, steps: int, start: int) -> list[float]:
    """The rates after the step `start`, and that of the step after the last, which no run takes."""
    return [learning_rate(step, steps, config) for step in range(start + 1, steps + 2)]


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
def test_the_step_after_the_last_would_have_the_smallest_rate(schedule: tuple[OptimConfig, int, int]) -> None:
    config, steps, start = schedule
    assert falling(config, steps, start)[-1] == pytest.approx(config.min_lr if start < steps else config.lr)


@given(schedules())
def test_every_step_learns(schedule: tuple[OptimConfig, int, int]) -> None:
    config, steps, _ = schedule
    assert all(rate > 0 for rate in rates(config.model_copy(update={"min_lr": 0.0}), steps)[1:])


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
    expected = [config.lr - part * i for i in range(steps - start + 1)]
    assert falling(config, steps, start) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(schedules("cosine"))
def test_cosine_is_symmetric_about_its_middle(schedule: tuple[OptimConfig, int, int]) -> None:
    config, steps, start = schedule
    half_wave = falling(config, steps, start)
    both = [a + b for a, b in zip(half_wave, reversed(half_wave), strict=True)]
    if start < steps:
        assert both == pytest.approx([config.lr + config.min_lr] * len(both), rel=1e-9)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(7, 0), (20, 3), (20, 19)])
def test_after_the_warmup_the_rates_are_those_of_transformers(
    name: Schedule, steps: int, warmup: int
) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs: Any = {
        "cosine": partial(get_cosine_schedule_with_warmup, num_training_steps=steps),
        "linear": partial(get_linear_schedule_with_warmup, num_training_steps=steps),
        "wsd": partial(
            get_wsd_schedule, num_training_steps=steps, num_decay_steps=1, decay_type="linear", min_lr_ratio=0
        ),
    }[name](optimizer, num_warmup_steps=warmup)
    expected = []
    for _ in range(steps):
        expected += theirs.get_last_lr()
        optimizer.step()
        theirs.step()
    config = OptimConfig(
        lr=0.5, min_lr=0, warmup_steps=warmup, schedule=name, decay_steps=1 if name == "wsd" else None
    )
    assert rates(config, steps)[warmup + 1 :] == pytest.approx(expected[warmup:], abs=1e-12)
    assert rates(config, steps)[:warmup] == pytest.approx(expected[:warmup]), "theirs starts from 0"


def test_ratios_are_shares_of_the_steps_rounded_up() -> None:
    given = OptimConfig(lr=1.0, warmup_ratio=0.03, schedule="wsd", decay_ratio=0.1)
    assert phases(100, given) == (3, 10) and phases(110, given) == (4, 11) and phases(10, given) == (1, 1)
    assert phases(60, OptimConfig(lr=1.0, schedule="wsd")) == (0, 6), "a tenth is the default"


@pytest.mark.parametrize(
    ("steps", "asked", "found"),
    [
        (3, {"warmup_steps": 10}, "the warm-up is shortened from 10 steps to 3"),
        (
            10,
            {"warmup_steps": 15, "schedule": "wsd", "decay_steps": 5},
            "the warm-up is shortened from 15 steps to 7, the decay is shortened from 5 steps to 3",
        ),
        (10, {"warmup_steps": 10}, None),
        (10, {"warmup_steps": 5, "schedule": "wsd", "decay_steps": 5}, None),
    ],
)
def test_a_run_too_short_for_its_schedule_shortens_it_and_says_so(
    steps: int, asked: dict[str, Any], found: str | None
) -> None:
    config = OptimConfig(lr=1.0, min_lr=0, **asked)
    assert sum(phases(steps, config)) == steps
    assert (shortened(steps, config) or "").endswith(found or "")
    assert (shortened(steps, config) is None) == (found is None)
    assert max(rates(config, steps)) == 1 and min(rates(config, steps)[1:]) > 0


def test_known_values() -> None:
    def at(step: int, **settings: object) -> float:
        return learning_rate(step, 100, OptimConfig(lr=1.0, min_lr=0.1, **settings))

    assert at(1) == 1.0 and at(51) == pytest.approx(0.55)
    assert at(26) == pytest.approx(0.1 + 0.9 * (1 + 2**-0.5) / 2)
    assert at(61, schedule="linear", warmup_steps=20) == pytest.approx(0.55)
    assert at(91, schedule="wsd") == 1.0 and at(96, schedule="wsd") == pytest.approx(0.55)
