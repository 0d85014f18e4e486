"""What stands on top of the transformer: a projection to token logits, or to a number a token.

A head does not know what it is trained for: it gives its output to an `OutputFunction`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from llm3d.parallel.boxes import Box, Piece, ShardedParameter
from llm3d.parallel.collectives import gather_equal_gradients
from llm3d.parallel.cross_entropy import (
    TokenTerms,
    entropy_of_hidden,
    entropy_of_logits,
    fits_one_chunk,
    token_terms,
    token_terms_of_hidden,
)
from llm3d.parallel.layers import add_to_main_grad, column_parallel_linear, vocabulary_range

HeadName = Literal["language", "score"]
SCORE = "score.weight"  # the name in transformers' LlamaForSequenceClassification


class OutputFunction(Protocol):
    """Turns what the head says of a microbatch into numbers."""

    def __call__(self, output: Any, batch: Any) -> Tensor:
        """output: `TokenTerms` from the language head, scores, fp32 [tokens], from the score head.

        -> fp32 [numbers], the first of which is differentiated; the same on all ranks of the tensor group.
        """


class OfLogits:
    """What is made of the logits themselves, where none is differentiated: a token, for instance."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        """function: of [tokens, this rank's part of the vocabulary]."""
        self.function = function


class LanguageModelHead(nn.Module):
    """Projects to this rank's part of the vocabulary; no logits are gathered.

    temperature: what logits are divided by before losses are made of them; not 1 where tokens are drawn at another.
    tied: the embedding's parameter, where it is on the same stage. Where it is on another, `shared` is the group
    of the two stages: this stage keeps a copy, which the first stage owns, and their gradients are summed.
    recompute: do not keep the logits for backward. Those that are kept are few: more are computed a chunk of tokens at
    a time, and again in backward, in any case.
    """

    def __init__(
        self,
        box: Box,
        group: ProcessGroup,
        sequence_parallel: bool,
        tied: ShardedParameter | None,
        shared: ProcessGroup | None,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.vocabulary, self.recompute = vocabulary_range(box.size[0], group), recompute
        part = box.rows(self.vocabulary.start, len(self.vocabulary))
        if tied is None:
            tied = ShardedParameter.on_meta([Piece(part, owned=shared is None, partial=shared)])
        else:
            tied.uses += 1
        self.weight = tied
        self.group, self.sequence_parallel, self.temperature = group, sequence_parallel, 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [tokens, hidden], after the final norm -> [tokens, this rank's part of the vocabulary]."""
        return column_parallel_linear(hidden, self.weight, self.group, self.sequence_parallel)

    def token_terms(self, hidden: Tensor, targets: Tensor) -> TokenTerms:
        """What losses are made of, for each token; hidden as in `logits`, targets: int64 [tokens]."""
        first_id = self.vocabulary.start
        if self.temperature != 1:
            hidden = hidden / self.temperature
        if self.recompute or not torch.is_grad_enabled() or not fits_one_chunk(len(targets), self.weight):
            where = self.group, self.sequence_parallel
            terms = token_terms_of_hidden(hidden, self.weight, targets, first_id, *where)
            return terms._replace(entropy=lambda: entropy_of_hidden(hidden, self.weight, *where))
        logits = self.logits(hidden)
        terms = token_terms(logits, targets, first_id, self.group)
        return terms._replace(entropy=lambda: entropy_of_logits(logits, self.group))

    def forward(self, hidden: Tensor, batch: Any, objective: OutputFunction | OfLogits) -> Tensor:
        """What the objective makes of the targets' log-probabilities, or of the logits."""
        if isinstance(objective, OfLogits):
            return objective.function(self.logits(hidden))
        return objective(self._terms(hidden, batch), batch)

    def _terms(self, hidden: Tensor, batch: Any) -> TokenTerms:
        """Of every token; where prompts make up much of the batch, computed for those alone that are targets.

        Not under sequence parallelism, where the tokens are not yet gathered.
        """
        targets, num_targets = batch.targets, batch.num_targets
        if self.sequence_parallel or not 0 < 4 * num_targets < 3 * len(targets):
            return self.token_terms(hidden, targets)
        places = torch.nonzero_static(targets >= 0, size=num_targets)[:, 0]
        return self.token_terms(hidden[places], targets[places]).spread(places, len(targets))


class ScoreHead(nn.Module):
    """A number for each token: the reward of the text so far, or its value. All tensor ranks hold the same weights.

    Under sequence parallelism each rank scores its share of the tokens, and the weight's gradient is a partial sum.
    """

    def __init__(self, box: Box, group: ProcessGroup, sequence_parallel: bool) -> None:
        super().__init__()
        self.group = group if sequence_parallel else None
        self.weight = ShardedParameter.on_meta([Piece(box, owned=group.rank() == 0, partial=self.group)])

    def forward(self, hidden: Tensor, batch: Any, objective: OutputFunction) -> Tensor:
        """What the objective makes of the scores. Sequence parallelism: all_gather of [tokens], fp32."""
        scores = _Score.apply(hidden, self.weight)
        return objective(scores if self.group is None else gather_equal_gradients(scores, self.group), batch)


class _Score(Function):
    """hidden [tokens, hidden] @ weight [1, hidden], in fp32 -> [tokens]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: ShardedParameter) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.weight = weight
        return hidden.float() @ weight[0].float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_output,), (hidden,) = grads, ctx.saved_tensors
        grad_hidden = torch.outer(grad_output, ctx.weight[0].float()).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            add_to_main_grad(ctx.weight, (grad_output @ hidden.float())[None])
        return grad_hidden, None
