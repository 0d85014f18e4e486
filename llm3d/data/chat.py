"""From files of conversations or comparisons to tokenised samples; what cannot be used is named, by file and line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from llm3d.config import ChatDataConfig
from llm3d.data.documents import BadRecord
from llm3d.data.formats import (
    PROMPT_FIELDS,
    Comparison,
    Conversation,
    Item,
    Kind,
    Message,
    Prompt,
    Reader,
    reader_for,
)
from llm3d.data.records import Record, find_record_files, read_records
from llm3d.data.samples import Sample, SampleSet, Tokens, fitted
from llm3d.data.templates import Template, Turns, sides, turns
from llm3d.errors import InputError
from llm3d.wording import counted

_AT_ONCE = 1024  # records that go through the tokenizer together
_MOST_NAMED = 5  # bad records that are told one by one


@dataclass
class Counts:
    """What became of the records of a source."""

    samples: int = 0
    too_long: int = 0
    cut: int = 0
    bad: list[BadRecord] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [counted(self.samples, "sample")]
        parts += [f"{self.too_long:,} left out, too long"] if self.too_long else []
        parts += [f"{self.cut:,} cut"] if self.cut else []
        parts += [f"{len(self.bad):,} left out that cannot be used"] if self.bad else []
        return ", ".join(parts)


def read_samples(
    path: str, kind: Kind, template: Template, settings: ChatDataConfig, prompt_loss: bool = False
) -> tuple[SampleSet, Counts]:
    """The samples in a file, the files of a directory or those that fit a pattern, in order.

    prompt_loss: every token but the first is learned.
    Raises InputError where nothing can be used, and, without settings.skip_bad, for what cannot.
    """
    counts, samples = Counts(), list[Sample]()
    rows = _rows(path, kind, settings.format, settings.columns, counts)
    while some := list(islice(rows, _AT_ONCE)):
        for where, sample in _encoded(some, template, settings, counts):
            try:
                fits = fitted(
                    sample, settings.sequence_length, settings.truncation, template.tokenizer.bos_id
                )
            except ValueError as error:
                counts.bad.append(BadRecord(where, str(error)))
                continue
            if fits is None:
                counts.too_long += 1
            else:
                counts.cut += fits is not sample
                samples.append(_all_learned(fits) if prompt_loss else fits)
    counts.samples = len(samples)
    _check(path, counts, settings)
    return SampleSet.of(samples), counts


class PlacedPrompt(NamedTuple):
    """row: all columns of its record."""

    where: str
    messages: tuple[Message, ...]
    row: dict[str, Any]

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
    found = [
        PlacedPrompt(record.where, item.messages, record.row)
        for record, item in _rows(path, "prompt", "auto", mapping, counts)
        if isinstance(item, Prompt)
    ]
    if counts.bad and not skip_bad:
        raise InputError("\n".join(_named(path, counts)))
    if not found:
        raise InputError(f"{path}: holds no prompt")
    counts.samples = len(found)
    return found, counts


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
                yield record, reader(record.row)
            except ValueError as error:
                counts.bad.append(BadRecord(record.where, str(error)))


def _reader(first: Record, kind: Kind, form: str, columns: Mapping[str, str]) -> Reader:
    try:
        return reader_for(list(first.row), kind, form, columns)
    except InputError as error:
        raise InputError(f"{first.where}: {error}") from None


def _encoded(
    rows: Sequence[tuple[Record, Item]],
    template: Template,
    settings: ChatDataConfig,
    counts: Counts,
) -> Iterator[tuple[str, Sample]]:
    """A sample for each comparison, and for each conversation as many as data.turns makes of it."""
    wanted: list[tuple[str, Item, list[Turns]]] = []
    for (where, _), item in rows:
        if isinstance(item, Comparison):
            wanted.append((where, item, sides(item)))
        elif isinstance(item, Conversation):
            wanted += [(where, item, [turn]) for turn in turns(item, settings.turns)]
    encoded = _sequences([these for _, _, these in wanted], template)
    for (where, item, _), sequences in zip(wanted, encoded, strict=True):
        if isinstance(sequences, InputError):
            counts.bad.append(BadRecord(where, str(sequences)))
        elif isinstance(item, Comparison):
            yield where, Sample(sequences, item.ranks, item.margin or 0.0)
        else:
            yield where, Sample(sequences)


def _sequences(wanted: Sequence[list[Turns]], template: Template) -> list[tuple[Tokens, ...] | InputError]:
    """Of each sample, or why the template cannot take it."""
    try:
        encoded = iter(template.encode_many([turn for these in wanted for turn in these]))
        return [tuple(Tokens(*next(encoded)) for _ in these) for these in wanted]
    except InputError as error:
        if len(wanted) == 1:
            return [error]
        return [found for these in wanted for found in _sequences([these], template)]


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
        hint = "; raise data.sequence_length or set data.truncation" if counts.too_long else ""
        raise InputError(f"{path}: holds no sample to use{left}{hint}")
