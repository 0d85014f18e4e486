"""Pretraining from token files to checkpoints: complete, resumable under any layout, readable by others."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from llm3d.cli import app
from llm3d.config import make_config
from llm3d.config.places import latest_checkpoint
from llm3d.data.language import LanguageData
from llm3d.data.pretraining import PretrainingData
from llm3d.data.steps import Consumed
from llm3d.parallel.mesh import Mesh
from tests import pool
from tests.closeness import assert_same_numbers
from tests.stages.common import (
    SEQUENCE_LENGTH,
    VOCAB_SIZE,
    Ended,
    Settings,
    command,
    evaluated,
    metrics,
    pretrain_on_rank,
    settings,
    write_corpus,
)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpora")
    write_corpus(directory / "train", 1000)
    write_corpus(directory / "valid", 11 * SEQUENCE_LENGTH + 5, seed=1)
    return directory


@pytest.fixture(scope="module")
def unbroken(corpora: Path) -> tuple[Settings, Ended]:
    """A run of 6 steps on one process, without a stop."""
    given = settings(corpora, train={"eval_every": 3})
    return given, command("pretrain", given)


def in_directory(corpora: Path, run_dir: Path, **changes: Any) -> Settings:
    return settings(corpora, **{**changes, "run": {"dir": str(run_dir), "seed": 3}})


def test_a_run_leaves_what_the_design_promises(unbroken: tuple[Settings, Ended]) -> None:
    given, ended = unbroken
    run_dir = Path(given["run"]["dir"])
    assert (ended.code, ended.stdout) == (0, "")
    assert {path.name for path in run_dir.iterdir()} == {"config.yaml", "metrics.jsonl", "checkpoints"}
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000006"]
    resolved = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert resolved["optim"]["min_lr"] == 1e-3 and resolved["train"]["steps"] == 6
    lines = metrics(given)
    assert [(line["step"], line["samples"]) for line in lines] == [(i, 4 * i) for i in range(1, 7)]
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[5]["valid_loss"] < lines[2]["valid_loss"]
    for said in ("tensor 1 x pipeline 1 x data 1", "random weights, seed 3", "step 6: saved"):
        assert said in ended.stderr


def test_the_first_loss_is_that_of_weights_that_know_nothing(unbroken: tuple[Settings, Ended]) -> None:
    first = metrics(unbroken[0])[0]["loss"]
    assert first == pytest.approx(torch.tensor(float(VOCAB_SIZE)).log().item(), rel=0.02)


def test_a_run_whose_layout_changes_twice_trains_as_one_that_never_stopped(
    corpora: Path, tmp_path: Path, unbroken: tuple[Settings, Ended]
) -> None:
    parts: list[tuple[int, dict[str, Any]]] = [
        (2, {"train": {"stop_after": 2, "eval_every": 3}, "parallel": {"tensor": 2, "sequence": True}}),
        (
            4,
            {
                "train": {"stop_after": 5, "eval_every": 3},
                "parallel": {"pipeline": 2, "chunks": 2, "schedule": "interleaved"},
            },
        ),
        (4, {"train": {"eval_every": 3}, "batch": {"micro": 2}, "parallel": {"tensor": 2}}),
    ]
    said = []
    for world_size, changes in parts:
        given = in_directory(corpora, tmp_path, **changes)
        said.append(pool.run(pretrain_on_rank, world_size, given))
    assert all(rank == "" for ranks in said for rank in ranks[1:]), "rank 0 speaks for all"
    assert "parameters from" in said[1][0] and "step-00000002" in said[1][0]
    checkpoints = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert checkpoints == ["step-00000002", "step-00000005", "step-00000006"]
    names = ("step", "tokens", "samples", "loss", "grad_norm", "lr", "valid_loss")
    expected = [{name: line[name] for name in names if name in line} for line in metrics(unbroken[0])]
    actual = [{name: line[name] for name in names if name in line} for line in metrics(given)]
    assert [line.keys() for line in actual] == [line.keys() for line in expected]
    for line, wanted in zip(actual, expected, strict=True):
        assert line == pytest.approx(wanted, rel=2e-5)


def test_the_weights_lie_as_transformers_wants_them(corpora: Path, unbroken: tuple[Settings, Ended]) -> None:
    checkpoint = latest_checkpoint(Path(unbroken[0]["run"]["dir"]))
    assert checkpoint is not None
    model = LlamaForCausalLM.from_pretrained(checkpoint / "model", dtype=torch.float32)
    windows = PretrainingData(
        [(str(corpora / "valid"), 1.0)], SEQUENCE_LENGTH, 3, VOCAB_SIZE, split_documents=False
    )
    tokens = torch.stack([windows.window(i).tokens for i in range(windows.num_windows)])
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    given = settings(corpora, data={"split_documents": False})
    ended = command("eval", given, f"model.path={checkpoint / 'model'}", "checkpoint.resume=none")
    assert ended.code == 0
    accuracy = (logits.argmax(-1) == tokens[:, 1:]).float().mean()
    expected = {"loss": loss, "token_accuracy": accuracy, "perplexity": loss.exp()}
    said = evaluated(ended)
    assert said.counted == "176 tokens"
    assert_same_numbers(said.numbers, {name: x.item() for name, x in expected.items()}, absolute=1e-4)


def test_training_goes_on_from_given_weights(
    corpora: Path, tmp_path: Path, unbroken: tuple[Settings, Ended]
) -> None:
    checkpoint = latest_checkpoint(Path(unbroken[0]["run"]["dir"]))
    given = in_directory(corpora, tmp_path, train={"steps": 2})
    given["model"] = {"path": f"{checkpoint}/model"}
    ended = command("pretrain", given)
    assert ended.code == 0 and f"parameters from {checkpoint}/model" in ended.stderr
    fresh, tuned = metrics(unbroken[0])[0], metrics(given)[0]
    assert tuned["step"] == fresh["step"] == 1
    assert tuned["loss"] < fresh["loss"] - 0.1, "the same samples, by weights that have seen text"


def test_a_run_that_is_done_has_nothing_to_do(corpora: Path, tmp_path: Path) -> None:
    given = in_directory(corpora, tmp_path, train={"steps": 1})
    assert command("pretrain", given).code == 0
    before = metrics(given)
    again = command("pretrain", given)
    assert again.code == 0 and "nothing to do" in again.stderr and "step 1" in again.stderr
    assert metrics(given) == before
    longer = command("pretrain", given, "train.steps=2")
    assert longer.code == 0
    assert [line["step"] for line in metrics(given)] == [1, 2]
    assert metrics(given)[0] == before[0]


def test_a_run_goes_on_from_the_checkpoint_that_is_named(corpora: Path, tmp_path: Path) -> None:
    first = in_directory(corpora, tmp_path / "first", train={"steps": 3}, checkpoint={"every": 1})
    assert command("pretrain", first).code == 0
    named = tmp_path / "first" / "checkpoints" / "step-00000002"
    second = in_directory(corpora, tmp_path / "second", train={"steps": 3}, checkpoint={"resume": str(named)})
    ended = command("pretrain", second)
    assert ended.code == 0 and str(named) in ended.stderr
    assert [line["step"] for line in metrics(second)] == [3]
    assert metrics(second)[0]["loss"] == metrics(first)[2]["loss"]


def test_the_best_checkpoint_stays_and_none_better_ends_the_run(corpora: Path, tmp_path: Path) -> None:
    """By a number of which the first is the best: a loss that should rise."""
    given = in_directory(
        corpora,
        tmp_path,
        train={"eval_every": 1, "patience": 2},
        checkpoint={"best": "valid_loss", "greater_is_better": True, "keep": 1},
    )
    checkpoints = tmp_path / "checkpoints"
    for patience in (2, 3):
        ended = command("pretrain", given, f"train.patience={patience}")
        assert ended.code == 0 and f"none better in the last {patience} evaluations" in ended.stderr
        first = metrics(given)[0]["valid_loss"]
        assert f"the best valid_loss is {first:.4f}, at step 1: {checkpoints}/best" in ended.stderr
        left = [f"step-{step:08d}" for step in (1, patience + 1)]
        assert sorted(path.name for path in checkpoints.iterdir()) == ["best", *left]
        assert (checkpoints / "best").resolve().name == "step-00000001"
        again = command("pretrain", given, f"train.patience={patience}")
        assert again.code == 0 and "nothing to do" in again.stderr and "raise train.patience" in again.stderr
    evaluated = command("eval", given, f"checkpoint.resume={checkpoints / 'best'}")
    assert f"best: loss {first:.4f}" in evaluated.stdout
    result = CliRunner().invoke(app, ["export", str(checkpoints / "best"), "--output", str(tmp_path / "out")])
    assert result.exit_code == 0
    LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_a_metric_that_no_evaluation_has_is_refused(corpora: Path, tmp_path: Path) -> None:
    given = in_directory(corpora, tmp_path / "run", train={"eval_every": 1}, checkpoint={"best": "eval_loss"})
    ended = command("pretrain", given)
    assert ended.code == 2 and "checkpoint.best: 'eval_loss' is not among" in ended.stderr
    assert "did you mean valid_loss?" in ended.stderr and not (tmp_path / "run").exists()


def test_other_data_than_the_checkpoints_is_said(corpora: Path, tmp_path: Path) -> None:
    given = in_directory(corpora, tmp_path, train={"steps": 1})
    assert "training data" not in command("pretrain", given).stderr
    assert "training data" not in command("pretrain", given, "train.steps=2").stderr
    other = write_corpus(tmp_path / "other", 500, seed=5)
    ended = command("pretrain", given, "train.steps=3", f"data.train={json.dumps([other])}")
    assert ended.code == 0
    assert "the training data, its weights or its order are not those of the checkpoint" in ended.stderr


def test_bf16_and_tied_weights_train_and_resume(corpora: Path, tmp_path: Path) -> None:
    given = in_directory(
        corpora,
        tmp_path,
        precision={"compute": "bf16"},
        model={"tie_word_embeddings": True},
        train={"stop_after": 3},
        recompute={},
    )
    given["recompute"] = "selective"
    assert command("pretrain", given).code == 0
    pool.run(pretrain_on_rank, 2, {**given, "train": {"steps": 6}, "parallel": {"pipeline": 2}})
    losses = [line["loss"] for line in metrics(given)]
    assert len(losses) == 6 and losses[5] < losses[3] < losses[0]
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoints" / "step-00000006" / "model")
    assert loaded.dtype == torch.bfloat16 and loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_resumed_run_with_another_batch_goes_on_at_the_next_sample(corpora: Path, tmp_path: Path) -> None:
    small = in_directory(corpora, tmp_path, train={"steps": 6, "stop_after": 3})
    assert command("pretrain", small).code == 0
    large = in_directory(corpora, tmp_path, batch={"global": 8})
    assert command("pretrain", large).code == 0
    samples = [step["samples"] for step in metrics(large)]
    assert samples == [4, 8, 12, 20, 28, 36]
    assert [step["tokens"] for step in metrics(large)] == [n * SEQUENCE_LENGTH for n in samples]

    data = LanguageData(make_config(large))
    data.resume(3, Consumed(12, 12 * SEQUENCE_LENGTH))
    coordinates = cast(Mesh, SimpleNamespace(data_rank=0, data_size=1))
    read = torch.cat([batch.tokens for batch in data.microbatches(4, coordinates)])
    assert torch.equal(read, torch.cat([data.train.sample(k).tokens[:-1] for k in range(12, 20)]))


def test_check_opens_what_a_run_needs_and_makes_nothing(corpora: Path, tmp_path: Path) -> None:
    given = in_directory(corpora, tmp_path / "run")
    assert command("pretrain", given, "--check").code == 0
    assert (
        command("pretrain", given, "--check", f"data.train={json.dumps([str(tmp_path / 'nowhere')])}").code
        == 2
    )
    assert not (tmp_path / "run").exists()
