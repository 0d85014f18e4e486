"""Run a pipeline schedule on paper: prove that it is sound, and say when each action runs.

The model of the machine is that of the executor on NCCL. A message moves once both its ends are posted, and those
posted before it in its queue have moved. There are two kinds of queue, as ProcessGroupNCCL has two ways to order what
is sent and received one by one. In groups that connect at first use, each pair of ranks has a communicator, thus a
stream, of its own: a queue is one kind of message (activations or gradients) between an ordered pair of ranks. In
groups bound to a device (`device_id`), all of a rank's messages on a group take turns: see `one_queue`.

What waits for a message: always the computation that uses it. On NCCL a message that is posted and has not moved is a
running kernel, and what needs an idle device (the first launch of a kernel, memory that is freed) waits for it: see
`blocks` and `idle_before_computing`.

A message is of one sender and one receiver, and nothing is chosen, so the order in which ranks are looked at changes
nothing (Kahn 1974, process networks): a schedule that runs through once runs through at any speed.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from llm3d.parallel.schedules import Action, Kind, channel_of, peer, receive_for

_OTHER_END_OF_SEND = {
    Kind.SEND_FORWARD: Kind.RECV_FORWARD,
    Kind.SEND_BACKWARD: Kind.RECV_BACKWARD,
}
_OTHER_END = _OTHER_END_OF_SEND | {receive: send for send, receive in _OTHER_END_OF_SEND.items()}


class ScheduleError(AssertionError):
    """The schedule contradicts itself: an action before what it needs, or messages that do not match."""


class DeadlockError(ScheduleError):
    """Every rank that is not done waits for a message that is never sent."""


@dataclass(frozen=True)
class Span:
    """start and end, in the unit of the times given.

    Of a compute action: when it runs. Of a send or receive: when it is posted, and when the message is there.
    """

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    spans: list[list[Span]]  # per pipeline rank, in the order of its actions

    @property
    def makespan(self) -> float:
        return max(span.end for spans in self.spans for span in spans)

    @property
    def bubble_fraction(self) -> float:
        """Idle time over ideal compute time, (num_stages - 1) / (num_chunks * num_microbatches) at best.

        Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters", section 2.2.
        Ideal is the compute time of the busiest rank.
        """
        ideal = max(
            sum(span.end - span.start for span in spans if span.action.kind in (Kind.FORWARD, Kind.BACKWARD))
            for spans in self.spans
        )
        return (self.makespan - ideal) / ideal

    @property
    def max_in_flight(self) -> list[int]:
        """Per rank, the most forwards (microbatches times chunks) held at once for a backward to come."""
        return [_max_in_flight([span.action for span in spans]) for spans in self.spans]


Event = tuple[int, Action]  # rank and action


def simulate(
    schedule: list[list[Action]],
    num_chunks: int,
    forward_time: float = 1.0,
    backward_time: float = 2.0,
    transfer_time: float = 0.0,
    blocks: Callable[[Event], bool] = lambda event: False,
    idle_before_computing: bool = False,
    one_queue: bool = False,
) -> Timeline:
    """Time a schedule with communication (from `make_schedule`); times are per chunk and per message.

    blocks: of which sends and receives the rank does nothing more, once it has posted them, until they have moved.
    idle_before_computing: whether ranks compute only when all that they have posted has moved.
    one_queue: whether all messages that a rank sends and receives on a channel of `Mesh` are in one queue.

    Raises DeadlockError when no rank can go on, ScheduleError when an action comes before what it needs, is
    listed twice, or when the order of sends on a channel is not the order of receives.
    """
    compute_time = {Kind.FORWARD: forward_time, Kind.BACKWARD: backward_time}
    run = _Run(schedule, num_chunks, compute_time, transfer_time, blocks, idle_before_computing, one_queue)
    while not run.is_done():
        advanced = [run.advance(rank) for rank in range(len(schedule))]
        if not any(advanced):
            raise DeadlockError(f"no rank can go on: {run.blocked()}")
    run.check_all_messages_moved()
    return run.timeline()


@dataclass
class _Queue:
    """One end's: what a rank has posted and has not moved."""

    posted: deque[Event] = field(default_factory=deque)
    free_at: float = 0.0


class _Run:
    def __init__(
        self,
        schedule: list[list[Action]],
        num_chunks: int,
        compute_time: dict[Kind, float],
        transfer_time: float,
        blocks: Callable[[Event], bool],
        idle_before_computing: bool,
        one_queue: bool,
    ) -> None:
        self.schedule = schedule
        self.num_stages = len(schedule)
        self.num_chunks = num_chunks
        self.compute_time, self.transfer_time = compute_time, transfer_time
        self.blocks, self.idle_before_computing, self.one_queue = blocks, idle_before_computing, one_queue
        self.position = [0] * self.num_stages
        self.clock = [0.0] * self.num_stages
        # Of each rank, messages that its next action waits for, and those that may not have moved.
        self.held: list[list[Event]] = [[] for _ in schedule]
        self.posted: list[list[Event]] = [[] for _ in schedule]
        self.start: dict[Event, float] = {}
        self.end: dict[Event, float] = {}
        self.queues: dict[tuple[object, ...], _Queue] = defaultdict(_Queue)

    def is_done(self) -> bool:
        return all(at == len(actions) for at, actions in zip(self.position, self.schedule, strict=True))

    def advance(self, rank: int) -> bool:
        """Run a rank until it waits or is done; say whether it moved."""
        before = self.position[rank]
        for action in self.schedule[rank][before:]:
            if not self._try(rank, action):
                break
            self.position[rank] += 1
        return self.position[rank] > before

    def _try(self, rank: int, action: Action) -> bool:
        """Run an action if what it needs is there."""
        needs = self._needs(rank, action)
        self._check_listed_before(rank, action, needs)
        if not all(need in self.end for need in needs):
            return False
        start = max([self.clock[rank], *(self.end[need] for need in needs)])
        self.clock[rank] = self.start[rank, action] = start
        self.held[rank] = []
        if action.kind in self.compute_time:
            self.clock[rank] = self.end[rank, action] = start + self.compute_time[action.kind]
            self.posted[rank] = [event for event in self.posted[rank] if event not in self.end]
        else:
            self._post((rank, action))
        return True

    def _needs(self, rank: int, action: Action) -> list[Event]:
        """The actions of the same rank that must have ended, messages that must have moved."""
        chunk, microbatch = action.chunk, action.microbatch
        needs: list[Action | None] = []
        if action.kind in self.compute_time:
            needs.append(receive_for(action, rank, self.num_stages, self.num_chunks))
        if action.kind in (Kind.BACKWARD, Kind.SEND_FORWARD):
            needs.append(Action(Kind.FORWARD, chunk, microbatch))
        if action.kind is Kind.SEND_BACKWARD:
            needs.append(Action(Kind.BACKWARD, chunk, microbatch))
        messages = [*self.held[rank], *(self.posted[rank] if self._waits_for_all(action) else [])]
        return [*((rank, need) for need in needs if need is not None), *messages]

    def _waits_for_all(self, action: Action) -> bool:
        return self.idle_before_computing and action.kind in self.compute_time

    def _check_listed_before(self, rank: int, action: Action, needs: list[Event]) -> None:
        if (rank, action) in self.start:
            raise ScheduleError(f"rank {rank} lists {action} twice")
        for need in needs:
            if need not in self.start:
                raise ScheduleError(f"rank {rank} lists {action} without {need[1]} before it")

    def _post(self, event: Event) -> None:
        rank = event[0]
        self._queue(event).posted.append(event)
        self.posted[rank].append(event)
        if self.blocks(event):
            self.held[rank] = [event]
        self._move(event)

    def _queue(self, event: Event) -> _Queue:
        """The queue of this end of a message."""
        rank, kind = event[0], event[1].kind
        channel = channel_of(kind, rank, self.num_stages)
        if self.one_queue:
            assert self.num_stages > 1, "on one rank a message would wait for itself"
            return self.queues[channel, rank]
        return self.queues[channel, rank, peer(kind, rank, self.num_stages), kind in _OTHER_END_OF_SEND]

    def _move(self, event: Event) -> None:
        """Move messages with both ends first in their queues: this event's, and what has waited for those."""
        looked_at = [event]
        while looked_at:
            mine = self._queue(looked_at.pop())
            theirs = self._queue(self._other_end(mine.posted[0])) if mine.posted else mine
            if not mine.posted or not theirs.posted:
                continue
            first, meets = mine.posted[0], theirs.posted[0]
            if self._queue(self._other_end(meets)) is not mine:
                continue  # it is for another rank
            if meets != self._other_end(first):
                send, receive = sorted((first, meets), key=lambda end: end[1].kind not in _OTHER_END_OF_SEND)
                raise ScheduleError(f"from rank {send[0]} to rank {receive[0]}: {send[1]} meets {receive[1]}")
            begin = max(self.start[first], self.start[meets], mine.free_at, theirs.free_at)
            self.end[first] = self.end[meets] = mine.free_at = theirs.free_at = begin + self.transfer_time
            looked_at += [mine.posted.popleft(), theirs.posted.popleft()]

    def _other_end(self, event: Event) -> Event:
        """The receive of a send, the send of a receive."""
        rank, action = event
        step = 1 if action.kind in (Kind.SEND_FORWARD, Kind.RECV_BACKWARD) else -1
        chunk, other = divmod(action.chunk * self.num_stages + rank + step, self.num_stages)
        return other, Action(_OTHER_END[action.kind], chunk, action.microbatch)

    def blocked(self) -> str:
        """What each rank that is not done waits for."""
        return "; ".join(
            f"rank {rank} at {action} waits for "
            + ", ".join(str(need[1]) for need in self._needs(rank, action) if need not in self.end)
            for rank, actions in enumerate(self.schedule)
            for action in actions[self.position[rank] : self.position[rank] + 1]
        )

    def check_all_messages_moved(self) -> None:
        for queue in self.queues.values():
            for rank, action in queue.posted:
                raise ScheduleError(f"{action} of rank {rank} meets nothing at the other end")

    def timeline(self) -> Timeline:
        return Timeline(
            [
                [Span(action, self.start[rank, action], self.end[rank, action]) for action in actions]
                for rank, actions in enumerate(self.schedule)
            ]
        )


def _max_in_flight(actions: list[Action]) -> int:
    has_backward = {(a.chunk, a.microbatch) for a in actions if a.kind is Kind.BACKWARD}
    change = {Kind.FORWARD: 1, Kind.BACKWARD: -1}
    held = most = 0
    for action in actions:
        if (action.chunk, action.microbatch) in has_backward:
            held += change.get(action.kind, 0)
            most = max(most, held)
    return most
