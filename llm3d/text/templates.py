"""Conversations as tokens, and which of the tokens a model learns to write.

A chat template is Jinja text, as transformers has it. A conversation is rendered as it is, and what the template
gives is what is trained on. Its special tokens are those that the template writes, never those that a text spells. A
reply's tokens are those that follow the tokens of its prompt: nothing is merged across that border, so that training
sees what generation will see.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from llm3d.errors import InputError
from llm3d.files import read_json
from llm3d.text.conversations import Comparison, Conversation, Fields, Message
from llm3d.text.rendering import Marks, Renderer, without_marks
from llm3d.text.replies import NO_REPLY, ReplyFinder, Span, missing_tokens, shown
from llm3d.text.tokenizer import Tokenizer
from llm3d.wording import first_line

BUILT_IN = {
    # Taori et al. 2023, Stanford Alpaca
    "alpaca": (
        "{{ bos_token }}"
        "{% if messages[0].role != 'system' %}"
        "Below is an instruction that describes a task"
        "{% if '\n\n### Input:\n' in messages[0].content %}"
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


class Encoded(NamedTuple):
    """A conversation. tokens: int32 [length].  is_target: bool [length], the tokens that are learned."""

    tokens: np.ndarray
    is_target: np.ndarray


class Turns(NamedTuple):
    """Messages of which the replies from message `targets_from` on are learned, unless they are context alone.

    template_kwargs: what the template reads beside messages: tools, documents, enable_thinking, ...
    """

    messages: tuple[Message, ...]
    targets_from: int = 0
    template_kwargs: Fields = {}  # noqa: RUF012 (nothing writes to it)

    @property
    def learned(self) -> list[bool]:
        """Of each message, whether it is learned."""
        replies = (m.role == "assistant" and m.is_learned for m in self.messages)
        return [reply and i >= self.targets_from for i, reply in enumerate(replies)]


def turns(conversation: Conversation, replies: Literal["all", "last", "split"]) -> list[Turns]:
    """What is learned of a conversation: all its replies, the last, or each in a sample that ends with it."""
    messages, kwargs = conversation.messages, conversation.template_kwargs
    whole = Turns(messages, 0, kwargs)
    if replies == "all":
        return [whole]
    if replies == "last":
        return [whole._replace(targets_from=len(messages) - 1)]
    return [Turns(messages[: i + 1], i, kwargs) for i, learned in enumerate(whole.learned) if learned]


def sides(comparison: Comparison) -> list[Turns]:
    """The prompt with each of its replies, of which the reply is learned."""
    prompt, kwargs = comparison.prompt, comparison.template_kwargs
    return [Turns(prompt + reply, len(prompt), kwargs) for reply in comparison.replies]


def load_template(name: str, tokenizer: Tokenizer) -> "Template":
    """A template by its name in BUILT_IN, by the path of a .jinja file, or "auto".

    auto: the template that lies with the tokenizer (chat_template.jinja, or chat_template in
    tokenizer_config.json), else alpaca.
    Raises InputError for a template that does not exist, is not Jinja, or asks for tokens that the tokenizer
    does not have, and for one from which it cannot be told where a reply starts and ends.
    """
    if name == "auto":
        own = _template_beside(tokenizer.directory) if tokenizer.directory else None
        return (
            Template(*own, tokenizer, is_own=True)
            if own
            else Template("alpaca", BUILT_IN["alpaca"], tokenizer)
        )
    if name in BUILT_IN:
        return Template(name, BUILT_IN[name], tokenizer)
    if Path(name).is_file():
        return Template(name, _read_text(Path(name)), tokenizer)
    known = ["auto", *BUILT_IN]
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"no template {name!r}{hint}; choose one of {', '.join(known)}, or a .jinja file's path")


class Template:
    """A chat template with a tokenizer.

    is_own: it lies with the tokenizer, whose tokens are then what they are.
    remarks: what a user should know about the two, for people.
    """

    def __init__(self, name: str, source: str, tokenizer: Tokenizer, is_own: bool = False) -> None:
        self.name, self.source, self.tokenizer = name, source, tokenizer
        self._renderer = Renderer(name, source, _special_tokens(name, source, tokenizer))
        self.remarks = self._missing(is_own)
        self._finder = ReplyFinder(self._renderer, tokenizer)
        self._reserved = self._finder.reserved
        spelled = [str(tokenizer.token(index)) for index in self._reserved]
        self._renderer.reserve(spelled)
        # Looks ahead, to find those that overlap.
        self._spelled = re.compile(f"(?={'|'.join(map(re.escape, spelled)) or '(?!)'})")

    @property
    def end_id(self) -> int:
        """The token that ends a reply."""
        return self._finder.end_id

    @property
    def end_ids(self) -> frozenset[int]:
        """All tokens that end a reply: some templates end one that calls a tool with another."""
        return self._finder.end_ids

    def encode(
        self, messages: Sequence[Message], targets_from: int = 0, template_kwargs: Fields | None = None
    ) -> Encoded:
        """Tokens of a conversation; targets are its replies from message `targets_from` on and their end tokens.

        Raises InputError where the template cannot take the messages, where a reply that is learned cannot be found
        in what it writes, and for a text that the tokenizer cannot tell from a special token.
        """
        return self.encode_many([Turns(tuple(messages), targets_from, template_kwargs or {})])[0]

    def encode_prompt(self, messages: Sequence[Message], template_kwargs: Fields | None = None) -> list[int]:
        """Tokens that a reply follows.

        `encode` of the same messages and a reply starts with them, wherever the template writes them so.
        """
        stretches = self._stretches(Turns(tuple(messages), len(messages), template_kwargs or {}), prompt=True)
        ((tokens, _),) = self._encode([stretches])
        return tokens.tolist()

    def encode_many(self, samples: Sequence[Turns]) -> list[Encoded]:
        """What `encode` gives for each. The fast way for many samples."""
        encoded = self._encode([self._stretches(sample) for sample in samples])
        return [
            Encoded(tokens, np.array([*sample.learned, False])[replies])
            for sample, (tokens, replies) in zip(samples, encoded, strict=True)
        ]

    def save_to(self, directory: str | Path) -> None:
        """Write the template to where transformers, and "auto", find it beside a tokenizer's files."""
        (Path(directory) / "chat_template.jinja").write_text(self.source, encoding="utf-8")

    def _missing(self, is_own: bool) -> list[str]:
        """Special tokens that the template writes and the tokenizer does not have: an error, or a remark."""
        missing = missing_tokens(self._renderer, self.tokenizer)
        if missing and not is_own:
            raise InputError(
                f"template {self.name} needs the special token {missing[0]!r}, which the tokenizer does not have; "
                "choose another template, or, if it is meant as text, save this one as chat_template.jinja beside "
                "the tokenizer"
            )
        written = ", ".join(missing)
        return (
            [f"template {self.name}: {written} is text, no special token of the tokenizer"] if missing else []
        )

    def _stretches(self, sample: Turns, prompt: bool = False) -> list["_Stretch"]:
        """Special tokens, and the texts between them, cut only where a reply starts or ends."""
        chat = self._renderer.chat(sample.messages, sample.template_kwargs)
        whole = self._renderer.render(chat, prompt)
        spans, closing = self._finder.find(chat, whole, sample.learned)
        stretches: list[_Stretch] = []
        at = 0
        for start, stop, reply in (*spans, Span(len(whole.text), len(whole.text), NO_REPLY)):
            self._append(stretches, self._parts(whole.text[at:start], chat.marks), NO_REPLY)
            self._append(stretches, self._parts(whole.text[start:stop], chat.marks), reply)
            at = stop
        if closing and not prompt:
            self._append(stretches, self._parts(closing, chat.marks), len(sample.messages) - 1)
        return stretches

    def _parts(self, text: str, marks: Marks) -> Iterator[int | str]:
        """The ids of special tokens, and the texts between them."""
        at = 0
        for start, stop, index in self._finder.specials(text, marks):
            yield without_marks(text[at:start], marks)
            yield index
            at = stop
        yield without_marks(text[at:], marks)

    def _append(self, stretches: list["_Stretch"], parts: Iterable[int | str], reply: int) -> None:
        for part in parts:
            if part != "":
                stretches.append(_Stretch(part, reply, self._continues(stretches[-1] if stretches else None)))

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
            token = self.tokenizer.token(next(iter(forged)))
            raise InputError(
                f"the tokenizer cannot tell text from its special token {token!r}; take it out of "
                f"{shown(stretch.what)}"
            )
        return ids


class _Stretch(NamedTuple):
    """A special token's id, or text that is encoded as one; which reply's it is; whether it continues a text."""

    what: Any
    reply: int
    continues: bool

    @property
    def is_text(self) -> bool:
        return isinstance(self.what, str)


def _special_tokens(name: str, source: str, tokenizer: Tokenizer) -> dict[str, str]:
    """What transformers gives to templates: bos_token, eos_token, unk_token, ..., as they are spelled."""
    tokens = dict[str, str]()
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        config = read_json(tokenizer.directory / file) if tokenizer.directory else {}
        for key in ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
            token = config.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            tokens |= {key: token} if isinstance(token, str) else {}
    for end, index in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        tokens[f"{end}_token"] = (tokenizer.token(index) if index is not None else None) or ""
    if "eos_token" in source and not tokens["eos_token"]:
        raise InputError(
            f"template {name} ends replies with the tokenizer's end token, and {tokenizer.file} has none; "
            "name it in tokenizer_config.json as eos_token, or choose another template"
        )
    return tokens


def _template_beside(directory: Path) -> tuple[str, str] | None:
    """The name and the text of the template in a tokenizer's directory.

    One named tool_use beside the default one is for conversations that have tools, as in transformers.
    """
    file, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if file.is_file():
        name, more = str(file), directory / "additional_chat_templates/tool_use.jinja"
        named: dict[str, Any] = {"default": _read_text(file)}
        named |= {"tool_use": _read_text(more)} if more.is_file() else {}
    else:
        name, template = f"{config} chat_template", read_json(config).get("chat_template")
        if template is None:
            return None
        entries = template if isinstance(template, list) else [{"name": "default", "template": template}]
        named = {
            str(entry.get("name")): entry.get("template") for entry in entries if isinstance(entry, dict)
        }
    if "default" not in named:
        raise InputError(f"{config}: no chat_template is named default; choose a template by name or path")
    default, with_tools = named["default"], named.get("tool_use")
    if not isinstance(default, str) or not isinstance(with_tools, str | None):
        raise InputError(f"{config}: chat_template is no text; choose a template by name or path")
    return name, default if with_tools is None else _by_tools(with_tools, default)


def _by_tools(with_tools: str, default: str) -> str:
    """One template of two. The signs keep the white space between them; Jinja drops one line's end after each."""
    first, second = (source.removesuffix("\n") for source in (with_tools, default))
    return f"{{% if tools is not none +%}}{first}{{%+ else +%}}{second}{{%+ endif %}}"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as text ({first_line(error)})") from error
