"""Pipeline schedules as data: for every pipeline rank, the list of actions that its executor runs in order.

Three parts, each in one place: `Kind` and `COMPUTATIONS` say what actions there are and which messages they exchange,
`Placement` says which virtual stages a rank holds, and a function for each schedule puts computations in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import zip_longest
from math import inf
from typing import NamedTuple

from llm3d.config import ParallelConfig
from llm3d.config.schedules import SCHEDULES, ScheduleName

# ---- what actions there are ----


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


class Messages(NamedTuple):
    """How the result of a computation gets to the virtual stage that is `step` further, which waits for it."""

    receive: Kind
    send: Kind
    step: int


class Computation(NamedTuple):
    """A kind of action that computes.

    duration: in those of a forward, as a rule of thumb.
    after: what the same rank has computed before it of the same chunk and microbatch.
    messages: None for a kind whose result stays where it is.
    """

    duration: float
    after: Kind | None = None
    messages: Messages | None = None


COMPUTATIONS = {  # of those that are due at once, the earlier kinds come first
    Kind.FORWARD: Computation(1, messages=Messages(Kind.RECV_FORWARD, Kind.SEND_FORWARD, step=1)),
    Kind.BACKWARD: Computation(
        2, after=Kind.FORWARD, messages=Messages(Kind.RECV_BACKWARD, Kind.SEND_BACKWARD, step=-1)
    ),
}
_ORDER_OF_KINDS = {kind: number for number, kind in enumerate(COMPUTATIONS)}
# By the kind of a message: the kind of computation that it is of, and the messages of that.
SENDS = {each.messages.send: (kind, each.messages) for kind, each in COMPUTATIONS.items() if each.messages}
RECEIVES = {
    each.messages.receive: (kind, each.messages) for kind, each in COMPUTATIONS.items() if each.messages
}


@dataclass(frozen=True)
class Action:
    kind: Kind
    chunk: int
    microbatch: int

    def of_kind(self, kind: Kind) -> Action:
        """Another kind of action for the same chunk and microbatch."""
        return Action(kind, self.chunk, self.microbatch)

    def __str__(self) -> str:
        return f"{self.kind.name}(chunk {self.chunk}, microbatch {self.microbatch})"


Event = tuple[int, Action]  # rank and action


# ---- where they run ----


@dataclass(frozen=True)
class Placement:
    """Which virtual stages each pipeline rank holds, and with whom it exchanges messages.

    A rank holds `num_chunks` pieces of the model. Chunk c of rank r is virtual stage c * num_ranks + r, so a
    microbatch visits all ranks once per chunk, and goes from the last rank back to rank 0 between chunks.
    """

    num_ranks: int
    num_chunks: int = 1

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.num_chunks

    def stage_of(self, rank: int, chunk: int) -> int:
        """The virtual stage that a chunk of a rank is."""
        return chunk * self.num_ranks + rank

    def place_of(self, stage: int) -> tuple[int, int]:
        """The rank that holds a virtual stage, and which of its chunks it is."""
        chunk, rank = divmod(stage, self.num_ranks)
        return rank, chunk

    def moved(self, event: Event, step: int, kind: Kind) -> Event | None:
        """The action of a kind for the same microbatch `step` virtual stages further; None beyond the ends."""
        rank, action = event
        stage = self.stage_of(rank, action.chunk) + step
        if not 0 <= stage < self.num_stages:
            return None
        rank, chunk = self.place_of(stage)
        return rank, Action(kind, chunk, action.microbatch)

    def source_of(self, compute: Event) -> Event | None:
        """The computation whose result another one waits for; none where the batch enters or the loss is taken."""
        messages = COMPUTATIONS[compute[1].kind].messages
        return self.moved(compute, -messages.step, compute[1].kind) if messages else None

    def target_of(self, compute: Event) -> Event | None:
        """The computation that waits for another one's result; none where the loss is taken or the batch enters."""
        messages = COMPUTATIONS[compute[1].kind].messages
        return self.moved(compute, messages.step, compute[1].kind) if messages else None

    def receive_for(self, compute: Event) -> Action | None:
        """The receive that a computation waits for."""
        messages = COMPUTATIONS[compute[1].kind].messages
        there = messages and self.source_of(compute)
        return compute[1].of_kind(messages.receive) if messages and there else None

    def send_after(self, compute: Event) -> Action | None:
        """The send of what a computation gave."""
        messages = COMPUTATIONS[compute[1].kind].messages
        there = messages and self.target_of(compute)
        return compute[1].of_kind(messages.send) if messages and there else None

    def other_end(self, message: Event) -> Event:
        """The receive of a send, the send of a receive."""
        end = self._other_end(message)
        assert end is not None, f"{message[1]} goes beyond the ends of the pipeline"
        return end

    def has_other_end(self, message: Event) -> bool:
        """Whether there is a virtual stage that a message goes to, or comes from."""
        return self._other_end(message) is not None

    def _other_end(self, message: Event) -> Event | None:
        kind = message[1].kind
        if kind in SENDS:
            _, messages = SENDS[kind]
            return self.moved(message, messages.step, messages.receive)
        _, messages = RECEIVES[kind]
        return self.moved(message, -messages.step, messages.send)

    def channel_of(self, message: Event) -> tuple[str, bool]:
        """Which of `Mesh.channels` a send or receive goes over: its direction, and whether from an end to the other.

        Only interleaving wraps around; with a single rank the chunks send to each other on that rank.
        """
        (here, action), (there, _) = message, self.other_end(message)
        sends = action.kind in SENDS
        _, messages = (SENDS if sends else RECEIVES)[action.kind]
        sender, receiver = (here, there) if sends else (there, here)
        if messages.step > 0:
            return "forward", receiver <= sender
        return "backward", sender <= receiver


# ---- a schedule ----


class Part(NamedTuple):
    """What one rank needs of a schedule: its actions, and when it can let go of what it sends."""

    actions: list[Action]
    arrivals: dict[Action, list[Action]]


@dataclass(frozen=True)
class Schedule:
    """A pipeline schedule: where virtual stages are, what each rank runs, and how many microbatches fit it."""

    name: ScheduleName
    placement: Placement

    def __post_init__(self) -> None:
        chunks = self.placement.num_chunks
        assert chunks == 1 or SCHEDULES[self.name].interleaves, f"{self.name} has one chunk, not {chunks}"

    @classmethod
    def of(cls, parallel: ParallelConfig) -> Schedule:
        return cls(parallel.schedule, Placement(parallel.pipeline, parallel.chunks))

    @property
    def microbatch_multiple(self) -> int:
        """What the number of microbatches trained on is a multiple of."""
        return SCHEDULES[self.name].microbatch_multiple(self.placement.num_ranks)

    def orders(self, num_microbatches: int, forward_only: bool = False) -> list[list[Action]]:
        """The computations of each pipeline rank. forward_only: for evaluation; of any number of microbatches."""
        if forward_only:
            return evaluation(self.placement, num_microbatches)
        multiple = self.microbatch_multiple
        assert num_microbatches % multiple == 0, f"{num_microbatches} is no multiple of {multiple}"
        return _ORDERS[self.name](self.placement, num_microbatches)

    def actions(self, num_microbatches: int, forward_only: bool = False) -> list[list[Action]]:
        """What the executor runs, per pipeline rank: compute and communication."""
        return with_communication(self.orders(num_microbatches, forward_only), self.placement)

    def part(self, rank: int, num_microbatches: int, forward_only: bool = False) -> Part:
        """A rank's part of `actions`, made once."""
        return _part(self, rank, num_microbatches, forward_only)

    def max_in_flight(self, num_microbatches: int) -> int:
        """The most forwards (microbatches times chunks) whose backward is to come, on the rank that has most."""
        return max(map(max_in_flight, self.orders(num_microbatches)))


@lru_cache(maxsize=8)
def _part(schedule: Schedule, rank: int, num_microbatches: int, forward_only: bool) -> Part:
    actions = schedule.actions(num_microbatches, forward_only)
    return Part(actions[rank], arrivals(actions, schedule.placement)[rank])


def max_in_flight(actions: Sequence[Action]) -> int:
    """Of one rank's actions: the most forwards held at once for a backward to come."""
    has_backward = {(a.chunk, a.microbatch) for a in actions if a.kind is Kind.BACKWARD}
    change = {Kind.FORWARD: 1, Kind.BACKWARD: -1}
    held = most = 0
    for action in actions:
        if (action.chunk, action.microbatch) in has_backward:
            held += change.get(action.kind, 0)
            most = max(most, held)
    return most


# ---- the order of computations ----


def gpipe(placement: Placement, num_microbatches: int) -> list[list[Action]]:
    """All forwards, then all backwards: holds the activations of every microbatch.

    GPipe, Huang et al. 2019, section 2.2, with one difference: backwards run first in, first out, where the
    paper's figure 2c reverses them. The bubble is the same, and gradients add up in the order of the
    microbatches, as they do in 1F1B, so that the two schedules agree to the last bit.
    """
    return [
        _one_forward_one_backward(placement, num_microbatches, num_warmup=num_microbatches)
        for _ in range(placement.num_ranks)
    ]


def one_f_one_b(placement: Placement, num_microbatches: int) -> list[list[Action]]:
    """GPipe's bubble, but rank r holds the activations of min(num_microbatches, num_ranks - r) microbatches.

    PipeDream-flush, Narayanan et al. 2021, "Memory-efficient pipeline-parallel DNN training", section 3.2.
    """
    return [
        _one_forward_one_backward(
            placement, num_microbatches, num_warmup=min(placement.num_ranks - rank - 1, num_microbatches)
        )
        for rank in range(placement.num_ranks)
    ]


def interleaved(placement: Placement, num_microbatches: int) -> list[list[Action]]:
    """1F1B over chunks: a bubble num_chunks times smaller, for num_chunks times the messages.

    Microbatches advance in groups of num_ranks: a group goes through chunk 0, then chunk 1, and so on.
    Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters", section 2.2.
    The length of the warmup is Megatron-LM's (forward_backward_pipelining_with_interleaving).
    """
    return [
        _one_forward_one_backward(
            placement, num_microbatches, num_warmup=_interleaved_warmup(rank, placement, num_microbatches)
        )
        for rank in range(placement.num_ranks)
    ]


def evaluation(placement: Placement, num_microbatches: int) -> list[list[Action]]:
    """The forwards of `interleaved` alone, for any number of microbatches (the last group may be short)."""
    order = _in_groups(Kind.FORWARD, range(placement.num_chunks), placement.num_ranks, num_microbatches)
    return [list(order) for _ in range(placement.num_ranks)]


_ORDERS: dict[ScheduleName, Callable[[Placement, int], list[list[Action]]]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
}


def _one_forward_one_backward(placement: Placement, num_microbatches: int, num_warmup: int) -> list[Action]:
    """Warm up with forwards, alternate while there are forwards left, cool down with backwards."""
    chunks, group = range(placement.num_chunks), placement.num_ranks
    forwards = _in_groups(Kind.FORWARD, chunks, group, num_microbatches)
    backwards = _in_groups(Kind.BACKWARD, reversed(chunks), group, num_microbatches)
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


def _interleaved_warmup(rank: int, placement: Placement, num_microbatches: int) -> int:
    """How many forwards come before the first backward.

    A rank's first backward is of its last chunk, after (num_chunks - 1) * num_ranks forwards of the others;
    it comes 2 * (num_ranks - rank - 1) hops after the rank's own forward of that microbatch: there and back.
    """
    num_ranks, num_chunks = placement.num_ranks, placement.num_chunks
    return min((num_ranks - rank - 1) * 2 + (num_chunks - 1) * num_ranks, num_chunks * num_microbatches)


# ---- messages between them ----


def with_communication(orders: list[list[Action]], placement: Placement) -> list[list[Action]]:
    """Put each send right after its compute action, and receives one compute action ahead of their use where no
    circle of ranks that wait for each other can come of it; else after the send, right before their use.

    A receive posted ahead can be filled while the rank computes; it costs one more buffer. But the compute action that
    it stands before may then have to wait for the message. So it stands there only if the message is due earlier:
    with all that a rank waits for due earlier than what waits, ranks cannot wait in a circle, whatever each takes.
    """
    due = _due(orders, placement)
    schedule: list[list[Action]] = []
    for rank, order in enumerate(orders):
        actions: list[Action | None] = [placement.receive_for((rank, order[0]))]
        for compute, upcoming in zip_longest(order, order[1:]):
            send = placement.send_after((rank, compute))
            source = None if upcoming is None else placement.source_of((rank, upcoming))
            if upcoming is None or source is None:
                actions += [compute, send]
                continue
            receive = placement.receive_for((rank, upcoming))
            ahead = due[source] < due[rank, compute]
            actions += [receive, compute, send] if ahead else [compute, send, receive]
        schedule.append([action for action in actions if action is not None])
    return schedule


def _due(orders: list[list[Action]], placement: Placement) -> dict[Event, tuple[float, int, int]]:
    """When each rank's compute actions start, if they take as long as COMPUTATIONS says, and messages no time.

    Of those that start at once, forwards come first, each before what follows it on the next rank; then backwards,
    each before what follows it on the rank before. What can never start is due at infinity.
    """
    ends = dict[Event, float]()
    due = {(rank, compute): (inf, 0, 0) for rank, order in enumerate(orders) for compute in order}
    position, clock = [0] * len(orders), [0.0] * len(orders)
    ready = deque(range(len(orders)))
    while ready:
        rank = ready.popleft()
        while position[rank] < len(orders[rank]):
            compute = rank, orders[rank][position[rank]]
            source, target = placement.source_of(compute), placement.target_of(compute)
            if source is not None and source not in ends:
                break
            start, kind = max(clock[rank], ends[source] if source else 0.0), compute[1].kind
            messages = COMPUTATIONS[kind].messages
            due[compute] = start, _ORDER_OF_KINDS[kind], rank * (messages.step if messages else 0)
            clock[rank] = ends[compute] = start + COMPUTATIONS[kind].duration
            position[rank] += 1
            ready += [target[0]] if target else []
    return due


def arrivals(schedule: list[list[Action]], placement: Placement) -> list[dict[Action, list[Action]]]:
    """By rank and computation: the sends that have arrived for certain once it has the message it waits for.

    Once a message from a peer is here, so is at the peer all that it has computed with before it sent that message:

        this rank    SEND a                                RECV b   COMPUTE with b: a has arrived, its tensor can go
                       |                                     |
        the peer       +--> RECV a   COMPUTE with a   SEND b +
    """
    position = [{action: i for i, action in enumerate(actions)} for actions in schedule]
    arrived: list[dict[Action, list[Action]]] = [{} for _ in schedule]
    for rank, actions in enumerate(schedule):
        under_way: dict[int, list[tuple[int, Action]]] = {}  # by peer: where it uses a message, and its send
        for action in actions:
            if action.kind in SENDS:
                other, theirs = placement.other_end((rank, action))
                use = theirs.of_kind(SENDS[action.kind][0])
                under_way.setdefault(other, []).append((position[other][use], action))
            elif action.kind in COMPUTATIONS and (receive := placement.receive_for((rank, action))):
                other, theirs = placement.other_end((rank, receive))
                sent_at, mine = position[other][theirs], under_way.get(other, [])
                arrived[rank][action] = [send for used_at, send in mine if used_at < sent_at]
                under_way[other] = [(used_at, send) for used_at, send in mine if used_at > sent_at]
    return arrived
