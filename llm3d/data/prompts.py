"""Prompts as reinforcement learning wants them: a step's, in an order that no layout changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from llm3d.config import PPOConfig
from llm3d.corpus.documents import BadRecord
from llm3d.data.chat import Counts, read_prompts
from llm3d.data.order import SampleOrder, held_out
from llm3d.data.samples import Tokens, without_start
from llm3d.data.steps import Consumed, Steps
from llm3d.errors import InputError
from llm3d.parallel.mesh import Mesh
from llm3d.text.templates import Template
from llm3d.text.tokenizer import Tokenizer
from llm3d.wording import counted


@dataclass(frozen=True)
class TokenizedPrompt:
    """number: of its replies' random numbers.  tokens: int32 [length].  shown, row: see PlacedPrompt."""

    number: int
    tokens: np.ndarray
    shown: Any
    row: dict[str, Any]
    where: str


@dataclass(frozen=True)
class PromptSet:
    """What a file has."""

    path: str
    prompts: list[TokenizedPrompt]
    counts: Counts

    def __len__(self) -> int:
        return len(self.prompts)

    def divided(self, share: float, seed: int, source: int) -> tuple[PromptSet, PromptSet]:
        """What is trained on, and what is held out of it for validation."""
        which = held_out(np.arange(len(self)), share, seed, source)  # a prompt is a row
        left, held = (
            [p for p, w in zip(self.prompts, which, strict=True) if w == part] for part in (False, True)
        )
        counts = self.counts.without(len(held))
        path = f"{self.path}, held out for validation"
        return PromptSet(self.path, left, counts), PromptSet(path, held, Counts(samples=len(held)))


def read_prompt_sets(
    template: Template, config: PPOConfig, training: bool = True
) -> tuple[list[PromptSet], list[PromptSet]]:
    """The prompts of data.train and of data.valid. Raises InputError where they cannot be used.

    training: False: those of data.valid alone.
    """
    data = config.data
    sources = data.train if training or isinstance(data.valid, float) else ()
    train = [read_prompt_set(source.path, template, config) for source in sources]
    if not isinstance(data.valid, float):
        return train, [read_prompt_set(source.path, template, config) for source in data.valid]
    parts = [
        prompt_set.divided(data.valid, config.run.seed, number) for number, prompt_set in enumerate(train)
    ]
    valid = [held_out for _, held_out in parts if held_out.prompts]
    if not valid:
        raise InputError(f"data.valid: {data.valid:g} of one row leaves none to train on; name other data")
    return [left for left, _ in parts], valid


def read_prompt_set(path: str, template: Template, config: PPOConfig) -> PromptSet:
    """The prompts in a file that leave room for a reply. Raises InputError where there are none, or one is bad."""
    data, room = config.data, config.data.sequence_length - config.generate.max_new_tokens
    placed, counts = read_prompts(path, data.columns, data.skip_bad)
    prompts = list[TokenizedPrompt]()
    for prompt in placed:
        try:
            tokens = np.array(template.encode_prompt(prompt.messages, prompt.template_kwargs), np.int32)
        except InputError as error:
            if not data.skip_bad:
                raise InputError(f"{prompt.where}: {error}") from None
            counts.bad.append(BadRecord(prompt.where, str(error)))
            continue
        counts.longest = max(counts.longest, len(tokens))
        if len(tokens) > room and data.truncation == "drop":
            counts.too_long += 1
            continue
        if len(tokens) > room:
            tokens = _cut(tokens, room, template.tokenizer)
            counts.cut += 1
        prompts.append(TokenizedPrompt(len(prompts), tokens, prompt.shown, prompt.row, prompt.where))
    if not prompts:
        raise InputError(
            f"{path}: holds no prompt of at most {counted(room, 'token')}, data.sequence_length "
            f"{data.sequence_length} less generate.max_new_tokens {config.generate.max_new_tokens}; raise the "
            "one or lower the other"
        )
    counts.samples = len(prompts)
    return PromptSet(path, prompts, counts)


def _cut(tokens: np.ndarray, length: int, tokenizer: Tokenizer) -> np.ndarray:
    """Without its start; a leading bos stays."""
    return without_start(
        Tokens(tokens, np.zeros(len(tokens), bool)), len(tokens) - length, tokenizer.bos_id
    ).ids


class PromptData:
    """`llm3d.stages.stage.StageData` over prompts; a step's are the same on every rank."""

    def __init__(self, config: PPOConfig, train: Sequence[PromptSet], valid: Sequence[PromptSet]) -> None:
        self.config, self.train, self.valid = config, list(train), list(valid)
        weights = [source.weight for source in config.data.train[: len(train)]]
        self.order = SampleOrder.by_sample(
            weights, [len(prompt_set) for prompt_set in train], config.run.seed
        )
        self.steps = Steps.of(config, self.order.samples_a_pass)
        self.resume(0, Consumed(0, 0))

    def resume(self, step: int, consumed: Consumed) -> None:
        """Go on after `step`, by which the run had read `consumed`."""
        self.steps = self.steps.after(step, consumed.samples)
        self._tokens = {step: consumed.tokens}  # after each step

    def record(self, tokens: int) -> None:
        """Say how many tokens the step's prompts and replies had, when they are written."""
        last = max(self._tokens)
        self._tokens[last + 1] = self._tokens[last] + tokens

    def consumed(self, step: int) -> Consumed:
        """Prompts, and tokens with those of replies, that the run has read when `step`, which is done, is done."""
        return Consumed(self.steps.read_by(step), self._tokens[step])

    def microbatches(self, step: int, mesh: Mesh) -> list[TokenizedPrompt]:
        """All prompts of a step, numbered over the run."""
        places = ((k, self.order.place(k)) for k in self.steps.numbers(step))
        return [replace(self.train[source].prompts[i], number=k) for k, (source, i) in places]

    def evaluation(self, mesh: Mesh) -> Iterator[list[TokenizedPrompt]]:
        """train.eval_steps batches as large as a step's, or all validation prompts."""
        prompts = (prompt for some in self.valid for prompt in some.prompts)
        numbered = (replace(prompt, number=-1 - i) for i, prompt in enumerate(prompts))
        size = self.config.batch.global_size
        return islice(iter(lambda: list(islice(numbered, size)), []), self.config.train.eval_steps)

    @property
    def digest(self) -> str:
        """What the prompts and their order depend on, in 16 hex digits."""
        hasher = hashlib.sha256()
        described = {"order": "feistel8-splitmix64/pfair65536/prompts/v1", "seed": self.config.run.seed}
        hasher.update(json.dumps(described | {"weights": self.order.blend.weights}).encode())
        for prompt in (prompt for some in self.train for prompt in some.prompts):
            hasher.update(prompt.tokens.tobytes() + b"\0")
        return hasher.hexdigest()[:16]

    def introduction(self, mesh: Mesh) -> list[str]:
        """What the run is going to read, for people."""
        batch, last = self.config.batch.global_size, self.steps.last
        replies = self.config.generate.num_replies
        return [
            *(
                line
                for p in (*self.train, *self.valid)
                for line in p.counts.summary(p.path, self.config.data)
            ),
            f"{counted(batch, 'prompt')} a step, {counted(replies, 'reply', 'replies')} to each; "
            f"by step {last} it has read them {self.steps.epoch(last):.2f} times",
        ]
