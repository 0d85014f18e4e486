"""What stands on top of the transformer. The language head: hidden states to token logits and their loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from llm3d.config import LossConfig
from llm3d.parallel.boxes import Box, Piece, ShardedParameter
from llm3d.parallel.cross_entropy import TokenTerms, cross_entropy_sum, token_terms, token_terms_of_hidden
from llm3d.parallel.layers import column_parallel_linear, vocabulary_range


class LanguageModelHead(nn.Module):
    """Projects to this rank's part of the vocabulary; the loss is computed without gathering the logits.

    tied: the embedding's parameter, where it is on the same stage. Where it is on another, `shared` is the group
    of the two stages: this stage keeps a copy, which the first stage owns, and their gradients are summed.
    recompute: do not keep the logits for backward.
    """

    def __init__(
        self,
        box: Box,
        group: ProcessGroup,
        sequence_parallel: bool,
        tied: ShardedParameter | None,
        shared: ProcessGroup | None,
        loss: LossConfig,
        recompute: bool,
    ) -> None:
        super().__init__()
        self.vocab_size, self.vocabulary = box.size[0], vocabulary_range(box.size[0], group)
        self.loss_config, self.recompute = loss, recompute
        part = box.rows(self.vocabulary.start, len(self.vocabulary))
        if tied is None:
            tied = ShardedParameter.on_meta([Piece(part, owned=shared is None, partial=shared)])
        else:
            tied.uses += 1
        self.weight = tied
        self.group, self.sequence_parallel = group, sequence_parallel

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [tokens, hidden], after the final norm -> [tokens, this rank's part of the vocabulary]."""
        return column_parallel_linear(hidden, self.weight, self.group, self.sequence_parallel)

    def token_terms(self, hidden: Tensor, targets: Tensor) -> TokenTerms:
        """What losses are made of, for each token; hidden as in `logits`, targets: int64 [tokens]."""
        first_id = self.vocabulary.start
        if self.recompute or not torch.is_grad_enabled():
            return token_terms_of_hidden(
                hidden, self.weight, targets, first_id, self.group, self.sequence_parallel
            )
        return token_terms(self.logits(hidden), targets, first_id, self.group)

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The fp32 sum over target tokens of the cross-entropy, the same on all ranks of the tensor group.

        z-loss and label smoothing are part of what is trained, not of an evaluation.
        """
        terms = self.token_terms(hidden, targets)
        if not torch.is_grad_enabled():
            return cross_entropy_sum(terms, targets, self.vocab_size)
        config = self.loss_config
        return cross_entropy_sum(terms, targets, self.vocab_size, config.z_loss, config.label_smoothing)
