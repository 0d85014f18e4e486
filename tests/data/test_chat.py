"""From a file's rows to samples: the same from every format, in order, with what cannot be used named and counted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from llm3d.config import ChatDataConfig
from llm3d.data import chat
from llm3d.data.chat import read_samples
from llm3d.data.samples import Sample, SampleSet
from llm3d.errors import InputError
from llm3d.text.conversations import Message
from llm3d.text.templates import Template, load_template
from llm3d.text.tokenizer import Tokenizer

Row = dict[str, Any]
TURNS = [("What is that?", "A bird."), ("Which one?", "A wren."), ("Sure?", "Yes, it sang.")]


@pytest.fixture
def template(tokenizer: Tokenizer) -> Template:
    return load_template("alpaca", tokenizer)


def settings(**changes: Any) -> ChatDataConfig:
    return ChatDataConfig.model_validate({"train": ["unused"], "sequence_length": 1024, **changes})


def write(path: Path, rows: Sequence[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def listed(samples: SampleSet) -> list[tuple[Any, ...]]:
    return [as_lists(samples[i]) for i in range(len(samples))]


def as_lists(sample: Sample) -> tuple[Any, ...]:
    return [(ids.tolist(), target.tolist()) for ids, target in sample.sequences], sample.ranks, sample.margin


def messages(turns: Sequence[tuple[str, str]], role: str, content: str, names: tuple[str, str]) -> list[Row]:
    return [{role: name, content: text} for pair in turns for name, text in zip(names, pair, strict=True)]


def written(directory: Path, turns: Sequence[tuple[str, str]]) -> dict[str, str]:
    """One conversation in every format and kind of file, by name."""
    (question, answer), history = turns[-1], [list(pair) for pair in turns[:-1]]
    rows: dict[str, Row] = {
        "alpaca": {"instruction": question, "input": "", "output": answer, "history": history},
        "question_answer": {"question": question, "answer": answer, "history": history},
        "prompt_response": {"prompt": question, "response": answer, "history": history},
        "completion": {"prompt": question, "completion": answer, "history": history},
        "messages": {"messages": messages(turns, "role", "content", ("user", "assistant"))},
        "sharegpt": {"conversations": messages(turns, "from", "value", ("human", "gpt"))},
    }
    paths = {name: write(directory / f"{name}.jsonl", [row]) for name, row in rows.items()}
    (directory / "list.json").write_text(json.dumps([rows["messages"]]))
    table = pyarrow.Table.from_pylist([rows["messages"]])
    pyarrow.parquet.write_table(table, directory / "table.parquet")
    return paths | {name: str(directory / name) for name in ("list.json", "table.parquet")}


@pytest.mark.parametrize("num_turns", [1, 3])
def test_a_conversation_is_the_same_sample_in_every_format(
    num_turns: int, template: Template, tmp_path: Path
) -> None:
    turns = TURNS[:num_turns]
    said = [
        Message(role, text) for pair in turns for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    tokens, is_target = template.encode(said)
    expected = [([(tokens.tolist(), is_target.tolist())], (0.0,), 0.0)]
    for name, path in written(tmp_path, turns).items():
        samples, counts = read_samples(path, "conversation", template, settings())
        assert listed(samples) == expected, name
        assert str(counts) == "1 sample"


def test_a_comparison_taken_apart_is_a_labeled_reply_each(template: Template, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "One?", "chosen": "Yes.", "rejected": "No."}] * 2)
    labels = [{"completion": "Yes.", "label": True}, {"completion": "No.", "label": False}]
    apart = write(tmp_path / "labeled.jsonl", [{"prompt": "One?", **label} for label in labels * 2])
    found = [listed(read_samples(each, "labeled", template, settings())[0]) for each in (path, apart)]
    assert found[0] == found[1]
    assert [ranks for _, ranks, _ in found[0]] == [(0.0,), (1.0,)] * 2


def test_a_comparison_is_its_prompt_with_each_reply(template: Template, tmp_path: Path) -> None:
    prompt = {"prompt": "What is that?"}
    rows = [
        prompt | {"chosen": "A bird.", "rejected": "A fish.", "margin": 0.5},
        {"question": "What is that?", "response_chosen": "A bird.", "response_rejected": "A fish."},
        prompt | {"responses": ["A fish.", "A bird.", "A stone."], "scores": [0.1, 3, -2]},
    ]
    tokens = {
        reply: tuple(
            part.tolist()
            for part in template.encode([Message("user", "What is that?"), Message("assistant", reply)])
        )
        for reply in ("A bird.", "A fish.", "A stone.")
    }
    found = []
    for number, row in enumerate(rows):
        path = write(tmp_path / f"{number}.jsonl", [row])
        found += listed(read_samples(path, "comparison", template, settings())[0])
    both = [tokens["A bird."], tokens["A fish."]]
    assert found[0] == (both, (0.0, 1.0), 0.5)
    assert found[1] == (both, (0.0, 1.0), 0.0)
    sequences, ranks, _ = found[2]
    assert sequences == [tokens["A fish."], tokens["A bird."], tokens["A stone."]]
    assert ranks == pytest.approx((-0.1, -3.0, 2.0)), "the best has the lowest"


def many(count: int) -> list[Row]:
    return [{"question": f"And {i}?", "answer": f"It is {i}." * (1 + i % 5)} for i in range(count)]


@pytest.mark.parametrize("at_once", [1, 3, 50])
def test_samples_come_in_the_order_of_the_rows_however_many_are_read_at_once(
    at_once: int, template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = many(11)
    expected = [
        listed(read_samples(write(tmp_path / "one.jsonl", [row]), "conversation", template, settings())[0])[0]
        for row in rows
    ]
    monkeypatch.setattr(chat, "_AT_ONCE", at_once)
    samples, _ = read_samples(write(tmp_path / "all.jsonl", rows), "conversation", template, settings())
    assert listed(samples) == expected


def test_split_conversations_learn_each_reply_once(template: Template, tmp_path: Path) -> None:
    path = write(
        tmp_path / "turns.jsonl", [{"messages": messages(TURNS, "role", "content", ("user", "assistant"))}]
    )
    found = {
        turns: read_samples(path, "conversation", template, settings(turns=turns))[0]
        for turns in ("all", "last", "split")
    }
    assert [len(found[turns]) for turns in ("all", "last", "split")] == [1, 1, 3]
    ((whole, learned),), _, _ = listed(found["all"])[0]
    ((_, last),), _, _ = listed(found["last"])[0]
    together = [False] * len(whole)
    for sequences, _, _ in listed(found["split"]):
        ((ids, target),) = sequences
        assert ids == whole[: len(ids)], "each ends with the reply that it learns"
        assert not any(a and b for a, b in zip(together, target, strict=False))
        together = [a or b for a, b in zip(together, [*target, *[False] * len(whole)], strict=False)]
    assert together == learned
    assert listed(found["split"])[-1] == listed(found["last"])[0] and sum(last) < sum(learned)


def test_with_prompt_loss_everything_is_learned(template: Template, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", many(3))
    plain, _ = read_samples(path, "conversation", template, settings())
    learned, _ = read_samples(path, "conversation", template, settings(), prompt_loss=True)
    assert learned.ids.tolist() == plain.ids.tolist()
    assert learned.is_target.all() and not plain.is_target.all()


def test_what_is_too_long_is_left_out_and_counted(template: Template, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", many(10))
    lengths = read_samples(path, "conversation", template, settings())[0].lengths.tolist()
    limit = sorted(lengths)[5]
    samples, counts = read_samples(path, "conversation", template, settings(sequence_length=limit))
    assert samples.lengths.tolist() == [length for length in lengths if length <= limit]
    too_long = sum(length > limit for length in lengths)
    assert too_long and str(counts) == f"{10 - too_long} samples, {too_long} left out, too long"


@pytest.mark.parametrize("truncation", ["left", "right"])
def test_what_is_too_long_is_cut_and_counted(truncation: str, template: Template, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", many(10))
    lengths = read_samples(path, "conversation", template, settings())[0].lengths
    limit = int(lengths.max()) - 1
    given = settings(sequence_length=limit, truncation=truncation)
    samples, counts = read_samples(path, "conversation", template, given)
    assert samples.lengths.tolist() == [min(int(length), limit) for length in lengths]
    assert str(counts) == f"10 samples, {(lengths > limit).sum()} cut"


def test_much_that_is_too_long_is_warned_of(template: Template, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", many(40))
    lengths = np.sort(read_samples(path, "conversation", template, settings())[0].lengths)
    for left_out, warns in ((1, False), (2, False), (10, True)):
        given = settings(sequence_length=int(lengths[-left_out - 1]))
        _, counts = read_samples(path, "conversation", template, given)
        _, *warnings = counts.summary(path, given)
        assert (counts.too_long > 2) is warns
        assert [f"WARNING: {counts.too_long / 40:.0%} is left out" in line for line in warnings] == [
            True
        ] * warns
        assert all(f"the longest has {lengths[-1]} tokens: raise" in line for line in warnings)


def test_columns_that_are_not_read_are_told_with_their_rows(template: Template, tmp_path: Path) -> None:
    rows = [row | {"id": i, "source": None if i else "web"} for i, row in enumerate(many(3))]
    _, counts = read_samples(write(tmp_path / "rows.jsonl", rows), "conversation", template, settings())
    assert counts.summary("P", settings())[1:] == [
        "P: columns that are not read, with their rows: id (3), source (1)"
    ]


def test_what_the_template_does_not_read_is_told_and_calls_are_not_lost(
    tmp_path: Path, template: Template
) -> None:
    asked, call = {"role": "user", "content": "1 + 1?"}, {"function": {"name": "add", "arguments": {}}}
    thought = {"role": "assistant", "content": "2", "reasoning_content": "Easy."}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows = [{"messages": [asked, reply], "tools": [call]} for reply in (thought, calling)]
    path = write(tmp_path / "rows.jsonl", rows)
    _, counts = read_samples(path, "conversation", template, settings(skip_bad=True))
    assert counts.unread == {"tools": 2, "messages.reasoning_content": 1, "messages.tool_calls": 1}
    assert [str(bad) for bad in counts.bad] == [
        f"{path} line 2: calls a tool, and the chat template writes no tool_calls"
    ]


@pytest.mark.parametrize("replies", ["all", "last", "split"])
def test_a_conversation_of_which_nothing_is_learned_cannot_be_used(
    replies: str, template: Template, tmp_path: Path
) -> None:
    said = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Yes.", "weight": 0}]
    path = write(tmp_path / "rows.jsonl", [{"messages": said}])
    with pytest.raises(InputError, match="line 1: none of its replies is learned"):
        read_samples(path, "conversation", template, settings(turns=replies))


BAD: list[tuple[str, str]] = [
    ("{", "line 2"),
    ('["a"]', "where an object must stand"),
    ('{"question": "And?"}', "no column 'answer'"),
    ('{"question": "And?", "answer": null}', "column 'answer' is null"),
    ('{"question": "And?", "answer": " "}', "turn 2 is an empty reply"),
    ('{"question": "And?", "answer": 5}', "where text must stand"),
]


@pytest.mark.parametrize(("line", "why"), BAD)
def test_what_cannot_be_used_is_named_by_its_line_or_left_out_and_counted(
    line: str, why: str, template: Template, tmp_path: Path
) -> None:
    good = [json.dumps(row) for row in many(2)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([good[0], line, good[1]]) + "\n")
    with pytest.raises(InputError) as refused:
        read_samples(str(path), "conversation", template, settings())
    first, last = str(refused.value).splitlines()
    assert f"{path} line 2" in first and why in first and "data.skip_bad=true" in last
    samples, counts = read_samples(str(path), "conversation", template, settings(skip_bad=True))
    assert len(samples) == 2 and str(counts) == "2 samples, 1 left out that cannot be used"


def test_many_bad_rows_are_few_lines(template: Template, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(many(1)[0]) + "\n" + '{"question": "And?"}\n' * 500)
    with pytest.raises(InputError) as refused:
        read_samples(str(path), "conversation", template, settings())
    lines = str(refused.value).splitlines()
    assert len(lines) < 10 and any("more like these" in line for line in lines)


def test_what_the_template_cannot_take_is_named_by_its_line_too(tmp_path: Path, template: Template) -> None:
    source = (
        "{% for m in messages %}{{ raise_exception('no system') if m.role == 'system' }}"
        "{{ m.content + eos_token if m.role == 'assistant' else '[' + m.content + ']' }}{% endfor %}"
    )
    (tmp_path / "own.jinja").write_text(source)
    own = load_template(str(tmp_path / "own.jinja"), template.tokenizer)
    rows = many(3)
    rows[1]["system"] = "Be brief."
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match="no system") as refused:
        read_samples(path, "conversation", own, settings())
    assert f"{path} line 2" in str(refused.value)
    samples, counts = read_samples(path, "conversation", own, settings(skip_bad=True))
    assert len(samples) == 2 and len(counts.bad) == 1
