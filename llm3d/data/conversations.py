"""Conversations and comparisons as a training loop wants them: steps of whole samples, packed into microbatches.

A step is batch.global samples, whatever the layout; how they are packed changes no number that is trained on. Global
sample k is a pure function of k and run.seed: source by a blend, place by a keyed permutation of each epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from llm3d.config import PostTrainingConfig
from llm3d.data.chat import Counts, read_samples
from llm3d.data.order import SampleOrder, held_out, short_digest
from llm3d.data.packed import PackedBatch, chosen_targets, collate, with_noise
from llm3d.data.packing import pack
from llm3d.data.run_tokenizer import open_tokenizer
from llm3d.data.samples import Sample, SampleSet, mismatched
from llm3d.data.steps import Consumed, Steps
from llm3d.errors import InputError
from llm3d.parallel.mesh import Mesh
from llm3d.permutation import derive_key
from llm3d.text.chat_tokenizer import ChatTokenizer
from llm3d.text.templates import load_template
from llm3d.wording import counted

_LOOKED_AT = 100  # steps from which the share of unused tokens is told

C = TypeVar("C", bound=PostTrainingConfig)


def open_chat(
    config: C, training: bool = True, prompt_loss: bool = False, mismatched: bool = False
) -> tuple[C, ChatTokenizer, ChatData]:
    """The run's tokenizer and its data. Raises InputError.

    training: False: validation data alone.  mismatched: microbatches bring along prompts with others' replies.
    """
    config, tokenizer = open_tokenizer(config)
    data, kind = config.data, config.reads
    assert kind != "tokens" and kind != "prompt"
    assert tokenizer is not None, "a model to start from has a tokenizer"
    template = load_template(data.template, tokenizer)
    train = (
        data.train if training or isinstance(data.valid, float) else ()
    )  # of which a share may be held out
    sources = (*train, *data.valid_sources)
    read = [read_samples(source.path, kind, template, data, prompt_loss) for source in sources]
    sets, num_train = [samples for samples, _ in read], len(train)
    counts = [(source.path, counts) for source, (_, counts) in zip(sources, read, strict=True)]
    for source, samples in zip(sources, sets, strict=True):
        _check_fits_a_microbatch(source.path, samples, config)
    if isinstance(data.valid, float):
        sets, counts = _with_held_out(sets, counts, data.valid, config.run.seed)
    chat = ChatData(config, sets[:num_train], sets[num_train:], counts, mismatched)
    return config, ChatTokenizer(tokenizer, template), chat


def _with_held_out(
    sets: Sequence[SampleSet], counts: Sequence[tuple[str, Counts]], share: float, seed: int
) -> tuple[list[SampleSet], list[tuple[str, Counts]]]:
    """The training sets, then of each the samples of the rows that are held out for validation; the same of counts."""
    chosen = [held_out(samples.rows, share, seed, number) for number, samples in enumerate(sets)]
    train = [samples.chosen(~which) for samples, which in zip(sets, chosen, strict=True)]
    valid = [
        (path, s.chosen(which))
        for (path, _), s, which in zip(counts, sets, chosen, strict=True)
        if which.any()
    ]
    if not valid:
        raise InputError(f"data.valid: {share:g} of one row leaves none to train on; name other data")
    split_counts = [
        (path, count.without(count.samples - len(s))) for (path, count), s in zip(counts, train, strict=True)
    ]
    split_counts += [(f"{path}, held out for validation", Counts(samples=len(s))) for path, s in valid]
    return [*train, *(samples for _, samples in valid)], split_counts


def _check_fits_a_microbatch(path: str, samples: SampleSet, config: PostTrainingConfig) -> None:
    """Raise InputError where a prompt has more replies than go through the model at once."""
    longest, length = int(samples.lengths.max()), config.data.sequence_length
    if longest > config.batch.micro * length:
        has = counted(config.batch.micro, "sequence")
        raise InputError(
            f"batch.micro: {has} of data.sequence_length {length} cannot hold a "
            f"sample of {path}, {counted(longest, 'token')} with all its replies; the least is {-(-longest // length)}"
        )


class SampleIndex(NamedTuple):
    """Of a sample: the number of its set, and its own in the set."""

    number: int
    sample: int


class ChatData:
    """`llm3d.stages.stage.StageData` over sample sets.

    sets: one for each of data.train (none, for evaluation alone), then one for each of data.valid.
    counts: for each, the path, and what became of the records there.
    reference: fp32 [sequences] for each set, which batches then bring along; None: they bring none.
    """

    def __init__(
        self,
        config: PostTrainingConfig,
        train: Sequence[SampleSet],
        valid: Sequence[SampleSet],
        counts: Sequence[tuple[str, Counts]] = (),
        mismatched: bool = False,
    ) -> None:
        self.counts, self.settings, self.mismatched = counts, config.data, mismatched
        self.config, self.sets, self.num_train = config, [*train, *valid], len(train)
        self.reference: list[Tensor] | None = None
        self.noise = config.neftune_alpha / math.sqrt(config.model.hidden_size)
        self.is_random = bool(config.neftune_alpha or config.lora.dropout)
        weights = [source.weight for source in config.data.train[: len(train)]]
        self.order = SampleOrder.by_sample(weights, [len(samples) for samples in train], config.run.seed)
        self.lengths = [samples.lengths for samples in self.sets]
        self.capacity = config.batch.micro * config.data.sequence_length
        self.steps = Steps.of(config, self.order.samples_a_pass)
        self.resume(0, Consumed(0, 0))

    # ---- what the loop asks ----

    def resume(self, step: int, consumed: Consumed) -> None:
        """Go on after `step`, by which the run had read `consumed`."""
        self.steps = self.steps.after(step, consumed.samples)
        self._tokens = [consumed.tokens]  # after each step from that one on

    def consumed(self, step: int) -> Consumed:
        """Samples and tokens that the run has read, all ranks together, when `step` is done."""
        while len(self._tokens) <= step - self.steps.step:
            following = self.steps.step + len(self._tokens)
            self._tokens.append(self._tokens[-1] + int(self._lengths(self._step(following)).sum()))
        return Consumed(self.steps.read_by(step), self._tokens[step - self.steps.step])

    def microbatches(self, step: int, mesh: Mesh) -> list[PackedBatch]:
        """This data rank's microbatches of a step."""
        packed = self._packed(self._step(step), mesh)
        if not self.is_random:
            return [batch for _, batch in packed]
        return [with_noise(batch, self._keys(step, items), self.noise) for items, batch in packed]

    def evaluation(self, mesh: Mesh) -> Iterator[list[PackedBatch]]:
        """This rank's share of train.eval_steps batches as large as a step's, or of all validation data."""
        for places in islice(self._stored(self._valid), self.config.train.eval_steps):
            yield [batch for _, batch in self._packed(places, mesh)]

    # ---- what the stage asks ----

    @property
    def digest(self) -> str:
        """What the samples and their order depend on, in 16 hex digits."""
        described: dict[str, Any] = {
            "order": "feistel8-splitmix64/pfair65536/samples/v1",
            "samples": [samples.digest for samples in self.sets[: self.num_train]],
            "weights": self.order.blend.weights,
            "seed": self.config.run.seed,
        }
        return short_digest(described)

    def introduction(self, mesh: Mesh) -> list[str]:
        """What the run is going to read, for people."""
        last = self.steps.last
        return [
            *(line for path, counts in self.counts for line in counts.summary(path, self.settings)),
            *([self.packing(mesh.data_size)] if last > self.steps.step else []),
            f"by step {last} it has read the data {self.steps.epoch(last):.2f} times",
        ]

    def packing(self, data_size: int) -> str:
        """How the first of the steps that are left are packed for so many data ranks, for people."""
        left = range(self.steps.step + 1, self.steps.last + 1)
        lengths = [self._lengths(self._step(step)) for step in left[:_LOOKED_AT]]
        bins = [[int(step[items].sum()) for items in self._bins(step, data_size)] for step in lengths]
        padded = sum(len(step) * max(step) for step in bins)
        tokens, num_bins = sum(map(sum, bins)), sum(map(len, bins))
        return (
            f"{tokens / len(bins):,.0f} tokens a step in {num_bins / len(bins) / data_size:,.1f} microbatches a data "
            f"rank, of any length; padding them to the longest would add {padded / tokens - 1:.2%}"
        )

    def in_order(self, split: Literal["train", "valid"]) -> Iterator[SampleIndex]:
        """Samples in the order in which training reads them, pass after pass, or an evaluation."""
        if split == "train":
            return (SampleIndex(*self.order.place(k)) for k in count())
        return (place for places in self._stored(self._valid) for place in places)

    def everything(self, number: int, mesh: Mesh) -> Iterator[list[tuple[list[SampleIndex], PackedBatch]]]:
        """This rank's share of a set, as many samples at a time as a step has: which are in each microbatch."""
        for places in self._stored([number]):
            yield [([places[i] for i in items], batch) for items, batch in self._packed(places, mesh)]

    # ---- steps ----

    def _step(self, step: int) -> list[SampleIndex]:
        return [SampleIndex(*self.order.place(k)) for k in self.steps.numbers(step)]

    @property
    def _valid(self) -> range:
        return range(self.num_train, len(self.sets))

    def _stored(self, numbers: Sequence[int]) -> Iterator[list[SampleIndex]]:
        """All samples of some sets, as stored, as many at a time as a step has."""
        places = (SampleIndex(number, i) for number in numbers for i in range(len(self.sets[number])))
        while some := list(islice(places, self.config.batch.global_size)):
            yield some

    def _lengths(self, places: Sequence[SampleIndex]) -> np.ndarray:
        return np.array([self.lengths[place.number][place.sample] for place in places], dtype=np.int64)

    def _bins(self, lengths: np.ndarray, data_size: int) -> list[np.ndarray]:
        """Which samples go together: as few microbatches as there can be, as many on each data rank, as even."""
        return pack(lengths, self.capacity, data_size * self.config.parallel.microbatch_multiple)

    def _keys(self, step: int, items: np.ndarray) -> list[int]:
        """Of the random numbers of each sequence of some of a step's samples."""
        first, places, seed = self.steps.numbers(step).start, self._step(step), self.config.run.seed
        counts = [(first + int(i), self.sequences(places[i])) for i in items]
        return [
            derive_key(seed, k, number) >> 1 for k, span in counts for number in range(span.stop - span.start)
        ]

    def _packed(self, places: Sequence[SampleIndex], mesh: Mesh) -> list[tuple[np.ndarray, PackedBatch]]:
        """This data rank's microbatches of the samples, and which of them are in each."""
        bins = self._bins(self._lengths(places), mesh.data_size)[mesh.data_rank :: mesh.data_size]
        total = chosen_targets([self.sets[place.number][place.sample] for place in places])
        batches = (self._collated([places[i] for i in items]) for items in bins)
        return [
            (
                items,
                replace(
                    batch,
                    mismatched=self._mismatched(places, items),
                    step_samples=len(places),
                    step_chosen_targets=total,
                ),
            )
            for items, batch in zip(bins, batches, strict=True)
        ]

    def _mismatched(self, places: Sequence[SampleIndex], items: np.ndarray) -> PackedBatch | None:
        """Prompts of some of a step's samples, each with the reply of the sample before it in the step."""
        if not self.mismatched:
            return None
        sequences = [self.sets[place.number][place.sample].sequences[0] for place in places]
        pairs = (mismatched(sequences[i], sequences[i - 1], self.config.data.sequence_length) for i in items)
        return collate([Sample((pair,)) for pair in pairs], self.config.parallel.token_multiple)

    def _collated(self, places: Sequence[SampleIndex]) -> PackedBatch:
        reference = None
        if self.reference is not None:
            parts = [self.reference[place.number][self.sequences(place)] for place in places]
            reference = torch.cat([torch.empty(0), *parts])
        samples = [self.sets[place.number][place.sample] for place in places]
        return collate(samples, self.config.parallel.token_multiple, reference)

    def sequences(self, place: SampleIndex) -> slice:
        """Which of its set's sequences a sample has."""
        first, last = self.sets[place.number].sample_starts[place.sample : place.sample + 2]
        return slice(int(first), int(last))
