"""What of Python's strings is no text: half of a surrogate pair has no UTF-8."""

import re

HALF_A_PAIR = "half of a surrogate pair (\\ud800 to \\udfff), which is no character"
SURROGATE = re.compile("[\ud800-\udfff]")


def has_half_a_pair(text: str) -> bool:
    """Whether a text holds a surrogate, which JSON can write and UTF-8 cannot."""
    return SURROGATE.search(text) is not None
