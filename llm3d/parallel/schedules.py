"""Pipeline schedules as data: for every pipeline rank, the list of actions that its executor runs in order.

A rank holds `num_chunks` pieces of the model. Chunk c of rank r is virtual stage c * num_stages + r, so a
microbatch visits all ranks once per chunk, and goes from the last rank back to rank 0 between chunks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from itertools import zip_longest
from typing import NamedTuple


class Kind(Enum):
    """What an action does. Computing waits for its own receive; receiving and sending never block."""

    RECV_FORWARD = "recv_forward"  # post the receive of activations from the previous virtual stage
    FORWARD = "forward"
    SEND_FORWARD = "send_forward"  # start sending activations to the next virtual stage
    RECV_BACKWARD = "recv_backward"  # post the receive of gradients from the next virtual stage
    BACKWARD = "backward"
    SEND_BACKWARD = "send_backward"  # start sending gradients to the previous virtual stage


@dataclass(frozen=True)
class Action:
    kind: Kind
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.name}(chunk {self.chunk}, microbatch {self.microbatch})"


def make_schedule(
    name: str, num_stages: int, num_chunks: int, num_microbatches: int, forward_only: bool = False
) -> list[list[Action]]:
    """What the executor runs, per pipeline rank: compute and communication.

    name: gpipe, 1f1b or interleaved; only interleaved trains more than one chunk a rank.
    forward_only: the schedule for evaluation, whatever the name.
    """
    assert forward_only or num_chunks == 1 or name == "interleaved", f"{name} has one chunk, not {num_chunks}"
    orders = _ORDERS["forward_only" if forward_only else name]
    return with_communication(orders(num_stages, num_chunks, num_microbatches), num_chunks)


class Part(NamedTuple):
    """What one rank needs of a schedule: its actions, and when it can let go of what it sends."""

    actions: list[Action]
    arrivals: dict[Action, list[Action]]


@lru_cache(maxsize=8)
def part_of_rank(
    rank: int, name: str, num_stages: int, num_chunks: int, num_microbatches: int, forward_only: bool = False
) -> Part:
    """A rank's part of `make_schedule`, made once."""
    schedule = make_schedule(name, num_stages, num_chunks, num_microbatches, forward_only)
    return Part(schedule[rank], arrivals(schedule)[rank])


def gpipe(num_stages: int, num_microbatches: int) -> list[list[Action]]:
    """All forwards, then all backwards: holds the activations of every microbatch.

    GPipe, Huang et al. 2019, section 2.2, with one difference: backwards run first in, first out, where the
    paper's figure 2c reverses them. The bubble is the same, and gradients add up in the order of the
    microbatches, as they do in 1F1B, so that the two schedules agree to the last bit.
    """
    return [
        _one_forward_one_backward(
            _in_groups(Kind.FORWARD, [0], num_stages, num_microbatches),
            _in_groups(Kind.BACKWARD, [0], num_stages, num_microbatches),
            num_warmup=num_microbatches,
        )
        for _ in range(num_stages)
    ]


def one_f_one_b(num_stages: int, num_microbatches: int) -> list[list[Action]]:
    """GPipe's bubble, but rank r holds the activations of min(num_microbatches, num_stages - r) microbatches.

    PipeDream-flush, Narayanan et al. 2021, "Memory-efficient pipeline-parallel DNN training", section 3.2.
    """
    return [
        _one_forward_one_backward(
            _in_groups(Kind.FORWARD, [0], num_stages, num_microbatches),
            _in_groups(Kind.BACKWARD, [0], num_stages, num_microbatches),
            num_warmup=min(num_stages - rank - 1, num_microbatches),
        )
        for rank in range(num_stages)
    ]


def interleaved(num_stages: int, num_chunks: int, num_microbatches: int) -> list[list[Action]]:
    """1F1B over chunks: a bubble num_chunks times smaller, for num_chunks times the messages.

    Microbatches advance in groups of num_stages: a group goes through chunk 0, then chunk 1, and so on.
    Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters", section 2.2.
    The length of the warmup is Megatron-LM's (forward_backward_pipelining_with_interleaving).
    """
    assert num_microbatches % num_stages == 0, f"{num_microbatches} microbatches, {num_stages} stages"
    return [
        _one_forward_one_backward(
            _in_groups(Kind.FORWARD, range(num_chunks), num_stages, num_microbatches),
            _in_groups(Kind.BACKWARD, reversed(range(num_chunks)), num_stages, num_microbatches),
            num_warmup=_interleaved_warmup(rank, num_stages, num_chunks, num_microbatches),
        )
        for rank in range(num_stages)
    ]


def forward_only(num_stages: int, num_chunks: int, num_microbatches: int) -> list[list[Action]]:
    """The forwards of `interleaved` alone, for any number of microbatches (the last group may be short)."""
    order = _in_groups(Kind.FORWARD, range(num_chunks), num_stages, num_microbatches)
    return [list(order) for _ in range(num_stages)]


def with_communication(orders: list[list[Action]], num_chunks: int) -> list[list[Action]]:
    """Put each send right after its compute action, and each receive one compute action ahead of its use.

    A receive posted that early can be filled while the rank computes; it costs one more buffer.
    """
    num_stages = len(orders)
    schedule: list[list[Action]] = []
    for rank, order in enumerate(orders):
        actions = [receive_for(order[0], rank, num_stages, num_chunks)]
        for compute, upcoming in zip_longest(order, order[1:]):
            if upcoming is not None:
                actions.append(receive_for(upcoming, rank, num_stages, num_chunks))
            actions += [compute, send_after(compute, rank, num_stages, num_chunks)]
        schedule.append([action for action in actions if action is not None])
    return schedule


def receive_for(compute: Action, rank: int, num_stages: int, num_chunks: int) -> Action | None:
    """The receive that a FORWARD or BACKWARD waits for; none where the batch enters or the loss is taken."""
    stage = compute.chunk * num_stages + rank
    if compute.kind is Kind.FORWARD:
        return replace(compute, kind=Kind.RECV_FORWARD) if stage > 0 else None
    return replace(compute, kind=Kind.RECV_BACKWARD) if stage < num_stages * num_chunks - 1 else None


def send_after(compute: Action, rank: int, num_stages: int, num_chunks: int) -> Action | None:
    """The send of what a FORWARD or BACKWARD gave; none where the loss is taken or the batch enters."""
    stage = compute.chunk * num_stages + rank
    if compute.kind is Kind.FORWARD:
        return replace(compute, kind=Kind.SEND_FORWARD) if stage < num_stages * num_chunks - 1 else None
    return replace(compute, kind=Kind.SEND_BACKWARD) if stage > 0 else None


def arrivals(schedule: list[list[Action]]) -> list[dict[Action, list[Action]]]:
    """By rank and computation: the sends that have arrived for certain once it has the message it waits for.

    The peer has computed with them before it sent that message. Their tensors can be let go.
    """
    position = [{action: i for i, action in enumerate(actions)} for actions in schedule]
    arrived: list[dict[Action, list[Action]]] = [{} for _ in schedule]
    for rank, actions in enumerate(schedule):
        under_way: dict[int, list[tuple[int, Action]]] = {}  # by peer: where it uses a message, and its send
        for action in actions:
            if action.kind in (Kind.RECV_FORWARD, Kind.RECV_BACKWARD):
                continue
            other, theirs = _at_the_other_end(action, rank, schedule)
            if action.kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
                under_way.setdefault(other, []).append((position[other][theirs], action))
            elif theirs in position[other]:
                sent_at, mine = position[other][theirs], under_way.get(other, [])
                arrived[rank][action] = [send for used_at, send in mine if used_at < sent_at]
                under_way[other] = [(used_at, send) for used_at, send in mine if used_at > sent_at]
    return arrived


def _at_the_other_end(action: Action, rank: int, schedule: list[list[Action]]) -> tuple[int, Action]:
    """Of a send, the computation that uses it; of a computation, the send that it waits for. With its rank."""
    forward = action.kind in (Kind.FORWARD, Kind.SEND_FORWARD)
    sends = action.kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)
    chunk, other = divmod(
        action.chunk * len(schedule) + rank + (1 if forward == sends else -1), len(schedule)
    )
    if sends:
        kind = Kind.FORWARD if forward else Kind.BACKWARD
    else:
        kind = Kind.SEND_FORWARD if forward else Kind.SEND_BACKWARD
    return other, Action(kind, chunk, action.microbatch)


def peer(kind: Kind, rank: int, num_stages: int) -> int:
    """The rank at the other end of a send or receive.

    Only interleaving wraps around; with a single rank the chunks send to each other on that rank.
    """
    step = {Kind.SEND_FORWARD: 1, Kind.RECV_BACKWARD: 1, Kind.RECV_FORWARD: -1, Kind.SEND_BACKWARD: -1}[kind]
    return (rank + step) % num_stages


_ORDERS: dict[str, Callable[[int, int, int], list[list[Action]]]] = {
    "gpipe": lambda num_stages, _, num_microbatches: gpipe(num_stages, num_microbatches),
    "1f1b": lambda num_stages, _, num_microbatches: one_f_one_b(num_stages, num_microbatches),
    "interleaved": interleaved,
    "forward_only": forward_only,
}


def _one_forward_one_backward(
    forwards: list[Action], backwards: list[Action], num_warmup: int
) -> list[Action]:
    """Warm up with forwards, alternate while there are forwards left, cool down with backwards."""
    order = forwards[:num_warmup]
    for forward, backward in zip(forwards[num_warmup:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(forwards) - num_warmup :]


def _in_groups(kind: Kind, chunks: Iterable[int], group_size: int, num_microbatches: int) -> list[Action]:
    """Groups of consecutive microbatches, each taken through all chunks before the next group starts."""
    chunks = list(chunks)
    return [
        Action(kind, chunk, microbatch)
        for start in range(0, num_microbatches, group_size)
        for chunk in chunks
        for microbatch in range(start, min(start + group_size, num_microbatches))
    ]


def _interleaved_warmup(rank: int, num_stages: int, num_chunks: int, num_microbatches: int) -> int:
    """How many forwards come before the first backward.

    A rank's first backward is of its last chunk, after (num_chunks - 1) * num_stages forwards of the others;
    it comes 2 * (num_stages - rank - 1) hops after the rank's own forward of that microbatch: there and back.
    """
    num_forwards = num_chunks * num_microbatches
    return min((num_stages - rank - 1) * 2 + (num_chunks - 1) * num_stages, num_forwards)
