"""Reward functions that `reinforcing.py` trains with; they show what ppo.rewards can name."""

from __future__ import annotations

import re
from collections.abc import Sequence

CALCULATION = r"[^\n<]*<<[^\n<>]+=[^\n<>]+>>[^\n<]*"
FORM = re.compile(rf"{CALCULATION}\n{CALCULATION}\n#### -?[\d,.]+")


def two_calculations(prompts: Sequence[str], replies: Sequence[str]) -> list[float]:
    """1 for a reply of exactly two lines with a calculation each, such as <<2*3=6>>, and a line with the answer."""
    return [float(FORM.fullmatch(reply.strip()) is not None) for reply in replies]
