"""Conversations, comparisons of replies, and prompts: what chat templates render and data files hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Role = Literal["system", "user", "assistant", "tool"]
Fields = Mapping[str, Any]  # JSON values by name


class Message(NamedTuple):
    """is_learned: False for a reply that is context alone.

    extra: what else of the message a chat template may read: tool_calls, reasoning_content, name, ...
    """

    role: Role
    content: str
    is_learned: bool = True
    extra: Fields = {}  # noqa: RUF012 (nothing writes to it)


@dataclass(frozen=True)
class Conversation:
    """Messages of which the last is a reply; which roles follow each other is for the chat template to say.

    template_kwargs: what the chat template reads beside messages: tools, documents, enable_thinking, ...
    """

    messages: tuple[Message, ...]
    template_kwargs: Fields = field(default_factory=dict)


@dataclass(frozen=True)
class LabeledReply:
    """A conversation whose last message is a reply, and whether such a reply is desirable."""

    messages: tuple[Message, ...]
    desirable: bool
    template_kwargs: Fields = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Replies to one prompt and how good each is.

    prompt: as a conversation's messages, up to a user's or a tool's.  replies: each ends with the assistant.
    ranks: one a reply, lower is better, not all equal.  margin: by how much the better one of two is better.
    """

    prompt: tuple[Message, ...]
    replies: tuple[tuple[Message, ...], ...]
    ranks: tuple[float, ...]
    margin: float | None = None
    template_kwargs: Fields = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """What is to be replied to: as a conversation's messages, up to a user's or a tool's."""

    messages: tuple[Message, ...]
    template_kwargs: Fields = field(default_factory=dict)


Item = Conversation | LabeledReply | Comparison | Prompt
