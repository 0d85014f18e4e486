"""The order and the packing of samples: a pure function of the step, the same whatever the layout, and resumable."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm3d.commands.evaluate import check
from llm3d.config import DPOConfig, SFTConfig, make_config
from llm3d.config.stages import Config
from llm3d.data.conversations import ChatData, SampleIndex, open_chat
from llm3d.data.packed import PackedBatch
from llm3d.data.samples import Sample, SampleSet, Tokens
from llm3d.data.steps import Consumed
from llm3d.errors import InputError
from llm3d.parallel.mesh import Mesh
from tests.stages.post_training import conversations, rankings, settings, write_model, write_rows

LONGEST = 12
Ids = tuple[int, ...]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


def make(model: Path, kind: type[Config] = SFTConfig, sources: Any = ("unused",), **changes: Any) -> Any:
    given = settings(model, "unused", Path("unused"), **changes)
    given["data"] |= {"train": list(sources), "sequence_length": LONGEST}
    return make_config(given, None, kind)


def samples(count: int, first_id: int, replies: int = 1) -> SampleSet:
    """Of different lengths; the first token tells them apart."""
    random = np.random.default_rng(first_id)
    made = []
    for i in range(count):
        sequences = []
        for _ in range(replies):
            ids = random.integers(0, 9, random.integers(2, LONGEST + 1)).astype(np.int32)
            ids[0] = first_id + i
            sequences.append(Tokens(ids, np.arange(len(ids)) > 0))
        made.append(Sample(tuple(sequences), tuple(map(float, range(replies)))))
    return SampleSet.of(made)


def mesh(rank: int = 0, size: int = 1) -> Mesh:
    """As much of a mesh as data looks at."""
    coordinates = SimpleNamespace(data_rank=rank, data_size=size, tensor_size=1, pipeline_size=1)
    return cast(Mesh, coordinates)


def firsts(batches: Iterable[PackedBatch]) -> list[int]:
    """The first token of each sequence."""
    return [
        int(batch.tokens[start]) for batch in batches for start in batch.cu_seqlens[: batch.num_sequences]
    ]


def read(data: ChatData, step: int) -> Counter[int]:
    return Counter(firsts(data.microbatches(step, mesh())))


def assert_same(ours: PackedBatch, theirs: PackedBatch) -> None:
    for field in dataclasses.fields(PackedBatch):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        same = torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other
        assert same, field.name


# ---- validation data ----


def test_a_share_of_each_source_is_held_out_for_validation(model: Path, tmp_path: Path) -> None:
    """The same samples whatever is asked of them: training, and an evaluation of the run."""
    paths = [write_rows(tmp_path / f"{i}.jsonl", conversations(10)[5 * i : 5 * i + 5]) for i in (0, 1)]
    given = settings(model, paths[0], tmp_path / "run", data={"train": paths})
    config = make_config(given, None, SFTConfig)
    _, _, whole = open_chat(config)
    config = config.model_copy(update={"data": config.data.model_copy(update={"valid": 0.4})})
    _, _, data = open_chat(config)
    assert [len(samples) for samples in data.sets] == [3, 3, 2, 2] and data.num_train == 2
    for source, samples in enumerate(whole.sets):
        parts = [data.sets[source], data.sets[source + 2]]
        assert Counter(texts(samples)) == Counter([text for part in parts for text in texts(part)])
    assert [line for line in data.introduction(mesh()) if "held out" in line] == [
        f"{path}, held out for validation: 2 samples" for path in paths
    ]
    evaluated = check(config).data
    assert isinstance(evaluated, ChatData)
    (ours,), (theirs,) = data.evaluation(mesh()), evaluated.evaluation(mesh())
    assert firsts(ours) == firsts(theirs) and len(firsts(ours)) == 4


def test_no_conversation_is_in_training_and_in_validation(model: Path, tmp_path: Path) -> None:
    """However many samples are made of each; and the same ones are held out."""
    rows: list[dict[str, Any]] = []
    for i in range(12):
        said = [(role, f"{i} {turn}") for turn in range(1 + i % 3) for role in ("user", "assistant")]
        rows.append({"messages": [{"role": role, "content": text} for role, text in said]})
    path = write_rows(tmp_path / "rows.jsonl", rows)

    def sets(turns: str, valid: Any) -> list[list[bytes]]:
        given = settings(model, path, tmp_path / "run", data={"turns": turns, "valid": valid})
        _, _, data = open_chat(make_config(given, None, SFTConfig))
        return [texts(samples) for samples in data.sets]

    (whole,) = sets("all", [])

    def conversation(piece: bytes) -> int:
        (found,) = (i for i, text in enumerate(whole) if text.startswith(piece))
        return found

    expected = [{*map(conversation, side)} for side in sets("all", 0.4)]
    assert [len(side) for side in expected] == [7, 5] and not expected[0] & expected[1]
    for turns, count in (("split", 24), ("last", 12)):
        found = sets(turns, 0.4)
        assert sum(map(len, found)) == count
        assert [{*map(conversation, side)} for side in found] == expected


def texts(samples: SampleSet) -> list[bytes]:
    return [samples[i].sequences[0].ids.tobytes() for i in range(len(samples))]


# ---- the order ----


def test_a_step_is_a_function_of_its_number_alone(model: Path) -> None:
    config = make(model, sft={"neftune_alpha": 5})
    sets = [samples(13, 100)]
    one, other = ChatData(config, sets, []), ChatData(config, sets, [])
    backwards = {step: other.microbatches(step, mesh()) for step in (5, 2, 7, 1)}
    for step, expected in backwards.items():
        for batch, wanted in zip(one.microbatches(step, mesh()), expected, strict=True):
            assert_same(batch, wanted)


@pytest.mark.parametrize("after", [1, 4])
def test_a_run_that_goes_on_reads_what_an_unbroken_one_would_have_read(model: Path, after: int) -> None:
    config, sets = make(model, lora={"rank": 2, "dropout": 0.1}), [samples(13, 100), samples(5, 200)]
    config = config.model_copy(update={"data": make(model, sources=["a", "b"]).data})
    unbroken, resumed = ChatData(config, sets, []), ChatData(config, sets, [])
    resumed.resume(after, unbroken.consumed(after))
    for step in range(after + 1, after + 5):
        for batch, wanted in zip(
            resumed.microbatches(step, mesh()), unbroken.microbatches(step, mesh()), strict=True
        ):
            assert_same(batch, wanted)
        assert resumed.consumed(step) == unbroken.consumed(step)


def test_no_two_tokens_of_a_run_draw_by_one_key(model: Path) -> None:
    """Not even those of one sample, read again in another epoch."""
    data = ChatData(make(model, lora={"rank": 2, "dropout": 0.1}), [samples(5, 100)], [])
    keys = [batch.keys for step in range(1, 6) for batch in data.microbatches(step, mesh())]
    drawn = torch.cat([of_batch for of_batch in keys if of_batch is not None])
    assert len(drawn) == data.consumed(5).tokens and len(drawn.unique()) == len(drawn)


def test_what_was_read_is_counted_in_whole_samples_and_their_tokens(model: Path) -> None:
    data = ChatData(make(model), [samples(13, 100)], [])
    assert data.consumed(0) == Consumed(0, 0)
    for step in range(1, 6):
        tokens = sum(len(batch.tokens) for batch in data.microbatches(step, mesh()))
        before, after = data.consumed(step - 1), data.consumed(step)
        assert after == Consumed(before.samples + 4, before.tokens + tokens)


def test_a_run_with_another_batch_goes_on_at_the_next_sample(model: Path) -> None:
    sets = [samples(40, 100)]
    small = ChatData(make(model), sets, [])
    large = ChatData(make(model, batch={"global": 10}), sets, [])
    large.resume(5, small.consumed(5))
    assert large.consumed(6).samples == 30
    both = sum((read(small, step) for step in range(1, 6)), Counter[int]()) + read(large, 6) + read(large, 7)
    assert both == Counter(range(100, 140)), "together they read each sample once"


@given(st.integers(1, 9), st.integers(0, 2**40))
def test_each_epoch_reads_each_sample_once(model: Path, batch: int, seed: int) -> None:
    config = make(model, batch={"global": batch}, run={"seed": seed})
    data = ChatData(config, [samples(3 * batch, 100)], [])
    epochs = [
        sum((read(data, step) for step in range(1 + 3 * e, 4 + 3 * e)), Counter[int]()) for e in range(3)
    ]
    assert epochs == [Counter(range(100, 100 + 3 * batch))] * 3


def test_epochs_and_seeds_differ_in_their_order(model: Path) -> None:
    sets = [samples(20, 100)]
    runs = [ChatData(make(model, batch={"global": 20}, run={"seed": seed}), sets, []) for seed in (1, 2)]
    orders = [[place.sample for place in data._step(step)] for data in runs for step in (1, 2)]
    assert len({tuple(order) for order in orders}) == 4


def test_sources_are_read_as_often_as_their_weights_say(model: Path) -> None:
    sources = [{"path": "a"}, {"path": "b", "weight": 3}, {"path": "c", "weight": 0.5}]
    config = make(model, sources=sources, batch={"global": 10})
    sets = [samples(20, 100), samples(10, 200), samples(20, 300)]
    data = ChatData(config, sets, [])
    assert data.order.samples_a_pass == 60
    total = sum((read(data, step) for step in range(1, 7)), Counter[int]())  # a pass
    assert [total[i] for i in range(100, 120)] == pytest.approx([1] * 20, abs=1)
    by_source = [sum(n for i, n in total.items() if i // 100 == hundred) for hundred in (1, 2, 3)]
    assert by_source == pytest.approx([20, 30, 10], abs=1)
    assert {total[i] for i in range(200, 210)} <= {2, 3, 4}


def test_what_the_order_depends_on_is_in_its_digest(model: Path) -> None:
    def digest(sets: list[SampleSet], valid: list[SampleSet] | None = None, **changes: Any) -> str:
        return ChatData(make(model, **changes), sets, valid or []).digest

    train = [samples(13, 100)]
    same = digest(train)
    assert digest(train, batch={"global": 9, "micro": 5}) == same, "nor does the order depend on the layout"
    assert digest(train, [samples(4, 200)]) == same
    assert digest([samples(13, 101)]) != same
    assert digest(train, run={"seed": 9}) != same
    two = [*train, samples(5, 200)]
    assert digest(two, sources=["a", "b"]) != digest(two, sources=["a", {"path": "b", "weight": 2}])


# ---- layouts ----


@given(st.integers(1, 12), st.integers(1, 4), st.sampled_from([1, 2, 3, 8]), st.sampled_from([1, 2]))
def test_data_ranks_share_out_a_step_whatever_its_size(
    model: Path, batch: int, micro: int, ranks: int, replies: int
) -> None:
    config = make(model, batch={"global": batch, "micro": micro * replies})
    data = ChatData(config, [samples(17, 100, replies)], [])
    whole = read(ChatData(config, data.sets, []), 3)
    shares = [data.microbatches(3, mesh(rank, ranks)) for rank in range(ranks)]
    assert sum((Counter(firsts(share)) for share in shares), Counter[int]()) == whole
    assert len({len(share) for share in shares}) == 1, "every rank has as many microbatches"
    for batch_of_rank in (packed for share in shares for packed in share):
        assert len(batch_of_rank.tokens) <= max(1, micro * replies * LONGEST)
        assert batch_of_rank.step_samples == batch
    chosen = {packed.step_chosen_targets for share in shares for packed in share}
    assert len(chosen) == 1


def test_reference_numbers_follow_their_sequences(model: Path) -> None:
    config = make(model, DPOConfig, sources=["a", "b"], batch={"micro": 3})
    sets = [samples(9, 100, 2), samples(7, 200, 3)]
    data = ChatData(config, sets, [samples(5, 300, 2)])
    # Of each sequence its first token, which here is the number of its sample.
    data.reference = [torch.from_numpy(found.ids[found.sequence_starts[:-1]]).float() for found in data.sets]
    batches = [batch for step in range(1, 9) for batch in data.microbatches(step, mesh())]
    batches += [batch for some in data.evaluation(mesh()) for batch in some]
    for batch in batches:
        assert batch.reference is not None
        assert (
            batch.reference.tolist() == batch.tokens[batch.cu_seqlens[: batch.num_sequences].long()].tolist()
        )


# ---- evaluation ----


@pytest.mark.parametrize("ranks", [1, 3])
def test_an_evaluation_reads_each_sample_once(model: Path, ranks: int) -> None:
    valid = [samples(7, 200), samples(6, 300)]
    data = ChatData(make(model, sources=["a"]), [samples(5, 100)], valid)
    shares = [list(data.evaluation(mesh(rank, ranks))) for rank in range(ranks)]
    found = Counter(first for share in shares for batches in share for first in firsts(batches))
    assert found == Counter([*range(200, 207), *range(300, 306)])
    assert len({tuple(len(batches) for batches in share) for share in shares}) == 1
    again = ChatData(data.config, data.sets[:1], valid)
    again.resume(3, Consumed(12, 99))
    assert [firsts(b) for b in again.evaluation(mesh())] == [firsts(b) for b in data.evaluation(mesh())]


def test_eval_steps_limit_an_evaluation_to_so_many_batches(model: Path) -> None:
    config = make(model, train={"eval_steps": 2})
    data = ChatData(config, [samples(5, 100)], [samples(11, 200)])
    assert sorted(firsts(b for some in data.evaluation(mesh()) for b in some)) == list(range(200, 208))


# ---- opening ----


def steps_over(model: Path, directory: Path, sources: list[tuple[int, float]], **changes: Any) -> int:
    """That a run takes over sources of so many samples and such weights."""
    return opened(model, directory, sources, **changes).steps.last


def opened(model: Path, directory: Path, sources: list[tuple[int, float]], **changes: Any) -> ChatData:
    """Sources of so many samples and such weights."""
    given = settings(model, "", directory / "run", **changes)
    given["data"]["train"] = [
        {"path": write_rows(directory / f"{number}.jsonl", conversations(count)), "weight": weight}
        for number, (count, weight) in enumerate(sources)
    ]
    return open_chat(make_config(given, None, SFTConfig))[2]


@pytest.mark.parametrize(
    ("sources", "epochs", "batch", "steps"),
    [
        ([(12, 1.0)], 1, 4, 3),
        ([(13, 1.0)], 1, 4, 4),
        ([(12, 1.0)], 0.25, 4, 1),
        ([(2, 1.0)], 0.25, 4, 1),
        ([(10, 1.0), (4, 0.5)], 3, 4, 9),
        ([(100, 1.1)], 1, 10, 11),  # 1.1 * 100 is a little above 110
        ([(10, 0.7)], 3, 3, 7),
    ],
)
def test_epochs_are_so_many_passes_over_the_data(
    sources: list[tuple[int, float]], epochs: float, batch: int, steps: int, model: Path, tmp_path: Path
) -> None:
    size = {"global": batch}
    train = {"steps": 0, "epochs": epochs}
    assert steps_over(model, tmp_path, sources, train=train, batch=size) == steps
    both = {"steps": 2, "epochs": epochs}
    assert steps_over(model, tmp_path, sources, train=both, batch=size) == 2, "steps override epochs"


@pytest.mark.parametrize("epochs", [1, 2.5])
def test_the_last_step_of_epochs_takes_what_is_left(model: Path, tmp_path: Path, epochs: float) -> None:
    data = opened(model, tmp_path, [(10, 1.0)], train={"steps": 0, "epochs": epochs})
    *steps, last = (data.microbatches(step, mesh()) for step in range(1, data.steps.last + 1))
    assert [batch.step_samples for step in steps for batch in step] == [4] * sum(map(len, steps))
    left = round(10 * epochs) % 4
    assert {batch.step_samples for batch in last} == {left}
    assert sum(batch.num_sequences for batch in last) == left
    assert data.consumed(data.steps.last).samples == 10 * epochs


def test_a_step_of_more_than_a_pass_is_said(model: Path, tmp_path: Path) -> None:
    for epochs, said in ((1, None), (3, "batch.global: a step of 12 is more than the 4 of a pass")):
        train, batch = {"steps": 0, "epochs": epochs}, {"global": 16}
        found = opened(model, tmp_path, [(4, 1.0)], train=train, batch=batch).steps.repetition()
        assert found is None if said is None else found is not None and found.startswith(said)


@given(
    st.integers(1, 40),
    st.floats(0.1, 4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=3),
)
def test_epochs_end_with_their_samples_however_often_the_batch_changes(
    model: Path, size: int, epochs: float, parts: list[tuple[int, int]]
) -> None:
    """parts: steps that a run takes in one go, and its batch."""
    sets, read_so_far, step, consumed = [samples(size, 100)], list[SampleIndex](), 0, Consumed(0, 0)
    for steps, batch in [*parts, (99, 3)]:
        config = make(model, batch={"global": batch}, train={"steps": 0, "epochs": epochs})
        data = ChatData(config, sets, [])
        data.resume(step, consumed)
        end = min(data.steps.last, step + steps)
        read_so_far += [place for done in range(step + 1, end + 1) for place in data._step(done)]
        step, consumed = end, data.consumed(end)
    unbroken = ChatData(make(model), sets, []).in_order("train")
    assert step == data.steps.last
    assert consumed.samples == len(read_so_far) == max(1, math.ceil(round(size * epochs, 9)))
    assert read_so_far == list(islice(unbroken, consumed.samples)), "in the order of a run without a break"


def test_a_list_of_replies_that_no_microbatch_holds_is_refused(model: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "ranked.jsonl", rankings(4, replies=5))
    given = settings(model, path, tmp_path / "run", batch={"micro": 5})
    samples = open_chat(make_config(given, None, DPOConfig))[2].sets[0]
    longest = int(np.diff(samples.sequence_starts).max())
    given["data"]["sequence_length"] = longest
    open_chat(make_config(given, None, DPOConfig))
    given["batch"]["micro"] = 2
    with pytest.raises(
        InputError, match=rf"batch.micro: 2 .* {samples.lengths.max()} tokens .* the least is [45]"
    ):
        open_chat(make_config(given, None, DPOConfig))
