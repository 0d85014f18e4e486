"""Ways of drawing a token, and rows of logits to draw from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from llm3d.generate.sampling import Choice, Sampling, choose
from llm3d.parallel.layers import vocabulary_range


@dataclass(frozen=True)
class Case:
    sampling: Sampling
    vocab_size: int = 101
    scale: float = 3.0  # of the logits

    def logits(self) -> Tensor:
        return self.scale * torch.randn(3, self.vocab_size, generator=torch.Generator().manual_seed(0))


SEEN = [[1, 5, 5, 0], [], [4, 3]]

CASES = {
    "plain": Case(Sampling()),
    "hot": Case(Sampling(temperature=1.7)),
    "top-k": Case(Sampling(top_k=7)),
    "top-k beyond a rank's part": Case(Sampling(top_k=60, temperature=0.5)),
    "top-k of one": Case(Sampling(top_k=1)),
    "top-k beyond all": Case(Sampling(top_k=500)),
    "top-p": Case(Sampling(top_p=0.8)),
    "top-p of many": Case(Sampling(top_p=0.9), vocab_size=2003, scale=0.1),
    "top-p of almost nothing": Case(Sampling(top_p=1e-6)),
    "min-p": Case(Sampling(min_p=0.2)),
    "penalty": Case(Sampling(repetition_penalty=1.8)),
    "all": Case(Sampling(0.7, top_k=30, top_p=0.9, min_p=0.05, repetition_penalty=0.6)),
    "fewer tokens than ranks": Case(Sampling(top_k=2), vocab_size=5),
}


def drawn(case: Case, numbers: Tensor, group: ProcessGroup) -> Choice:
    logits, count = case.logits(), len(numbers)
    part = vocabulary_range(case.vocab_size, group)
    rows = logits[:, part.start : part.stop].repeat_interleave(count, 0)
    seen = [tokens for tokens in SEEN for _ in range(count)]
    return choose(rows, part.start, group, [case.sampling] * len(rows), numbers.repeat(len(logits)), seen)
