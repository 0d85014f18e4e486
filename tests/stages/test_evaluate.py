"""The validation loss is a property of weights and data: of no layout, no batch, no number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm3d.config import make_config
from llm3d.models.hugging_face import read_weights
from llm3d.parallel.mesh import Mesh
from llm3d.stages.language_data import ValidationData
from llm3d.train.checkpoint import save_checkpoint
from llm3d.train.trainer import Evaluator, Trainer
from tests import pool
from tests.stages.common import SEQUENCE_LENGTH, command, evaluate_on_rank, settings, write_corpus

NUM_WINDOWS = 11

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"batch": {"global": 4, "micro": 4}}),
    (1, {"batch": {"global": 64, "micro": 1}}),
    (2, {"batch": {"global": 4, "micro": 2}}),
    (3, {"batch": {"global": 3}}),
    (4, {"batch": {"global": 32, "micro": 8}}),  # more at once than there are windows
    (8, {"batch": {"global": 8}}),
    (4, {"parallel": {"tensor": 2, "sequence": True}, "batch": {"global": 4, "micro": 2}}),
    (4, {"parallel": {"tensor": 4}, "batch": {"global": 4, "micro": 2}}),
    (2, {"parallel": {"pipeline": 2}}),
    (4, {"parallel": {"pipeline": 2, "schedule": "gpipe"}, "batch": {"global": 2}}),
    (4, {"parallel": {"pipeline": 2, "chunks": 2, "schedule": "interleaved"}}),
    (8, {"parallel": {"tensor": 2, "pipeline": 2}, "batch": {"global": 4, "micro": 2}}),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("evaluate")
    write_corpus(made / "train", 1000)
    write_corpus(made / "valid", NUM_WINDOWS * SEQUENCE_LENGTH + 5, seed=1)
    write_corpus(made / "one-window", SEQUENCE_LENGTH + 1, seed=2)
    pool.run(save_on_rank, 1, settings(made))
    return made


def save_on_rank(given: dict[str, Any]) -> None:
    """Random weights, large enough for predictions that differ."""
    config = make_config(given)
    trainer = Trainer(config, Mesh())
    trainer.initialise()
    for _, weights in trainer.weights():
        weights.mul_(5)
    save_checkpoint(Path(config.run.dir), 1, trainer, {"step": 1})


def checkpoint(directory: Path) -> Path:
    return directory / "run" / "checkpoints" / "step-00000001"


def window_by_window_on_rank(given: dict[str, Any], weights: Path) -> list[tuple[float, int]]:
    """Loss and targets of each validation window alone."""
    config = make_config(given)
    data = ValidationData(config)
    model = Evaluator(config, Mesh())
    read_weights(weights, model.weights(), config.model, model.mesh.everyone)
    assert data.valid is not None
    from llm3d.data.pretraining import collate

    windows = (collate([data.valid.window(i)]) for i in range(data.valid.num_windows))
    tallies = [model.evaluate([window]) for window in windows]
    return [(tally.sums[0], tally.num_terms) for tally in tallies]


@pytest.fixture(scope="module")
def windows(directory: Path) -> list[tuple[float, int]]:
    found = pool.run(window_by_window_on_rank, 1, settings(directory), checkpoint(directory) / "model")[0]
    assert len(found) == NUM_WINDOWS and len({count for _, count in found}) > 1
    return found


def mean(windows: list[tuple[float, int]]) -> tuple[float, int]:
    count = sum(count for _, count in windows)
    return sum(loss for loss, _ in windows) / count, count


@pytest.mark.parametrize(("world_size", "changes"), LAYOUTS, ids=str)
def test_the_loss_is_the_mean_over_all_windows_under_any_layout(
    directory: Path, windows: list[tuple[float, int]], world_size: int, changes: dict[str, Any]
) -> None:
    loss, count = mean(windows)
    results = pool.run(evaluate_on_rank, world_size, settings(directory, **changes), checkpoint(directory))
    assert len(set(results)) == 1, "every rank has the same"
    assert results[0].num_terms == count
    assert results[0].loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_part_of_the_data_is_its_first_windows(
    directory: Path, windows: list[tuple[float, int]], world_size: int
) -> None:
    for eval_steps, num_windows in ((1, 4), (2, 8), (3, 11), (100, 11)):
        loss, count = mean(windows[:num_windows])
        given = settings(directory, train={"eval_steps": eval_steps})
        result = pool.run(evaluate_on_rank, world_size, given, checkpoint(directory))[0]
        assert (result.loss, result.num_terms) == (pytest.approx(loss, rel=1e-5), count)


def test_one_window_is_enough_for_any_number_of_ranks(directory: Path) -> None:
    given = settings(directory, data={"valid": [str(directory / "one-window")]})
    alone = pool.run(evaluate_on_rank, 1, given, checkpoint(directory))[0]
    many = pool.run(evaluate_on_rank, 4, given, checkpoint(directory))
    assert 0 < alone.num_terms <= SEQUENCE_LENGTH
    assert all(result.num_terms == alone.num_terms for result in many)
    assert many[0].loss == pytest.approx(alone.loss, rel=1e-6)


def test_the_command_says_what_it_evaluated(
    directory: Path, windows: list[tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    loss, count = mean(windows)
    perplexity = torch.tensor(loss, dtype=torch.float64).exp().item()
    given, path = settings(directory), checkpoint(directory)
    before = sorted(directory.rglob("*"))
    for source, words in (
        (path, ()),
        (path, (f"checkpoint.resume={path}", "run.dir=elsewhere")),
        (path / "model", (f"model.path={path}/model", "run.dir=elsewhere")),
    ):
        code, stdout, stderr = command("eval", given, *words)
        assert (code, stderr) == (0, "")
        assert stdout.startswith(f"{source}: loss {loss:.4f}, token_accuracy 0.")
        assert stdout.endswith(f", perplexity {perplexity:.4f} on {count} tokens\n")
    assert sorted(directory.rglob("*")) == before, "an evaluation writes nothing"
