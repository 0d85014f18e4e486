"""Which sequences run next, and where in the cache their tokens lie: plain numbers, the same on every rank.

Sequences belong to a group; a pipeline has as many groups in flight as stages. A finished sequence makes room at once:
prompts that wait are admitted, as soon as their longest possible reply has room, before their group goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from llm3d.config import Config
from llm3d.generate.sampling import Sampling
from llm3d.permutation import derive_key
from llm3d.text.streaming import Detokenizer

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """A prompt, and what is wanted of it.

    num_replies: independent ones.  seed: of all that is drawn for it; reply r at token t depends on (seed, r, t) alone.
    ends: whether a reply, its tokens so far, is done.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    ends: Callable[[Sequence[int]], bool]
    sampling: Sampling = field(default_factory=Sampling)
    num_replies: int = 1
    seed: int = 0


@dataclass(eq=False)
class Running:
    """A reply in the making. blocks: of the cache, in the order of its tokens."""

    request: Request
    number: int  # of the request
    reply: int  # of the request's
    blocks: list[int]
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    reason: Reason | None = None

    @property
    def seen(self) -> list[int]:
        return [*self.request.prompt, *self.tokens]

    @property
    def length(self) -> int:
        """Tokens, the prompt's among them."""
        return len(self.request.prompt) + len(self.tokens)


class Prefill(NamedTuple):
    """Families of replies whose prompts are read: a prompt's first reply reads it for all."""

    families: list[list[Running]]

    @property
    def sequences(self) -> list[Running]:
        return [running for family in self.families for running in family]


class Decode(NamedTuple):
    """Replies that get a token more, after the one they got last."""

    sequences: list[Running]


Work = Prefill | Decode


@dataclass(frozen=True)
class Limits:
    """max_sequences: of a group, at once.  max_prefill_tokens: read at once, unless a single prompt is longer.
    max_length: of a sequence, what the model can tell apart; reached, a reply ends.
    """

    num_blocks: int
    block_size: int
    max_sequences: int
    max_prefill_tokens: int
    max_length: int

    def blocks(self, length: int) -> int:
        """That so many tokens need."""
        return -(-length // self.block_size)

    def needed(self, request: Request) -> int:
        """Blocks of a request with all its replies, which share those that the prompt fills."""
        shared = len(request.prompt) // self.block_size
        return shared + request.num_replies * (self.blocks(self.longest(request)) - shared)

    def longest(self, request: Request) -> int:
        return min(len(request.prompt) + request.max_new_tokens, self.max_length)


class Scheduler:
    """The replies of every group, the prompts that wait, and the blocks of the cache that are free."""

    def __init__(self, requests: Sequence[Request], num_groups: int, limits: Limits) -> None:
        self.limits = limits
        self.waiting = deque(enumerate(requests))
        self.longest = max(map(limits.longest, requests), default=0)  # of all sequences that there can be
        self.groups: list[list[Running]] = [[] for _ in range(num_groups)]
        self.free = list(range(limits.num_blocks))[::-1]
        self.users = [0] * limits.num_blocks
        for request in requests:
            assert limits.needed(request) <= limits.num_blocks, (
                "the cache is made to hold the largest request"
            )
            assert request.num_replies <= limits.max_sequences
            assert len(request.prompt) < limits.max_length and request.max_new_tokens > 0

    @property
    def finished(self) -> bool:
        return not self.waiting and not any(self.groups)

    def next(self, group: int) -> Work | None:
        """What the group does now; None where it has nothing to do."""
        if admitted := self._admit(group):
            self.groups[group] += [running for family in admitted for running in family]
            return Prefill(admitted)
        return Decode(list(self.groups[group])) if self.groups[group] else None

    def _admit(self, group: int) -> list[list[Running]]:
        """First come, first served, so that none waits forever."""
        room = self.limits.max_sequences - len(self.groups[group])
        admitted: list[list[Running]] = []
        num_tokens = 0
        while self.waiting:
            number, request = self.waiting[0]
            num_tokens += len(request.prompt)
            too_many = admitted and num_tokens > self.limits.max_prefill_tokens
            if too_many or request.num_replies > room or self.limits.needed(request) > len(self.free):
                break
            self.waiting.popleft()
            room -= request.num_replies
            admitted.append(self._family(number, request))
        return admitted

    def _family(self, number: int, request: Request) -> list[Running]:
        shared = self._take(len(request.prompt) // self.limits.block_size)
        own = self.limits.blocks(self.limits.longest(request)) - len(shared)
        family = [
            Running(request, number, reply, shared + self._take(own)) for reply in range(request.num_replies)
        ]
        for block in shared:
            self.users[block] = request.num_replies
        return family

    def _take(self, count: int) -> list[int]:
        blocks = [self.free.pop() for _ in range(count)]
        for block in blocks:
            self.users[block] = 1
        return blocks

    def advance(
        self, group: int, work: Work, tokens: Sequence[int], log_probabilities: Sequence[float]
    ) -> list[Running]:
        """Give each of the work's sequences its token; -> those that are done."""
        for running, token, log_probability in zip(work.sequences, tokens, log_probabilities, strict=True):
            running.tokens.append(token)
            running.log_probabilities.append(log_probability)
            running.reason = self._reason(running)
        done = [running for running in work.sequences if running.reason]
        for running in done:
            self._release(running)
        if done:
            self.groups[group] = [running for running in self.groups[group] if not running.reason]
        return done

    def _reason(self, running: Running) -> Reason | None:
        if running.request.ends(running.tokens):
            return "stop"
        return "length" if running.length >= self.limits.longest(running.request) else None

    def _release(self, running: Running) -> None:
        for block in running.blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.append(block)


def request_for(config: Config, detokenizer: Detokenizer, tokens: Sequence[int], number: int) -> Request:
    """What `generate` asks for, of one prompt; the same number and run.seed draw the same."""
    settings = config.generate
    sampling = Sampling(
        settings.temperature, settings.top_k, settings.top_p, settings.min_p, settings.repetition_penalty
    )
    seed = derive_key(config.run.seed, number) >> 1
    return Request(tokens, settings.max_new_tokens, detokenizer.ends, sampling, settings.num_replies, seed)
