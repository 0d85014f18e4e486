"""The same samples give the same loss and gradients, however they are packed, ordered, split or shared out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llm3d.checkpoint.load import load_pretrained
from llm3d.config import STAGES, ChatDataConfig, make_config
from llm3d.data.chat import read_samples
from llm3d.data.conversations import ChatData
from llm3d.data.packed import chosen_targets, collate
from llm3d.data.samples import Sample, SampleSet, Tokens
from llm3d.parallel.mesh import Mesh
from llm3d.text.templates import BUILT_IN, load_template
from llm3d.text.tokenizer import load_tokenizer
from llm3d.train.trainer import StepResult, Trainer
from tests import pool
from tests.closeness import assert_same_numbers, relative_norm
from tests.parity.harness import owned_pieces
from tests.stages.common import trained_model
from tests.stages.post_training import conversations, settings, write_model, write_rows

STAGE_SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"loss": {"z_loss": 0.01, "label_smoothing": 0.1}},
    "reward": {"reward": {"margin": True, "center": 0.1}},
    "dpo": {"dpo": {"rpo_alpha": 0.5, "rpo_mean": "token"}},
    "dpo-sequence": {"dpo": {"length_normalized": True, "rpo_alpha": 0.5, "rpo_mean": "sequence"}},
    "dpo-ipo": {"dpo": {"loss": "ipo"}},
    "dpo-lora": {"dpo": {"loss": "hinge"}, "lora": {"rank": 3, "targets": ["q_proj", "down_proj"]}},
}
NUM_SAMPLES = 6
Arrangement = list[list[int]]  # the samples of each microbatch
Found = tuple[dict[str, float], dict[str, Tensor]]  # loss, norm and metrics; gradients by name


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", max_position_embeddings=512)


def random_samples(stage: str, count: int = NUM_SAMPLES) -> list[Sample]:
    """Of SFT, one reply; of the others, two to four, some of them as good as another."""
    random = np.random.default_rng(8)
    made = []
    for number in range(count):
        num_replies = 1 if stage == "sft" else 2 + number % 3
        prompt = random.integers(0, 280, random.integers(1, 9))
        replies = [random.integers(0, 280, random.integers(1, 12)) for _ in range(num_replies)]
        sequences = tuple(
            Tokens(
                np.concatenate([prompt, reply]).astype(np.int32),
                np.arange(len(prompt) + len(reply)) >= len(prompt),
            )
            for reply in replies
        )
        ranks = tuple(float(max(0, rank - number % 2)) for rank in range(num_replies))
        made.append(
            Sample(sequences, ranks if len(set(ranks)) > 1 else (1.0, 0.0)[:num_replies], random.random())
        )
    return made


def make_trainer(stage: str, model: Path, **changes: Any) -> Trainer:
    given = settings(model, "unused", Path("unused"), **STAGE_SETTINGS[stage], **changes)
    config = make_config(given, dist.get_world_size(), STAGES[stage.partition("-")[0]])
    trainer = Trainer(
        config, Mesh(config.parallel.tensor, config.parallel.pipeline), trained_model(config).objective
    )
    load_pretrained(model, trainer)
    return trainer


def found_by(trainer: Trainer, result: StepResult) -> tuple[dict[str, float], list[Any]]:
    numbers = {"loss": result.loss, "grad_norm": result.grad_norm, **result.metrics}
    return numbers, owned_pieces(trainer, trainer.flat.gradients)


def whole(pieces: Sequence[tuple[Any, Tensor]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for box, value in pieces:
        target = tensors.setdefault(box.name, torch.full(box.shape, torch.nan))
        target[tuple(slice(a, a + n) for a, n in zip(box.offset, box.size, strict=True))] = value
    return tensors


def assert_same(actual: Found, expected: Found) -> None:
    assert_same_numbers(actual[0], expected[0], absolute=1e-6)
    assert actual[1].keys() == expected[1].keys()
    scale = max(value.norm() for value in expected[1].values())
    wrong = {
        name: relative_norm(actual[1][name], value)
        for name, value in expected[1].items()
        # Of a gradient that is nothing beside the others, rounding is much.
        if value.norm() > 1e-6 * scale and not relative_norm(actual[1][name], value) < 1e-5
    }
    assert wrong == {}


# ---- packing and order ----


def steps_on_rank(
    stage: str, model: Path, arrangements: list[Arrangement], multiple_of: int = 1
) -> list[Found]:
    """A step on the same samples in each arrangement."""
    trainer, samples = make_trainer(stage, model), random_samples(stage)
    random = torch.Generator().manual_seed(4)
    references = [-30 * torch.rand(len(sample.sequences), generator=random) for sample in samples]
    total, found = chosen_targets(samples), []
    for arrangement in arrangements:
        batches = []
        for numbers in arrangement:
            reference = torch.cat([torch.empty(0), *(references[i] for i in numbers)])
            batch = collate([samples[i] for i in numbers], multiple_of, reference)
            batches.append(replace(batch, step_samples=NUM_SAMPLES, step_chosen_targets=total))
        numbers_found, pieces = found_by(trainer, trainer.step(batches, lr=0.0))
        found.append((numbers_found, whole(pieces)))
    return found


ALONE: Arrangement = [[i] for i in range(NUM_SAMPLES)]
PACKED: dict[str, Arrangement] = {
    "together": [[0, 1, 2, 3, 4, 5]],
    "in pairs": [[0, 1], [2, 3], [4, 5]],
    "permuted": [[5], [3], [0], [4], [2], [1]],
    "permuted and packed": [[4, 1, 5], [0, 3], [2]],
    "with empty microbatches": [[], [0, 1, 2], [], [3, 4, 5], []],
}


@pytest.mark.parametrize("stage", STAGE_SETTINGS)
def test_the_step_does_not_depend_on_how_samples_are_packed_and_ordered(stage: str, model: Path) -> None:
    alone, *others = pool.run(steps_on_rank, 1, stage, model, [ALONE, *PACKED.values()])[0]
    padded = pool.run(steps_on_rank, 1, stage, model, list(PACKED.values()), 8)[0]
    assert len(alone[1]) > 3 and all(value.isfinite().all() for value in alone[1].values())
    for found in (*others, *padded):
        assert_same(found, alone)


# ---- lists ----


def pairs_of(sample: Sample) -> list[Sample]:
    """Each two of its replies that differ in rank, by themselves."""
    return [
        Sample((sample.sequences[i], sample.sequences[j]), (0.0, 1.0), sample.margin)
        for i, rank in enumerate(sample.ranks)
        for j, other in enumerate(sample.ranks)
        if rank < other
    ]


def lists_on_rank(stage: str, model: Path) -> list[tuple[Found, list[Found]]]:
    """A step on each list, and on each of its pairs."""
    trainer = make_trainer(stage, model)

    def step(sample: Sample) -> Found:
        batch = replace(collate([sample]), step_samples=1, step_chosen_targets=chosen_targets([sample]))
        numbers, pieces = found_by(trainer, trainer.step([batch], lr=0.0))
        return numbers, whole(pieces)

    lists = [sample for sample in random_samples(stage) if len(sample.sequences) > 2]
    return [(step(sample), [step(pair) for pair in pairs_of(sample)]) for sample in lists]


@pytest.mark.parametrize("stage", ["reward", "dpo-sequence", "dpo-ipo"])
def test_a_list_of_replies_is_the_mean_of_its_pairs(stage: str, model: Path) -> None:
    found = pool.run(lists_on_rank, 1, stage, model)[0]
    assert any(len(pairs) > 2 for _, pairs in found)
    for (numbers, gradients), pairs in found:
        of_pairs = {name: float(np.mean([of_pair[name] for of_pair, _ in pairs])) for name in numbers}
        of_lists = {
            name: numbers[name] for name in ("grad_norm", "max_reward", "min_reward") if name in numbers
        }
        if "nll_loss" in numbers:
            of_lists["nll_loss"] = over_tokens([of_pair for of_pair, _ in pairs])
        assert_same_numbers(numbers, of_pairs | of_lists, absolute=1e-6)
        means = {name: torch.stack([of_pair[name] for _, of_pair in pairs]).mean(0) for name in gradients}
        assert_same(({}, gradients), ({}, means))


def over_tokens(pairs: list[dict[str, float]]) -> float:
    """The mean of nll_loss over the tokens of all chosen replies, each as often as it is in a pair."""
    told = [-numbers["logps/chosen"] for numbers in pairs]
    tokens = [sum_of / numbers["nll_loss"] for sum_of, numbers in zip(told, pairs, strict=True)]
    return sum(told) / sum(tokens)


# ---- sharing out ----

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (4, {"zero": {"stage": 1}}),
    (4, {"parallel": {"tensor": 2, "sequence": True}, "zero": {"stage": 3}}),
    (4, {"parallel": {"pipeline": 2, "chunks": 2, "schedule": "interleaved"}}),
]


def few_on_rank(
    stage: str, model: Path, batch: dict[str, int], layout: dict[str, Any]
) -> tuple[dict, list, int]:
    """The second step of batch.global samples."""
    trainer = make_trainer(stage, model, batch=batch, **layout)
    data = ChatData(trainer.config, [SampleSet.of(random_samples(stage))], [])
    batches = data.microbatches(2, trainer.mesh)
    empty = sum(not packed.num_samples for packed in batches)
    return *found_by(trainer, trainer.step(batches, lr=0.0)), empty


@pytest.mark.parametrize(
    ("stage", "layout"),
    [
        pytest.param(
            stage, layout, id=f"{stage}-{layout[1]}", marks=[] if i == j else pytest.mark.all_layouts
        )
        for i, stage in enumerate(("sft", "reward", "dpo"))
        for j, layout in enumerate(LAYOUTS)
    ],
)
def test_a_step_of_fewer_samples_than_ranks_is_that_of_one_process(
    stage: str, layout: tuple[int, dict[str, Any]], model: Path
) -> None:
    world_size, changes = layout
    batch = {"global": 1, "micro": 4}
    ((numbers, pieces, _),) = pool.run(few_on_rank, 1, stage, model, batch, {})
    ranks = pool.run(few_on_rank, world_size, stage, model, batch, changes)
    assert sum(empty for _, _, empty in ranks), "some microbatches hold nothing"
    assert all(rank[0] == ranks[0][0] for rank in ranks)
    together = whole([piece for _, mine, _ in ranks for piece in mine])
    assert_same((ranks[0][0], together), (numbers, whole(pieces)))


# ---- conversations of several turns ----


def turns_on_rank(model: Path, path: str, templates: list[str]) -> list[tuple[str, Found, Found]]:
    """A step on conversations as a whole, and on each of their replies by itself."""
    trainer, tokenizer = make_trainer("sft", model), load_tokenizer(model)
    compared = []
    for name in templates:
        found = []
        for turns in ("all", "split"):
            data = {"train": ["unused"], "sequence_length": 512, "turns": turns}
            template = load_template(name, tokenizer)
            samples, _ = read_samples(path, "conversation", template, ChatDataConfig.model_validate(data))
            batches = [collate([samples[i]]) for i in range(len(samples))]
            numbers, pieces = found_by(trainer, trainer.step(batches, lr=0.0))
            found.append((numbers | {"samples": len(samples)}, whole(pieces)))
        compared.append((name, found[0], found[1]))
    return compared


def test_learning_all_replies_at_once_is_learning_each_by_itself(model: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "turns.jsonl", conversations(6))
    for name, (together, gradients), (split, of_split) in pool.run(
        turns_on_rank, 1, model, path, list(BUILT_IN)
    )[0]:
        assert (together.pop("samples"), split.pop("samples")) == (6, 9), name
        assert_same((split, of_split), (together, gradients))
