"""What the user got wrong after pretraining ends with exit code 2 and a line for each thing; nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tokenizers

from llm3d.errors import InputError
from tests import pool
from tests.stages.common import Settings, command, snapshot
from tests.stages.post_training import (
    Row,
    comparisons,
    conversations,
    rankings,
    settings,
    train_on_rank,
    write_model,
    write_rows,
)

Spoil = Callable[[Path, Settings], None]  # spoils a directory and the settings of a run in it
ALL = ("sft", "reward", "dpo")
COMPARING = ("reward", "dpo")


class Wrong(NamedTuple):
    name: str
    stages: tuple[str, ...]
    spoil: Spoil
    named: tuple[str, ...]  # in the message: the setting or file, and what tells this fault from others
    overrides: tuple[str, ...] = ()
    lines: int = 1


def nothing(directory: Path, given: Settings) -> None:
    pass


def rows(found: Sequence[Row]) -> Spoil:
    """These are the file's rows."""

    def spoil(directory: Path, given: Settings) -> None:
        write_rows(directory / "train.jsonl", found)

    return spoil


def text(content: str) -> Spoil:
    def spoil(directory: Path, given: Settings) -> None:
        (directory / "train.jsonl").write_text(content)

    return spoil


def of_the_stage(stage: str) -> list[Row]:
    return conversations(5) if stage == "sft" else comparisons(5)


def turns(*said: tuple[str, str]) -> Row:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def template(source: str) -> Spoil:
    def spoil(directory: Path, given: Settings) -> None:
        (directory / "own.jinja").write_text(source)
        given["data"]["template"] = str(directory / "own.jinja")

    return spoil


def no_template(directory: Path, given: Settings) -> None:
    (directory / "model" / "chat_template.jinja").unlink()


def no_end_token(directory: Path, given: Settings) -> None:
    """The tokenizer knows its end by none of the names that are in use, and no file says what it is."""
    no_template(directory, given)
    model = directory / "model"
    content = json.loads((model / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["content"] = token["content"].replace("end_of_text", "over")
    content["model"]["vocab"] = {
        name.replace("end_of_text", "over"): number for name, number in content["model"]["vocab"].items()
    }
    (model / "tokenizer.json").write_text(json.dumps(content))
    tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text("{}")
    (model / "generation_config.json").unlink(missing_ok=True)
    edit(model / "config.json", eos_token_id=None)


def no_tokenizer(directory: Path, given: Settings) -> None:
    (directory / "model" / "tokenizer.json").unlink()


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def no_file(directory: Path, given: Settings) -> None:
    (directory / "train.jsonl").unlink()


def no_model(directory: Path, given: Settings) -> None:
    from tests.stages.post_training import SHAPE

    given["model"] = {name: value for name, value in SHAPE.items() if name != "initializer_range"}
    given["data"]["tokenizer"] = str(directory / "model")


def no_such_model(directory: Path, given: Settings) -> None:
    given["model"] = {"path": str(directory / "nowhere")}


def finished(stage: str, directory: Path, given: Settings, run: str, **changes: Any) -> Path:
    """The checkpoint of another run."""
    train = write_rows(directory / f"{run}.jsonl", of_the_stage(stage))
    data = {**given["data"], "train": [train]}
    other = {**given, "data": data, "run": {"dir": str(directory / run)}, "train": {"steps": 1}, **changes}
    assert command(stage, other).code == 0
    return directory / run / "checkpoints" / "step-00000001"


def reward_model(directory: Path, given: Settings) -> None:
    given["model"] = {"path": str(finished("reward", directory, given, "scores"))}


def adapters_as_model(directory: Path, given: Settings) -> None:
    given["model"] = {"path": str(finished("sft", directory, given, "adapted", lora={"rank": 2}))}


def model_as_adapters(directory: Path, given: Settings) -> None:
    given["lora"] = {"path": str(finished("sft", directory, given, "tuned"))}


def adapters_of_another_model(directory: Path, given: Settings) -> None:
    given["lora"] = {"path": str(finished("sft", directory, given, "adapted", lora={"rank": 2}))}
    given["model"] = {"path": str(write_model(directory / "other", num_hidden_layers=2))}


def adapters_of_another_shape(directory: Path, given: Settings) -> None:
    given["lora"] = {"path": str(finished("sft", directory, given, "adapted", lora={"rank": 2}))}
    given["model"] = {"path": str(write_model(directory / "other", hidden_size=32))}


def other_adapters(directory: Path, given: Settings) -> None:
    checkpoint = finished("sft", directory, given, "adapted", lora={"rank": 2, "targets": ["q_proj"]})
    given["lora"] = {"path": str(checkpoint), "targets": ["v_proj"]}


def no_adapters(directory: Path, given: Settings) -> None:
    given["lora"] = {"path": str(directory / "nowhere")}


def trained_without_adapters(stage: str) -> Spoil:
    def spoil(directory: Path, given: Settings) -> None:
        finished(stage, directory, given, "run")
        given["lora"] = {"rank": 2}

    return spoil


def trained_with_other_adapters(directory: Path, given: Settings) -> None:
    finished("sft", directory, given, "run", lora={"rank": 2})
    given["lora"] = {"rank": 3}


def another_stages_checkpoint(directory: Path, given: Settings) -> None:
    finished("reward", directory, given, "run")


def long_lists(directory: Path, given: Settings) -> None:
    write_rows(directory / "train.jsonl", rankings(5, replies=8))
    given["data"]["sequence_length"] = 48


def file_in_the_way(directory: Path, given: Settings) -> None:
    (directory / "run").write_text("in the way")


LONG = "What? " * 40
LONG_ROWS = {
    "sft": {"question": LONG, "answer": "two"},
    "dpo": {"prompt": LONG, "chosen": "two", "rejected": "six"},
}
TOO_LONG = "too long"
LONG_REPLY = [{"prompt": "What?", "chosen": "so " * 60, "rejected": "six"}]
NO_MARKER = (
    "{% for m in messages %}{{ 'answer: ' if m.role == 'assistant' }}{{ m.content + eos_token }}{% endfor %}"
)
TRIMMING = (
    "{% for m in messages %}<|im_start|>{{ m.role + ': ' + m.content | trim }}<|im_end|>{% endfor %}"
    "{{ '<|im_start|>assistant: ' if add_generation_prompt }}"
)
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}"
)
USER, ASSISTANT = ("user", "What?"), ("assistant", "two")

TABLE = [
    # what the file holds
    Wrong("empty file", ALL, text(""), ("train.jsonl", "no sample")),
    Wrong("no file", ALL, no_file, ("train.jsonl", "no such file")),
    Wrong("not JSON", ALL, text("so what\n"), ("line 1", "JSON", "data.skip_bad"), lines=2),
    Wrong("not objects", ALL, text("1\n"), ("line 1", "object", "data.skip_bad"), lines=2),
    Wrong("a list", ("sft",), text("[1]\n"), ("train.jsonl", ".json")),
    Wrong("over lines", ("sft",), text("{\n"), ("train.jsonl", "several lines")),
    Wrong(
        "mixed formats",
        ("sft",),
        rows([*conversations(2), {"question": "What?", "answer": "two"}]),
        ("line 3", "messages", "data.skip_bad"),
        lines=2,
    ),
    Wrong(
        "empty reply",
        ("sft",),
        rows([turns(USER, ("assistant", ""))]),
        ("line 1", "empty", "data.skip_bad"),
        lines=2,
    ),
    Wrong("no reply", ("sft",), rows([turns(USER)]), ("line 1", "no reply", "data.skip_bad"), lines=2),
    Wrong(
        "labels of KTO",
        ("sft",),
        rows([{"prompt": "What?", "completion": "two", "label": True}]),
        ("line 1", "llm3d kto"),
    ),
    Wrong(
        "the same in the template",
        ("dpo",),
        lambda directory, given: (
            template(TRIMMING)(directory, given),
            rows([{"prompt": "What?", "chosen": "two", "rejected": " two\n"}])(directory, given),
        ),
        ("line 1", "template", "data.skip_bad"),
        lines=2,
    ),
    Wrong(
        "no choice",
        COMPARING,
        rows([{"prompt": "What?", "chosen": "two", "rejected": "two"}]),
        ("line 1", "same", "data.skip_bad"),
        lines=2,
    ),
    Wrong(
        "empty choice",
        COMPARING,
        rows([{"prompt": "What?", "chosen": "", "rejected": "two"}]),
        ("line 1", "empty", "data.skip_bad"),
        lines=2,
    ),
    Wrong(
        "comparisons to fine-tune on",
        ("sft",),
        rows(comparisons(3)),
        ("line 1", "preference"),
    ),
    Wrong(
        "nothing to compare",
        COMPARING,
        rows(conversations(3)),
        ("line 1", "comparison"),
    ),
    Wrong(
        "unknown columns",
        ALL,
        rows([{"a": 1, "b": 2}]),
        ("line 1", "a, b"),
    ),
    Wrong(
        "unknown format",
        ALL,
        nothing,
        ("no format", "messages_of"),
        overrides=("data.format=messages_of",),
    ),
    Wrong(
        "a share of all",
        ALL,
        nothing,
        ("data.valid", "1.0"),
        overrides=("data.valid=1.0",),
    ),
    Wrong(
        "a share of one",
        ("sft",),
        rows(conversations(1)),
        ("data.valid", "0.5"),
        overrides=("data.valid=0.5",),
    ),
    Wrong("long lists", COMPARING, long_lists, ("batch.micro", "least")),
    # templates and tokenizers
    Wrong(
        "unknown template",
        ALL,
        nothing,
        ("template", "chatml"),
        overrides=("data.template=chatlm",),
    ),
    Wrong(
        "no marker",
        ALL,
        template(NO_MARKER),
        ("own.jinja", "add_generation_prompt"),
    ),
    Wrong(
        "no end token in the template",
        ALL,
        template(NO_END),
        ("own.jinja", "end token"),
    ),
    Wrong("not Jinja", ALL, template("{% for %}"), ("own.jinja", "Jinja")),
    Wrong(
        "missing marks",
        ALL,
        template("<|channel|>{{ messages[0].content }}"),
        ("own.jinja", "template"),
    ),
    Wrong("no end token", ALL, no_end_token, ("alpaca", "end token")),
    Wrong("no tokenizer", ALL, no_tokenizer, ("tokenizer.json", "tokenizer.model")),
    # too long
    *(
        Wrong(
            f"long prompt, {policy}",
            (stage,),
            rows([row]),
            (TOO_LONG, advice),
            (f"data.truncation={policy}",),
        )
        for stage, row in LONG_ROWS.items()
        for policy, advice in (
            ("drop", "data.truncation"),
            ("right", "data.sequence_length"),
        )
    ),
    Wrong(
        "long reply, left",
        COMPARING,
        rows(LONG_REPLY),
        (TOO_LONG, "data.sequence_length"),
        ("data.truncation=left",),
    ),
    # models and adapters
    Wrong("no model", ALL, no_model, ("model.path", "missing")),
    Wrong("no such model", ALL, no_such_model, ("model.path", "nowhere")),
    Wrong("a reward model", ("sft", "dpo"), reward_model, ("model.path", "reward model")),
    Wrong("adapters as model", ALL, adapters_as_model, ("llm3d export",)),
    Wrong("a model as adapters", ALL, model_as_adapters, ("lora.path", "no such file")),
    Wrong("no adapters", ALL, no_adapters, ("lora.path", "nowhere")),
    Wrong(
        "adapters of another model",
        ALL,
        adapters_of_another_model,
        ("lora.path", "model.path"),
    ),
    Wrong("adapters of another shape", ALL, adapters_of_another_shape, ("[2, 24]", "[2, 32]")),
    Wrong("other adapters", ("sft",), other_adapters, ("lora.targets", "lora.path")),
    Wrong("adapters of no rank", ALL, nothing, ("lora", "lora.rank"), overrides=("lora.alpha=3",)),
    Wrong(
        "adapters late",
        ("sft",),
        trained_without_adapters("sft"),
        ("lora.rank", "step-00000001"),
    ),
    Wrong(
        "adapters late, compared",
        ("dpo",),
        trained_without_adapters("dpo"),
        ("lora.rank", "step-00000001"),
    ),
    Wrong(
        "another rank",
        ("sft",),
        trained_with_other_adapters,
        ("lora.rank", "step-00000001"),
    ),
    Wrong(
        "another stage's run",
        ("sft", "dpo"),
        another_stages_checkpoint,
        ("step-00000001", "reward"),
    ),
    # settings
    Wrong(
        "one reply at a time",
        COMPARING,
        nothing,
        ("batch.micro", "two"),
        overrides=("batch.micro=1",),
    ),
    Wrong(
        "no length of the run",
        ALL,
        nothing,
        ("train.steps", "train.epochs"),
        overrides=("train.steps=0",),
    ),
    Wrong("unknown loss", ("dpo",), nothing, ("dpo.loss", "sigmoidal"), overrides=("dpo.loss=sigmoidal",)),
    Wrong(
        "smooth hinge",
        ("dpo",),
        nothing,
        ("dpo.label_smoothing",),
        overrides=("dpo.loss=hinge", "dpo.label_smoothing=0.1"),
    ),
    Wrong("file in the way", ALL, file_in_the_way, ("run.dir",)),
]
CASES = [pytest.param(wrong, stage, id=f"{stage}-{wrong.name}") for wrong in TABLE for stage in wrong.stages]


@pytest.fixture
def run_settings(tmp_path: Path) -> Settings:
    model = write_model(tmp_path / "model")
    return settings(model, str(tmp_path / "train.jsonl"), tmp_path / "run")


@pytest.mark.parametrize(("wrong", "stage"), CASES)
def test_wrong_input_ends_with_a_line_and_changes_nothing(
    wrong: Wrong, stage: str, tmp_path: Path, run_settings: Settings
) -> None:
    write_rows(tmp_path / "train.jsonl", of_the_stage(stage))
    wrong.spoil(tmp_path, run_settings)
    before = snapshot(tmp_path)
    ended = command(stage, run_settings, *wrong.overrides)
    assert (ended.code, ended.stdout) == (2, ""), ended.stderr
    assert [line.startswith("llm3d: ") for line in ended.stderr.splitlines()] == [True] * wrong.lines, (
        ended.stderr
    )
    for word in wrong.named:
        assert word in ended.stderr
    after = snapshot(tmp_path)
    assert sorted(after) == sorted(before), "nothing is left behind"
    assert after == before, "what was there is as it was"


def refusal_on_rank(stage: str, given: Settings) -> str:
    with pytest.raises(InputError) as refused:
        train_on_rank(stage, given)
    return str(refused.value)


@pytest.mark.parametrize(
    "spoil", [adapters_of_another_shape, reward_model, no_end_token, another_stages_checkpoint]
)
def test_every_rank_ends_with_the_same_line(spoil: Spoil, tmp_path: Path, run_settings: Settings) -> None:
    """None waits for one that has ended."""
    write_rows(tmp_path / "train.jsonl", comparisons(5))
    spoil(tmp_path, run_settings)
    before = snapshot(tmp_path)
    refusals = pool.run(refusal_on_rank, 4, "dpo", {**run_settings, "parallel": {"tensor": 2}})
    assert len(set(refusals)) == 1 and "\n" not in refusals[0]
    assert snapshot(tmp_path) == before
