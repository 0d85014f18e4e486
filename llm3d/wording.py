"""Words of messages."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """1 reply; 2,000 replies. plural: where it is not the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def json_kind(value: object) -> str:
    """What a value is called where it stands in the place of another kind."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
