"""The command writes what transformers would, in every way of asking, and under every layout."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from llm3d.commands.generate import Completion, GenerateOptions, PromptEncoder, TextGenerator, check
from llm3d.config import STAGES, make_config
from llm3d.errors import InputError
from llm3d.parallel.mesh import Mesh
from llm3d.text.conversations import Message
from llm3d.text.templates import BUILT_IN
from tests import pool
from tests.commands.generating import NEW_TOKENS, by_transformers, generate, user
from tests.stages.common import Settings, snapshot
from tests.stages.post_training import SHAPE, settings, write_model, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large first weights, so that replies differ."""
    return write_model(tmp_path_factory.mktemp("model") / "model", initializer_range=0.4)


@pytest.fixture
def given(model: Path, tmp_path: Path) -> Settings:
    generate = {"max_new_tokens": NEW_TOKENS, "temperature": 0}
    return settings(model, "unused.jsonl", tmp_path / "run", sft={}, generate=generate)


QUESTIONS = ["What comes after one?", "And after two?", "Why?", "What is it, of course?", "one one one"]


def test_a_prompt_is_replied_to(given: Settings, model: Path, tmp_path: Path) -> None:
    for question in QUESTIONS[:2]:
        ended = generate(given, tmp_path, "--prompt", question)
        assert ended == (0, by_transformers(model, user(question))[0] + "\n", f"{model}\n")


def test_a_file_of_prompts_gives_a_line_of_json_each(given: Settings, model: Path, tmp_path: Path) -> None:
    conversation = [
        {"role": "system", "content": "Be brief."},
        *user("One?"),
        {"role": "assistant", "content": "Two."},
        *user("And?"),
    ]
    files = {
        "texts.jsonl": [{"question": question, "id": 7} for question in QUESTIONS],
        "turns.parquet": [{"messages": conversation}],
        "answered.jsonl": [{"messages": [*conversation, {"role": "assistant", "content": "left out"}]}],
    }
    for name, rows in files.items():
        output = tmp_path / f"{name}.out"
        ended = generate(
            given, tmp_path, "--prompts", write_rows(tmp_path / name, rows), "--output", str(output)
        )
        assert (ended.code, ended.stdout) == (0, "") and counted(len(rows)) in ended.stderr
        prompts = [user(question) for question in QUESTIONS] if name == "texts.jsonl" else [conversation]
        for line, prompt in zip(output.read_text().splitlines(), prompts, strict=True):
            found = json.loads(line)
            assert found["prompt"] == (prompt[0]["content"] if len(prompt) == 1 else prompt)
            assert (found["reply"], found["reason"]) == by_transformers(model, prompt)
            assert found["log_probability"] < 0 < found["tokens"] <= NEW_TOKENS


def counted(num_replies: int) -> str:
    return "1 reply, " if num_replies == 1 else f"{num_replies} replies, "


def test_a_conversation_remembers_what_was_said(given: Settings, model: Path, tmp_path: Path) -> None:
    typed = [QUESTIONS[0], "", QUESTIONS[1]]
    ended = generate(given, tmp_path, "--chat", typed="".join(f"{line}\n" for line in typed))
    first, _ = by_transformers(model, user(QUESTIONS[0]))
    so_far = [*user(QUESTIONS[0]), {"role": "assistant", "content": first}, *user(QUESTIONS[1])]
    second, _ = by_transformers(model, so_far)
    assert (ended.code, ended.stdout) == (0, f"{first}\n{second}\n")


def test_a_conversation_can_start_anew_and_be_ended(given: Settings, model: Path, tmp_path: Path) -> None:
    typed = ["/help", QUESTIONS[0], "/clear", "/nothing", QUESTIONS[1], "quit", QUESTIONS[2]]
    ended = generate(given, tmp_path, "--chat", typed="".join(f"{line}\n" for line in typed))
    replies = [by_transformers(model, user(question))[0] for question in QUESTIONS[:2]]
    assert (ended.code, ended.stdout) == (0, "".join(f"{reply}\n" for reply in replies))
    first, *_ = (line for line in ended.stderr.splitlines() if line != str(model))
    assert all(command in first for command in ("/help", "/clear", "/exit"))
    assert "no command /nothing" in ended.stderr


def test_ctrl_c_ends_a_conversation_quietly(
    given: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> list[Completion]:
        raise KeyboardInterrupt

    monkeypatch.setattr(TextGenerator, "write", interrupted)
    ended = generate(given, tmp_path, "--chat", typed="one\ntwo\n")
    assert (ended.code, ended.stdout) == (0, "") and "interrupted" not in ended.stderr


def test_text_can_be_continued_as_it_stands(given: Settings, model: Path, tmp_path: Path) -> None:
    expected, _ = by_transformers(model, QUESTIONS[0])
    assert generate(given, tmp_path, "--raw", "--prompt", QUESTIONS[0]).stdout == expected + "\n"
    pretraining = {name: section for name, section in given.items() if name != "sft"}
    pretraining["data"] = {"train": ["unused"], "sequence_length": 8, "tokenizer": str(model)}
    assert generate(pretraining, tmp_path, "--raw", "--prompt", QUESTIONS[0]).stdout == expected + "\n"


def test_stop_strings_end_a_reply_and_are_not_shown(given: Settings, model: Path, tmp_path: Path) -> None:
    whole, _ = by_transformers(model, user(QUESTIONS[0]))
    stop = whole[3:5]
    ended = generate(
        given | {"generate": given["generate"] | {"stop": [stop, "never"]}},
        tmp_path,
        "--prompt",
        QUESTIONS[0],
    )
    assert ended.stdout == whole[: whole.find(stop)] + "\n"


def test_several_replies_are_told_apart(given: Settings, tmp_path: Path) -> None:
    words = ("generate.num_replies=3", "generate.temperature=1", "--prompt", QUESTIONS[0])
    first, again = (generate(given, tmp_path, *words) for _ in range(2))
    assert first.code == 0 and first.stdout.count("--- reply ") == 3
    assert first == again, "the same seed draws the same"
    assert generate(given, tmp_path, *words, "run.seed=6").stdout != first.stdout


def write_on_rank(given: Settings, wanted: GenerateOptions) -> list[Completion]:
    config = make_config(given, dist.get_world_size(), STAGES["sft"])
    opened = check(config, wanted)
    writer = TextGenerator(opened.encoder, Mesh(config.parallel.tensor, config.parallel.pipeline))
    return writer.write(opened.prompts)


def test_every_layout_writes_the_same(given: Settings, tmp_path: Path) -> None:
    """Drawn, under layouts whose settings for training text is not written with."""
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": question} for question in QUESTIONS])
    given["generate"] |= {"temperature": 0.9, "top_p": 0.95, "num_replies": 2, "max_sequences": 4}
    layouts: list[tuple[int, dict[str, Any]]] = [
        (1, {}),
        (2, {"parallel": {"tensor": 2, "sequence": True}, "recompute": "full"}),
        (4, {"parallel": {"pipeline": 2, "chunks": 2, "schedule": "interleaved"}, "zero": {"stage": 2}}),
        (3, {"zero": {"stage": 3}}),
        (8, {"parallel": {"tensor": 2, "pipeline": 2}}),
    ]
    results = [
        result
        for world_size, changes in layouts
        for result in pool.run(write_on_rank, world_size, given | changes, GenerateOptions(prompts=prompts))
    ]
    assert len(results[0]) == 2 * len(QUESTIONS)
    for result in results[1:]:
        for written, expected in zip(result, results[0], strict=True):
            assert written._replace(log_probability=expected.log_probability) == expected
            assert written.log_probability == pytest.approx(expected.log_probability, abs=1e-4)


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing asked": ((), "give one of --prompt, --prompts and --chat"),
    "two things": (("--prompt", "x", "--chat"), "give one of --prompt, --prompts and --chat"),
    "no file": (("--prompts", "nowhere.jsonl"), "nowhere.jsonl"),
    "no prompt in it": (("--prompts", "{dir}/empty.jsonl"), "holds no prompt"),
    "a row without": (("--prompts", "{dir}/bad.jsonl"), "bad.jsonl line 2: "),
    "other columns": (
        ("--prompts", "{dir}/other.jsonl"),
        "line 1: the columns color fit no format for a prompt",
    ),
    "too long": (("--prompts", "{dir}/long.jsonl"), "long.jsonl line 1: a prompt of "),
    "output of one": (("--prompt", "x", "--output", "{dir}/o"), "--output is for the replies to --prompts"),
    "no such directory": (
        ("--prompts", "{dir}/good.jsonl", "--output", "{dir}/no/o"),
        "in a directory that exists",
    ),
    "no weights": (("--prompt", "x", "model.path=nowhere"), "model.path"),
    "no chat template": (("--chat", "--raw"), "--chat needs a chat template"),
    "a cold top_p": (("--prompt", "x", "generate.top_p=0"), "generate.top_p: "),
    "a small cache": (
        ("--prompt", "x", "generate.cache_gib=1e-6"),
        "generate.cache_gib: keys and values",
    ),
    "no UTF-8": (("--prompt", "\udcff"), "not valid UTF-8"),
    "there already": (("--prompts", "{dir}/good.jsonl", "--output", "{dir}/good.jsonl"), "allow --overwrite"),
    "misspelled": (("--prompt", "x", "generate.topp=1"), "generate.topp: unknown setting"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_ends_with_one_line(name: str, given: Settings, tmp_path: Path) -> None:
    rows = {
        "empty": [],
        "good": [{"prompt": "x"}],
        "bad": [{"prompt": "x"}, {"prompt": 3}],
        "other": [{"color": "red"}],
        "long": [{"prompt": "x" * 500}],
    }
    for file, some in rows.items():
        write_rows(tmp_path / f"{file}.jsonl", some)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    words, said = WRONG[name]
    before = snapshot(tmp_path)
    ended = generate(given, tmp_path, *(word.format(dir=tmp_path) for word in words))
    assert (ended.code, ended.stdout) == (2, "")
    assert said in ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line != given["model"]["path"]]
    assert len(lines) == 1 and lines[0].startswith("llm3d: ")
    assert snapshot(tmp_path) == before


def test_role_marks_that_are_plain_text_are_told(given: Settings, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", template=None)
    (model / "chat_template.jinja").write_text(BUILT_IN["chatml"].replace("<|im_start|>", "<|turn|>"))
    given["model"]["path"] = str(model)
    ended = generate(given, tmp_path, "--prompt", "x")
    remark = f"template {model}/chat_template.jinja: <|turn|> is text, no special token of the tokenizer"
    assert (ended.code, ended.stderr) == (0, f"{model}\n{remark}\n")
    assert generate(given, tmp_path, "--prompt", "x", "--raw").stderr == f"{model}\n"


def refused_on_rank(given: Settings, of_ranks: list[Settings]) -> str:
    config = make_config(given | of_ranks[dist.get_rank()], dist.get_world_size(), STAGES["sft"])
    with pytest.raises(InputError) as caught:
        TextGenerator(PromptEncoder(config, raw=False), Mesh())
    return str(caught.value)


def test_ranks_that_found_different_weights_end_alike(given: Settings, model: Path, tmp_path: Path) -> None:
    """As where the hosts' copies of a run directory hold different checkpoints."""
    shutil.copytree(model, other := tmp_path / "other")
    for name, of_ranks in {
        "model.path": [{}, {}, {"model": {"path": str(other)}}],
        "checkpoint.resume": [{}, {"checkpoint": {"resume": "none"}}, {}],
        "data.tokenizer": [{"data": {**given["data"], "tokenizer": str(other)}}, {}, {}],
    }.items():
        said = pool.run(refused_on_rank, 3, given, of_ranks)
        assert len({*said}) == 1 and said[0].startswith(f"{name}: ") and "see different files" in said[0]


def test_a_reward_model_writes_nothing(given: Settings, tmp_path: Path) -> None:
    reward = {name: section for name, section in given.items() if name != "sft"} | {"reward": {}}
    ended = generate(reward, tmp_path, "--prompt", "x")
    assert ended.code == 2 and "scores replies and writes none" in ended.stderr


def test_a_conversation_goes_on_after_what_cannot_be_read(
    given: Settings, model: Path, tmp_path: Path
) -> None:
    ended = generate(given, tmp_path, "--chat", typed=f"{'x' * 500}\n{QUESTIONS[0]}\n")
    assert (ended.code, ended.stdout) == (0, by_transformers(model, user(QUESTIONS[0]))[0] + "\n")
    assert "leaves no room for a reply; this was not read" in ended.stderr


def test_what_was_written_before_a_failure_is_kept(
    given: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replies are in a file of their own until all are there."""
    given["generate"]["max_sequences"] = 1
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "one"}] * 20)
    calls, write = [], TextGenerator.write

    def interrupted(*arguments: Any) -> list[Completion]:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(TextGenerator, "write", interrupted)
    with suppress(KeyboardInterrupt):
        generate(given, tmp_path, "--prompts", prompts, "--output", str(tmp_path / "out"))
    assert len(calls) == 2
    assert not (tmp_path / "out").exists()
    assert len((tmp_path / ".out.partial").read_text().splitlines()) == 16


def test_an_output_is_replaced_only_where_that_is_asked_for(given: Settings, tmp_path: Path) -> None:
    prompts, output = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "one"}]), tmp_path / "out"
    output.write_text("before")
    words = ("--prompts", prompts, "--output", str(output))
    assert generate(given, tmp_path, *words).code == 2 and output.read_text() == "before"
    assert generate(given, tmp_path, *words, "--overwrite").code == 0
    assert json.loads(output.read_text())["prompt"] == "one"
    assert not list(tmp_path.glob(".out*"))


def test_a_text_starts_as_the_tokenizer_says_whatever_the_settings_are_for(
    given: Settings, model: Path
) -> None:
    pretraining = {name: section for name, section in given.items() if name != "sft"}
    pretraining["data"] = {"train": ["unused"], "sequence_length": 8, "tokenizer": str(model)}
    told = [
        PromptEncoder(make_config(settings, 1, STAGES[stage]), raw=True)
        for stage, settings in (
            ("sft", given),
            ("pretrain", pretraining),
            ("pretrain", pretraining | {"model": SHAPE}),
        )
    ]
    tokenizer = told[0].tokenizer
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []
    for encoder in told:
        assert encoder.tokens([Message("user", "one")]) == [*bos, *tokenizer.encode("one")]


def test_settings_of_pretraining_use_the_template_that_lies_with_the_model(
    given: Settings, model: Path, tmp_path: Path
) -> None:
    pretraining = {name: section for name, section in given.items() if name != "sft"}
    pretraining["data"] = {"train": ["unused"], "sequence_length": 8}
    ended = generate(pretraining, tmp_path, "--prompt", QUESTIONS[0])
    assert ended.stdout == by_transformers(model, user(QUESTIONS[0]))[0] + "\n"


# ---- what the command is given ----
