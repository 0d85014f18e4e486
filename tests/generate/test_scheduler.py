"""Who runs when, and where: everyone gets done, nobody writes where another reads, and finished replies make room."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm3d.generate.scheduler import Limits, Prefill, Request, Running, Scheduler

BLOCK = 4


def never_ends(tokens: Sequence[int]) -> bool:
    return False


def limits(**changes: int) -> Limits:
    usual = {
        "num_blocks": 30,
        "block_size": BLOCK,
        "max_sequences": 4,
        "max_prefill_tokens": 20,
        "max_length": 24,
    }
    return Limits(**(usual | changes))


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Request], int, Limits]:
    """Requests that can be served, a number of groups, and limits."""
    shape = st.tuples(st.integers(1, 23), st.integers(1, 12), st.integers(1, 3), st.integers(0, 9))
    some = limits(max_sequences=draw(st.integers(3, 6)), max_prefill_tokens=draw(st.integers(1, 40)))
    requests = [
        Request([0] * prompt, new, lambda tokens, at=at: len(tokens) == at, num_replies=replies)
        for prompt, new, replies, at in draw(st.lists(shape, max_size=12))
    ]
    least = max((some.needed(request) for request in requests), default=0)
    num_blocks = draw(st.integers(least, least + 30))
    return requests, draw(st.integers(1, 3)), limits(**(vars(some) | {"num_blocks": num_blocks}))


def writes(running: Running, some: Limits) -> set[int]:
    """The blocks that only this reply may use: those that its own tokens lie in."""
    return set(running.blocks[len(running.request.prompt) // some.block_size :])


@given(situations())
def test_every_reply_is_done_in_room_of_its_own(situation: tuple[list[Request], int, Limits]) -> None:
    requests, num_groups, some = situation
    scheduler, done = Scheduler(requests, num_groups, some), list[Running]()
    turn = idle = 0
    while not scheduler.finished:
        group = turn % num_groups
        turn += 1
        work = scheduler.next(group)
        idle = 0 if work else idle + 1
        assert idle <= num_groups, "where nobody runs, somebody is admitted"
        everyone = [running for group_ in scheduler.groups for running in group_]
        for running in everyone:
            others = {block for other in everyone if other is not running for block in other.blocks}
            assert not writes(running, some) & others
            assert not set(running.blocks) & set(scheduler.free)
            assert some.blocks(running.length) <= len(running.blocks), "the next token has room"
        assert len(scheduler.groups[group]) <= some.max_sequences
        if isinstance(work, Prefill):
            read = [len(family[0].request.prompt) for family in work.families]
            assert len(read) == 1 or sum(read) <= some.max_prefill_tokens
        if work:
            count = len(work.sequences)
            done += scheduler.advance(group, work, [len(done)] * count, [-1.0] * count)
    expected = {(number, i) for number, request in enumerate(requests) for i in range(request.num_replies)}
    assert {(running.number, running.reply) for running in done} == expected and len(done) == len(expected)
    assert sorted(scheduler.free) == list(range(some.num_blocks)), "all room is given back"
    for running in done:
        request, at = running.request, running.request.ends
        most = min(request.max_new_tokens, some.max_length - len(request.prompt))
        assert 1 <= len(running.tokens) <= most
        assert running.reason == ("stop" if at(running.tokens) else "length")
        assert running.reason == "stop" or len(running.tokens) == most


def test_a_finished_reply_makes_room_at_once() -> None:
    requests = [Request([0] * 4, 2 if i == 0 else 9, never_ends) for i in range(5)]
    scheduler = Scheduler(requests, 1, limits())
    first = scheduler.next(0)
    assert isinstance(first, Prefill) and [running.number for running in first.sequences] == [0, 1, 2, 3]
    assert scheduler.advance(0, first, [1] * 4, [0.0] * 4) == []
    second = scheduler.next(0)
    assert second is not None and not isinstance(second, Prefill)
    (done,) = scheduler.advance(0, second, [1] * 4, [0.0] * 4)
    third = scheduler.next(0)
    assert done.number == 0
    assert isinstance(third, Prefill) and [running.number for running in third.sequences] == [4]
    fourth = scheduler.next(0) if not scheduler.advance(0, third, [1], [0.0]) else None
    assert fourth is not None and [running.number for running in fourth.sequences] == [1, 2, 3, 4]


def test_replies_to_a_prompt_share_the_blocks_that_it_fills() -> None:
    scheduler = Scheduler([Request([0] * 10, 5, never_ends, num_replies=3)], 1, limits())
    work = scheduler.next(0)
    assert work is not None
    blocks = [running.blocks for running in work.sequences]
    assert all(len(own) == 4 and own[:2] == blocks[0][:2] for own in blocks)
    assert len({block for own in blocks for block in own}) == 2 + 3 * 2


@pytest.mark.parametrize("length", [23, 30])
def test_a_reply_ends_where_positions_end(length: int) -> None:
    some = limits(max_length=length)
    assert some.longest(Request([0] * 20, 100, never_ends)) == length
