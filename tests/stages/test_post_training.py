"""Fine-tuning, reward models and DPO from files to checkpoints: complete, resumable, readable by others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests import pool
from tests.closeness import assert_same_numbers
from tests.stages.common import Settings, command, metrics
from tests.stages.post_training import (
    Row,
    answer,
    comparisons,
    conversations,
    question,
    rankings,
    settings,
    train_on_rank,
    write_model,
    write_rows,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


def turns(count: int, user: str, assistant: str, role: str, content: str) -> list[list[Row]]:
    return [[{role: user, content: question(i)}, {role: assistant, content: answer(i)}] for i in range(count)]


FORMATS: dict[str, tuple[str, str, Sequence[Row]]] = {  # the stage, the file's ending, its rows
    "messages": ("sft", ".jsonl", conversations(9)),
    "sharegpt": (
        "sft",
        ".json",
        [{"conversations": one, "system": "Count."} for one in turns(9, "human", "gpt", "from", "value")],
    ),
    "alpaca": (
        "sft",
        ".parquet",
        [{"instruction": question(i), "input": "", "output": answer(i)} for i in range(9)],
    ),
    "question_answer": ("sft", ".jsonl", [{"question": question(i), "answer": answer(i)} for i in range(9)]),
    "prompt_response": ("sft", ".jsonl", [{"prompt": question(i), "response": answer(i)} for i in range(9)]),
    "preference": ("reward", ".jsonl", comparisons(9)),
    "margins": ("reward", ".parquet", [{**row, "margin": 0.5} for row in comparisons(9)]),
    "ranked": ("reward", ".json", rankings(9)),
    "preferred replies": ("dpo", ".jsonl", comparisons(9)),
    "preferred messages": (
        "dpo",
        ".parquet",
        [
            {"chosen": one, "rejected": [one[0], {"role": "assistant", "content": "No."}]}
            for one in turns(9, "user", "assistant", "role", "content")
        ],
    ),
    "orpo": ("orpo", ".jsonl", comparisons(9)),
    "simpo": ("simpo", ".jsonl", comparisons(9)),
    "labeled": (
        "kto",
        ".jsonl",
        [{"prompt": question(i), "completion": answer(i), "label": i % 3 != 1} for i in range(9)],
    ),
    "labeled messages": (
        "kto",
        ".json",
        [
            {"conversations": one, "label": i % 2 == 0}
            for i, one in enumerate(turns(9, "human", "gpt", "from", "value"))
        ],
    ),
    "scored": (
        "dpo",
        ".jsonl",
        [
            {"prompt": row["prompt"], "responses": row["responses"], "scores": [1.0, 0.5, -1.0]}
            for row in rankings(9)
        ],
    ),
}
REPORTED = {
    "sft": {"token_accuracy", "perplexity"},
    "reward": {"accuracy", "margin", "mean_reward", "max_reward", "min_reward"},
    "dpo": {
        *(f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")),
        *("logps/chosen", "logps/rejected", "nll_loss"),
    },
    "orpo": {"rewards/margins", "logps/chosen", "nll_loss", "log_odds_ratio"},
    "simpo": {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
    | {"logps/chosen"},
    "kto": {
        "kl",
        "rewards/chosen",
        "logps/chosen",
    },  # those of a label that no sample of a step has are left out
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_trains_and_leaves_what_transformers_loads(
    form: str, model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    stage, ending, rows = FORMATS[form]
    train = write_rows(tmp_path / f"train{ending}", rows)
    valid = write_rows(tmp_path / f"valid{ending}", rows[:3])
    given = settings(
        model,
        train,
        tmp_path / "run",
        data={"valid": [valid]},
        batch={"micro": 3},
        train={"steps": 0, "epochs": 3, "eval_every": 7},
        **({"reward": {"margin": True}} if form == "margins" else {}),
    )
    ended = command(stage, given)
    assert (ended.code, ended.stdout) == (0, "")
    assert f"{train}: 9 samples" in ended.stderr and "has read the data 3.00 times" in ended.stderr
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["train"]["steps"] == 0, "what they come to is another with another batch"
    lines = metrics(given)
    assert [(line["step"], line["samples"]) for line in lines] == [
        *((i, 4 * i) for i in range(1, 7)),
        (7, 27),
    ], "three passes over nine samples, four at a time"
    for name in ("loss", *REPORTED[stage]):
        assert name in lines[0] and f"valid_{name}" in lines[-1]
    assert lines[-1]["loss"] < lines[0]["loss"]
    found = tmp_path / "run" / "checkpoints" / "step-00000007" / "model"
    kind = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    _, report = kind.from_pretrained(found, output_loading_info=True)
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(found)
    assert tokenizer.chat_template == (model / "chat_template.jinja").read_text()
    said = tokenizer.apply_chat_template([{"role": "user", "content": "Hm?"}], tokenize=False)
    assert said == "<|im_start|>user\nHm?<|im_end|>\n"


# ---- going on ----

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {"sft": {"neftune_alpha": 5}}),
    "sft-lora": ("sft", {"lora": {"rank": 3, "dropout": 0.2}}),
    "reward": ("reward", {"reward": {"center": 0.1}}),
    "reward-lora": ("reward", {"lora": {"rank": 2, "targets": ["q_proj", "o_proj"], "rslora": True}}),
    "dpo": ("dpo", {"dpo": {"rpo_alpha": 0.2}}),
    "dpo-lora": ("dpo", {"lora": {"rank": 3, "alpha": 4}}),
    "orpo": ("orpo", {"orpo": {"beta": 0.3}}),
    "simpo-lora": ("simpo", {"simpo": {"gamma": 0.8}, "lora": {"rank": 3}}),
    "kto-lora": ("kto", {"lora": {"rank": 3}}),
}
PARTS: list[tuple[int, int, dict[str, Any]]] = [  # ranks, the last step, the layout
    (4, 2, {"parallel": {"tensor": 2, "pipeline": 2, "sequence": True}}),
    (2, 4, {"zero": {"stage": 3}}),
    (1, 5, {}),
]


def given_settings(name: str, model: Path, directory: Path, run: str, **changes: Any) -> Settings:
    stage, sections = RUNS[name]
    rows = conversations(9) if stage in ("sft", "kto") else comparisons(9)
    if stage == "kto":
        rows = [{**row, "label": i % 2 == 0} for i, row in enumerate(rows)]
    train = write_rows(directory / f"{name}.jsonl", rows)
    valid = {"valid": [write_rows(directory / f"{name}-valid.jsonl", rows[2:7])]}
    steps = {"steps": 0, "epochs": 2, "eval_every": 5, **changes.pop("train", {})}
    # At a high learning rate, Adam makes much of the rounding of small gradients.
    optim = {"lr": 1e-3}
    return settings(
        model, train, directory / run, data=valid, train=steps, optim=optim, **{**sections, **changes}
    )


@pytest.fixture(scope="module")
def unbroken(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Settings]:
    """Runs of 5 steps, the last a smaller one, on one process, without a stop."""
    directory = tmp_path_factory.mktemp("unbroken")
    runs = {name: given_settings(name, model, directory, f"run-{name}") for name in RUNS}
    for name, given in runs.items():
        pool.run(train_on_rank, 1, RUNS[name][0], given)
    return runs


def numbers(given: Settings) -> list[dict[str, float]]:
    """What does not depend on the machine, of each step."""
    skipped = ("step_time_s", "tokens_per_s", "tflops_per_device", "mfu", "memory_gib")
    return [{name: x for name, x in line.items() if name not in skipped} for line in metrics(given)]


def weights(given: Settings) -> dict[str, torch.Tensor]:
    step = Path(given["run"]["dir"]) / "checkpoints" / "step-00000005"
    folder = "adapter" if "lora" in given else "model"
    assert {path.name for path in step.iterdir() if path.is_dir()} == {folder, "optimizer"}
    return {
        name: value
        for path in (step / folder).glob("*.safetensors")
        for name, value in load_file(path).items()
    }


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    name: str, model: Path, tmp_path: Path, unbroken: dict[str, Settings]
) -> None:
    stopped = given_settings(name, model, tmp_path, "run", train={"stop_after": 2})
    pool.run(train_on_rank, 1, RUNS[name][0], stopped)
    given = given_settings(name, model, tmp_path, "run")
    (said,) = pool.run(train_on_rank, 1, RUNS[name][0], given)
    assert "step-00000002" in said and "training data" not in said
    assert numbers(given) == numbers(unbroken[name])
    expected, actual = weights(unbroken[name]), weights(given)
    assert actual.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


@pytest.mark.parametrize("name", RUNS)
def test_a_run_whose_layout_changes_twice_trains_as_one_that_never_stopped(
    name: str, model: Path, tmp_path: Path, unbroken: dict[str, Settings]
) -> None:
    for world_size, last, layout in PARTS:
        given = given_settings(name, model, tmp_path, "run", train={"stop_after": last}, **layout)
        said = pool.run(train_on_rank, world_size, RUNS[name][0], given)
        assert all(rank == "" for rank in said[1:]), "rank 0 speaks for all"
    expected, actual = numbers(unbroken[name]), numbers(given)
    for line, wanted in zip(actual, expected, strict=True):
        assert_same_numbers(line, wanted, absolute=1e-5)


def test_a_run_without_end_does_nothing_more(model: Path, tmp_path: Path) -> None:
    given = given_settings("dpo", model, tmp_path, "run")
    assert command("dpo", given).code == 0
    before = metrics(given)
    ended = command("dpo", given)
    assert ended.code == 0 and "nothing to do" in ended.stderr
    assert metrics(given) == before


def test_epochs_are_counted_in_samples_whatever_the_batch_was(model: Path, tmp_path: Path) -> None:
    """Of two passes over nine samples, one is read two at a time."""
    epochs = {"steps": 0, "epochs": 2, "eval_every": None}
    given = given_settings("sft", model, tmp_path, "run", train=epochs, batch={"global": 2})
    assert command("sft", given, "train.stop_after=4").code == 0
    ended = command("sft", given, "batch.global=4")
    assert ended.code == 0 and "by step 7 it has read the data 2.00 times" in ended.stderr
    assert [line["samples"] for line in metrics(given)] == [2, 4, 6, 8, 12, 16, 18]
    rates = [line["lr"] for line in metrics(given)]
    assert rates[-1] == min(rates[1:]) and rates[-1] > 1e-4, "the schedule ends where the run does"
    again = command("sft", given, "batch.global=3")
    assert "nothing to do" in again.stderr and "raise train.epochs" in again.stderr


def test_other_samples_than_the_checkpoints_are_said(model: Path, tmp_path: Path) -> None:
    given = given_settings("sft", model, tmp_path, "run", train={"stop_after": 2})
    assert command("sft", given).code == 0
    other = write_rows(tmp_path / "other.jsonl", conversations(7))
    ended = command("sft", given, f"data.train={json.dumps([other])}", "train.stop_after=3")
    assert ended.code == 0 and "goes on at sample 8 of the new order" in ended.stderr


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_check_opens_what_a_run_needs_and_makes_nothing(stage: str, model: Path, tmp_path: Path) -> None:
    given = given_settings(stage, model, tmp_path, "run")
    assert command(stage, given, "--check").code == 0
    assert (
        command(stage, given, "--check", f"data.train={json.dumps([str(tmp_path / 'nowhere.jsonl')])}").code
        == 2
    )
    assert not (tmp_path / "run").exists()


def test_stages_follow_on_each_others_checkpoints(model: Path, tmp_path: Path) -> None:
    """A fine-tuned model is the start of a reward model, of DPO and of adapters, and adapters are the start of more."""
    first = given_settings("sft", model, tmp_path, "sft")
    assert command("sft", first).code == 0
    tuned = tmp_path / "sft" / "checkpoints" / "step-00000005"
    for name in ("reward", "dpo", "sft-lora"):
        ended = command(RUNS[name][0], given_settings(name, tuned, tmp_path, name))
        assert ended.code == 0 and f"from {tuned}" in ended.stderr
    adapter = tmp_path / "sft-lora" / "checkpoints" / "step-00000005"
    given = given_settings("sft-lora", tuned, tmp_path, "again", lora={"path": str(adapter)})
    ended = command("sft", given)
    assert ended.code == 0 and f"from {tuned} and {adapter}" in ended.stderr
    losses = [metrics(settings(tuned, "", tmp_path / run))[0]["loss"] for run in ("sft-lora", "again")]
    assert losses[1] < losses[0], "it starts from what the adapters had learned"
