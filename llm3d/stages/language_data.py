"""Tokenised text as a training loop wants it: pretraining's data, and what evaluation reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from llm3d.config import DataSource, PretrainConfig
from llm3d.data.batches import evaluation_batches, step_microbatches
from llm3d.data.pretraining import Microbatch, PretrainingData
from llm3d.errors import InputError
from llm3d.parallel.mesh import Mesh
from llm3d.train.loop import Consumed
from llm3d.train.steps import Steps
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
