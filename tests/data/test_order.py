"""The order of samples is a pure, stateless function with the properties that training relies on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3d.data.order import CYCLE, Blend, held_out, order_digest, sample_window
from llm3d.permutation import derive_key, permute

ORDER = [(0, 0, 1), (0, 0, 2), (0, 0, 8), (1, 0, 6), (0, 6999, 9), (1, 9999847, 17)]
DIGEST = "811fd12579c7ddff"

weights_lists = st.lists(st.floats(0.001, 1000), min_size=1, max_size=8)


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@given(size=st.integers(1, 2**40), key=st.integers(0, 2**64 - 1), data=st.data())
def test_permutation_of_one_index_and_of_an_array_agree(size, key, data):
    index = data.draw(st.integers(0, size - 1))
    assert 0 <= permute(index, size, key) < size
    assert permute(index, size, key) == permute(np.array([index]), size, key)[0]


@given(size=st.integers(2, 2000), share=st.floats(0.001, 0.999), source=st.integers(0, 9))
def test_about_that_share_is_held_out_at_least_one_and_never_all(size, share, source):
    which = held_out(np.arange(size), share, 7, source)
    assert 1 <= which.sum() <= size - 1 and (abs(which.sum() - share * size) <= 1)
    assert (which == held_out(np.arange(size), share, 7, source)).all()


@given(of_row=st.lists(st.integers(1, 5), min_size=2, max_size=50), share=st.floats(0.001, 0.999))
def test_all_samples_of_a_row_are_on_the_side_of_the_row(of_row, share):
    rows = np.repeat(3 * np.arange(len(of_row)), of_row)  # rows between them gave no sample
    expected = held_out(np.arange(len(of_row)), share, 7, 0)
    assert (held_out(rows, share, 7, 0) == np.repeat(expected, of_row)).all()


def test_what_is_held_out_depends_on_the_seed_and_the_source():
    masks = {
        held_out(np.arange(100), 0.3, seed, source).tobytes() for seed in range(5) for source in range(5)
    }
    assert len(masks) == 25 and not held_out(np.zeros(3, int), 0.5, 0, 0).any()


def test_every_order_of_a_few_windows_occurs():
    orders = {tuple(permute(np.arange(4), 4, derive_key(7, 0, epoch))) for epoch in range(500)}
    assert len(orders) == 24


@settings(max_examples=20)
@given(weights=weights_lists)
def test_blend_keeps_to_its_weights_at_every_prefix(weights):
    blend = Blend(weights)
    k = np.arange(2 * CYCLE)
    sources, _ = blend.source_and_index(k)
    for source, weight in enumerate(blend.weights):
        drawn = np.cumsum(sources == source)
        assert np.abs(drawn - (k + 1) * weight).max() < 1


@settings(max_examples=20)
@given(weights=weights_lists)
def test_blend_rounds_weights_to_parts_of_its_cycle(weights):
    blend = Blend(weights)
    assert sum(blend.weights) == pytest.approx(1)
    for rounded, weight in zip(blend.weights, weights, strict=True):
        assert rounded >= 1 / CYCLE
        assert abs(rounded - weight / sum(weights)) <= len(weights) / CYCLE


@settings(max_examples=20)
@given(weights=weights_lists, start=st.integers(0, 10**12))
def test_blend_numbers_the_draws_of_each_source_without_gaps(weights, start):
    blend = Blend(weights)
    sources, indices = blend.source_and_index(start + np.arange(1000))
    for source in range(len(weights)):
        assert (np.diff(indices[sources == source]) == 1).all()
    assert blend.source_and_index(start) == (sources[0], indices[0])


@settings(max_examples=30)
@given(windows=st.lists(st.integers(1, 50), min_size=1, max_size=3), seed=st.integers(0, 2**63))
def test_each_epoch_visits_every_window_once(windows, seed):
    blend = Blend([1.0] * len(windows))
    visits: dict[tuple[int, int], list[int]] = {}
    for k in range(400):
        source, epoch, window = sample_window(k, blend, windows, seed)
        visits.setdefault((source, epoch), []).append(window)
    for (source, epoch), seen in visits.items():
        assert len(set(seen)) == len(seen)
        if (source, epoch + 1) in visits:
            assert sorted(seen) == list(range(windows[source]))


def test_epochs_and_seeds_and_sources_have_orders_of_their_own():
    blend = Blend([1.0, 1.0])
    orders: dict[tuple[int, int, int], list[int]] = {}
    for seed in (1, 2):
        for k in range(400):
            source, epoch, window = sample_window(k, blend, [100, 100], seed)
            orders.setdefault((seed, source, epoch), []).append(window)
    assert len({tuple(order) for order in orders.values()}) == 8


def test_order_stays_what_it_was():
    """Checkpoints rely on it: a change here must change the name of the order in the digest."""
    blend = Blend([0.7, 0.2, 0.1])
    assert [sample_window(k, blend, [10, 20, 30], 1234) for k in (0, 1, 2, 3, 99_999, 10**9)] == ORDER
    assert order_digest([100, 200], [3, 4], [1, 3], 32, 7) == DIGEST


@pytest.mark.parametrize(
    "changed",
    [
        {"num_tokens": [100, 201]},
        {"num_documents": [3, 5]},
        {"weights": [2, 3]},
        {"sequence_length": 33},
        {"seed": 8},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_digest_changes_with_everything_that_changes_the_order(changed):
    setting = {"num_tokens": [100, 200], "num_documents": [3, 4], "weights": [1, 3], "sequence_length": 32}
    setting["seed"] = 7
    assert order_digest(**setting) != order_digest(**{**setting, **changed})
    assert order_digest(**setting) == order_digest(**{**setting, "weights": [10, 30]})
