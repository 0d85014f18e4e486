"""Conversations as tokens, and which of the tokens a model learns to write.

A chat template is Jinja text, as transformers has it. It is rendered once for every order of roles, with marks in
the places of contents, and so taken apart into the template's own text, in which special tokens are meant, and
contents, in which they never are. A reply's tokens are those that follow the tokens of its prompt: nothing is
merged across that border, so that training sees what generation will see.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llm3d.data.documents import first_line
from llm3d.data.formats import INPUT_HEADING, Comparison, Conversation, Message, Role
from llm3d.data.tokenizer import Tokenizer, read_json
from llm3d.errors import InputError

BUILT_IN = {
    # Taori et al. 2023, Stanford Alpaca
    "alpaca": (
        "{{ bos_token }}"
        "{% if messages[0].role != 'system' %}"
        "Below is an instruction that describes a task"
        "{% if has_input | default('\n\n### Input:\n' in messages[0].content) %}"
        ", paired with an input that provides further context"
        "{% endif %}"
        ". Write a response that appropriately completes the request."
        "{% endif %}"
        "{% for message in messages %}"
        "{% if message.role == 'user' %}"
        "{{ '\n\n### Instruction:\n' + message.content + '\n\n### Response:\n' }}"
        "{% else %}{{ message.content }}{{ eos_token if message.role == 'assistant' }}{% endif %}"
        "{% endfor %}"
    ),
    # OpenAI's chat markup, as Qwen and others have it
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    ),
    # Touvron et al. 2023, Llama 2
    "llama2": (
        "{% if messages[0].role == 'system' %}"
        "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}"
        "{% endif %}"
        "{% for message in messages %}"
        "{% if message.role == 'user' %}"
        "{{ bos_token + '[INST] ' + (((system or '') if loop.first else '') + message.content) | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + message.content | trim + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    # Grattafiori et al. 2024, Llama 3
    "llama3": (
        "<|begin_of_text|>"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' if add_generation_prompt }}"
    ),
}

MARK = "\ue000"  # private use: around the number of a content that a template is rendered without
SPACE_BEFORE, SPACE_AFTER = "\n \u2003", "\u2002 \n"  # put around contents to see what a template trims
# What is left of the spaces above -> the characters that were stripped; None: all white space.
TRIMS_BEFORE = {"\n \u2003": "", " \u2003": "\n", "\u2003": " \n", "": None}
TRIMS_AFTER = {"\u2002 \n": "", "\u2002 ": "\n", "\u2002": " \n", "": None}
LOOKS_SPECIAL = re.compile(r"<[|\uff5c][^\s<>|\uff5c]+[|\uff5c]>")


class Encoded(NamedTuple):
    """A conversation. tokens: int32 [length].  is_target: bool [length], the tokens that are learned."""

    tokens: np.ndarray
    is_target: np.ndarray


class Turns(NamedTuple):
    """Messages of which the replies from message `targets_from` on are learned."""

    messages: tuple[Message, ...]
    targets_from: int = 0


def turns(conversation: Conversation, replies: Literal["all", "last", "split"]) -> list[Turns]:
    """What is learned of a conversation: all its replies, the last, or each in a sample that ends with it."""
    messages = conversation.messages
    if replies == "all":
        return [Turns(messages)]
    if replies == "last":
        return [Turns(messages, len(messages) - 1)]
    return [Turns(messages[: i + 1], i) for i, message in enumerate(messages) if message.role == "assistant"]


def sides(comparison: Comparison) -> list[Turns]:
    """The prompt with each of its replies, of which the reply is learned."""
    return [Turns(comparison.prompt + reply, len(comparison.prompt)) for reply in comparison.replies]


def load_template(name: str, tokenizer: Tokenizer) -> "Template":
    """A template by its name in BUILT_IN, by the path of a .jinja file, or "auto".

    auto: the template that lies with the tokenizer (chat_template.jinja, or chat_template in
    tokenizer_config.json), else alpaca.
    Raises InputError for a template that does not exist, is not Jinja, or asks for tokens that the tokenizer
    does not have, and for one from which it cannot be told where a reply starts and ends.
    """
    if name == "auto":
        own = _template_beside(tokenizer.directory) if tokenizer.directory else None
        return Template(*own, tokenizer) if own else Template("alpaca", BUILT_IN["alpaca"], tokenizer)
    if name in BUILT_IN:
        return Template(name, BUILT_IN[name], tokenizer)
    if Path(name).is_file():
        return Template(name, _read_text(Path(name)), tokenizer)
    known = ["auto", *BUILT_IN]
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"no template {name!r}{hint}; choose one of {', '.join(known)}, or a .jinja file's path")


class Template:
    """A chat template with a tokenizer."""

    def __init__(self, name: str, source: str, tokenizer: Tokenizer):
        self.name, self.source, self.tokenizer = name, source, tokenizer
        self._parts = _Parts(name, source, tokenizer)
        self._reserved = self._find_reserved(source)
        spellings = (re.escape(str(tokenizer.token(index))) for index in self._reserved)
        self._spelled = re.compile(f"(?={'|'.join(spellings)})")  # looks ahead, to find those that overlap

    @property
    def end_id(self) -> int:
        """The token that ends a reply."""
        reply = [part for part in self._parts.of(("user", "assistant")) if part.reply != NO_REPLY]
        assert isinstance(reply[-1].what, int), "a template without one is refused"
        return reply[-1].what

    def encode(self, messages: Sequence[Message], targets_from: int = 0) -> Encoded:
        """Tokens of a conversation; targets are its replies from message `targets_from` on and their end tokens.

        Raises InputError where the template has no place for one of the roles, and for a text that the tokenizer
        cannot tell from a special token.
        """
        return self.encode_many([Turns(tuple(messages), targets_from)])[0]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens that a reply follows: `encode` of the same messages and a reply starts with them."""
        (tokens, _), *_ = self._encode([self._stretches(messages, prompt=True)])
        return tokens.tolist()

    def encode_many(self, samples: Sequence[Turns]) -> list[Encoded]:
        """What `encode` gives for each. The fast way for many samples."""
        encoded = self._encode([self._stretches(sample.messages) for sample in samples])
        return [
            Encoded(tokens, replies >= sample.targets_from)
            for sample, (tokens, replies) in zip(samples, encoded, strict=True)
        ]

    def save_to(self, directory: str | Path) -> None:
        """Write the template to where transformers, and "auto", find it beside a tokenizer's files."""
        (Path(directory) / "chat_template.jinja").write_text(self.source, encoding="utf-8")

    def _find_reserved(self, source: str) -> set[int]:
        """Ids that no content may hold: of the special tokens that the template writes, and <|...|> of any kind.

        Not all of them: tokenizers have others for plain things, such as two newlines, or <think>.
        """
        ids = {index for _, _, index in self.tokenizer.find_special(source)}
        ids |= {i for text, i in self.tokenizer.special_tokens.items() if LOOKS_SPECIAL.fullmatch(text)}
        ids |= {index for index in (self.tokenizer.bos_id, self.tokenizer.eos_id) if index is not None}
        parts = list(self._parts.of(("user", "assistant")))  # so that what is wrong with it is said at once
        with suppress(InputError):  # some templates have no place for a system message
            parts += self._parts.of(("system", "user", "assistant"))
        ids |= {part.what for part in parts if isinstance(part.what, int)}
        return {index for index in ids if (self.tokenizer.token(index) or "").strip()}

    def _stretches(self, messages: Sequence[Message], prompt: bool = False) -> list["_Stretch"]:
        """Special tokens, and the texts between them, cut only where a reply starts."""
        questions = (message.content for message in messages if message.role == "user")
        has_input = INPUT_HEADING in next(questions, "")
        stretches: list[_Stretch] = []
        for part, reply in self._parts.of(tuple(role for role, *_ in messages), has_input, prompt):
            what = part.text(messages) if isinstance(part, _Content) else part
            last = stretches[-1] if stretches else None
            if isinstance(what, str) and last and isinstance(last.what, str) and last.reply == reply:
                stretches[-1] = last._replace(what=last.what + what)
            elif what != "":
                stretches.append(_Stretch(what, reply, self._continues(last)))
        return stretches

    def _continues(self, last: "_Stretch | None") -> bool:
        if last is None:
            return False
        return isinstance(last.what, str) or not self.tokenizer.starts_anew_after_special

    def _encode(self, samples: Sequence[Sequence["_Stretch"]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each sample, the tokens, int32 [length], and which reply each is of, int64 [length]."""
        every = [stretch for stretches in samples for stretch in stretches]
        first = self.tokenizer.encode_arrays([s.what for s in every if s.is_text and not s.continues])
        later = self.tokenizer.encode_next_arrays([s.what for s in every if s.is_text and s.continues])
        texts = {False: iter(first), True: iter(later)}
        encoded = []
        for stretches in samples:
            parts = [
                self._unforged(stretch, next(texts[stretch.continues]))
                if stretch.is_text
                else np.array([stretch.what], dtype=np.int32)
                for stretch in stretches
            ]
            replies = np.repeat([stretch.reply for stretch in stretches], [len(part) for part in parts])
            encoded.append((np.concatenate(parts), replies))
        return encoded

    def _unforged(self, stretch: "_Stretch", ids: np.ndarray) -> np.ndarray:
        """The tokens of a text, taken to pieces where they hold what only the template may write.

        Tokenizers find some of their special tokens in any text: those that sentencepiece calls user-defined,
        and added ones that are not marked as special.
        """
        if self._reserved.isdisjoint(ids.tolist()):
            return ids
        cuts = [match.start() + 1 for match in self._spelled.finditer(stretch.what)]
        first, *rest = (stretch.what[i:j] for i, j in pairwise([0, *cuts, len(stretch.what)]))
        start = self.tokenizer.encode_next(first) if stretch.continues else self.tokenizer.encode(first)
        ids = np.concatenate([start, *self.tokenizer.encode_next_arrays(rest)]).astype(np.int32)
        forged = self._reserved & set(ids.tolist())
        if forged:
            token = self.tokenizer.token(forged.pop())
            raise InputError(
                f"the tokenizer cannot tell text from its special token {token!r}; take it out of "
                f"{_shown(stretch.what)}"
            )
        return ids


NO_REPLY = -1


class _Stretch(NamedTuple):
    """A special token's id, or text that is encoded as one; which reply's it is; whether it continues a text."""

    what: Any
    reply: int
    continues: bool

    @property
    def is_text(self) -> bool:
        return isinstance(self.what, str)


class _Content(NamedTuple):
    """The place of a message's content. before, after: the characters that are stripped there; None: spaces."""

    message: int
    before: str | None
    after: str | None

    def text(self, messages: Sequence[Message]) -> str:
        return messages[self.message].content.lstrip(self.before).rstrip(self.after)


class _Part(NamedTuple):
    """The template's own text, the id of a special token in it, or a content; which reply's it is."""

    what: str | int | _Content
    reply: int


class _Parts:
    """What a template makes of messages, apart from their contents: parts by the order of their roles."""

    def __init__(self, name: str, source: str, tokenizer: Tokenizer):
        self.name, self.tokenizer = name, tokenizer
        self._template = _compile(name, source)
        self._tokens = {
            f"{end}_token": (tokenizer.token(index) if index is not None else None) or ""
            for end, index in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id))
        }
        if "eos_token" in source and not self._tokens["eos_token"]:
            raise InputError(
                f"template {name} ends replies with the tokenizer's end token, and {tokenizer.file} has none; "
                "name it in tokenizer_config.json as eos_token, or choose another template"
            )
        self._known: dict[tuple[tuple[Role, ...], bool, bool], list[_Part]] = {}

    def of(self, roles: tuple[Role, ...], has_input: bool = False, prompt: bool = False) -> list[_Part]:
        """Parts of messages with these roles, in order.

        has_input: the first question has the heading of an input in it.  prompt: a reply is to follow.
        """
        key = (roles, has_input, prompt)
        if key not in self._known:
            self._known[key] = self._take_apart(*key)
        return self._known[key]

    def _take_apart(self, roles: tuple[Role, ...], has_input: bool, prompt: bool) -> list[_Part]:
        gaps = self._gaps(roles, has_input, prompt)
        contents = self._contents(gaps, roles, has_input, prompt)
        parts: list[_Part] = []
        for i, role in enumerate(roles):
            if role == "assistant":
                start = self._reply_start(gaps[i], roles[:i], has_input)
                stop = self._reply_stop(gaps[i + 1])
                parts += self._own(gaps[i][:start], NO_REPLY)
                parts += [*self._own(gaps[i][start:], i), _Part(contents[i], i)]
                parts += self._own(gaps[i + 1][:stop], i)
                gaps[i + 1] = gaps[i + 1][stop:]
            else:
                parts += [*self._own(gaps[i], NO_REPLY), _Part(contents[i], NO_REPLY)]
        parts += self._own(gaps[-1], NO_REPLY)
        if roles and roles[-1] == "assistant":
            before = self.of(roles[:-1], has_input, prompt=True)
            if parts[: len(before)] != before:
                raise self._error("writes a prompt in another way when a reply follows it")
        return parts

    def _reply_start(self, gap: str, before: tuple[Role, ...], has_input: bool) -> int:
        """Where in the text before a reply generation starts."""
        asked = self._gaps(before, has_input, prompt=True)[-1]
        if not gap.startswith(asked):
            raise self._error(
                f"asks for a reply with {_shown(asked)} and puts {_shown(gap)} before one: where a reply starts "
                "cannot be found"
            )
        if gap[len(asked) :].strip() and asked == self._gaps(before, has_input, prompt=False)[-1]:
            raise self._error(
                f"puts {_shown(gap[len(asked) :])} before a reply, but not when add_generation_prompt asks for one"
            )
        return len(asked)

    def _reply_stop(self, gap: str) -> int:
        """Where the end token ends in the text after a reply."""
        special = self.tokenizer.find_special(gap)
        if not special or gap[: special[0][0]].strip():
            found = f"{_shown(gap)}, which the tokenizer has no special token for" if gap else "nothing"
            raise self._error(f"has no end token after a reply but {found}")
        return special[0][1]

    def _own(self, text: str, reply: int) -> list[_Part]:
        """The template's own text, divided at special tokens."""
        parts: list[_Part] = []
        at = 0
        for start, stop, index in self.tokenizer.find_special(text):
            parts += [_Part(text[at:start], reply), _Part(index, reply)]
            at = stop
        parts = [part for part in (*parts, _Part(text[at:], reply)) if part.what != ""]
        for part in parts:
            unknown = LOOKS_SPECIAL.search(part.what) if isinstance(part.what, str) else None
            if unknown:
                raise self._error(
                    f"needs the special token {unknown[0]!r}, which the tokenizer does not have"
                )
        return parts

    def _contents(
        self, gaps: Sequence[str], roles: tuple[Role, ...], has_input: bool, prompt: bool
    ) -> list[_Content]:
        """The places of contents, with how they are trimmed: what became of spaces around them."""
        before = self._gaps(roles, has_input, prompt, before=SPACE_BEFORE)
        after = self._gaps(roles, has_input, prompt, after=SPACE_AFTER)
        contents = []
        for i in range(len(roles)):
            left, right = before[i].removeprefix(gaps[i]), after[i + 1].removesuffix(gaps[i + 1])
            if left not in TRIMS_BEFORE or right not in TRIMS_AFTER:
                raise self._error(f"changes the text of a message ({roles[i]})")
            contents.append(_Content(i, TRIMS_BEFORE[left], TRIMS_AFTER[right]))
        return contents

    def _gaps(
        self, roles: tuple[Role, ...], has_input: bool, prompt: bool, before: str = "", after: str = ""
    ) -> list[str]:
        """The template's own text before, between and after contents, one more than there are messages."""
        marks = [f"{MARK}{i}{MARK}" for i in range(len(roles))]
        messages = [
            {"role": role, "content": before + mark + after} for role, mark in zip(roles, marks, strict=True)
        ]
        try:
            text = self._template.render(
                messages=messages, has_input=has_input, add_generation_prompt=prompt, **self._tokens
            )
        except Exception as error:  # a template is a program, and stops as it likes
            raise self._error(
                f"does not take messages of {', '.join(roles)} ({first_line(error)})"
            ) from error
        first, *others = re.split(f"({MARK}[0-9]+{MARK})", text)
        for mark, role in zip(marks, roles, strict=True):
            if mark not in others:
                raise self._error(f"leaves out the text of a message ({role}, of {', '.join(roles)})")
        if others[::2] != marks:
            raise self._error(f"repeats messages, or changes their order ({', '.join(roles)})")
        return [first, *others[1::2]]

    def _error(self, what: str) -> InputError:
        return InputError(f"template {self.name} {what}; choose another template")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _compile(name: str, source: str) -> jinja2.Template:
    """A template in the environment that transformers gives to templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"template {name} line {error.lineno}: not Jinja ({first_line(error)})") from error


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, around replies in some templates: what is inside."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own filter escapes what HTML would read."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _template_beside(directory: Path) -> tuple[str, str] | None:
    """The name and the text of the template in a tokenizer's directory."""
    file, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if file.is_file():
        return str(file), _read_text(file)
    template = read_json(config).get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if "default" not in named:
            raise InputError(
                f"{config}: no chat_template is named default; choose a template by name or path"
            )
        template = named["default"]
    if template is None:
        return None
    if not isinstance(template, str):
        raise InputError(f"{config}: chat_template is no text; choose a template by name or path")
    return f"{config} chat_template", template


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as text ({first_line(error)})") from error
