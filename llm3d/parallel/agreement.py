"""What fails on one rank is made known to all, so that every rank ends the same way and none waits forever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import ProcessGroup

from llm3d.errors import InputError
from llm3d.parallel.collectives import gather_bytes


def first_failure(failure: str | None, group: ProcessGroup) -> str | None:
    """The message of the lowest rank that has one, on every rank of the group; None where none has."""
    messages = gather_bytes((failure or "").encode(), group)
    return next((message.decode() for message in messages if message), None)


@contextmanager
def input_errors_on_all(group: ProcessGroup) -> Iterator[None]:
    """An InputError that a rank raises in the block is raised on every rank of the group at its end.

    No rank may communicate inside: the others would wait for one that has failed.
    """
    own: InputError | None = None
    try:
        yield
    except InputError as error:
        own = error
    message = first_failure(str(own) if own else None, group)
    if message is not None:
        raise InputError(message) from own
