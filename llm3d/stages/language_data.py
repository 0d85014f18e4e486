"""Tokenised text as a training loop wants it: pretraining's data, and what evaluation reads."""

from __future__ import annotations

from collections.abc import Iterator

from llm3d.config import Config, with_vocab_size
from llm3d.data.batches import evaluation_batches, step_microbatches
from llm3d.data.pretraining import Microbatch, PretrainingData
from llm3d.data.tokenizer import Tokenizer, load_tokenizer
from llm3d.errors import InputError
from llm3d.parallel.mesh import Mesh


def open_tokenizer(config: Config) -> tuple[Config, Tokenizer | None]:
    """The run's tokenizer, if it has one; its size becomes model.vocab_size where that is not set.

    Raises InputError where the two disagree.
    """
    if config.data.tokenizer is None:
        if config.model.vocab_size is None:
            raise InputError("model.vocab_size: not set; set it, or data.tokenizer, which tells it")
        return config, None
    tokenizer = load_tokenizer(config.data.tokenizer)
    if config.model.vocab_size is None:
        return with_vocab_size(config, tokenizer.vocab_size), tokenizer
    if tokenizer.vocab_size > config.model.vocab_size:
        raise InputError(
            f"data.tokenizer: {config.data.tokenizer} has {tokenizer.vocab_size} tokens, more than "
            f"model.vocab_size {config.model.vocab_size}; give the model's own tokenizer, or a larger vocab_size"
        )
    return config, tokenizer


class LanguageData:
    """`llm3d.train.loop.TrainingData` over token files. Opening checks the files, before any process group exists."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.train = self._open(config.data.train, "train")
        self.valid = self._open(config.data.valid, "valid") if config.data.valid else None
        self.mesh: Mesh | None = None

    def _open(self, sources: tuple, split: str) -> PretrainingData:
        config = self.config
        assert config.model.vocab_size is not None, "open_tokenizer has set it"
        return PretrainingData(
            [(source.path, source.weight) for source in sources],
            config.data.sequence_length,
            config.run.seed,
            config.model.vocab_size,
            config.data.split_documents,
            split,
        )

    def check_batch(self) -> None:
        """Raise InputError where the training data does not fill one step's batch."""
        windows, needed = self.train.num_windows, self.config.batch.global_size
        if windows < needed:
            raise InputError(
                f"data.train: {windows} sequences of {self.config.data.sequence_length} tokens in all, fewer than "
                f"one step takes: batch.global {needed}; add text, or lower batch.global or data.sequence_length"
            )

    def microbatches(self, step: int) -> list[Microbatch]:
        assert self.mesh is not None, "the layout is known before training starts"
        batch = self.config.batch
        return step_microbatches(
            self.train, step, batch.global_size, batch.micro, self.mesh.data_rank, self.mesh.data_size
        )

    def evaluation(self) -> Iterator[list[Microbatch]]:
        """train.eval_steps batches as large as a step's, or all validation data."""
        assert self.mesh is not None and self.valid is not None, "the settings name validation data"
        config = self.config
        num_samples = self.valid.num_windows
        if config.train.eval_steps is not None:
            num_samples = min(num_samples, config.train.eval_steps * config.batch.global_size)
        return evaluation_batches(
            self.valid,
            num_samples,
            config.batch.micro,
            self.mesh.data_rank,
            self.mesh.data_size,
            at_once=config.num_microbatches(self.mesh.size),
        )
