from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llm3d.config.schedules import SCHEDULES
from llm3d.parallel.schedules import (
    Action,
    Kind,
    Placement,
    Schedule,
    arrivals,
    gpipe,
    one_f_one_b,
    with_communication,
)
from llm3d.plan.simulate import DeadlockError, ScheduleError, simulate

COMPUTE = (Kind.FORWARD, Kind.BACKWARD)
SENDS = (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)
RECEIVES = (Kind.RECV_FORWARD, Kind.RECV_BACKWARD)
NAMES = list(SCHEDULES)

quick = settings(max_examples=60, deadline=None)
durations = st.floats(min_value=1e-3, max_value=1e3)


@st.composite
def shapes(draw, names=(*NAMES, "forward_only")):
    """A schedule's name, stages, chunks and microbatches that go together."""
    name = draw(st.sampled_from(names))
    num_stages = draw(st.integers(1, 8))
    num_chunks = draw(st.integers(1, 4)) if name in ("interleaved", "forward_only") else 1
    if name == "interleaved":
        return name, num_stages, num_chunks, num_stages * draw(st.integers(1, 3))
    return name, num_stages, num_chunks, draw(st.integers(1, 20))


def build(shape):
    name, num_ranks, num_chunks, num_microbatches = shape
    placement = Placement(num_ranks, num_chunks)
    if name == "forward_only":
        return Schedule("interleaved", placement).actions(num_microbatches, forward_only=True)
    return Schedule(name, placement).actions(num_microbatches)


def placement_of(shape):
    return Placement(shape[1], shape[2])


def durations_of(forward, backward):
    return {Kind.FORWARD: forward, Kind.BACKWARD: backward}


def is_receive(event):
    return event[1].kind in RECEIVES


def of_kind(actions, *kinds):
    return [action for action in actions if action.kind in kinds]


# Where it runs


@given(st.integers(1, 8), st.integers(1, 4))
@quick
def test_every_virtual_stage_has_one_place(num_ranks, num_chunks):
    placement = Placement(num_ranks, num_chunks)
    places = [placement.place_of(stage) for stage in range(placement.num_stages)]
    assert sorted(places) == [(rank, chunk) for rank in range(num_ranks) for chunk in range(num_chunks)]
    assert [placement.stage_of(*place) for place in places] == list(range(placement.num_stages))


@given(shapes())
@quick
def test_the_two_ends_of_a_message_know_each_other(shape):
    placement = placement_of(shape)
    for event in posts_of(build(shape)):
        assert placement.other_end(placement.other_end(event)) == event
        assert placement.channel_of(placement.other_end(event)) == placement.channel_of(event)


# What is computed


@given(shapes())
@quick
def test_every_rank_computes_every_chunk_of_every_microbatch_once(shape):
    name, _, num_chunks, num_microbatches = shape
    work = [(chunk, microbatch) for chunk in range(num_chunks) for microbatch in range(num_microbatches)]
    for actions in build(shape):
        forwards = of_kind(actions, Kind.FORWARD)
        backwards = of_kind(actions, Kind.BACKWARD)
        assert sorted((a.chunk, a.microbatch) for a in forwards) == work
        assert sorted((a.chunk, a.microbatch) for a in backwards) == ([] if name == "forward_only" else work)


@given(shapes(NAMES))
@quick
def test_backward_comes_after_its_own_forward(shape):
    for actions in build(shape):
        for at, action in enumerate(actions):
            if action.kind is Kind.BACKWARD:
                assert Action(Kind.FORWARD, action.chunk, action.microbatch) in actions[:at]


@given(shapes(NAMES))
@quick
def test_gradients_add_up_in_the_order_of_microbatches_under_every_schedule(shape):
    _, _, num_chunks, num_microbatches = shape
    for actions in build(shape):
        for chunk in range(num_chunks):
            order = [a.microbatch for a in of_kind(actions, Kind.BACKWARD) if a.chunk == chunk]
            assert order == list(range(num_microbatches))


@given(shapes(["interleaved"]))
@quick
def test_evaluation_runs_the_forwards_of_training(shape):
    evaluation = build(("forward_only", *shape[1:]))
    for actions, trained in zip(evaluation, build(shape), strict=True):
        assert of_kind(actions, *COMPUTE) == of_kind(trained, Kind.FORWARD)


@given(shapes(), durations, durations, durations)
@quick
def test_what_is_let_go_has_arrived(shape, forward_time, backward_time, transfer_time):
    schedule = build(shape)
    placement = placement_of(shape)
    timeline = simulate(schedule, placement, durations_of(forward_time, backward_time), transfer_time)
    spans = [{span.action: span for span in spans} for spans in timeline.spans]
    for rank, arrived in enumerate(arrivals(schedule, placement)):
        gone = [send for sends in arrived.values() for send in sends]
        assert len(gone) == len(set(gone))
        for compute, sends in arrived.items():
            assert compute.kind in COMPUTE
            for send in sends:
                assert send.kind in SENDS
                assert spans[rank][send].end <= spans[rank][compute].start


@given(shapes(["1f1b", "interleaved"]))
@quick
def test_messages_are_let_go_as_others_are_sent(shape):
    """However many microbatches there are, no more messages are held than there are stages on the way."""
    _, num_stages, num_chunks, _ = shape
    schedule = build(shape)
    for actions, arrived in zip(schedule, arrivals(schedule, placement_of(shape)), strict=True):
        held = most = 0
        for action in actions:
            held += (action.kind in SENDS) - len(arrived.get(action, []))
            most = max(most, held)
        assert most <= 2 * num_stages * num_chunks + 2


# What is communicated


@given(shapes())
@quick
def test_each_channel_is_sent_in_the_order_in_which_it_is_received(shape):
    placement, num_microbatches = placement_of(shape), shape[3]
    sent, received = defaultdict(list), defaultdict(list)
    for rank, actions in enumerate(build(shape)):
        for action in actions:
            if action.kind in COMPUTE:
                continue
            channel = placement.channel_of((rank, action))
            other, _ = placement.other_end((rank, action))
            cargo = action.kind.value.split("_")[1]
            stage = placement.stage_of(rank, action.chunk)
            assert channel[0] == cargo
            if action.kind in SENDS:
                target = stage + 1 if cargo == "forward" else stage - 1
                assert placement.place_of(target)[0] == other
                sent[channel, rank, other].append((target, action.microbatch))
            else:
                received[channel, other, rank].append((stage, action.microbatch))
    assert sent == received
    num_directions = 1 if shape[0] == "forward_only" else 2
    num_messages = num_directions * (placement.num_stages - 1) * num_microbatches
    assert sum(map(len, sent.values())) == num_messages


@given(shapes())
@quick
def test_receives_are_posted_at_most_one_compute_action_ahead_and_sends_right_behind(shape):
    _, num_stages, num_chunks, _ = shape
    first, last = (0, 0), (num_stages - 1, num_chunks - 1)
    for rank, actions in enumerate(build(shape)):
        computed = of_kind(actions, *COMPUTE)
        for number, compute in enumerate(computed):
            at = actions.index(compute)
            forward = compute.kind is Kind.FORWARD
            source, sink = (first, last) if forward else (last, first)
            receive, send = (
                Action(kind, compute.chunk, compute.microbatch)
                for kind in (
                    (Kind.RECV_FORWARD, Kind.SEND_FORWARD)
                    if forward
                    else (Kind.RECV_BACKWARD, Kind.SEND_BACKWARD)
                )
            )
            assert (receive in actions) == ((rank, compute.chunk) != source)
            assert (send in actions) == ((rank, compute.chunk) != sink)
            if receive in actions:
                between = actions[actions.index(receive) : at]
                assert of_kind(between, *COMPUTE) in ([], computed[max(number - 1, 0) : number])
            if send in actions:
                assert actions[at + 1] == send


@given(st.integers(1, 8), st.integers(1, 20), st.sampled_from([0.25, 0.5, 1.0]))
@quick
def test_transfers_hide_behind_compute_but_for_the_first_way_out_and_the_last_way_back(p, m, transfer_time):
    timeline = simulate(build(("gpipe", p, 1, m)), Placement(p), transfer_time=transfer_time)
    assert timeline.makespan == (m + p - 1) * 3 + 2 * (p - 1) * transfer_time


def test_a_slow_link_carries_one_message_at_a_time():
    timeline = simulate(build(("forward_only", 2, 1, 5)), Placement(2), transfer_time=4)
    assert timeline.makespan == 1 + 5 * 4 + 1


@pytest.mark.parametrize(("name", "num_chunks"), [("1f1b", 1), ("interleaved", 2), ("interleaved", 4)])
def test_most_of_what_posting_ahead_can_hide_is_hidden(name, num_chunks):
    """Of the time that messages add to a step when every receive is posted right before its use."""
    placement = Placement(4, num_chunks)
    orders, times = Schedule(name, placement).orders(16), durations_of(1 / num_chunks, 2 / num_chunks)

    def added(schedule):
        slow, instant = (simulate(schedule, placement, times, transfer).makespan for transfer in (0.05, 0))
        return slow - instant

    at_use = [[a for a in order if a.kind not in RECEIVES] for order in with_communication(orders, placement)]
    for rank, actions in enumerate(at_use):
        for compute in of_kind(actions, *COMPUTE):
            receive = placement.receive_for((rank, compute))
            actions[actions.index(compute) : actions.index(compute)] = [receive] if receive else []
    assert added(with_communication(orders, placement)) < 0.9 * added(at_use)


# What else waits for a message, on NCCL


def shapes_up_to(most_ranks, most_microbatches):
    return [
        (name, p, v, m)
        for p in range(2, most_ranks + 1)
        for m in range(1, most_microbatches + 1)
        for name, chunks in (("gpipe", 1), ("1f1b", 1), ("interleaved", 4), ("forward_only", 4))
        for v in range(2 if name == "interleaved" else 1, chunks + 1)
        if name != "interleaved" or m % p == 0
    ]


def posts_of(schedule):
    return [
        (rank, action)
        for rank, actions in enumerate(schedule)
        for action in of_kind(actions, *SENDS, *RECEIVES)
    ]


@pytest.mark.parametrize("most", [(5, 10), pytest.param((8, 12), marks=pytest.mark.all_layouts)], ids=str)
@pytest.mark.parametrize("one_queue", [False, True], ids=["a queue a pair", "one queue a channel"])
def test_no_schedule_deadlocks_however_messages_occupy_the_device(one_queue, most):
    """Not even if no rank does anything before what it has last posted to receive has come, nor computes before all
    that it has posted has moved.
    """
    for shape in shapes_up_to(*most):
        schedule, placement = build(shape), placement_of(shape)
        waiting = {"blocks": is_receive, "idle_before_computing": True, "one_queue": one_queue}
        assert simulate(schedule, placement, **waiting).makespan >= simulate(schedule, placement).makespan


@given(shapes(), st.booleans(), st.data())
@quick
def test_one_send_or_receive_that_blocks_its_rank_is_no_deadlock(shape, one_queue, data):
    posts = posts_of(build(shape))
    assume(shape[1] > 1 and posts)
    chosen = data.draw(st.sampled_from(posts))
    waiting = simulate(build(shape), placement_of(shape), blocks=chosen.__eq__, one_queue=one_queue)
    assert waiting.makespan >= simulate(build(shape), placement_of(shape)).makespan, (
        "and waiting makes nothing faster"
    )


def test_a_receive_ahead_of_what_its_message_needs_is_a_deadlock_if_it_blocks():
    """Of the last microbatch of GPipe, nothing has been sent when the first gradient is waited for."""
    schedule = build(("gpipe", 2, 1, 3))
    receive, last = Action(Kind.RECV_BACKWARD, 0, 0), Action(Kind.FORWARD, 0, 2)
    schedule[0].remove(receive)
    schedule[0].insert(schedule[0].index(last), receive)
    simulate(schedule, Placement(2))
    with pytest.raises(DeadlockError, match=r"rank 0 at FORWARD.*2\) waits for RECV_BACKWARD.*rank 1 at"):
        simulate(schedule, Placement(2), blocks=is_receive)
    with pytest.raises(DeadlockError):
        simulate(schedule, Placement(2), idle_before_computing=True)


def test_messages_of_one_queue_take_turns():
    """The middle rank cannot send on while it waits for more, as it can with a queue for each pair of ranks."""
    late = build(("forward_only", 3, 1, 2))
    first, second = (Action(Kind.RECV_FORWARD, 0, microbatch) for microbatch in (0, 1))
    assert late[1].index(second) < late[1].index(Action(Kind.SEND_FORWARD, 0, 0))

    def last_starts(one_queue):
        spans = simulate(late, Placement(3), transfer_time=4, one_queue=one_queue).spans[2]
        return next(span.start for span in spans if span.action.kind is Kind.FORWARD)

    assert late[1][0] == first
    assert last_starts(one_queue=False) == 1 + 4 + 1 + 4
    assert last_starts(one_queue=True) == 1 + 4 + 4 + 4


# Time and memory


@given(shapes(), durations, durations, durations)
@quick
def test_no_schedule_deadlocks_whatever_the_times(shape, forward_time, backward_time, transfer_time):
    times = durations_of(forward_time, backward_time)
    timeline = simulate(build(shape), placement_of(shape), times, transfer_time)
    for actions, spans in zip(build(shape), timeline.spans, strict=True):
        assert [span.action for span in spans] == actions
        assert all(span.start <= span.end for span in spans)
        computed = [span for span in spans if span.action.kind in COMPUTE]
        assert all(a.end <= b.start for a, b in pairwise(computed))


@given(shapes())
@quick
def test_the_bubble_is_that_of_the_papers(shape):
    """(p - 1) forwards and backwards of one chunk are idle, of v * m: exact in small integers."""
    _, num_stages, num_chunks, num_microbatches = shape
    assume(num_microbatches % num_stages == 0 or num_chunks == 1)
    timeline = simulate(build(shape), placement_of(shape), durations_of(1, 2))
    assert timeline.bubble_fraction == (num_stages - 1) / (num_chunks * num_microbatches)


def test_interleaving_divides_the_bubble_by_the_chunks():
    def bubble_time(name, num_chunks):
        schedule, times = build((name, 4, num_chunks, 8)), durations_of(1 / num_chunks, 2 / num_chunks)
        return simulate(schedule, Placement(4, num_chunks), times).makespan - 8 * 3

    assert bubble_time("1f1b", 1) == 9
    assert bubble_time("interleaved", 2) == 4.5
    assert bubble_time("interleaved", 4) == 2.25


@given(shapes())
@quick
def test_activations_in_flight_are_those_of_the_papers(shape):
    name, p, v, m = shape
    warmup = [(p - rank - 1) * 2 + (v - 1) * p for rank in range(p)]
    expected = {
        "gpipe": [m] * p,
        "1f1b": [min(m, p - rank) for rank in range(p)],
        "interleaved": [min(v * m, warmup[rank] + 1) for rank in range(p)],
        "forward_only": [0] * p,
    }
    assert simulate(build(shape), placement_of(shape)).max_in_flight == expected[name]
    if name != "forward_only":
        assert Schedule(name, placement_of(shape)).max_in_flight(m) == max(expected[name])


# The simulator catches broken schedules


@given(shapes(), st.data())
@quick
def test_exchanging_two_messages_of_a_rank_is_caught(shape, data):
    schedule = build(shape)
    actions = data.draw(st.sampled_from(schedule))
    kind = data.draw(st.sampled_from(Kind))
    same = [at for at, action in enumerate(actions) if action.kind is kind]
    assume(kind not in COMPUTE and len(same) > 1)
    i, j = data.draw(st.lists(st.sampled_from(same), min_size=2, max_size=2, unique=True))
    actions[i], actions[j] = actions[j], actions[i]
    with pytest.raises(ScheduleError):
        simulate(schedule, placement_of(shape))


@given(shapes(), st.data())
@quick
def test_a_lost_or_doubled_message_is_caught(shape, data):
    schedule = build(shape)
    actions = data.draw(st.sampled_from(schedule))
    messages = [at for at, action in enumerate(actions) if action.kind not in COMPUTE]
    assume(messages)
    at = data.draw(st.sampled_from(messages))
    actions[at : at + 1] = data.draw(st.sampled_from([[], [actions[at]] * 2]))
    with pytest.raises(ScheduleError):
        simulate(schedule, placement_of(shape))


@given(shapes(NAMES), st.data())
@quick
def test_backward_before_forward_is_caught(shape, data):
    schedule = build(shape)
    actions = data.draw(st.sampled_from(schedule))
    forward = data.draw(st.sampled_from(of_kind(actions, Kind.FORWARD)))
    i = actions.index(forward)
    j = actions.index(Action(Kind.BACKWARD, forward.chunk, forward.microbatch))
    actions[i], actions[j] = actions[j], actions[i]
    with pytest.raises(ScheduleError, match="without"):
        simulate(schedule, placement_of(shape))


def test_computing_twice_is_caught():
    order = one_f_one_b(Placement(1), 3)[0]
    with pytest.raises(ScheduleError, match=r"BACKWARD\(chunk 0, microbatch 2\) twice"):
        simulate([order + order[-1:]], Placement(1))


def test_ranks_that_forward_in_different_orders_are_caught():
    orders = gpipe(Placement(2), 3)
    orders[0][0], orders[0][1] = orders[0][1], orders[0][0]
    with pytest.raises(
        ScheduleError,
        match=r"SEND_FORWARD\(chunk 0, microbatch 1\) meets RECV_FORWARD\(chunk 0, microbatch 0",
    ):
        simulate(with_communication(orders, Placement(2)), Placement(2))


def test_a_message_that_nobody_receives_is_caught():
    schedule = build(("1f1b", 2, 1, 2))
    schedule[1].append(Action(Kind.SEND_FORWARD, 0, 1))
    with pytest.raises(ScheduleError, match="rank 1 meets nothing"):
        simulate(schedule, Placement(2))


@pytest.mark.parametrize("num_microbatches", [2, 5])
def test_ranks_that_wait_for_each_other_are_a_deadlock(num_microbatches):
    """Rank 0 wants the first gradient before its last forward; rank 1 wants the last forward before."""
    orders = gpipe(Placement(2), num_microbatches)
    last_forward, first_backward = num_microbatches - 1, num_microbatches
    order = orders[0]
    order[last_forward], order[first_backward] = order[first_backward], order[last_forward]
    with pytest.raises(
        DeadlockError, match=r"rank 0 at BACKWARD.*waits for RECV_BACKWARD.*rank 1 at FORWARD"
    ):
        simulate(with_communication(orders, Placement(2)), Placement(2))


def test_ranks_under_different_schedules_are_a_deadlock():
    orders = [one_f_one_b(Placement(2), 4)[1], gpipe(Placement(2), 4)[1]]
    with pytest.raises(DeadlockError):
        simulate(with_communication(orders, Placement(2)), Placement(2))
