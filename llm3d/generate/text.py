"""From tokens to text as they come, and where a reply ends."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

_NO_CHARACTER = "\ufffd"  # what half a character is decoded to


class Decoder(Protocol):
    """What is asked of a tokenizer; `llm3d.data.tokenizer.Tokenizer` is one."""

    def decode_next(self, ids: Iterable[int]) -> str: ...
    @property
    def special_tokens(self) -> dict[str, int]: ...


class Replies:
    """What is text in replies, and what ends them.

    end_ids: tokens after which a reply is done.  stop: strings at which it is; they are no part of the text.
    """

    def __init__(self, tokenizer: Decoder, end_ids: Collection[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.end_ids, self.stop = tokenizer, frozenset(end_ids), tuple(stop)
        self.special = frozenset(tokenizer.special_tokens.values()) | self.end_ids
        # A token is a byte or more; one that is cut in half may stand before.
        self.reach = 1 + max((len(text.encode()) for text in stop), default=0)

    def ends(self, tokens: Sequence[int]) -> bool:
        if tokens[-1] in self.end_ids:
            return True
        return bool(self.stop) and self._stop_in(self._decoded(tokens[-self.reach :])) is not None

    def text(self, tokens: Sequence[int]) -> str:
        """Without special tokens, up to the first of the strings that end it."""
        text = self._decoded(tokens)
        return text[: self._stop_in(text)]

    def settled(self, tokens: Sequence[int]) -> str:
        """Of the text of a reply in the making, what later tokens do not change."""
        text = self._decoded(tokens).rstrip(_NO_CHARACTER)
        if (end := self._stop_in(text)) is not None:
            return text[:end]
        most = min(self.reach, len(text))
        held = next((n for n in range(most, 0, -1) if self._may_become_stop(text[-n:])), 0)
        return text[: len(text) - held]

    def _may_become_stop(self, ending: str) -> bool:
        return any(len(ending) < len(stop) and stop.startswith(ending) for stop in self.stop)

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode_next([token for token in tokens if token not in self.special])

    def _stop_in(self, text: str) -> int | None:
        """Where the first of the strings that end a reply starts."""
        return min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=None)
