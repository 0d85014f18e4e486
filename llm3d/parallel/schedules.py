"""Pipeline schedules as data: for every pipeline rank, the list of actions that its executor runs in order.

A rank holds `num_chunks` pieces of the model. Chunk c of rank r is virtual stage c * num_stages + r, so a
microbatch visits all ranks once per chunk, and goes from the last rank back to rank 0 between chunks.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from itertools import zip_longest
from math import inf
from typing import NamedTuple


class Kind(Enum):
    """What an action does. Computing waits for its own receive; the others only start a message.

    On NCCL the start of a message is a kernel that stays on the GPU until the other end has started its own. Launching
    a kernel that is not loaded yet, or freeing memory, may then wait until it has gone: `with_communication` arranges
    receives such that the message comes even so.
    """

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
    """Put each send right after its compute action, and receives one compute action ahead of their use where no
    circle of ranks that wait for each other can come of it; else after the send, right before their use.

    A receive posted ahead can be filled while the rank computes; it costs one more buffer. But the compute action that
    it stands before may then have to wait for the message. So it stands there only if the message is due earlier:
    with all that a rank waits for due earlier than what waits, ranks cannot wait in a circle, whatever each takes.
    """
    num_stages, due = len(orders), _due(orders, num_chunks)
    schedule: list[list[Action]] = []
    for rank, order in enumerate(orders):
        actions = [receive_for(order[0], rank, num_stages, num_chunks)]
        for compute, upcoming in zip_longest(order, order[1:]):
            send = send_after(compute, rank, num_stages, num_chunks)
            source = None if upcoming is None else source_of(upcoming, rank, num_stages, num_chunks)
            if upcoming is None or source is None:
                actions += [compute, send]
                continue
            receive = receive_for(upcoming, rank, num_stages, num_chunks)
            ahead = due[source] < due[rank, compute]
            actions += [receive, compute, send] if ahead else [compute, send, receive]
        schedule.append([action for action in actions if action is not None])
    return schedule


def _due(orders: list[list[Action]], num_chunks: int) -> dict[tuple[int, Action], tuple[float, bool, int]]:
    """When each rank's compute actions start, if backward takes twice as long as forward, and messages no time.

    Of those that start at once, forwards come first, each before what follows it on the next rank; then backwards,
    each before what follows it on the rank before. What can never start is due at infinity.
    """
    num_stages, ends = len(orders), dict[tuple[int, Action], float]()
    due = {(rank, compute): (inf, False, 0) for rank, order in enumerate(orders) for compute in order}
    position, clock = [0] * num_stages, [0.0] * num_stages
    ready = deque(range(num_stages))
    while ready:
        rank = ready.popleft()
        while position[rank] < len(orders[rank]):
            compute = orders[rank][position[rank]]
            source = source_of(compute, rank, num_stages, num_chunks)
            if source is not None and source not in ends:
                break
            start = max(clock[rank], ends[source] if source else 0.0)
            is_backward = compute.kind is Kind.BACKWARD
            due[rank, compute] = start, is_backward, -rank if is_backward else rank
            clock[rank] = ends[rank, compute] = start + (2 if is_backward else 1)
            position[rank] += 1
            ready += [(rank + (-1 if is_backward else 1)) % num_stages]
    return due


def source_of(compute: Action, rank: int, num_stages: int, num_chunks: int) -> tuple[int, Action] | None:
    """The compute action, and its rank, whose result a FORWARD or BACKWARD is sent; see `receive_for`."""
    if receive_for(compute, rank, num_stages, num_chunks) is None:
        return None
    step = -1 if compute.kind is Kind.FORWARD else 1
    chunk, source = divmod(compute.chunk * num_stages + rank + step, num_stages)
    return source, replace(compute, chunk=chunk)


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


def channel_of(kind: Kind, rank: int, num_stages: int) -> tuple[str, bool]:
    """Which of `Mesh.channels` a send or receive goes over: its direction, and whether from an end to the other."""
    forward = kind in (Kind.RECV_FORWARD, Kind.SEND_FORWARD)
    forward_starts_here = kind in (Kind.SEND_FORWARD, Kind.RECV_BACKWARD)  # at this end of the link
    return "forward" if forward else "backward", rank == (num_stages - 1 if forward_starts_here else 0)


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
