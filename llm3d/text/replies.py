"""Where the replies stand in a conversation that a chat template has rendered.

A reply starts where generation starts: after its prompt, rendered with add_generation_prompt. It ends with its end
token. Templates may write a message in another way when others follow (Qwen 3 drops the thoughts of earlier turns),
so replies are looked for in the whole conversation as it is rendered, which is what is trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import NamedTuple

from llm3d.errors import InputError
from llm3d.text.conversations import Message
from llm3d.text.rendering import MARKS, Chat, Marks, Rendered, Renderer, unforged_pieces
from llm3d.text.tokenizer import Tokenizer

LOOKS_SPECIAL = re.compile(r"<[|\uff5c][^\s<>|\uff5c]+[|\uff5c]>")
NO_REPLY = -1
# The contents of the conversations on which a template is tried, and a message that calls a tool.
_QUESTION, _ANSWER = "\ue000", "\ue001"
_USER, _ASSISTANT = Message("user", _QUESTION), Message("assistant", _ANSWER)
_CALL = Message(
    "assistant",
    "",
    extra={
        "tool_calls": [{"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}}]
    },
)
_RESULT = Message("tool", _QUESTION, extra={"name": "f", "tool_call_id": "call00000"})


class Special(NamedTuple):
    """A special token in a rendered text: characters [start, stop), and its id."""

    start: int
    stop: int
    token_id: int


class Span(NamedTuple):
    """Characters [start, stop) of a rendered text, and the message whose reply they are, or NO_REPLY."""

    start: int
    stop: int
    message: int


class ReplySpans(NamedTuple):
    """Spans in order. closing: the end of the last reply, where the template leaves it to the next message."""

    spans: list[Span]
    closing: str


class ReplyFinder:
    """How a template begins and ends a reply, tried on conversations of one character a message.

    end_id: the token that ends a reply.  end_ids: all that may; calls of tools may end with another.
    reserved: ids that no text of a conversation may hold.
    Raises InputError for a template from which it cannot be told where a reply starts or ends.
    """

    def __init__(self, renderer: Renderer, tokenizer: Tokenizer) -> None:
        self._renderer, self._tokenizer = renderer, tokenizer
        self._cut_out = frozenset(tokenizer.special_tokens.values())
        exchange, user = self._try(_USER, _ASSISTANT), self._try(_USER)
        prompt = self._try(_USER, prompt=True)
        again = exchange
        with suppress(InputError):  # some templates take one turn alone
            again = self._try(_USER, _ASSISTANT, _USER)
        if _ANSWER not in exchange.text:
            raise self._error("leaves out the text of a reply")
        opening = self._find_opening(user.text, prompt.text, exchange)
        self.end_ids, self._ends_itself, self._next = frozenset[int](), True, {"user": "", "tool": ""}
        self._find_ends(exchange.text, again.text)
        self._find_ends_of_calls(prompt.text)
        self.reserved = self._find_reserved(user.text)
        self._cut_out = self.reserved | tokenizer.control_ids
        # It tells where a reply starts only if no text can hold it.
        self._opening = opening if any(s.token_id in self.reserved for s in self.specials(opening)) else ""

    def find(self, chat: Chat, whole: Rendered, learned: Sequence[bool]) -> ReplySpans:
        """The replies in a rendered conversation; learned: for each message, whether it is one that counts.

        Raises InputError for a reply that counts where its place cannot be found.
        """
        if whole.generated:
            return ReplySpans(self._marked(chat, whole), "")
        spans, at, ended = list[Span](), 0, ""
        text = _Text(whole.text, self.specials(whole.text, chat.marks))
        for i in _places(chat):
            try:
                prompt, conversation = self._prompt(chat, i), self._conversation(chat, i, whole.text)
                start = self._start(prompt, ended, text.text, at, chat.marks)
                stop = self._stop(conversation, text, start, chat.marks)
            except InputError:
                if learned[i]:
                    raise
                continue
            spans.append(Span(start, stop, i))
            at, ended = stop, conversation
        return ReplySpans(spans, self._closing(chat, text, spans))

    def specials(self, text: str, marks: Marks = MARKS) -> list[Special]:
        """The special tokens in a rendered text; what is only spelled like one is none.

        Without tokens that the tokenizer finds in any text, unless they are reserved for the template.
        """
        return [
            Special(at + start, at + stop, index)
            for at, piece in unforged_pieces(text, marks)
            for start, stop, index in self._tokenizer.find_special(piece)
            if index in self._cut_out
        ]

    # ---- in a conversation ----

    def _marked(self, chat: Chat, whole: Rendered) -> list[Span]:
        """What the template says is generated; and, before it, what a prompt does not have."""
        places = list(_places(chat))
        prompts = [self._renderer.render(chat.until(i), prompt=True) for i in places if i]
        counts = [len(prompt.generated) for prompt in prompts][-len(places) + 1 :] if places[1:] else []
        borders = {len(prompt.text) for prompt in prompts if whole.text.startswith(prompt.text)}
        # A special token may take up spaces that follow it.
        stops = {
            stop: s.stop for s in self.specials(whole.text, chat.marks) for stop in range(s.start + 1, s.stop)
        }
        spans = list[Span]()
        for i, (first, last) in zip(places, pairwise([0, *counts, len(whole.generated)]), strict=False):
            spans += [Span(start, stops.get(stop, stop), i) for start, stop in whole.generated[first:last]]
        inside = {at for at in borders if any(span.start <= at < span.stop for span in spans)}
        return sorted([*spans, *(Span(at, at, NO_REPLY) for at in borders - inside)])

    def _prompt(self, chat: Chat, i: int) -> str:
        """What a reply follows."""
        if i:
            return self._renderer.render(chat.until(i), prompt=True).text
        if not self._opening:  # many templates cannot be rendered without a message
            raise self._error("does not tell where a reply starts that is the first message")
        return self._opening

    def _conversation(self, chat: Chat, i: int, whole: str) -> str:
        return whole if i + 1 == len(chat.messages) else self._renderer.render(chat.until(i + 1)).text

    def _start(self, prompt: str, ended: str, whole: str, at: int, marks: Marks) -> int:
        """Where a reply starts. ended: the conversation up to the reply before, which in the whole ends at `at`."""
        if whole.startswith(prompt):
            start = len(prompt)
        else:
            stop = self._last_end(_Text(ended, self.specials(ended, marks)), 0)
            new = prompt[stop:] if prompt.startswith(ended[:stop]) else ""
            same = new and whole.startswith(new, at)
            start = at + len(new) if same else self._after_opening(prompt, whole, at)
        if start < at:
            raise self._error(
                "writes what is before a reply in another way when more follows, so that where the reply starts "
                "cannot be found; with data.turns=split each reply is a sample, or"
            )
        return start

    def _after_opening(self, prompt: str, whole: str, at: int) -> int:
        """Where a reply starts that is asked for as the first is; -1 if none is."""
        _, opening, rest = prompt.rpartition(self._opening) if self._opening else ("", "", "")
        position = whole.find(opening, at)
        if not opening or position < 0 or any(s.token_id in self.end_ids for s in self.specials(rest)):
            return -1
        return position + max(len(opening), self._alike(opening + rest, whole[position:]))

    def _stop(self, conversation: str, whole: _Text, start: int, marks: Marks) -> int:
        """Where a reply that starts there has ended. conversation: up to it, with it."""
        if whole.text.startswith(conversation):
            before = _Text(conversation, [s for s in whole.specials if s.start < len(conversation)])
            after = (s for s in whole.specials if s.start >= len(conversation))
            following = next(after, Special(len(whole.text), len(whole.text), -1))
            stop = self._last_end(before, start) if self._ends_itself else following.stop
        else:
            ends = self.end_ids | {s.token_id for s in self.specials(conversation, marks)[-1:]}
            stop = next((s.stop for s in whole.specials if s.start >= start and s.token_id in ends), 0)
        if stop < start or (self._ends_itself and stop == start):
            raise self._error("writes a reply without an end token, or one that cannot be found")
        return stop

    def _last_end(self, text: _Text, start: int) -> int:
        """Where the token ends that ends the reply at the end of a text; 0 if no special token is there.

        Some templates put more special tokens behind it.
        """
        end, stop = 0, len(text.text)
        for special in reversed(text.specials):
            if special.start < start or text.text[special.stop : stop].strip():
                break
            if not end or special.token_id in self.end_ids:
                end = special.stop
            stop = special.start
        return end

    def _closing(self, chat: Chat, whole: _Text, spans: Sequence[Span]) -> str:
        ends_with_reply = bool(spans) and spans[-1].stop == len(whole.text)
        if self._ends_itself or not ends_with_reply:
            return ""
        return self._next["tool" if chat.messages[-1].get("tool_calls") else "user"]

    # ---- in general ----

    def _find_opening(self, user: str, prompt: str, exchange: Rendered) -> str:
        """What the template writes before every reply, if it can be told from what is before a user's text."""
        start = self._alike(prompt, user)
        begin, before = prompt[start:], exchange.text[: exchange.text.index(_ANSWER)]
        both = begin[: self._alike(begin, before[start:])]
        edges = {special.stop for special in self.specials(both)} | {len(both)}
        edges |= {i + 1 for i, letter in enumerate(both) if letter == "\n"}
        # The least that tells: after it, templates may write an empty thought, or none.
        opening = next((both[:edge] for edge in sorted(edges) if both[:edge] not in user), "")
        if not exchange.generated:
            self._check_opening(prompt, before, start, bool(opening))
        return opening if begin else prompt.rpartition(_QUESTION)[2]

    def _check_opening(self, prompt: str, before: str, start: int, is_telling: bool) -> None:
        """prompt: up to a reply; before: in a conversation; start: of what asks for one."""
        begin, written = shown(prompt[start:]), shown(before[start:])
        if not before.startswith(prompt[:start]):
            raise self._error("writes a prompt in another way when a reply follows it")
        if start == len(prompt) and before[start:].strip():
            raise self._error(
                f"puts {written} before a reply, but not when add_generation_prompt asks for one"
            )
        if not before.startswith(prompt) and not is_telling:
            raise self._error(
                f"asks for a reply with {begin} and puts {written} before one: where a reply starts cannot be found"
            )

    def _find_ends(self, exchange: str, again: str) -> None:
        rest, after = exchange.rpartition(_ANSWER)[2], again.rpartition(_ANSWER)[2]
        ends = self.specials(rest)[:1]
        self._ends_itself = bool(ends)
        ends += [special for special in self.specials(after)[:1] if not after[: special.start].strip()]
        if not ends:
            written = f"{shown(rest)}, which the tokenizer has no special token for" if rest else "nothing"
            raise self._error(f"has no end token after a reply but {written}")
        self.end_id = ends[0].token_id
        self.end_ids = frozenset(special.token_id for special in ends)
        if not self._ends_itself:
            self._next = dict.fromkeys(self._next, after[ends[0].start : ends[0].stop])

    def _find_ends_of_calls(self, prompt: str) -> None:
        with suppress(InputError):  # many templates know nothing of tools
            called = self._try(_USER, _CALL).text
            rest = called[self._alike(called, prompt) :]
            if not self._ends_itself:
                resulted = self._try(_USER, _CALL, _RESULT).text
                rest = resulted[len(called) :] if resulted.startswith(called) else ""
            ends = self.specials(rest)
            if ends and self._ends_itself:
                self.end_ids |= {ends[-1].token_id}
            elif ends:
                self.end_ids |= {ends[0].token_id}
                self._next["tool"] = rest[ends[0].start : ends[0].stop]

    def _find_reserved(self, user: str) -> frozenset[int]:
        """Special tokens, but for those that are markup of texts: tags that stand in pairs, as <think> and </think>.

        With the tokens around a user's text, and <|...|> of any kind, which need not be marked as special.
        """
        known = self._tokenizer.special_tokens
        named = {i for i in (self._tokenizer.bos_id, self._tokenizer.eos_id) if i is not None}
        tags = {index for text, index in known.items() if _other_tag(text) in known} - named
        around = named | self.end_ids | {special.token_id for special in self.specials(user)}
        looking = {index for text, index in known.items() if LOOKS_SPECIAL.fullmatch(text)}
        ids = around | looking | (self._tokenizer.control_ids - tags)
        return frozenset(i for i in ids if (self._tokenizer.token(i) or "").strip())

    def _alike(self, text: str, other: str) -> int:
        """Characters with which both start, up to where a special token or a line ends, or one of them."""
        shorter = min(len(text), len(other))
        both = text[: next((i for i in range(shorter) if text[i] != other[i]), shorter)]
        if len(both) == shorter:
            return shorter
        return max([both.rfind("\n") + 1, *(special.stop for special in self.specials(both))])

    def _try(self, *messages: Message, prompt: bool = False) -> Rendered:
        return _tried(self._renderer, *messages, prompt=prompt)

    def _error(self, what: str) -> InputError:
        return InputError(f"template {self._renderer.name} {what}; choose another template")


class _Text(NamedTuple):
    """A rendered text with its special tokens."""

    text: str
    specials: list[Special]


def missing_tokens(renderer: Renderer, tokenizer: Tokenizer) -> list[str]:
    """What the template writes that looks like special tokens, and that the tokenizer has not."""
    exchange, prompt = _tried(renderer, _USER, _ASSISTANT), _tried(renderer, _USER, prompt=True)
    spellings = LOOKS_SPECIAL.findall(exchange.text + prompt.text)
    return [token for token in dict.fromkeys(spellings) if token not in tokenizer.special_tokens]


def _tried(renderer: Renderer, *messages: Message, prompt: bool = False) -> Rendered:
    return renderer.render(renderer.chat(messages, {}), prompt)


def shown(text: str) -> str:
    """A text for an error: as in Python, and not long."""
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _places(chat: Chat) -> Iterable[int]:
    return (i for i, message in enumerate(chat.messages) if message["role"] == "assistant")


def _other_tag(text: str) -> str | None:
    """</x> for <x> and the other way round; nothing for what is no tag."""
    tag = re.fullmatch(r"<(/?)([a-zA-Z_]\w*)>", text)
    return f"<{'' if tag[1] else '/'}{tag[2]}>" if tag else None
