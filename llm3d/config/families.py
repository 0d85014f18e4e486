"""The families of models that there are, by the model_type of a config.json."""

from __future__ import annotations

from llm3d.config.architecture import Architecture
from llm3d.config.llama import LLAMA
from llm3d.config.qwen3 import QWEN3

ARCHITECTURES: dict[str, Architecture] = {family.model_type: family for family in (LLAMA, QWEN3)}
