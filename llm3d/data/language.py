"""Tokenized text as a training loop wants it: pretraining's data, and what evaluation reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from llm3d.config import DataSource, PretrainConfig
from llm3d.data.pretraining import IGNORED, Microbatch, PretrainingData, collate
from llm3d.data.steps import Consumed, Steps
from llm3d.errors import InputError
from llm3d.parallel.mesh import Mesh
from llm3d.wording import counted


class ValidationData:
    """data.valid, a pass over which is an evaluation. Raises InputError where the files cannot be used."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.valid = open_sources(config, config.data.valid, "valid") if config.data.valid else None

    def evaluation(self, mesh: Mesh) -> Iterator[list[Microbatch]]:
        """This rank's share of train.eval_steps batches as large as a step's, or of all validation data."""
        assert self.valid is not None, "the settings name validation data"
        config, num_samples = self.config, self.valid.num_windows
        if config.train.eval_steps is not None:
            num_samples = min(num_samples, config.train.eval_steps * config.batch.global_size)
        at_once = config.num_microbatches(mesh.size)
        return evaluation_batches(
            self.valid, num_samples, config.batch.micro, mesh.data_rank, mesh.data_size, at_once
        )


class LanguageData(ValidationData):
    """`llm3d.train.loop.TrainingData` over token files. Raises InputError where they cannot be used."""

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        self.train = open_sources(config, config.data.train, "train")
        windows, needed = self.train.num_windows, config.batch.global_size
        if windows < needed:
            length = counted(config.data.sequence_length, "token")
            raise InputError(
                f"data.train: {counted(windows, 'sequence')} of {length} in all, fewer than one step takes: "
                f"batch.global {needed}; add text, or lower batch.global or data.sequence_length"
            )
        self.steps = Steps(config.batch.global_size, config.train.steps)
        self.resume(0, Consumed(0, 0))

    def resume(self, step: int, consumed: Consumed) -> None:
        """Go on after `step`, by which the run had read `consumed`."""
        self.steps = self.steps.after(step, consumed.samples)
        self.start = consumed

    def consumed(self, step: int) -> Consumed:
        """Samples and tokens that the run has read, all ranks together, when `step` is done."""
        read = self.steps.read_by(step)
        tokens = (read - self.start.samples) * self.config.data.sequence_length
        return Consumed(read, self.start.tokens + tokens)

    @property
    def digest(self) -> str:
        """What the order of samples depends on, in 16 hex digits."""
        return self.train.digest

    def introduction(self, mesh: Mesh) -> list[str]:
        """What the run is going to read, for people."""
        config = self.config
        tokens = config.batch.global_size * config.data.sequence_length
        epochs = self.train.epochs(self.steps.read_by(self.steps.last))
        passes = ", ".join(
            f"{source.path} {times:.2f} times"
            for source, times in zip(config.data.train, epochs, strict=True)
        )
        return [
            f"{tokens:,} tokens a step in {counted(config.num_microbatches(mesh.size), 'microbatch', 'microbatches')} "
            "a data rank",
            f"by step {self.steps.last} it has read {passes}",
        ]

    def microbatches(self, step: int, mesh: Mesh) -> list[Microbatch]:
        """This data rank's microbatches of a step."""
        batch, first_sample = self.config.batch, self.steps.numbers(step).start
        return step_microbatches(
            self.train, first_sample, batch.global_size, batch.micro, mesh.data_rank, mesh.data_size
        )


def open_sources(config: PretrainConfig, sources: Sequence[DataSource], split: str) -> PretrainingData:
    assert config.model.vocab_size is not None, "open_tokenizer has set it"
    return PretrainingData(
        [(source.path, source.weight) for source in sources],
        config.data.sequence_length,
        config.run.seed,
        config.model.vocab_size,
        config.data.split_documents,
        split,
    )


def step_microbatches(
    data: PretrainingData, first_sample: int, global_batch: int, micro: int, data_rank: int, data_size: int
) -> list[Microbatch]:
    """This data rank's share of a step that takes global samples first_sample and on, in their order."""
    share = global_batch // data_size
    first = first_sample + data_rank * share
    return [
        collate([data.sample(k) for k in range(start, start + micro)])
        for start in range(first, first + share, micro)
    ]


def evaluation_batches(
    data: PretrainingData, num_samples: int, micro: int, data_rank: int, data_size: int, at_once: int
) -> Iterator[list[Microbatch]]:
    """Lists of `at_once` microbatches that together hold windows 0 .. num_samples - 1 once, over all data ranks.

    Every data rank gets the same number of microbatches, of the same size; what is beyond num_samples is filled
    with samples without targets.
    """
    windows_at_once = at_once * micro * data_size
    for start in range(0, num_samples, windows_at_once):
        first = start + data_rank * micro
        yield [
            _microbatch(data, first + i * micro * data_size, micro, num_samples)
            for i in range(-(-min(windows_at_once, num_samples - start) // (micro * data_size)))
        ]


def _microbatch(data: PretrainingData, first: int, micro: int, num_samples: int) -> Microbatch:
    batch = collate([data.window(min(index, num_samples - 1)) for index in range(first, first + micro)])
    beyond = max(0, min(micro, first + micro - num_samples))
    if beyond:
        batch.targets[(micro - beyond) * data.sequence_length :] = IGNORED
        return replace(batch, num_targets=int((batch.targets != IGNORED).sum()))
    return batch
