"""The section `data`: what is trained on, how it is read, and how long a sample may be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from llm3d.config.base import Name, OneOrMore, Positive, Section


class DataSource(Section):
    """A corpus of tokens and its share in the blend. A path alone stands for a source of weight 1."""

    path: Name
    """Megatron data path: the path of a .bin/.idx pair without its ending."""
    weight: float = Field(1.0, gt=0)
    """Blend weight: the source's share of the samples, relative to the other sources."""

    @model_validator(mode="before")
    @classmethod
    def _bare_path(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "minLength": 1}, handler(schema)]}


class ChatSource(DataSource):
    """Files of conversations, comparisons or prompts. A path alone stands for a source of weight 1."""

    path: Name
    """Data path: a .jsonl, .json or .parquet file, a directory of them, or a pattern."""
    weight: float = Field(1.0, gt=0)
    """Sampling weight: the number of times that each sample of the source is read in one epoch."""


HeldOutShare = Annotated[float, Field(gt=0, lt=1)]


class DataConfig(Section):
    """Training and validation data."""

    train: Annotated[tuple[DataSource, ...], Field(min_length=1), OneOrMore()]
    """Training data: a path, a source {path, weight}, or a list of them."""
    valid: Annotated[HeldOutShare | tuple[DataSource, ...], OneOrMore()] = ()
    """Validation data: a path, a source {path, weight}, or a list of them."""
    sequence_length: Positive
    """Sequence length, tokens: the length of a pretraining sample; the maximum length of any other sample."""
    tokenizer: Name | None = None
    """Tokenizer: a tokenizer.model or tokenizer.json, or the directory of one."""


class TokenDataConfig(DataConfig):
    """Tokens from `llm3d data tokenize`, or from Megatron."""

    valid: Annotated[tuple[DataSource, ...], OneOrMore()] = ()
    """Validation data: a path, a source {path, weight}, or a list of them."""
    split_documents: bool = True
    """Document attention mask: attention does not cross from one document of a sample into the next."""


class ChatDataConfig(DataConfig):
    """Conversations, replies to compare, or prompts. No sample is longer than sequence_length."""

    train: Annotated[tuple[ChatSource, ...], Field(min_length=1), OneOrMore()]
    """Training data: a path, a source {path, weight}, or a list of them."""
    valid: Annotated[HeldOutShare | tuple[ChatSource, ...], OneOrMore()] = ()
    """Validation data: files as for training, or a share of the rows of each of data.train, such as 0.1, that is held
    out of it: whole conversations, comparisons or prompts. Which ones depends on run.seed."""
    tokenizer: Name | None = None
    """Tokenizer: a tokenizer.model or tokenizer.json, or the directory of one. Null: that of model.path."""
    format: Name = "auto"
    """Data format: alpaca, sharegpt, messages, question_answer, preference or ranked. auto: found by the columns."""
    columns: dict[str, str] = Field({})
    """Column mapping from the format's names to those of the files, such as {prompt: question}."""
    template: Name = "auto"
    """Chat template: alpaca, chatml, llama2, llama3, or the path of a .jinja file. auto: the tokenizer's own, else
    alpaca."""
    turns: Literal["all", "last", "split"] = "all"
    """Trained turns of a conversation with several replies. all: every reply; last: the last one; split: every reply,
    each as a sample that ends with it."""
    truncation: Literal["drop", "left", "right"] = "drop"
    """Truncation of samples longer than sequence_length. drop: they are left out; left: their start is cut off; right:
    their end is cut off. A sample that is left without a reply is left out, too."""
    skip_bad: bool = False
    """Skip invalid samples: samples that cannot be used, for another reason than their length, are left out and
    counted. false: the first ones end the command."""

    @property
    def valid_sources(self) -> tuple[ChatSource, ...]:
        return () if isinstance(self.valid, float) else self.valid
