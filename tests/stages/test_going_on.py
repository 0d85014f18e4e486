"""A run goes on only as what it was: what its checkpoints mean is compared with the settings. What may change, may."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llm3d.config import STAGES, config_to_yaml, load_config, make_config
from llm3d.stages.run import open_task
from tests.stages.common import Settings, command, write_corpus
from tests.stages.post_training import (
    SHAPE,
    comparisons,
    conversations,
    question,
    settings,
    write_model,
    write_reward_model,
    write_rows,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data; a run of all weights in `full`, and one of adapters in `lora`, each of a step."""
    made = tmp_path_factory.mktemp("going_on")
    base = write_model(made / "base")
    write_model(made / "other", seed=1)
    write_reward_model(made / "reward", base)
    shutil.copytree(base, made / "moved")
    swapped = shutil.copytree(base, made / "swapped") / "tokenizer.json"
    words = json.loads(swapped.read_text())
    vocab = words["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    swapped.write_text(json.dumps(words))
    write_rows(made / "chats.jsonl", conversations(20))
    write_rows(made / "pairs.jsonl", comparisons(20))
    write_rows(made / "prompts.jsonl", [{"prompt": question(i)} for i in range(8)])
    write_corpus(made / "corpus", 400, vocab_size=SHAPE["vocab_size"])
    for name, lora in LORA.items():
        assert command("sft", given_settings(made, name, lora=lora)).code == 0
    return made


LORA: dict[str, dict[str, Any]] = {"full": {}, "lora": {"rank": 2, "alpha": 6}}


def given_settings(files: Path, run: str, **changes: Any) -> Settings:
    """The settings of a run, or others."""
    return settings(
        files / "base", str(files / "chats.jsonl"), files / run, **{"train": {"steps": 1}, **changes}
    )


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another start": ("full", {"model": {"path": "other"}}, "model.path: "),
    "another base of adapters": ("lora", {"model": {"path": "other"}}, "model.path: "),
    "adapters": ("full", {"lora": {"rank": 2}}, "lora.rank: 2 is not"),
    "another rank": ("lora", {"lora": {"rank": 3, "alpha": 6}}, "lora.rank: 3 is not"),
    "another scale": ("lora", {"lora": {"rank": 2, "alpha": 7}}, "lora.alpha: 7.0 is not"),
    "another kind of scale": ("lora", {"lora": LORA["lora"] | {"rslora": True}}, "lora.rslora: true is not"),
    "other targets": ("lora", {"lora": LORA["lora"] | {"targets": ["q_proj"]}}, "lora.targets: "),
    "another template": ("full", {"data": {"template": "llama3"}}, "data.template: llama3 is not"),
    "another tokenizer": ("full", {"model": {"path": "swapped"}}, "data.tokenizer: another one"),
}


def changed(files: Path, run: str, changes: dict[str, Any]) -> Settings:
    given = given_settings(files, run, train={"steps": 2}, lora=LORA[run])
    for section, values in changes.items():
        within = {"path", "tokenizer"}
        values = {name: str(files / value) if name in within else value for name, value in values.items()}
        given[section] = given.get(section, {}) | values
    return given


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_does_not_go_on_as_another(name: str, files: Path) -> None:
    run, changes, said = OTHERS[name]
    before = contents(files)
    code, _, stderr = command("sft", changed(files, run, changes))
    assert (code, stderr.count("\n")) == (2, 1) and stderr.startswith(f"llm3d: {said}"), stderr
    assert "name another run.dir" in stderr and str(files / run / "checkpoints") in stderr
    assert contents(files) == before, "config.yaml is that of the run"


def test_a_run_of_one_stage_does_not_go_on_as_another(files: Path) -> None:
    given = given_settings(files, "full") | {"dpo": {"reference": "none"}}
    given["data"] = given["data"] | {"train": [str(files / "pairs.jsonl")]}
    code, _, stderr = command("dpo", given)
    checkpoint = files / "full" / "checkpoints" / "step-00000001"
    assert code == 2 and f"{checkpoint}: of sft, and cannot go on as dpo; name another run.dir" in stderr
    assert f"model.path={checkpoint}" in stderr


def test_an_evaluation_may_have_another_start_and_another_template(files: Path) -> None:
    given = changed(files, "full", {"model": {"path": "other"}, "data": {"template": "llama3"}})
    given["data"]["valid"] = given["data"]["train"]
    assert command("eval", given | {"sft": {}}).code == 0


def test_what_may_change_while_a_run_goes_on(files: Path, tmp_path: Path) -> None:
    """Steps, learning rate, batch, data, and where the base lies; another precision is said."""
    for run in LORA:
        shutil.copytree(files / run, tmp_path / run)
        given = changed(files, run, {"model": {"path": "moved"}, "precision": {"compute": "bf16"}} | LATER)
        given["run"] = {"dir": str(tmp_path / run)}
        code, _, stderr = command("sft", given)
        assert code == 0 and "precision.compute: bf16, where" in stderr and "was trained with fp32" in stderr
        assert (tmp_path / run / "checkpoints" / "step-00000002").is_dir()


LATER: dict[str, dict[str, Any]] = {
    "optim": {"lr": 1e-3, "weight_decay": 0.0},
    "batch": {"global": 2, "micro": 1},
    "run": {"seed": 6},
    "data": {"sequence_length": 64},
    "zero": {"stage": 1},
}


STAGE_SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {},
    "reward": {},
    "dpo": {},
    "ppo": {"ppo": {"rewards": [{"model": "reward"}]}, "generate": {"max_new_tokens": 8}},
}


@pytest.mark.parametrize("lora", LORA)
@pytest.mark.parametrize("stage", STAGE_SETTINGS)
def test_the_settings_that_a_run_wrote_down_are_its_settings_again(
    stage: str, lora: str, files: Path
) -> None:
    """Whatever opening them has added: sizes, steps, a padding token."""
    data = {"sft": "chats", "ppo": "prompts"}.get(stage, "pairs")
    given = given_settings(
        files, "new", lora=LORA[lora], train={"steps": 0, "epochs": 2}, **STAGE_SETTINGS[stage]
    )
    given["data"] = given["data"] | {"train": [str(files / f"{data}.jsonl")]}
    if stage == "ppo":
        given["ppo"] = {"rewards": [{"model": str(files / "reward")}]}
    config = open_task(make_config(given, 1, STAGES[stage])).config
    assert_again(files, stage, config_to_yaml(config))


@pytest.mark.parametrize(
    "model", [SHAPE, {"preset": "llama-tiny", "vocab_size": 291}, {"path": "base"}], ids=str
)
def test_the_same_of_pretraining(model: dict[str, Any], files: Path) -> None:
    model = model | ({"path": str(files / "base")} if "path" in model else {})
    given = given_settings(files, "new") | {"model": model}
    given["data"] = {
        "train": [str(files / "corpus")],
        "sequence_length": 32,
        "tokenizer": str(files / "base"),
    }
    assert_again(files, "pretrain", config_to_yaml(open_task(make_config(given)).config))


def assert_again(files: Path, stage: str, resolved: str) -> None:
    path = files / "resolved.yaml"
    path.write_text(resolved)
    again = load_config(path, [], 1, STAGES[stage])
    assert config_to_yaml(again) == resolved
    assert config_to_yaml(open_task(again).config) == resolved
