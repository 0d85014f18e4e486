"""What the user got wrong ends with exit code 2 and one line that says what and what to do; nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from llm3d.corpus.tokenizer_training import train_tokenizer
from llm3d.errors import InputError
from tests import pool
from tests.stages.common import (
    Settings,
    command,
    pretrain_on_rank,
    settings,
    silent,
    snapshot,
    write_corpus,
    write_empty_corpus,
)

Spoil = Callable[[Path, Settings], None]  # spoils a directory and the settings of a run in it


class Wrong(NamedTuple):
    name: str
    spoil: Spoil
    named: str  # in the message: the setting or the file
    keyword: str  # that tells this fault from others
    commands: tuple[str, ...] = ("pretrain",)
    overrides: tuple[str, ...] = ()


def empty_corpus(directory: Path, given: Settings) -> None:
    write_empty_corpus(directory / "train")


def shorter_than_a_batch(directory: Path, given: Settings) -> None:
    write_corpus(directory / "train", 3 * 16 + 1)


def shorter_than_a_sequence(directory: Path, given: Settings) -> None:
    write_corpus(directory / "train", 16)


def large_tokenizer(directory: Path, given: Settings) -> None:
    text = directory / "text.txt"
    text.write_text("a wall of bottles of beer\n" * 20)
    with silent():
        train_tokenizer([text], directory / "tokenizer", "byte-level", 270)
    given["data"]["tokenizer"] = str(directory / "tokenizer")


def no_tokenizer(directory: Path, given: Settings) -> None:
    given["data"]["tokenizer"] = str(directory / "tokenizer")


def no_vocabulary(directory: Path, given: Settings) -> None:
    given["model"] = {name: value for name, value in given["model"].items() if name != "vocab_size"}


def tokens_outside_the_vocabulary(directory: Path, given: Settings) -> None:
    write_corpus(directory / "train", 1000, vocab_size=70)


def no_tokens(directory: Path, given: Settings) -> None:
    (directory / "train.bin").unlink()


def no_index(directory: Path, given: Settings) -> None:
    (directory / "train.idx").unlink()


def truncated_tokens(directory: Path, given: Settings) -> None:
    path = directory / "train.bin"
    path.write_bytes(path.read_bytes()[:-7])


def truncated_index(directory: Path, given: Settings) -> None:
    path = directory / "train.idx"
    path.write_bytes(path.read_bytes()[:-7])


def not_an_index(directory: Path, given: Settings) -> None:
    (directory / "train.idx").write_text("something else altogether")


def long_sequences(directory: Path, given: Settings) -> None:
    given["data"]["sequence_length"] = 33


def no_valid_files(directory: Path, given: Settings) -> None:
    (directory / "valid.bin").unlink()


def short_valid(directory: Path, given: Settings) -> None:
    write_corpus(directory / "valid", 5)


def after_training(spoil: Spoil) -> Spoil:
    """Checkpoints are there, and then something goes wrong."""

    def both(directory: Path, given: Settings) -> None:
        trained(directory, given)
        spoil(directory, given)

    return both


def no_valid(directory: Path, given: Settings) -> None:
    trained(directory, given)
    del given["data"]["valid"]


def trained(directory: Path, given: Settings) -> None:
    """Two checkpoints are there, of steps 1 and 2."""
    more = {**given, "train": {"steps": 2}, "checkpoint": {"every": 1}}
    assert command("pretrain", more).code == 0


def trained_wider(directory: Path, given: Settings) -> None:
    trained(directory, {**given, "model": {**given["model"], "intermediate_size": 36}})


def trained_deeper(directory: Path, given: Settings) -> None:
    trained(directory, {**given, "model": {**given["model"], "num_hidden_layers": 6}})


def later_checkpoints(directory: Path, given: Settings) -> None:
    trained(directory, given)
    given["checkpoint"] = {"resume": str(directory / "run" / "checkpoints" / "step-00000001")}


def later_checkpoints_but_none_wanted(directory: Path, given: Settings) -> None:
    trained(directory, given)
    given["checkpoint"] = {"resume": "none"}


def damaged(directory: Path, given: Settings) -> None:
    trained(directory, given)
    path = directory / "run" / "checkpoints" / "step-00000002" / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def resume_from_nowhere(directory: Path, given: Settings) -> None:
    given["checkpoint"] = {"resume": str(directory / "nowhere")}


def resume_from_a_folder(directory: Path, given: Settings) -> None:
    (directory / "folder").mkdir()
    given["checkpoint"] = {"resume": str(directory / "folder")}


def model_from_nowhere(directory: Path, given: Settings) -> None:
    given["model"] = {"path": str(directory / "nowhere")}


def model_without_weights(directory: Path, given: Settings) -> None:
    trained(directory, {**given, "run": {"dir": str(directory / "other")}})
    model = directory / "other" / "checkpoints" / "step-00000002" / "model"
    (model / "model.safetensors").unlink()
    given["model"] = {"path": str(model)}


def file_in_the_way(directory: Path, given: Settings) -> None:
    (directory / "run").write_text("in the way")


def nothing(directory: Path, given: Settings) -> None:
    pass


BOTH = ("pretrain", "eval")
TABLE = [
    Wrong("empty corpus", empty_corpus, "train.idx", "empty"),
    Wrong("less than a batch", shorter_than_a_batch, "data.train", "batch.global"),
    Wrong(
        "less than a sequence",
        shorter_than_a_sequence,
        "train.bin",
        "data.sequence_length",
    ),
    Wrong(
        "large tokenizer",
        after_training(large_tokenizer),
        "data.tokenizer",
        "model.vocab_size",
        BOTH,
    ),
    Wrong("no tokenizer", no_tokenizer, "data.tokenizer", "no file", BOTH),
    Wrong("no vocabulary", no_vocabulary, "model.vocab_size", "missing", BOTH),
    Wrong(
        "foreign tokens",
        tokens_outside_the_vocabulary,
        "train.bin",
        "vocabulary",
    ),
    Wrong("no tokens", no_tokens, "train.bin", "no such file"),
    Wrong("no index", no_index, "train.idx", "no such file"),
    Wrong("truncated tokens", truncated_tokens, "train.bin", "1993"),
    Wrong("truncated index", truncated_index, "train.idx", "truncated"),
    Wrong("not an index", not_an_index, "train.idx", "Megatron"),
    Wrong(
        "long sequences",
        long_sequences,
        "data.sequence_length",
        "model.max_position_embeddings",
        BOTH,
    ),
    Wrong(
        "another width",
        trained_wider,
        "model.intermediate_size",
        "36",
    ),
    Wrong(
        "another depth",
        trained_deeper,
        "model.num_hidden_layers",
        "6",
    ),
    Wrong(
        "later checkpoints",
        later_checkpoints,
        "run.dir",
        "step-00000002",
    ),
    Wrong("none wanted", later_checkpoints_but_none_wanted, "run.dir", "later"),
    Wrong("damaged", damaged, "model.safetensors", "step-00000002", BOTH),
    Wrong("resume from nowhere", resume_from_nowhere, "checkpoint.resume", "nowhere", BOTH),
    Wrong("resume from a folder", resume_from_a_folder, "folder", "complete"),
    Wrong("model from nowhere", model_from_nowhere, "model.path", "nowhere", BOTH),
    Wrong("no weights", model_without_weights, "model.safetensors", "missing", BOTH),
    Wrong("file in the way", file_in_the_way, "run.dir", "File exists"),
    Wrong(
        "no valid files",
        after_training(no_valid_files),
        "valid.bin",
        "no such file",
        BOTH,
    ),
    Wrong(
        "short valid",
        after_training(short_valid),
        "valid.bin",
        "data.sequence_length",
        BOTH,
    ),
    Wrong("no valid", no_valid, "data.valid", "empty", ("eval",)),
    Wrong(
        "no valid in training",
        nothing,
        "train.eval_every",
        "data.valid",
        overrides=("train.eval_every=2", "data.valid=[]"),
    ),
    Wrong("nothing to evaluate", nothing, "run.dir", "no checkpoint", ("eval",)),
    Wrong(
        "unknown setting",
        nothing,
        "optim.learning_rate",
        "optim.lr",
        BOTH,
        ("optim.learning_rate=1",),
    ),
    Wrong(
        "not enough ranks",
        nothing,
        "world size",
        "tensor 2",
        BOTH,
        ("parallel.tensor=2",),
    ),
]
CASES = [
    pytest.param(wrong, command_name, id=f"{command_name}-{wrong.name}")
    for wrong in TABLE
    for command_name in wrong.commands
]


@pytest.fixture
def run_settings(tmp_path: Path) -> Settings:
    write_corpus(tmp_path / "train", 1000)
    write_corpus(tmp_path / "valid", 100, seed=1)
    return settings(tmp_path)


@pytest.mark.parametrize(("wrong", "command_name"), CASES)
def test_wrong_input_ends_with_one_line_and_changes_nothing(
    wrong: Wrong, command_name: str, tmp_path: Path, run_settings: Settings
) -> None:
    wrong.spoil(tmp_path, run_settings)
    before = snapshot(tmp_path)
    ended = command(command_name, run_settings, *wrong.overrides)
    assert (ended.code, ended.stdout) == (2, "")
    assert [line.startswith("llm3d: ") for line in ended.stderr.splitlines()] == [True]
    assert wrong.named in ended.stderr and wrong.keyword in ended.stderr
    after = snapshot(tmp_path)
    assert sorted(after) == sorted(before), "nothing is left behind"
    assert after == before, "what was there is as it was"


def refusal_on_rank(given: Settings) -> str:
    with pytest.raises(InputError) as refused:
        pretrain_on_rank(given)
    return str(refused.value)


@pytest.mark.parametrize("spoil", [trained_wider, later_checkpoints, file_in_the_way, resume_from_a_folder])
def test_every_rank_ends_with_the_same_line(spoil: Spoil, tmp_path: Path, run_settings: Settings) -> None:
    """None waits for one that has ended."""
    spoil(tmp_path, run_settings)
    before = snapshot(tmp_path)
    refusals = pool.run(refusal_on_rank, 4, {**run_settings, "parallel": {"tensor": 2}})
    assert len(set(refusals)) == 1 and "\n" not in refusals[0]
    assert snapshot(tmp_path) == before
