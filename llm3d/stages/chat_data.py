"""Conversations and comparisons as a training loop wants them: steps of whole samples, packed into microbatches.

A step is batch.global samples, whatever the layout; how they are packed changes no number that is trained on. Global
sample k is a pure function of k and run.seed: source by a blend, place by a keyed permutation of each epoch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from llm3d.config import ChatDataConfig, Config, EpochsConfig, SFTConfig, with_steps
from llm3d.data.chat import read_samples
from llm3d.data.formats import Kind
from llm3d.data.order import Blend, derive_key, sample_window
from llm3d.data.packed import PackedBatch, chosen_targets, collate, with_noise
from llm3d.data.packing import pack
from llm3d.data.samples import SampleSet
from llm3d.data.templates import Template, load_template
from llm3d.data.tokenizer import Tokenizer
from llm3d.parallel.mesh import Mesh
from llm3d.stages.tokenizer import open_tokenizer
from llm3d.train.loop import Consumed
from llm3d.train.objective import Objective
from llm3d.train.trainer import Trainer

_LOOKED_AT = 100  # steps from which the share of unused tokens is told


C = TypeVar("C", bound=Config)


class ChatTokenizer:
    """A tokenizer with the template that conversations were put in."""

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        self.tokenizer, self.template = tokenizer, template

    def save_to(self, directory: Path) -> None:
        """Write the files that transformers' AutoTokenizer loads, the template among them."""
        self.tokenizer.save_to(directory)
        self.template.save_to(directory)


class OpenedChat(NamedTuple):
    """What a stage's settings name; see `llm3d.stages.training.Opened`."""

    config: Config
    tokenizer: ChatTokenizer
    data: ChatData
    objective: Objective
    prepare: Callable[[Trainer], None] = lambda trainer: None


def open_chat(config: C, kind: Kind, prompt_loss: bool = False) -> tuple[C, ChatTokenizer, ChatData]:
    """The run's tokenizer and its data; the settings then know their number of steps. Raises InputError."""
    config, tokenizer = open_tokenizer(config)
    data = config.data
    assert tokenizer is not None and isinstance(data, ChatDataConfig), "a model to start from has a tokenizer"
    template = load_template(data.template, tokenizer)
    read = [
        [(source.path, *read_samples(source.path, kind, template, data, prompt_loss)) for source in sources]
        for sources in (data.train, data.valid)
    ]
    train, valid = ([samples for _, samples, _ in split] for split in read)
    said = [f"{path}: {counts}" for split in read for path, _, counts in split]
    config = _with_epochs(config, train)
    return config, ChatTokenizer(tokenizer, template), ChatData(config, train, valid, said)


def _with_epochs(config: C, train: Sequence[SampleSet]) -> C:
    """The steps that train.epochs take, where train.steps does not say."""
    if config.train.steps:
        return config
    assert isinstance(config.train, EpochsConfig) and config.train.epochs, "checked with the settings"
    pairs = zip(config.data.train, train, strict=True)
    samples = config.train.epochs * sum(source.weight * len(found) for source, found in pairs)
    return with_steps(config, max(1, math.ceil(samples / config.batch.global_size)))


class Place(NamedTuple):
    """Of a sample: the number of its set, and its own in the set."""

    number: int
    sample: int


class ChatData:
    """`llm3d.stages.training.StageData` over sample sets.

    sets: one for each of data.train, then one for each of data.valid.
    reference: fp32 [sequences] for each set, which batches then bring along; None: they bring none.
    """

    def __init__(
        self, config: Config, train: Sequence[SampleSet], valid: Sequence[SampleSet], said: Sequence[str] = ()
    ) -> None:
        """said: of the files, for people."""
        assert isinstance(config.data, ChatDataConfig)
        self.said = list(said)
        self.config, self.sets, self.num_train = config, [*train, *valid], len(train)
        self.reference: list[Tensor] | None = None
        alpha = config.sft.neftune_alpha if isinstance(config, SFTConfig) else 0.0
        self.noise = alpha / math.sqrt(config.model.hidden_size)
        self.is_random = bool(alpha or config.lora.dropout)
        self.sizes = [len(samples) for samples in train]
        self.weights = [source.weight for source in config.data.train]
        self.blend = Blend([weight * size for weight, size in zip(self.weights, self.sizes, strict=True)])
        self.lengths = [samples.lengths for samples in self.sets]
        self.capacity = config.batch.micro * config.data.sequence_length
        self.resume(0, Consumed(0, 0))

    # ---- what the loop asks ----

    def resume(self, step: int, consumed: Consumed) -> None:
        """Go on after `step`, by which the run had read `consumed`."""
        self.start_step, self.start = step, consumed
        self._tokens = [consumed.tokens]  # after each step from start_step on

    def consumed(self, step: int) -> Consumed:
        """Samples and tokens that the run has read, all ranks together, when `step` is done."""
        while len(self._tokens) <= step - self.start_step:
            following = self.start_step + len(self._tokens)
            self._tokens.append(self._tokens[-1] + int(self._lengths(self._step(following)).sum()))
        samples = (step - self.start_step) * self.config.batch.global_size
        return Consumed(self.start.samples + samples, self._tokens[step - self.start_step])

    def microbatches(self, step: int, mesh: Mesh) -> list[PackedBatch]:
        """This data rank's microbatches of a step."""
        packed = self._packed(self._step(step), mesh)
        if not self.is_random:
            return [batch for _, batch in packed]
        return [with_noise(batch, self._keys(step, items), self.noise) for items, batch in packed]

    def evaluation(self, mesh: Mesh) -> Iterator[list[PackedBatch]]:
        """This rank's share of train.eval_steps batches as large as a step's, or of all validation data."""
        for places in islice(self._in_order(self.num_train), self.config.train.eval_steps):
            yield [batch for _, batch in self._packed(places, mesh)]

    # ---- what the stage asks ----

    @property
    def digest(self) -> str:
        """What the samples and their order depend on, in 16 hex digits."""
        described: dict[str, Any] = {
            "order": "feistel8-splitmix64/pfair65536/samples/v1",
            "samples": [samples.digest for samples in self.sets[: self.num_train]],
            "weights": self.blend.weights,
            "seed": self.config.run.seed,
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]

    def introduction(self, mesh: Mesh) -> list[str]:
        """What the run is going to read, for people."""
        steps = range(1, min(_LOOKED_AT, self.config.train.steps) + 1)
        lengths = [self._lengths(self._step(step)) for step in steps]
        bins = [[int(step[items].sum()) for items in self._bins(step, mesh)] for step in lengths]
        static = sum(len(step) * max(step) for step in bins)
        tokens = sum(map(sum, bins)) / len(bins)
        passes = self.config.train.steps * self.config.batch.global_size / self.samples_a_pass
        return [
            *self.said,
            f"{tokens:,.0f} tokens a step in {sum(map(len, bins)) / len(bins) / mesh.data_size:,.1f} microbatches "
            f"a data rank, {1 - tokens * len(bins) / static:.2%} less than as many of the longest would hold",
            f"by step {self.config.train.steps} it has read the data {passes:.2f} times",
        ]

    @property
    def samples_a_pass(self) -> float:
        """Samples in one pass over the data, each as often as its source's weight says."""
        return sum(weight * size for weight, size in zip(self.weights, self.sizes, strict=True))

    def everything(self, mesh: Mesh) -> Iterator[list[tuple[list[Place], PackedBatch]]]:
        """This rank's share of all samples, as many at a time as a step has: which are in each microbatch."""
        for places in self._in_order(0):
            yield [([places[i] for i in items], batch) for items, batch in self._packed(places, mesh)]

    # ---- steps ----

    def _step(self, step: int) -> list[Place]:
        first, seed = self._first_sample(step), self.config.run.seed
        numbers = range(first, first + self.config.batch.global_size)
        found = (sample_window(k, self.blend, self.sizes, seed) for k in numbers)
        return [Place(source, index) for source, _, index in found]

    def _first_sample(self, step: int) -> int:
        return self.start.samples + (step - self.start_step - 1) * self.config.batch.global_size

    def _in_order(self, first_set: int) -> Iterator[list[Place]]:
        """All samples from a set on, as stored, as many at a time as a step has."""
        sets = enumerate(self.sets[first_set:], first_set)
        places = (Place(number, i) for number, samples in sets for i in range(len(samples)))
        while some := list(islice(places, self.config.batch.global_size)):
            yield some

    def _lengths(self, places: Sequence[Place]) -> np.ndarray:
        return np.array([self.lengths[place.number][place.sample] for place in places], dtype=np.int64)

    def _bins(self, lengths: np.ndarray, mesh: Mesh) -> list[np.ndarray]:
        """Which samples go together: as few microbatches as there can be, as many on each data rank, as even."""
        interleaved = self.config.parallel.schedule == "interleaved"
        return pack(lengths, self.capacity, mesh.data_size * (mesh.pipeline_size if interleaved else 1))

    def _keys(self, step: int, items: np.ndarray) -> list[int]:
        """Of the random numbers of each sequence of some of a step's samples."""
        first, places, seed = self._first_sample(step), self._step(step), self.config.run.seed
        counts = [(first + int(i), self.sequences(places[i])) for i in items]
        return [
            derive_key(seed, k, number) >> 1 for k, span in counts for number in range(span.stop - span.start)
        ]

    def _packed(self, places: Sequence[Place], mesh: Mesh) -> list[tuple[np.ndarray, PackedBatch]]:
        """This data rank's microbatches of the samples, and which of them are in each."""
        bins = self._bins(self._lengths(places), mesh)[mesh.data_rank :: mesh.data_size]
        total = chosen_targets([self.sets[place.number][place.sample] for place in places])
        batches = (self._collated([places[i] for i in items], mesh) for items in bins)
        return [
            (items, replace(batch, step_samples=len(places), step_chosen_targets=total))
            for items, batch in zip(bins, batches, strict=True)
        ]

    def _collated(self, places: Sequence[Place], mesh: Mesh) -> PackedBatch:
        reference = None
        if self.reference is not None:
            parts = [self.reference[place.number][self.sequences(place)] for place in places]
            reference = torch.cat([torch.empty(0), *parts])
        samples = [self.sets[place.number][place.sample] for place in places]
        return collate(samples, mesh.tensor_size if self.config.parallel.sequence else 1, reference)

    def sequences(self, place: Place) -> slice:
        """Which of its set's sequences a sample has."""
        first, last = self.sets[place.number].sample_starts[place.sample : place.sample + 2]
        return slice(int(first), int(last))
