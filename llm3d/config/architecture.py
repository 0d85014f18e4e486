"""A family of models, as settings and a config.json know it; `llm3d.models` has the layers of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from llm3d.config.sections import ModelConfig


@dataclass(frozen=True)
class Architecture:
    """A model family, described once for settings, checks, files and plans.

    model_type: in config.json.
    defaults: the fields of config.json that are settings of the model, by their name in both, with what transformers
        takes where the file is silent.
    only: fields that ask for what is not built, with the values that do not; of a list, each entry.
    harmless: further fields that change nothing of what is computed, whatever they say.
    fixed: what is written into config.json beside the settings.
    heads: what config.json says of a model with each kind of head.
    layer_parameters: the number of weights of a layer.
    problems: what a shape, on so many tensor ranks, asks for that cannot be.
    """

    model_type: str
    defaults: dict[str, Any]
    only: dict[str, tuple[Any, ...]]
    fixed: dict[str, Any]
    heads: dict[Literal["language", "score"], dict[str, Any]]
    layer_parameters: Callable[[ModelConfig], int]
    problems: Callable[[ModelConfig, int], Iterator[str]]
    harmless: frozenset[str] = frozenset()
