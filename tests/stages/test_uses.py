"""A command that uses a model takes whatever names it: settings, a run directory, a checkpoint, a model alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from typer.testing import CliRunner

from llm3d.cli import app
from llm3d.config import PretrainConfig
from llm3d.config.uses import config_for_evaluation, config_for_generation, config_for_plan
from llm3d.errors import InputError
from llm3d.text.templates import BUILT_IN
from tests import pool
from tests.commands.generating import by_transformers, user
from tests.stages.common import Ended
from tests.stages.post_training import conversations, settings, train_on_rank, write_model, write_rows

QUESTION = "What comes after one?"


def llm3d(*words: object) -> Ended:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


class Runs(NamedTuple):
    """A run under pipeline 2, moved since, whose base is gone; one of adapters; the base; and settings of the first."""

    whole: Path
    adapters: Path
    base: Path
    settings: Path

    def checkpoint(self, of: Path) -> Path:
        return of / "checkpoints" / "step-00000002"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = tmp_path_factory.mktemp("uses")
    base = write_model(made / "base", initializer_range=0.4)
    train, valid = (
        write_rows(made / f"{name}.jsonl", conversations(n)) for name, n in (("train", 8), ("valid", 5))
    )
    short = {"sft": {"sample_tokens": 0}, "train": {"steps": 2}, "generate": {"max_new_tokens": 12}}
    short["data"] = {"valid": [valid], "template": "chatml"}
    given = settings(base, train, made / "before" / "run", **short, parallel={"pipeline": 2})
    pool.run(train_on_rank, 2, "sft", given)
    adapters = settings(base, train, made / "adapters", **short, lora={"rank": 2})
    pool.run(train_on_rank, 1, "sft", adapters)
    (made / "before" / "run").rename(made / "run")
    given["model"]["path"] = str(made / "gone")
    stored = yaml.safe_load((made / "run" / "config.yaml").read_text())
    stored["model"]["path"] = str(made / "gone")
    (made / "run" / "config.yaml").write_text(yaml.safe_dump(stored))
    (made / "sft.yaml").write_text(yaml.safe_dump(given))
    return Runs(made / "run", made / "adapters", base, made / "sft.yaml")


GREEDY = ("--prompt", QUESTION, "generate.temperature=0", "generate.max_new_tokens=12")


def test_whatever_names_a_model_writes_the_same(runs: Runs, tmp_path: Path) -> None:
    checkpoint = runs.checkpoint(runs.whole)
    expected, _ = by_transformers(checkpoint / "model", user(QUESTION))
    alone, linked = tmp_path / "alone", tmp_path / "link"
    shutil.copytree(checkpoint / "model", alone)
    linked.symlink_to(checkpoint)
    for words in (
        (runs.whole,),
        (runs.whole / "checkpoints",),
        (checkpoint,),
        (checkpoint / "model",),
        (linked,),
        (alone,),
        (runs.settings, f"run.dir={runs.whole}"),
        (runs.settings, f"checkpoint.resume={checkpoint}"),
        (runs.settings, f"model.path={checkpoint}"),
    ):
        ended = llm3d("generate", *words, *GREEDY)
        assert (ended.code, ended.stdout) == (0, f"{expected}\n"), words


def test_adapters_bring_their_base(runs: Runs, tmp_path: Path) -> None:
    checkpoint = runs.checkpoint(runs.adapters)
    assert llm3d("export", runs.adapters, "--output", tmp_path / "merged").code == 0
    expected, _ = by_transformers(tmp_path / "merged", user(QUESTION))
    alone = tmp_path / "alone"
    shutil.copytree(checkpoint / "adapter", alone)
    for words in (
        (runs.adapters,),
        (checkpoint / "adapter",),
        (alone,),
        (runs.settings, f"run.dir={runs.adapters}"),
    ):
        ended = llm3d("generate", *words, *GREEDY)
        assert (ended.code, ended.stdout) == (0, f"{expected}\n"), words


def test_the_layout_is_that_of_the_launch(runs: Runs) -> None:
    config, remarks = config_for_generation(runs.whole, [], 1)
    assert (config.parallel.pipeline, config.parallel.tensor) == (1, 1)
    assert remarks == ["tensor 1 x pipeline 1: tensor 1 x pipeline 2 needs 2 processes, here is 1"]
    assert config_for_generation(runs.whole, [], 4)[0].parallel.pipeline == 2
    assert config_for_evaluation(runs.whole, ["parallel.tensor=2"], 2)[0].parallel.pipeline == 1
    with pytest.raises(InputError, match="world size 1 is not a multiple of tensor 1 x pipeline 2 = 2"):
        config_for_evaluation(runs.whole, ["parallel.pipeline=2"], 1)


def test_a_run_is_evaluated_by_its_own_settings(runs: Runs) -> None:
    ways = [
        llm3d("eval", *words)
        for words in ((runs.whole,), (runs.checkpoint(runs.whole),), (runs.settings, f"run.dir={runs.whole}"))
    ]
    assert all(way.code == 0 and way.stdout == ways[0].stdout for way in ways)
    assert ways[0].stdout.startswith(f"{runs.checkpoint(runs.whole)}: loss ")
    assert llm3d("eval", runs.adapters).code == 0


def refused(runs: Runs) -> dict[str, tuple[tuple[object, ...], str]]:
    """What the command line says, and what the weights have otherwise."""
    whole, adapters = runs.checkpoint(runs.whole), runs.checkpoint(runs.adapters)
    return {
        "alpha": ((adapters, "lora.alpha=7"), "lora.alpha: 7 is not what lora.path has, 4"),
        "alpha of a run": ((runs.adapters, "lora.alpha=7"), "lora.alpha: 7 is not what lora.path has, 4"),
        "no adapters": ((runs.adapters, "lora=null"), f"{adapters} holds adapters and no whole model"),
        "no path": ((runs.adapters, "lora.path=null"), f"lora.path: null is not what is used, {adapters}"),
        "other adapters": ((adapters, f"lora.path={runs.base}"), "is not what is used"),
        "adapters": ((runs.whole, "lora.rank=2"), "holds a whole model and no adapters"),
        "a shape": ((runs.whole, "model.rope_theta=5"), "model.rope_theta: 5 is not what"),
        "a shape of settings": ((runs.settings, f"run.dir={runs.whole}", "model.rope_theta=5"), "rope_theta"),
        "a preset": ((runs.whole, "model.preset=llama-7b"), "is not what"),
        "another model": ((runs.whole, f"model.path={runs.base}"), f"is not what is used, {whole}"),
        "no base": ((adapters, "model.path=nowhere"), "nowhere"),
        "tokenizer": ((runs.whole, "data.tokenizer=nowhere"), "nowhere"),
        "template": ((runs.whole, "data.template=nowhere"), "nowhere"),
    }


@pytest.mark.parametrize("name", refused(Runs(*[Path()] * 4)))
def test_the_command_line_is_not_left_aside_for_what_the_weights_have(name: str, runs: Runs) -> None:
    words, said = refused(runs)[name]
    for ended in (llm3d("generate", *words, "--prompt", "x"), llm3d("eval", *words)):
        assert (ended.code, ended.stdout) == (2, "") and said in ended.stderr


def test_settings_of_a_model_of_other_sizes_do_not_use_this_one(runs: Runs, tmp_path: Path) -> None:
    """Who has changed the sizes and has not trained yet is not told the numbers of the model before."""
    given = yaml.safe_load(runs.settings.read_text())
    given["run"]["dir"] = str(runs.whole)
    sizes = yaml.safe_load((runs.whole / "config.yaml").read_text())["model"]
    for changes in ({"hidden_size": 32}, {"rope_theta": 5.0}, {}):
        given["model"] = {name: sizes[name] for name in sizes if name != "path"} | changes
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(given))
        ended = llm3d("eval", tmp_path / "other.yaml")
        if changes:
            said = "model.{}: {} is not what".format(*next(iter(changes.items())))
            assert (ended.code, ended.stdout) == (2, "") and said in ended.stderr
            assert str(runs.checkpoint(runs.whole)) in ended.stderr
            assert llm3d("generate", tmp_path / "other.yaml", *GREEDY).code == 2
        else:
            assert ended.code == 0, ended.stderr


def test_the_command_line_may_say_what_the_weights_have(runs: Runs) -> None:
    whole, adapters = runs.checkpoint(runs.whole), runs.checkpoint(runs.adapters)
    start = yaml.safe_load((runs.whole / "config.yaml").read_text())["model"]["path"]
    for words in (
        [f"model.path={whole}"],
        [f"model.path={whole}/model"],
        [f"model.path={start}"],
        ["lora.rank=0"],
    ):
        assert config_for_evaluation(runs.whole, words, 1)[0].model.path == str(whole)
    for words in (["lora.alpha=4", "lora.rank=2"], [f"lora.path={adapters}"], [f"model.path={runs.base}"]):
        lora = config_for_evaluation(runs.adapters, words, 1)[0].lora
        assert (lora.path, lora.alpha) == (str(adapters), 4)
    assert config_for_generation(runs.whole, ["model.eos_token_id=7"], 1)[0].model.eos_token_id == 7
    assert config_for_generation(runs.base, [f"checkpoint.resume={whole}"], 1)[0].model.path == str(whole)


@pytest.mark.parametrize(
    "override",
    [
        "parallel.sequence=true",
        "parallel.schedule=gpipe",
        "parallel.chunks=2",
        "zero.stage=1",
        "recompute=full",
    ],
)
def test_a_layout_in_which_no_text_is_written_is_refused(override: str, runs: Runs) -> None:
    with pytest.raises(InputError, match=f"{override.partition('=')[0]}: .* is for training"):
        config_for_generation(runs.whole, [override], 1)


def test_what_is_only_for_training_is_not_asked_of_who_writes(runs: Runs, tmp_path: Path) -> None:
    given = yaml.safe_load(runs.settings.read_text())
    given["data"]["sequence_length"] = 4096
    given["optim"]["warmup_steps"] = 1000
    given["zero"] = {"stage": 3}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(given))
    assert config_for_generation(path, [f"run.dir={runs.whole}"], 3)[0].data.sequence_length == 4096
    ppo = {name: given[name] for name in given if name != "sft"} | {
        "ppo": {"rewards": [{"function": "x.py:f"}]}
    }
    path.write_text(yaml.safe_dump(ppo))
    config_for_generation(path, [f"run.dir={runs.whole}", "generate.temperature=0"], 1)
    with pytest.raises(InputError, match=r"generate\.temprature: unknown setting"):
        config_for_generation(path, [f"run.dir={runs.whole}", "generate.temprature=0"], 1)


def test_a_model_alone_brings_how_it_is_to_be_used(runs: Runs, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(runs.base, model)
    (model / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 2, "do_sample": True, "temperature": 0.6, "top_k": 3, "top_p": None})
    )
    config = json.loads((model / "config.json").read_text()) | {"dtype": "bfloat16"}
    (model / "config.json").write_text(json.dumps(config))
    found, remarks = config_for_generation(model, ["generate.top_k=5"], 1)
    assert (found.generate.temperature, found.generate.top_k, found.generate.top_p) == (0.6, 5, 1.0)
    assert remarks == ["as generation_config.json says: temperature 0.6, top_k 3"]
    assert found.precision.compute == "bf16"
    assert config_for_generation(model, ["precision.compute=fp32"], 1)[0].precision.compute == "fp32"
    (model / "chat_template.jinja").unlink()
    assert isinstance(config_for_generation(model, [], 1)[0], PretrainConfig), (
        "there is no template to put it in"
    )


def wrong(runs: Runs, empty: Path) -> dict[str, tuple[tuple[object, ...], str]]:
    return {
        "an empty directory": (("generate", empty, *GREEDY), "no run directory"),
        "no checkpoint yet": (("generate", empty / "run", *GREEDY), "complete checkpoint"),
        "nothing": (("generate", empty / "nothing", *GREEDY), "no such file or directory"),
        "a model says nothing of data": (("eval", runs.base), "give the CONFIG.yaml of a stage"),
        "a base that is gone": (
            ("generate", empty / "adapter", *GREEDY),
            "model.path: 'gone', which the adapters",
        ),
        "exported already": (
            ("export", runs.base, "--output", empty / "o"),
            "Hugging Face directory already",
        ),
        "nothing to export": (("export", empty / "run", "--output", empty / "o"), "no complete checkpoint"),
        "no samples": (("data", "show", runs.base), "has no config.yaml"),
    }


@pytest.mark.parametrize("name", wrong(Runs(*[Path()] * 4), Path()))
def test_what_cannot_be_used_is_said_in_one_line(name: str, runs: Runs, tmp_path: Path) -> None:
    for directory in ("run", "adapter"):
        (tmp_path / directory).mkdir()
    shutil.copy(runs.whole / "config.yaml", tmp_path / "run")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "gone"}')
    words, said = wrong(runs, tmp_path)[name]
    ended = llm3d(*words)
    assert (ended.code, ended.stdout) == (2, "")
    assert said in ended.stderr and ended.stderr.count("\n") == 1


def test_runs_are_shown_and_planned_by_their_own_settings(runs: Runs) -> None:
    """The base that they started from is gone; its shape is in their settings."""
    assert f"dir: {runs.adapters}\n" in llm3d("config", runs.adapters).stdout
    assert "8 samples" in llm3d("data", "show", runs.adapters, "--samples", 0).stdout
    for place in (runs.whole, runs.checkpoint(runs.whole)):
        planned = config_for_plan(place, [], 2)[0]
        assert planned.parallel.pipeline == 2 and planned.model.path is None
    assert config_for_plan(runs.base, [], 4, "dpo")[0].model.hidden_size == planned.model.hidden_size


def test_an_evaluation_says_what_the_template_writes_as_text(runs: Runs, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(runs.base, model)
    (model / "chat_template.jinja").write_text("{{ '<|note|>' }}" + BUILT_IN["chatml"])
    ended = llm3d("eval", runs.settings, f"run.dir={tmp_path}", f"model.path={model}", "data.template=auto")
    assert ended.code == 0 and "<|note|> is text, no special token" in ended.stderr
