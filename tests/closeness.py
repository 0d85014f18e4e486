"""Numbers that two runs report of the same, compared on the scale of what each was computed from.

A DPO reward is a difference of log-probabilities, a margin a difference of rewards, a KL one of log-probabilities
again: however small such a difference is, it is rounded as the numbers are that were subtracted.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

ROUNDING = 1e-6  # of what was subtracted: fp32's 6e-8, added up over layers and tokens

# By the name of a difference, the names of the numbers that say how large what was subtracted is.
SUBTRACTED = {
    **dict.fromkeys(
        (
            *(f"rewards/{name}" for name in ("chosen", "rejected", "margins")),
            *("log_odds_chosen", "log_odds_ratio", "kl"),
        ),
        ("logps/chosen", "logps/rejected"),
    ),
    **dict.fromkeys(("margin", "mean_reward"), ("max_reward", "min_reward")),
    **dict.fromkeys(
        ("objective/kl", "objective/non_score_reward", "objective/rlhf_reward"), ("objective/entropy",)
    ),
}


def assert_same_numbers(
    actual: Mapping[str, float], expected: Mapping[str, float], relative: float = 1e-5, absolute: float = 0.0
) -> None:
    """By name. relative, absolute: allowed of every number; of a difference, its parts' rounding as well."""
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    wrong = {
        name: (actual[name], value)
        for name, value in expected.items()
        if not abs(actual[name] - value) <= relative * abs(value) + absolute + rounding(name, expected)
    }
    assert not wrong, wrong


def assert_same_tensors(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], relative: float = 1e-4
) -> None:
    """By name, each to `relative` of its norm.

    One element alone is not held to more: where its gradient is nothing but rounding, AdamW's step, which is the
    gradient over its own size, is anywhere within the learning rate.
    """
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    errors = {name: relative_norm(actual[name], tensor) for name, tensor in expected.items()}
    assert {name: error for name, error in errors.items() if not error < relative} == {}


def relative_norm(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def assert_same_logits(actual: Tensor, expected: Tensor) -> None:
    """To 1e-5. A logit is a sum whose terms are as large where it is near 0 as where it is large."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * scale)


def rounding(name: str, numbers: Mapping[str, float]) -> float:
    """By how much a number may be off because what was subtracted is; 0 where it is no difference."""
    prefix = "valid_" * name.startswith("valid_")
    parts = SUBTRACTED.get(name.removeprefix(prefix), ())
    return ROUNDING * max((abs(numbers[prefix + part]) for part in parts), default=0.0)
