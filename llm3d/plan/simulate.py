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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llm3d.parallel.schedules import COMPUTATIONS, SENDS, Action, Event, Kind, Placement, max_in_flight

DURATIONS = {kind: each.duration for kind, each in COMPUTATIONS.items()}


class ScheduleError(AssertionError):
    """The schedule contradicts itself: an action before what it needs, or messages that do not match."""


class DeadlockError(ScheduleError):
    """Every rank that is not done waits for a message that is never sent."""


@dataclass(frozen=True)
class TimedAction:
    """start and end, in the unit of the times given.

    Of a compute action: when it runs. Of a send or receive: when it is posted, and when the message is there.
    """

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    spans: list[list[TimedAction]]  # per pipeline rank, in the order of its actions

    @property
    def makespan(self) -> float:
        return max(span.end for spans in self.spans for span in spans)

    @property
    def bubble_fraction(self) -> float:
        """Idle time over ideal compute time, (num_ranks - 1) / (num_chunks * num_microbatches) at best.

        Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters", section 2.2.
        Ideal is the compute time of the busiest rank.
        """
        ideal = max(
            sum(span.end - span.start for span in spans if span.action.kind in COMPUTATIONS)
            for spans in self.spans
        )
        return (self.makespan - ideal) / ideal

    @property
    def max_in_flight(self) -> list[int]:
        """Per rank, the most forwards (microbatches times chunks) held at once for a backward to come."""
        return [max_in_flight([span.action for span in spans]) for spans in self.spans]


def simulate(
    schedule: list[list[Action]],
    placement: Placement,
    durations: Mapping[Kind, float] = DURATIONS,
    transfer_time: float = 0.0,
    blocks: Callable[[Event], bool] = lambda event: False,
    idle_before_computing: bool = False,
    one_queue: bool = False,
) -> Timeline:
    """Time a schedule with communication (from `Schedule.actions`).

    durations: of each kind of computation, a chunk and microbatch.  transfer_time: of a message.
    blocks: of which sends and receives the rank does nothing more, once it has posted them, until they have moved.
    idle_before_computing: whether ranks compute only when all that they have posted has moved.
    one_queue: whether all messages that a rank sends and receives on a channel of `Mesh` are in one queue.

    Raises DeadlockError when no rank can go on, ScheduleError when an action comes before what it needs, is
    listed twice, or when the order of sends on a channel is not the order of receives.
    """
    run = _Run(schedule, placement, durations, transfer_time, blocks, idle_before_computing, one_queue)
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
        placement: Placement,
        durations: Mapping[Kind, float],
        transfer_time: float,
        blocks: Callable[[Event], bool],
        idle_before_computing: bool,
        one_queue: bool,
    ) -> None:
        self.schedule, self.placement = schedule, placement
        self.durations, self.transfer_time = durations, transfer_time
        self.blocks, self.idle_before_computing, self.one_queue = blocks, idle_before_computing, one_queue
        self.position = [0] * len(schedule)
        self.clock = [0.0] * len(schedule)
        # Of each rank, messages that its next action waits for, and those that may not have moved.
        self.held: list[list[Event]] = [[] for _ in schedule]
        self.posted: list[list[Event]] = [[] for _ in schedule]
        self.start: dict[Event, float] = {}
        self.end: dict[Event, float] = {}
        self.queues: dict[tuple[object, ...], _Queue] = defaultdict(_Queue)
        self.queue_of: dict[Event, _Queue] = {}

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
        if action.kind in COMPUTATIONS:
            self.clock[rank] = self.end[rank, action] = start + self.durations[action.kind]
            self.posted[rank] = [event for event in self.posted[rank] if event not in self.end]
        else:
            self._post((rank, action))
        return True

    def _needs(self, rank: int, action: Action) -> list[Event]:
        """The actions of the same rank that must have ended, messages that must have moved."""
        needs: list[Action | None] = []
        if action.kind in SENDS:
            needs.append(action.of_kind(SENDS[action.kind][0]))
        if action.kind in COMPUTATIONS:
            after = COMPUTATIONS[action.kind].after
            needs += [self.placement.receive_for((rank, action)), after and action.of_kind(after)]
        messages = [*self.held[rank], *(self.posted[rank] if self._waits_for_all(action) else [])]
        return [*((rank, need) for need in needs if need is not None), *messages]

    def _waits_for_all(self, action: Action) -> bool:
        return self.idle_before_computing and action.kind in COMPUTATIONS

    def _check_listed_before(self, rank: int, action: Action, needs: list[Event]) -> None:
        if (rank, action) in self.start:
            raise ScheduleError(f"rank {rank} lists {action} twice")
        for need in needs:
            if need not in self.start:
                raise ScheduleError(f"rank {rank} lists {action} without {need[1]} before it")

    def _post(self, event: Event) -> None:
        rank = event[0]
        if not self.placement.has_other_end(event):
            raise ScheduleError(f"{event[1]} of rank {rank} meets nothing at the other end")
        self._queue(event).posted.append(event)
        self.posted[rank].append(event)
        if self.blocks(event):
            self.held[rank] = [event]
        self._move(event)

    def _queue(self, event: Event) -> _Queue:
        """The queue of this end of a message."""
        if event not in self.queue_of:
            self.queue_of[event] = self._queue_by_place(event)
        return self.queue_of[event]

    def _queue_by_place(self, event: Event) -> _Queue:
        rank, channel = event[0], self.placement.channel_of(event)
        if self.one_queue:
            assert len(self.schedule) > 1, "on one rank a message would wait for itself"
            return self.queues[channel, rank]
        peer, _ = self.placement.other_end(event)
        return self.queues[channel, rank, peer, event[1].kind in SENDS]

    def _move(self, event: Event) -> None:
        """Move messages with both ends first in their queues: this event's, and what has waited for those."""
        looked_at = [event]
        while looked_at:
            mine = self._queue(looked_at.pop())
            theirs = self._queue(self.placement.other_end(mine.posted[0])) if mine.posted else mine
            if not mine.posted or not theirs.posted:
                continue
            first, meets = mine.posted[0], theirs.posted[0]
            if self._queue(self.placement.other_end(meets)) is not mine:
                continue  # it is for another rank
            if meets != self.placement.other_end(first):
                send, receive = sorted((first, meets), key=lambda end: end[1].kind not in SENDS)
                raise ScheduleError(f"from rank {send[0]} to rank {receive[0]}: {send[1]} meets {receive[1]}")
            begin = max(self.start[first], self.start[meets], mine.free_at, theirs.free_at)
            self.end[first] = self.end[meets] = mine.free_at = theirs.free_at = begin + self.transfer_time
            looked_at += [mine.posted.popleft(), theirs.posted.popleft()]

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
                [TimedAction(action, self.start[rank, action], self.end[rank, action]) for action in actions]
                for rank, actions in enumerate(self.schedule)
            ]
        )
