"""What stages on conversations and comparisons share: the settings, the data and the objective, opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from llm3d.config import Config
from llm3d.data.conversations import ChatData
from llm3d.parallel.mesh import Mesh
from llm3d.text.chat_tokenizer import ChatTokenizer
from llm3d.train.objective import Objective, names_of
from llm3d.train.trainer import Evaluator, Trainer


class OpenedChat(NamedTuple):
    """What a stage's settings name; see `llm3d.stages.run.Opened`."""

    config: Config
    tokenizer: ChatTokenizer
    data: ChatData
    objective: Objective
    prepare: Callable[[Evaluator], None] = lambda model: None
    remarks: Callable[[Evaluator], Sequence[str]] = lambda model: ()

    @property
    def validation_names(self) -> Sequence[str]:
        return names_of(self.objective)

    def trainer(self, mesh: Mesh) -> Trainer:
        return Trainer(self.config, mesh, self.objective)
