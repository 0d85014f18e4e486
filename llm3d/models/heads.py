"""What stands on top of the transformer. The language head: hidden states to token logits and their loss."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from llm3d.parallel.boxes import Box, Piece, ShardedParameter
from llm3d.parallel.cross_entropy import cross_entropy_sum
from llm3d.parallel.layers import column_parallel_linear, vocabulary_range


class LanguageModelHead(nn.Module):
    """Projects to this rank's part of the vocabulary; the loss is computed without gathering the logits.

    tied: the embedding's parameter, where it is on the same stage. Where it is on another, `shared` is the group
    of the two stages: this stage keeps a copy, which the first stage owns, and their gradients are summed.
    """

    def __init__(
        self,
        box: Box,
        group: ProcessGroup,
        sequence_parallel: bool,
        tied: ShardedParameter | None,
        shared: ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.vocabulary = vocabulary_range(box.size[0], group)
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

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The fp32 sum over target tokens of the cross-entropy, the same on all ranks of the tensor group."""
        return cross_entropy_sum(self.logits(hidden), targets, self.vocabulary.start, self.group)
