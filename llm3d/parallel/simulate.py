"""Run a pipeline schedule on paper: prove that it is sound, and say when each action runs.

The model of the machine is that of the executor on NCCL. Receives and sends are posted and block nothing. A
channel is one kind of message (activations or gradients) between an ordered pair of ranks; it matches sends
with receives first in, first out, and moves one message at a time, once both its ends are posted.

Only computing waits, and only for a message that nobody else can take, so the order in which ranks are looked
at changes nothing (Kahn 1974, process networks): a schedule that runs through once runs through at any speed.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from llm3d.parallel.schedules import Action, Kind, peer, receive_for


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


def simulate(
    schedule: list[list[Action]],
    num_chunks: int,
    forward_time: float = 1.0,
    backward_time: float = 2.0,
    transfer_time: float = 0.0,
) -> Timeline:
    """Time a schedule with communication (from `make_schedule`); times are per chunk and per message.

    Raises DeadlockError when no rank can go on, ScheduleError when an action comes before what it needs, is
    listed twice, or when the order of sends on a channel is not the order of receives.
    """
    run = _Run(schedule, num_chunks, forward_time, backward_time, transfer_time)
    while not run.is_done():
        advanced = [run.advance(rank) for rank in range(len(schedule))]
        if not any(advanced):
            raise DeadlockError(f"no rank can go on: {run.blocked()}")
    run.check_all_messages_matched()
    return run.timeline()


Event = tuple[int, Action]  # rank and action


@dataclass
class _Channel:
    sends: list[Event] = field(default_factory=list)
    receives: list[Event] = field(default_factory=list)
    num_matched: int = 0
    free_at: float = 0.0


class _Run:
    def __init__(
        self,
        schedule: list[list[Action]],
        num_chunks: int,
        forward_time: float,
        backward_time: float,
        transfer_time: float,
    ) -> None:
        self.schedule = schedule
        self.num_stages = len(schedule)
        self.num_chunks = num_chunks
        self.compute_time = {Kind.FORWARD: forward_time, Kind.BACKWARD: backward_time}
        self.transfer_time = transfer_time
        self.position = [0] * self.num_stages
        self.clock = [0.0] * self.num_stages
        self.start: dict[Event, float] = {}
        self.end: dict[Event, float] = {}
        self.channels: dict[tuple[str, int, int], _Channel] = defaultdict(_Channel)

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
        self.start[rank, action] = start
        if action.kind in self.compute_time:
            self.clock[rank] = self.end[rank, action] = start + self.compute_time[action.kind]
        else:
            self._post(rank, action)
        return True

    def _needs(self, rank: int, action: Action) -> list[Event]:
        """The actions of the same rank that must have ended."""
        chunk, microbatch = action.chunk, action.microbatch
        needs: list[Action | None] = []
        if action.kind in self.compute_time:
            needs.append(receive_for(action, rank, self.num_stages, self.num_chunks))
        if action.kind in (Kind.BACKWARD, Kind.SEND_FORWARD):
            needs.append(Action(Kind.FORWARD, chunk, microbatch))
        if action.kind is Kind.SEND_BACKWARD:
            needs.append(Action(Kind.BACKWARD, chunk, microbatch))
        return [(rank, need) for need in needs if need is not None]

    def _check_listed_before(self, rank: int, action: Action, needs: list[Event]) -> None:
        if (rank, action) in self.start:
            raise ScheduleError(f"rank {rank} lists {action} twice")
        for need in needs:
            if need not in self.start:
                raise ScheduleError(f"rank {rank} lists {action} without {need[1]} before it")

    def _post(self, rank: int, action: Action) -> None:
        other = peer(action.kind, rank, self.num_stages)
        if action.kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
            channel = self.channels[_cargo(action), rank, other]
            channel.sends.append((rank, action))
        else:
            channel = self.channels[_cargo(action), other, rank]
            channel.receives.append((rank, action))
        if channel.num_matched < min(len(channel.sends), len(channel.receives)):
            self._match(channel)

    def _match(self, channel: _Channel) -> None:
        """Move the oldest message that has both ends posted."""
        send, receive = channel.sends[channel.num_matched], channel.receives[channel.num_matched]
        if self._message(send) != self._message(receive):
            raise ScheduleError(
                f"message {channel.num_matched} from rank {send[0]} to rank {receive[0]}: "
                f"{send[1]} meets {receive[1]}"
            )
        start = max(self.start[send], self.start[receive], channel.free_at)
        self.end[send] = self.end[receive] = channel.free_at = start + self.transfer_time
        channel.num_matched += 1

    def _message(self, event: Event) -> tuple[int, int]:
        """The virtual stage that a message is for, and its microbatch."""
        rank, action = event
        step = {Kind.SEND_FORWARD: 1, Kind.SEND_BACKWARD: -1}.get(action.kind, 0)
        return action.chunk * self.num_stages + rank + step, action.microbatch

    def blocked(self) -> str:
        """What each rank that is not done waits for."""
        return "; ".join(
            f"rank {rank} at {action} waits for "
            + ", ".join(str(need) for _, need in self._needs(rank, action) if (rank, need) not in self.end)
            for rank, actions in enumerate(self.schedule)
            for action in actions[self.position[rank] : self.position[rank] + 1]
        )

    def check_all_messages_matched(self) -> None:
        for channel in self.channels.values():
            for rank, action in (
                channel.sends[channel.num_matched :] + channel.receives[channel.num_matched :]
            ):
                raise ScheduleError(f"{action} of rank {rank} meets nothing at the other end")

    def timeline(self) -> Timeline:
        return Timeline(
            [
                [Span(action, self.start[rank, action], self.end[rank, action]) for action in actions]
                for rank, actions in enumerate(self.schedule)
            ]
        )


def _cargo(action: Action) -> str:
    forward = action.kind in (Kind.SEND_FORWARD, Kind.RECV_FORWARD)
    return "activations" if forward else "gradients"


def _max_in_flight(actions: list[Action]) -> int:
    has_backward = {(a.chunk, a.microbatch) for a in actions if a.kind is Kind.BACKWARD}
    change = {Kind.FORWARD: 1, Kind.BACKWARD: -1}
    held = most = 0
    for action in actions:
        if (action.chunk, action.microbatch) in has_backward:
            held += change.get(action.kind, 0)
            most = max(most, held)
    return most
