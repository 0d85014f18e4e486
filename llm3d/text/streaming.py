"""From tokens to text as they come, and where a reply ends."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

_NO_CHARACTER = "\ufffd"  # what part of a character is decoded to
_MOST_BYTES = 4  # of a character


class Decoder(Protocol):
    """What is asked of a tokenizer; `llm3d.text.tokenizer.Tokenizer` is one."""

    vocab_size: int

    def decode_next(self, ids: Iterable[int]) -> str: ...
    @property
    def control_ids(self) -> frozenset[int]: ...


class Detokenizer:
    """From the tokens of replies to their text, and what ends a reply.

    end_ids: tokens after which a reply is done.  stop: strings at which it is; they are no part of the text.
    """

    def __init__(self, tokenizer: Decoder, end_ids: Collection[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.end_ids, self.stop = tokenizer, frozenset(end_ids), tuple(stop)
        self.silent = tokenizer.control_ids | self.end_ids
        self.reach = max((len(text.encode()) for text in stop), default=0)  # a token is a byte or more

    def ends(self, tokens: Sequence[int]) -> bool:
        if tokens[-1] in self.end_ids:
            return True
        return bool(self.stop) and self._stop_in(self._ending(tokens)) is not None

    def _ending(self, tokens: Sequence[int]) -> str:
        """Text at the end, not less than a stop string is long, and from the start of a character on."""
        spoken = self._spoken(tokens)
        for start in range(len(spoken) - self.reach - 1, len(spoken) - self.reach - 1 - _MOST_BYTES, -1):
            text = self.tokenizer.decode_next(spoken[max(0, start) :])
            if start <= 0 or not text.startswith(_NO_CHARACTER):
                break
        return text

    def text(self, tokens: Sequence[int]) -> str:
        """Without tokens that are no text, up to the first of the strings that end it."""
        text = self.tokenizer.decode_next(self._spoken(tokens))
        return text[: self._stop_in(text)]

    def settled(self, tokens: Sequence[int]) -> str:
        """Of the text of a reply in the making, what later tokens do not change.

        Less than before where a tokenizer shows nothing of a run of bytes that ends inside a character.
        """
        text = self.tokenizer.decode_next(self._spoken(tokens)).rstrip(_NO_CHARACTER)
        if (end := self._stop_in(text)) is not None:
            return text[:end]
        most = min(self.reach, len(text))
        held = next((n for n in range(most, 0, -1) if self._may_become_stop(text[-n:])), 0)
        return text[: len(text) - held]

    def _may_become_stop(self, ending: str) -> bool:
        return any(len(ending) < len(stop) and stop.startswith(ending) for stop in self.stop)

    def _spoken(self, tokens: Sequence[int]) -> list[int]:
        """A model may have more tokens than its tokenizer; those are no text either."""
        known = self.tokenizer.vocab_size
        return [token for token in tokens if token not in self.silent and token < known]

    def _stop_in(self, text: str) -> int | None:
        """Where the first of the strings that end a reply starts."""
        return min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=None)


class StreamPrinter:
    """A reply as it is written: what is new of it, and never again what was there."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self.detokenizer, self.so_far = detokenizer, ""

    def more(self, tokens: Sequence[int]) -> str:
        """What the tokens so far add."""
        return self.up_to(self.detokenizer.settled(tokens))

    def up_to(self, text: str) -> str:
        if not text.startswith(self.so_far):
            return ""
        added, self.so_far = text[len(self.so_far) :], text
        return added
