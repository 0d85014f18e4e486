"""Chat templates rendered as transformers renders them, but that no text can forge a special token.

Where a message, a tool or a document spells a token that only the template may write, private-use characters are put
around the spelling before the template sees it, as transformers does with `sanitize_control_tokens=True`. So the
template can still look at contents, and what it writes itself can be told from what it was given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llm3d.errors import InputError
from llm3d.text.conversations import Fields, Message
from llm3d.wording import first_line

_PRIVATE = range(0x10FF00, 0x10FFFE)  # the end of the last private-use area
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the first is what most templates read


class Marks(NamedTuple):
    """Characters that no text of a conversation has: around what it forges, and around what the model generates."""

    forged: str
    end_forged: str
    generated: str
    end_generated: str


MARKS = Marks(*map(chr, _PRIVATE[:4]))


class Chat(NamedTuple):
    """What a template is rendered with: messages as transformers gives them to it, and what goes beside them."""

    messages: list[dict[str, Any]]
    kwargs: dict[str, Any]
    marks: Marks

    def until(self, stop: int) -> Chat:
        return self._replace(messages=self.messages[:stop])


class Rendered(NamedTuple):
    """text: with the marks of what was forged.  generated: what {% generation %} is around, [start, stop)."""

    text: str
    generated: list[tuple[int, int]]


class Renderer:
    """A template, and the variables that are the same for every conversation.

    special_tokens: bos_token, eos_token, ... as they are spelled.
    Raises InputError for a source that is not Jinja.
    """

    def __init__(self, name: str, source: str, special_tokens: Mapping[str, str]) -> None:
        self.name, self._special_tokens = name, dict(special_tokens)
        self._template = _compile(name, source)
        self.reserve(())

    def reserve(self, spellings: Sequence[str]) -> None:
        """Name the special tokens that no text may hold."""
        pattern = "|".join(map(re.escape, sorted(spellings, key=len, reverse=True)))
        self._reserved = re.compile(pattern or "(?!)")
        self._suspicious = re.compile(f"{pattern or '(?!)'}|[{''.join(MARKS)}]")

    def chat(self, messages: Sequence[Message], kwargs: Fields) -> Chat:
        """Messages and keyword arguments in which every special token that must not be written is marked."""
        fields, others = [_fields(message) for message in messages], dict(kwargs)
        texts = list(_texts([fields, others]))
        if not any(self._suspicious.search(text) for text in texts):
            return Chat(fields, others, MARKS)
        marks = _unused("".join(texts))
        put = rf"{marks.forged}\g<0>{marks.end_forged}"
        fields, others = _mapped([fields, others], lambda text: self._reserved.sub(put, text))
        return Chat(fields, others, marks)

    def render(self, chat: Chat, prompt: bool = False) -> Rendered:
        """The text of a conversation; prompt: a reply is to follow. Raises InputError where the template does."""
        variables = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **chat.kwargs,
            "messages": chat.messages,
            "add_generation_prompt": prompt,
            "_marks": chat.marks,
        }
        try:
            text = self._template.render(variables)
        except Exception as error:  # a template is a program, and stops as it likes
            roles = ", ".join(message["role"] for message in chat.messages)
            raise InputError(
                f"template {self.name} does not take messages of {roles} ({first_line(error)}); "
                "choose another template"
            ) from error
        for mark in chat.marks[:2]:  # where JSON is written in ASCII
            text = text.replace(json.dumps(mark)[1:-1], mark)
        return _split_generated(text, chat.marks)


def unforged_pieces(text: str, marks: Marks) -> Iterator[tuple[int, str]]:
    """What the template wrote, and texts that forge nothing, between what does: where each stands, and it."""
    opening, closing = marks[:2]
    at = 0
    if opening in text or closing in text:
        for match in re.finditer(f"{opening}[^{opening}{closing}]*{closing}|[{opening}{closing}]", text):
            yield at, text[at : match.start()]
            at = match.end()
    yield at, text[at:]


def without_marks(text: str, marks: Marks) -> str:
    """The text that is meant, with what it forges."""
    return text.replace(marks.forged, "").replace(marks.end_forged, "")


def _split_generated(text: str, marks: Marks) -> Rendered:
    """Take out the marks of what is generated, and say where they were."""
    if marks.generated not in text:
        return Rendered(text, [])
    pieces, spans, length, start = [], [], 0, 0
    for piece in re.split(f"([{marks.generated}{marks.end_generated}])", text):
        if piece == marks.generated:
            start = length
        elif piece == marks.end_generated:
            spans.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return Rendered("".join(pieces), [span for span in spans if span[0] < span[1]])


def _fields(message: Message) -> dict[str, Any]:
    """A message as transformers gives it to a template: nothing that is null, and thoughts by the usual names."""
    fields = {"role": message.role, "content": message.content, **message.extra}
    thought = next((fields[name] for name in _REASONING if fields.get(name) is not None), None)
    if thought is not None:
        fields = {"thinking": thought, **fields, "reasoning_content": thought}
    return {name: value for name, value in fields.items() if value is not None}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, held in value.items():
            yield from _texts(key)
            yield from _texts(held)
    elif isinstance(value, list | tuple):
        for held in value:
            yield from _texts(held)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with all its texts changed, those of keys as well."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(held, change) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(held, change) for held in value]
    return value


def _unused(text: str) -> Marks:
    """Marks that a text does not have."""
    return Marks(*islice((chr(code) for code in _PRIVATE if chr(code) not in text), len(Marks._fields)))


def _compile(name: str, source: str) -> jinja2.Template:
    """A template in the environment that transformers gives to templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    now = datetime.now()  # one time for all renders, which are compared with each other
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = now.strftime
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"template {name} line {error.lineno}: not Jinja ({first_line(error)})") from error


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, around replies in some templates: what is inside, marked."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return [self._mark("generated"), jinja2.nodes.Scope(body), self._mark("end_generated")]

    def _mark(self, name: str) -> jinja2.nodes.Node:
        marks = jinja2.nodes.Name("_marks", "load")
        return jinja2.nodes.Output([jinja2.nodes.Getattr(marks, name, "load")])


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes what HTML would read."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
