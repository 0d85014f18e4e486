"""From files of conversations or comparisons to tokenized samples; what cannot be used is named, by file and line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from llm3d.config import ChatDataConfig
from llm3d.corpus.documents import BadRecord
from llm3d.data.formats import PROMPT_FIELDS, Kind, Reader, reader_for
from llm3d.data.records import Record, find_record_files, read_records
from llm3d.data.samples import Sample, SampleSet, Tokens, fitted, why_useless
from llm3d.errors import InputError
from llm3d.text.conversations import Comparison, Conversation, Fields, Item, LabeledReply, Message, Prompt
from llm3d.text.templates import Template, Turns, sides, turns
from llm3d.wording import counted

_AT_ONCE = 1024  # records that go through the tokenizer together
_MOST_NAMED = 5  # bad records that are told one by one
_WORTH_A_WARNING = 0.05  # of the samples, left out as too long


@dataclass
class Counts:
    """What became of the records of a source.

    held_out: no longer here, but in validation.  too_long: left out.  cut: shortened.  longest: tokens of the longest
    sequence before that.
    unread: how many rows have something in a column that means nothing here, by column.
    """

    samples: int = 0
    held_out: int = 0
    too_long: int = 0
    cut: int = 0
    longest: int = 0
    bad: list[BadRecord] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        parts = [counted(self.samples, "sample")]
        parts += [f"{self.too_long:,} left out, too long"] if self.too_long else []
        parts += [f"{self.cut:,} cut"] if self.cut else []
        parts += [f"{len(self.bad):,} left out that cannot be used"] if self.bad else []
        return ", ".join(parts)

    def without(self, held_out: int) -> Counts:
        return replace(self, samples=self.samples - held_out, held_out=held_out)

    def summary(self, path: str, settings: ChatDataConfig) -> list[str]:
        """For people: what there is, what is not read, and a warning where much of it is too long."""
        lines = [f"{path}: {self}"]
        if self.unread:
            columns = ", ".join(f"{column} ({count:,})" for column, count in self.unread.most_common())
            lines.append(f"{path}: columns that are not read, with their rows: {columns}")
        share = self.too_long / max(1, self.samples + self.held_out + self.too_long)
        if share > _WORTH_A_WARNING:
            lines.append(f"{path}: WARNING: {share:.0%} is left out, too long{self.advice(settings)}")
        return lines

    def advice(self, settings: ChatDataConfig) -> str:
        """What to do about what is too long."""
        longest, length = counted(self.longest, "token"), settings.sequence_length
        hint = f"; the longest has {longest}: raise data.sequence_length {length:,}"
        return hint + (" or set data.truncation to left or right" if settings.truncation == "drop" else "")


def read_samples(
    path: str, kind: Kind, template: Template, settings: ChatDataConfig, prompt_loss: bool = False
) -> tuple[SampleSet, Counts]:
    """The samples in a file, the files of a directory or those that fit a pattern, in order.

    prompt_loss: every token but the first is learned.
    Raises InputError where nothing can be used, and, without settings.skip_bad, for what cannot.
    """
    counts, samples = Counts(), list[Sample]()
    rows = enumerate(_rows(path, kind, settings.format, settings.columns, counts))
    while some := list(islice(rows, _AT_ONCE)):
        for sample in _encoded(some, template, settings, counts, kind):
            counts.longest = max(counts.longest, *(len(sequence.ids) for sequence in sample.sequences))
            fits = fitted(sample, settings.sequence_length, settings.truncation, template.tokenizer.bos_id)
            if fits is None:
                counts.too_long += 1
            else:
                counts.cut += fits is not sample
                samples.append(_all_learned(fits) if prompt_loss else fits)
    counts.samples = len(samples)
    _check(path, counts, settings)
    return SampleSet.of(samples), counts


class PlacedPrompt(NamedTuple):
    """row: all columns of its record.  template_kwargs: see `llm3d.text.conversations.Prompt`."""

    where: str
    messages: tuple[Message, ...]
    row: dict[str, Any]
    template_kwargs: Fields

    @property
    def shown(self) -> Any:
        """For people and functions: a prompt of one message is its text, another a list of role and content."""
        if len(self.messages) == 1:
            return self.messages[0].content
        return [{"role": m.role, "content": m.content, **m.extra} for m in self.messages]


def read_prompts(
    path: str, columns: Mapping[str, str], skip_bad: bool = False
) -> tuple[list[PlacedPrompt], Counts]:
    """The prompts in a file, the files of a directory or those that fit a pattern, in order.

    columns: for fields of a prompt, the columns that hold them; those of other fields do not matter.
    Raises InputError for those that cannot be used, without skip_bad, and where there are none.
    """
    counts = Counts()
    mapping = {field: column for field, column in columns.items() if field in PROMPT_FIELDS}
    prompts = [
        PlacedPrompt(record.where, item.messages, record.row, item.template_kwargs)
        for record, item in _rows(path, "prompt", "auto", mapping, counts)
        if isinstance(item, Prompt)
    ]
    if counts.bad and not skip_bad:
        raise InputError("\n".join(_named(path, counts)))
    if not prompts:
        raise InputError(f"{path}: holds no prompt")
    counts.samples = len(prompts)
    return prompts, counts


def _rows(
    path: str, kind: Kind, form: str, columns: Mapping[str, str], counts: Counts
) -> Iterator[tuple[Record, Item]]:
    """The place and meaning of each usable record."""
    for file in find_record_files([path]):
        reader: Reader | None = None
        for record in read_records(file):
            if isinstance(record, BadRecord):
                counts.bad.append(record)
                continue
            reader = reader or _reader(record, kind, form, columns)
            try:
                item = reader(record.row)
            except InputError as error:
                raise InputError(f"{record.where}: {error}") from None
            except ValueError as error:
                counts.bad.append(BadRecord(record.where, str(error)))
            else:
                counts.unread.update(reader.unread(record.row))
                yield record, item


def _reader(first: Record, kind: Kind, form: str, columns: Mapping[str, str]) -> Reader:
    try:
        return reader_for(list(first.row), kind, form, columns)
    except InputError as error:
        raise InputError(f"{first.where}: {error}") from None


def _encoded(
    rows: Sequence[tuple[int, tuple[Record, Item]]],
    template: Template,
    settings: ChatDataConfig,
    counts: Counts,
    kind: Kind,
) -> Iterator[Sample]:
    """A sample for each comparison, and for each conversation as many as data.turns makes of it.

    Of labeled replies, one each, of rank 0 where it is desirable, else 1.
    """
    entries: list[tuple[int, str, Item, list[Turns]]] = []
    for row, ((where, _), item) in rows:
        counts.unread.update(_unwritten(item, template))
        if _calls_in_vain(item, template):
            counts.bad.append(BadRecord(where, "calls a tool, and the chat template writes no tool_calls"))
        elif isinstance(item, Comparison):
            entries.append((row, where, item, sides(item)))
        elif isinstance(item, LabeledReply):
            labeled = Conversation(item.messages, item.template_kwargs)
            entries.append((row, where, item, turns(labeled, "last")))
        elif isinstance(item, Conversation):
            learned_turns = turns(item, settings.turns)
            entries += [(row, where, item, [turn]) for turn in learned_turns]
            counts.bad += [] if learned_turns else [BadRecord(where, "none of its replies is learned")]
    encoded = _sequences([these for *_, these in entries], template)
    for (row, where, item, _), sequences in zip(entries, encoded, strict=True):
        why = str(sequences) if isinstance(sequences, InputError) else why_useless(sequences)
        if isinstance(sequences, InputError) or why is not None:
            counts.bad.append(BadRecord(where, str(why)))
        elif isinstance(item, Comparison) and kind == "labeled":
            yield from (Sample((s,), (rank,), row=row) for s, rank in zip(sequences, item.ranks, strict=True))
        elif isinstance(item, Comparison):
            yield Sample(sequences, item.ranks, item.margin or 0.0, row)
        elif isinstance(item, LabeledReply):
            yield Sample(sequences, (0.0 if item.desirable else 1.0,), row=row)
        else:
            yield Sample(sequences, row=row)


def _unwritten(item: Item, template: Template) -> set[str]:
    """What the messages have, or what lies beside them, that the template does not read."""
    fields = {f"messages.{name}" for message in _messages(item) for name in message.extra} | {
        *item.template_kwargs
    }
    return {field for field in fields if field.removeprefix("messages.") not in template.source}


def _calls_in_vain(item: Item, template: Template) -> bool:
    """Whether a reply that is nothing but a call of a tool would be learned as nothing."""
    silent = (m for m in _messages(item) if m.role == "assistant" and not m.content.strip())
    return "tool_calls" not in template.source and any(True for _ in silent)


def _messages(item: Item) -> Iterator[Message]:
    if isinstance(item, Comparison):
        return chain(item.prompt, *item.replies)
    return iter(item.messages)


def _sequences(samples: Sequence[list[Turns]], template: Template) -> list[tuple[Tokens, ...] | InputError]:
    """Of each sample, or why the template cannot take it."""
    try:
        encoded = iter(template.encode_many([turn for these in samples for turn in these]))
        return [tuple(Tokens(*next(encoded)) for _ in these) for these in samples]
    except InputError as error:
        if len(samples) == 1:
            return [error]
        return [result for these in samples for result in _sequences([these], template)]


def _all_learned(sample: Sample) -> Sample:
    learned = (Tokens(ids, np.ones(len(ids), dtype=bool)) for ids, _ in sample.sequences)
    return sample._replace(sequences=tuple(learned))


def _named(path: str, counts: Counts) -> list[str]:
    """A line for each of the first records that cannot be used, and one for how many more there are."""
    lines = [str(bad) for bad in counts.bad[:_MOST_NAMED]]
    more = len(counts.bad) - len(lines)
    return [*lines, *([f"{path}: {more:,} more like these"] if more else [])]


def _check(path: str, counts: Counts, settings: ChatDataConfig) -> None:
    if counts.bad and not settings.skip_bad:
        hint = f"{path}: data.skip_bad=true leaves out what cannot be used"
        raise InputError("\n".join([*_named(path, counts), hint]))
    if not counts.samples:
        left = f": {counts}" if counts.too_long or counts.bad else ""
        advice = counts.advice(settings) if counts.too_long else ""
        raise InputError(f"{path}: holds no sample to use{left}{advice}")
