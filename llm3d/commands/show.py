"""The samples of a stage's data as the model gets them: every token, and which of them are learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Literal

import numpy as np
from rich.console import Console
from rich.text import Text

from llm3d.config import Config
from llm3d.data.conversations import ChatData
from llm3d.data.samples import Sample, SampleSet, Tokens
from llm3d.errors import InputError
from llm3d.stages.stage import stage_of
from llm3d.text.chat_tokenizer import ChatTokenizer
from llm3d.text.tokenizer import Tokenizer
from llm3d.wording import counted

_NAMED = 10  # of the records that cannot be used
_QUANTILES = {"least": 0.0, "10%": 0.1, "median": 0.5, "90%": 0.9, "99%": 0.99, "most": 1.0}
# Tokens have two shades in turn, so that it is seen where one ends.
_STYLES = {True: ("green", "bold green"), False: ("", "dim")}


def show(
    config: Config, num_samples: int, split: Literal["train", "valid"], data_size: int, console: Console
) -> None:
    """Print the first samples in the order in which they are read, and what all of the split come to.

    data_size: the data ranks for which steps are packed.  Raises InputError where the data cannot be used.
    """
    if split == "valid" and not config.data.valid:
        raise InputError("data.valid: empty; name the data, or show --split train")
    if config.reads in ("tokens", "prompt"):
        raise InputError(
            f"these settings are for {config.stage}, whose data are no conversations; --stage names another stage"
        )
    opened = stage_of(config).open(config)
    data, chat = opened.data, opened.tokenizer
    assert isinstance(data, ChatData) and isinstance(chat, ChatTokenizer)
    tokenizer = chat.tokenizer
    part = slice(data.num_train) if split == "train" else slice(data.num_train, None)
    sets, counts = data.sets[part], data.counts[part]
    colored = console.color_system is not None and not console.no_color
    header = (f"template: {chat.template.name}", *chat.remarks)
    lines = [*map(Text, header), _legend(colored)]
    for place in islice(data.in_order(split), min(num_samples, sum(map(len, sets)))):
        path, _ = data.counts[place.number]
        sample = data.sets[place.number][place.sample]
        margin = f", margin {sample.margin:g}" if sample.margin else ""
        lines.append(Text(f"\n{path}, sample {place.sample + 1:,}{margin}", "bold" if colored else ""))
        lines += _described(sample, tokenizer, colored)
    lines.append(Text())
    for path, count in counts:
        lines += map(Text, count.summary(path, data.settings))
        lines += [Text(f"  {bad}") for bad in count.bad[:_NAMED]]
    lines += map(Text, _lengths(sets))
    lines += [Text(data.packing(data_size))] if split == "train" else []
    for line in lines:
        console.print(line, soft_wrap=True)


def _legend(colored: bool) -> Text:
    if not colored:
        return Text("⟦learned⟧, not learned, ⟨a special token⟩, ↵ a line's end")
    special = ("a special token", "reverse")
    return Text.assemble(("learned", "green"), ", not learned, ", special, ", ↵ a line's end")


def _described(sample: Sample, tokenizer: Tokenizer, colored: bool) -> Iterator[Text]:
    """Its sequences, one after the other; of replies that are compared, the ranks."""
    for number, (sequence, rank) in enumerate(zip(sample.sequences, sample.ranks, strict=True), 1):
        several = len(sample.sequences) > 1
        reply = f"reply {number} of {len(sample.sequences)}, rank {rank:g}: " if several else ""
        heading = f"{reply}{counted(len(sequence.ids), 'token')}, {int(_learned(sequence).sum()):,} learned"
        yield Text(heading, "bold" if colored else "")
        yield _colored(sequence, tokenizer) if colored else _marked(sequence, tokenizer)


def _learned(sequence: Tokens) -> np.ndarray:
    """bool [length]. Before the first token there is nothing from which it could be told."""
    return sequence.is_target & (np.arange(len(sequence.ids)) > 0)


def _colored(sequence: Tokens, tokenizer: Tokenizer) -> Text:
    text = Text()
    for i, (learned, (spelled, special)) in enumerate(
        zip(_learned(sequence).tolist(), spelling(sequence.ids.tolist(), tokenizer), strict=True)
    ):
        text.append(spelled, f"{_STYLES[learned][i % 2]}{' reverse' if special else ''}".strip())
    return text


def _marked(sequence: Tokens, tokenizer: Tokenizer) -> Text:
    text, before = "", False
    tokens = spelling(sequence.ids.tolist(), tokenizer)
    for learned, (spelled, special) in zip(_learned(sequence).tolist(), tokens, strict=True):
        text += "⟦" if learned and not before else "⟧" if before and not learned else ""
        text += f"⟨{spelled}⟩" if special else spelled
        before = learned
    return Text(text + "⟧" * before)


def spelling(ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """The text of each token, and whether it is a special one.

    A character that is in several tokens is with the last of them. What cannot be seen is written as in Python, and a
    line's end has a sign before it.
    """
    special = set(tokenizer.special_tokens.values())
    waiting = list[int]()
    for i, index in enumerate(ids):
        if index in special:
            yield _visible(str(tokenizer.token(index))), True
            continue
        waiting.append(index)
        text = tokenizer.decode_next(waiting)
        ends = i + 1 == len(ids) or ids[i + 1] in special
        if text.endswith("\ufffd") and not ends:
            yield "", False
        else:
            waiting.clear()
            yield _visible(text), False


def _visible(text: str) -> str:
    shown = (c if c.isprintable() else "↵\n" if c == "\n" else ascii(c)[1:-1] for c in text)
    return "".join(shown)


def _lengths(sets: Sequence[SampleSet]) -> Iterator[str]:
    lengths = np.concatenate([np.diff(samples.sequence_starts) for samples in sets])
    quantiles = np.quantile(lengths, list(_QUANTILES.values()), method="nearest")
    entries = (f"{name} {int(length):,}" for name, length in zip(_QUANTILES, quantiles, strict=True))
    yield f"tokens a sequence: {', '.join(entries)}"
    first = np.concatenate([samples.is_target[samples.sequence_starts[:-1]] for samples in sets])
    learned = sum(int(samples.is_target.sum()) for samples in sets) - int(first.sum())
    yield f"learned: {learned / lengths.sum():.1%} of {int(lengths.sum()):,} tokens"
