"""The validation loss is a property of weights and data: of no layout, no batch, no number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm3d.checkpoint.hugging_face import read_weights
from llm3d.checkpoint.save import save_checkpoint
from llm3d.commands.evaluate import check, evaluate_latest
from llm3d.config import STAGES, make_config
from llm3d.data.language import ValidationData
from llm3d.parallel.mesh import Mesh
from llm3d.train.trainer import ShardedModel, Trainer
from tests import pool
from tests.closeness import assert_same_numbers
from tests.stages import post_training
from tests.stages.common import (
    SEQUENCE_LENGTH,
    command,
    evaluate_on_rank,
    evaluated,
    metrics,
    settings,
    silent,
    write_corpus,
)

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
    trainer.initialize()
    for _, weights in trainer.weights():
        weights.mul_(5)
    save_checkpoint(Path(config.run.dir), 1, trainer, {"step": 1})


def checkpoint(directory: Path) -> Path:
    return directory / "run" / "checkpoints" / "step-00000001"


def window_by_window_on_rank(given: dict[str, Any], weights: Path) -> list[tuple[float, int]]:
    """Loss and targets of each validation window alone."""
    config = make_config(given)
    data = ValidationData(config)
    model = ShardedModel(config, Mesh())
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
        ended = command("eval", given, *words)
        assert (ended.code, ended.stderr) == (0, "")
        said = evaluated(ended)
        assert (said.source, said.counted) == (str(source), f"{count} tokens")
        assert 0 < said.numbers.pop("token_accuracy") < 1
        assert_same_numbers(said.numbers, {"loss": loss, "perplexity": perplexity}, absolute=1e-4)
    assert sorted(directory.rglob("*")) == before, "an evaluation writes nothing"


# ---- stages after pretraining ----

STAGE_CHANGES: dict[str, dict[str, Any]] = {
    "sft": {"sft": {}, "loss": {"z_loss": 0.1}},
    "reward": {"reward": {"center": 0.1}},
    "dpo": {"dpo": {"rpo_alpha": 0.5}},
    "sft-lora": {"sft": {"neftune_alpha": 5.0}, "lora": {"rank": 4, "dropout": 0.2}},
    "reward-lora": {"reward": {}, "lora": {"rank": 4}},
    "dpo-lora": {"dpo": {}, "lora": {"rank": 4}},
}


@pytest.fixture(scope="module", params=STAGE_CHANGES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run that is done and that has evaluated its last step."""
    made = tmp_path_factory.mktemp("trained")
    stage = request.param.partition("-")[0]
    rows = post_training.conversations if stage == "sft" else post_training.comparisons
    train = post_training.write_rows(made / "train.jsonl", rows(20))
    valid = post_training.write_rows(made / "valid.jsonl", rows(27)[20:])
    base = post_training.write_model(made / "base")
    given = post_training.settings(
        base, train, made / "run", train={"eval_every": 4}, **STAGE_CHANGES[request.param]
    )
    given["data"]["valid"] = [valid]
    pool.run(post_training.train_on_rank, 2, stage, given)
    return given


def stage_of(given: dict[str, Any]) -> str:
    return next(name for name in given if name in STAGES)


def evaluate_stage_on_rank(given: dict[str, Any]) -> tuple[str, dict[str, float], int]:
    """What `llm3d eval` does under torchrun, in a world that is there already."""
    opened = check(make_config(given, torch.distributed.get_world_size(), STAGES[stage_of(given)]))
    layout = opened.config.parallel
    with silent():
        source, found = evaluate_latest(opened, Mesh(layout.tensor, layout.pipeline))
    return source, found.numbers, found.num_terms


def numbers_of_training(given: dict[str, Any]) -> dict[str, float]:
    last = metrics(given)[-1]
    return {name.removeprefix("valid_"): last[name] for name in last if name.startswith("valid_")}


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(1, {}), (3, {}), (2, {"pipeline": 2}), (4, {"tensor": 2, "sequence": True, "pipeline": 2})],
    ids=str,
)
def test_a_checkpoint_has_the_numbers_that_training_saw(
    trained: dict[str, Any], world_size: int, parallel: dict[str, Any]
) -> None:
    expected = numbers_of_training(trained)
    before = files_of(trained)
    results = pool.run(evaluate_stage_on_rank, world_size, trained | {"parallel": parallel})
    assert all(result == results[0] for result in results), "every rank has the same"
    source, numbers, _ = results[0]
    assert source.endswith(f"{trained['run']['dir']}/checkpoints/step-00000004")
    assert_same_numbers(numbers, expected, relative=1e-4, absolute=1e-6)
    assert files_of(trained) == before, "what training knew of the reference is used again"


def files_of(given: dict[str, Any]) -> list[Path]:
    return sorted(Path(given["run"]["dir"]).rglob("*"))


def test_the_command_evaluates_what_the_settings_name(trained: dict[str, Any], tmp_path: Path) -> None:
    """The latest checkpoint; or, elsewhere, adapters or a whole model; or the model that training started from."""
    path = Path(trained["run"]["dir"]) / "checkpoints" / "step-00000004"
    base, elsewhere = trained["model"]["path"], f"run.dir={tmp_path}/elsewhere"
    source_of_run = f"{base} and {path}" if "lora" in trained else str(path)
    ways = [(source_of_run, ()), (source_of_run, (f"checkpoint.resume={path}", elsewhere))]
    if "lora" in trained and stage_of(trained) != "dpo":
        ways.append((source_of_run, (f"lora.path={path}", elsewhere)))
    expected = numbers_of_training(trained)
    for source, words in ways:
        ended = command("eval", trained, *words)
        assert (ended.code, ended.stderr) == (0, "")
        said = evaluated(ended)
        assert said.source == source
        assert_same_numbers(said.numbers, expected, relative=1e-4, absolute=1e-4)
        assert said.counted.endswith(" tokens") if stage_of(trained) == "sft" else said.counted == "7 samples"
    starts = [(base, ()), *([(source_of_run, (f"lora.path={path}",))] if "lora" in trained else [])]
    for start, words in starts:
        code, stdout, stderr = command("eval", trained, elsewhere, *words)
        if stage_of(trained) == "reward" and start == base:
            assert code == 2 and f"model.path: {base} has no score head" in stderr
            continue
        assert code == 0 and stdout.startswith(f"{start}: loss ")
        if stage_of(trained) == "dpo":
            assert "rewards/margins 0.0000" in stdout, "the model that training starts from is its reference"


def test_only_the_validation_data_is_read(trained: dict[str, Any]) -> None:
    code, _, _ = command("eval", trained, "data.train=nothing.jsonl")
    assert code == 0
    code, _, stderr = command("eval", trained, "data.valid=[]", "train.eval_every=null")
    assert (code, stderr) == (2, "llm3d: data.valid: empty; name the data to evaluate on\n")


def test_adapters_and_whole_models_are_told_apart(trained: dict[str, Any]) -> None:
    """A command line that asks for the one where the checkpoint holds the other is refused."""
    path = Path(trained["run"]["dir"]) / "checkpoints" / "step-00000004"
    for words in [("lora=null",), ("lora.rank=0",)] if "lora" in trained else [("lora.rank=4",)]:
        code, _, stderr = command("eval", trained, *words)
        assert code == 2 and stderr.startswith("llm3d: lora") and stderr.count("\n") == 1
        assert str(path) in stderr or "is not what lora.path has" in stderr
