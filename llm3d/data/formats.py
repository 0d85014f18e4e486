"""What the columns of post-training data mean: rows to conversations, comparisons of replies, and prompts.

    conversation   alpaca              instruction, output or response; maybe input or context, system, history
                   sharegpt            conversations (of from, value); maybe system
                   messages            messages (of role, content); maybe system
                   question_answer     question, answer or response; maybe system, history
                   prompt_response     prompt, response or completion; maybe system, history
    comparison     preference          chosen, rejected; maybe prompt, input, system, history, margin
                   ranked              responses and their ranks or scores; a prompt as for preference
    labeled       one for a conversation, with a label that says whether the reply is desirable; or preference
    prompt         prompt              prompt, question or instruction; maybe input, system, history
                   prompt_messages     messages, or conversations, without a reply at their end; maybe system

A prompt or a reply is a string, a message or a list of messages. history: earlier turns, pairs of [user, assistant].
All may have tools, documents and chat_template_kwargs, which the chat template reads. What is compared may hold its
prompt itself, as messages or as hh-rlhf's dialogues, or lie beside it as conversations.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from llm3d.data.columns import Form, Kind, Values, choose_form, listed, place_of
from llm3d.data.messages import (
    checked_turns,
    is_dialogue,
    read_dialogue,
    read_json_field,
    read_messages,
    read_text,
    read_tools,
)
from llm3d.errors import InputError
from llm3d.text.conversations import (
    Comparison,
    Conversation,
    Fields,
    Item,
    LabeledReply,
    Message,
    Prompt,
    Role,
)
from llm3d.wording import json_kind

INPUT_HEADING = "\n\n### Input:\n"  # between an instruction and its input: Taori et al. 2023, Stanford Alpaca
REPLY: tuple[Role, ...] = ("assistant",)
QUESTION: tuple[Role, ...] = ("user", "tool")
MEDIA = ("images", "videos", "audios")


@dataclass(frozen=True)
class Reader:
    """A function from the rows of a file to samples.  columns: which of them holds each of the format's fields."""

    form: Form
    columns: Mapping[str, str]

    def __call__(self, row: Mapping[str, Any]) -> Item:
        """Raises ValueError for a row that cannot be used: why, but not where; the caller knows the row's place.

        InputError where it shows that the file is of a kind that is not read.
        """
        for column in map(self.columns.__getitem__, self.form.needs):
            if column not in row:
                raise ValueError(
                    f"no column {column!r}, which the file's first row has (format {self.form.name}; there are: "
                    f"{listed(row)}); rows of another format belong in a file of their own"
                )
            if row[column] is None:
                raise ValueError(f"column {column!r} is null")
        values = {name: row.get(column) for name, column in self.columns.items()}
        for medium in MEDIA:
            if values[medium]:
                raise ValueError(f"{self.columns[medium]}: only text is read, and no pictures or sounds")
        item: Item = self.form.read(values | {"unread": {column: row[column] for column in self.unread(row)}})
        return item

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """The columns of a row that say something and mean nothing here."""
        known = set(self.columns.values())
        return [column for column, value in row.items() if value is not None and column not in known]


def reader_for(
    columns: Sequence[str], kind: Kind, name: str = "auto", mapping: Mapping[str, str] | None = None
) -> Reader:
    """What reads the rows of a file.

    columns: of the file's first row.  name: of a format, or "auto": the one that the columns fit.
    mapping: for fields of the format, the columns that hold them.
    Raises InputError where no format fits, or more than one.
    """
    mapping = mapping or {}
    form = choose_form(_FORMS, columns, kind, name, mapping)
    return Reader(form, {name: place_of(form, name, columns, mapping) for name in form.fields})


# ---- conversations and prompts ----


def _turns(field: str) -> Callable[[Values], Conversation]:
    def read(values: Values) -> Conversation:
        return _conversation(_with_system(values, read_messages(values[field], field)), values)

    return read


def _pair(question: str, answer: str) -> Callable[[Values], Conversation]:
    def read(values: Values) -> Conversation:
        return _conversation([*_prompt(values, question), *_reply(values[answer], answer)], values)

    return read


def _conversation(messages: Sequence[Message], values: Values) -> Conversation:
    if isinstance(values["label"], bool):
        raise InputError(
            "replies with a label, true or false, are for `llm3d kto`; for sft, write the good ones to a file of their "
            "own, and for dpo, good and bad ones to the same prompt as chosen and rejected"
        )
    return Conversation(checked_turns(messages, REPLY), _template_kwargs(values))


def _labeled(read: Callable[[Values], Conversation]) -> Callable[[Values], LabeledReply]:
    def read_labeled(values: Values) -> LabeledReply:
        label = values["label"]
        if label not in (False, True):  # or 0 and 1, which equal them
            raise ValueError(f"label: {label!r} where true or false must stand")
        conversation = read(values | {"label": None})
        return LabeledReply(conversation.messages, bool(label), conversation.template_kwargs)

    return read_labeled


def _read_prompt(values: Values) -> Prompt:
    return Prompt(checked_turns(_prompt(values, "prompt"), QUESTION), _template_kwargs(values))


def _read_prompt_of_turns(values: Values) -> Prompt:
    messages = _with_system(values, read_messages(values["messages"], "messages"))
    if messages and messages[-1].role == "assistant":
        messages.pop()
    return Prompt(checked_turns(messages, QUESTION), _template_kwargs(values))


# ---- comparisons ----


def _read_preference(values: Values) -> Comparison:
    chosen, rejected, context = values["chosen"], values["rejected"], _context(values)
    if not context and _is_plain(chosen) and _is_plain(rejected):
        context, chosen, rejected = _without_shared_start(chosen, rejected, values["unread"])
    sides = [_side(chosen, "chosen"), _side(rejected, "rejected")]
    prompt, replies = _divided(values, context, sides)
    if replies[0] == replies[1]:
        raise ValueError("chosen and rejected are the same")
    return Comparison(prompt, replies, (0.0, 1.0), _margin(values["margin"]), _template_kwargs(values))


def _read_ranked(values: Values) -> Comparison:
    if not isinstance(values["responses"], list):
        raise ValueError(f"responses: {json_kind(values['responses'])} where a list must stand")
    sides = [_side(reply, f"response {i}") for i, reply in enumerate(values["responses"], 1)]
    if len(sides) < 2:
        raise ValueError(f"fewer than two responses ({len(sides)}); a comparison needs two")
    prompt, replies = _divided(values, _context(values), sides)
    if any(replies[i] == replies[j] for i in range(len(replies)) for j in range(i)):
        raise ValueError("two responses are the same")
    return Comparison(prompt, replies, _ranks(values, len(replies)), template_kwargs=_template_kwargs(values))


def _ranks(values: Values, count: int) -> tuple[float, ...]:
    ranks, scores = values["ranks"], values["scores"]
    if (ranks is None) == (scores is None):
        raise ValueError("responses need ranks (lower is better) or scores (higher is better), one of them")
    name, given = ("ranks", ranks) if scores is None else ("scores", scores)
    if not isinstance(given, list) or len(given) != count:
        held = f"{len(given)}" if isinstance(given, list) else json_kind(given)
        raise ValueError(f"{name}: {held} for {count} responses; each needs one")
    numbers = tuple(_number(value, name) for value in given)
    if len(set(numbers)) == 1:
        raise ValueError(f"{name} are all equal, so that no response is better than another")
    return numbers if scores is None else tuple(-number for number in numbers)


def _margin(value: Any) -> float | None:
    return None if value is None else _number(value, "margin")


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what}: {json_kind(value)} where a number must stand")
    if not math.isfinite(value):
        raise ValueError(f"{what}: {value} is no finite number")
    return float(value)


def _context(values: Values) -> list[Message]:
    """What is said before the replies that are compared, as far as it lies beside them."""
    context = [*_history(values["history"]), *_question(values["prompt"], values["input"], "prompt")]
    if not context and values["conversations"] is not None:
        context = read_messages(values["conversations"], "conversations")
        if context and context[-1].role == "assistant":  # it is one of the sides
            return []
    return context


def _side(value: Any, what: str) -> list[Message]:
    """A reply, or a whole conversation that ends with it."""
    return (
        read_dialogue(value, what) if isinstance(value, str) and is_dialogue(value) else _reply(value, what)
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, str) and not is_dialogue(value)


def _without_shared_start(chosen: str, rejected: str, unread: Fields) -> tuple[list[Message], str, str]:
    """The whole words with which two texts start, as a prompt, and what is left of each: TRL's extract_prompt."""
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
    prompt = re.sub(r"\S*\Z", "", chosen[:shared])
    texts = [column for column, value in unread.items() if isinstance(value, str) and value.strip()]
    if texts or not prompt.strip() or chosen == rejected:
        column = texts[0] if texts else "COLUMN"
        raise ValueError(
            "chosen and rejected are texts, and there is no prompt column; name it, as in columns: "
            f"{{prompt: {column}}}"
        )
    start = len(prompt)
    return [Message("user", prompt.strip())], chosen[start:], rejected[start:]


def _divided(
    values: Values, context: Sequence[Message], sides: Sequence[Sequence[Message]]
) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], ...]]:
    """The prompt and the replies to it, where sides may repeat what was asked, or hold it alone."""
    shared = 0
    if not context or all(_starts_with(side, context) or _starts_whole(side) for side in sides):
        shared = _shared(sides)
        if not _holds(sides[0][:shared], context):
            raise ValueError("the prompt is not among the messages with which chosen and rejected start")
        context = sides[0][:shared]
    prompt = checked_turns(_with_system(values, context), QUESTION)
    replies = [checked_turns([*prompt, *side[shared:]], REPLY)[len(prompt) :] for side in sides]
    if any(reply[0].role != "assistant" for reply in replies if reply):
        raise ValueError("one of the replies starts with what the user says")
    return prompt, tuple(replies)


def _starts_whole(side: Sequence[Message]) -> bool:
    """Whether messages are a conversation from its beginning, and not a reply."""
    return bool(side) and side[0].role in ("system", "user")


def _shared(sides: Sequence[Sequence[Message]]) -> int:
    """Messages with which all sides start, up to a user's or a tool's."""
    alike = 0
    while all(alike < len(side) and side[alike] == sides[0][alike] for side in sides):
        alike += 1
    return max((i + 1 for i in range(alike) if sides[0][i].role in QUESTION), default=0)


def _holds(messages: Sequence[Message], part: Sequence[Message]) -> bool:
    return any(_starts_with(messages[i:], part) for i in range(len(messages) - len(part) + 1))


def _starts_with(messages: Sequence[Message], start: Sequence[Message]) -> bool:
    pairs = zip(messages, start, strict=False)
    return len(messages) >= len(start) and all(a.content.strip() == b.content.strip() for a, b in pairs)


# ---- parts of a row ----


def _prompt(values: Values, field: str) -> list[Message]:
    question = _question(values[field], values.get("input"), field)
    return _with_system(values, [*_history(values["history"]), *question])


def _with_system(values: Values, messages: Sequence[Message]) -> list[Message]:
    """Messages after the system message that a column holds, where they do not have it themselves."""
    text = "" if values["system"] is None else read_text(values["system"], "system")
    own = messages[0].content if messages and messages[0].role == "system" else None
    if own is not None and text.strip() not in ("", own.strip()):
        raise ValueError(
            "a system message in a column of its own, and another one at the start of the messages"
        )
    return [*messages] if own is not None or not text.strip() else [Message("system", text), *messages]


def _history(pairs: Any) -> list[Message]:
    messages: list[Message] = []
    pairs = [] if pairs is None else pairs
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("history: not a list of pairs [what the user said, what the assistant said]")
    for pair in pairs:
        messages.append(Message("user", read_text(pair[0], "history")))
        messages.append(Message("assistant", read_text(pair[1], "history")))
    return messages


def _question(value: Any, addition: Any, what: str) -> list[Message]:
    if value is None:
        return []
    if not isinstance(value, str):
        return read_messages(value, what)
    if is_dialogue(value):
        return read_dialogue(value, what)
    text, addition = read_text(value, what), "" if addition is None else read_text(addition, "input")
    return [Message("user", text + INPUT_HEADING + addition if addition.strip() else text)]


def _reply(value: Any, what: str) -> list[Message]:
    if isinstance(value, list | dict):
        return read_messages(value, what)
    return [Message("assistant", read_text(value, what))]


def _template_kwargs(values: Values) -> Fields:
    given = {
        "tools": read_tools(values["tools"]),
        "documents": read_json_field(values["documents"], "documents"),
    }
    more = read_json_field(values["chat_template_kwargs"], "chat_template_kwargs")
    if more is not None and not isinstance(more, dict):
        raise ValueError(f"chat_template_kwargs: {json_kind(more)} where an object must stand")
    if more and not {"messages", "add_generation_prompt"}.isdisjoint(more):
        raise ValueError("chat_template_kwargs: messages and add_generation_prompt are not for a file to say")
    return {name: value for name, value in {**given, **(more or {})}.items() if value is not None}


# ---- the formats ----

_ALL: dict[str, tuple[str, ...]] = {
    "system": ("system", "system_prompt"),
    "tools": ("tools",),
    "documents": ("documents",),
    "chat_template_kwargs": ("chat_template_kwargs",),
    "images": ("images", "image"),
    "videos": ("videos", "video"),
    "audios": ("audios", "audio"),
}
_LABEL: dict[str, tuple[str, ...]] = {"label": ("label", "kto_tag"), **_ALL}
_OPENING: dict[str, tuple[str, ...]] = {"history": ("history",), **_LABEL}
_PROMPT: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction"),
    "input": ("input", "context"),
    "history": ("history",),
    **_ALL,
}
_SIDES: dict[str, tuple[str, ...]] = {
    "conversations": ("conversations", "conversation", "messages"),
    **_PROMPT,
}
PROMPT_FIELDS = frozenset(_PROMPT) | {"messages"}
_PLAIN = (
    Form(
        "alpaca",
        "conversation",
        _pair("instruction", "output"),
        needs={"instruction": ("instruction",), "output": ("output", "response")},
        allows={"input": ("input", "context"), **_OPENING},
    ),
    Form(
        "sharegpt",
        "conversation",
        _turns("conversations"),
        needs={"conversations": ("conversations", "conversation")},
        allows=_LABEL,
    ),
    Form(
        "messages",
        "conversation",
        _turns("messages"),
        needs={"messages": ("messages",)},
        allows=_LABEL,
    ),
    Form(
        "question_answer",
        "conversation",
        _pair("question", "answer"),
        needs={"question": ("question",), "answer": ("answer", "response")},
        allows=_OPENING,
    ),
    Form(
        "prompt_response",
        "conversation",
        _pair("prompt", "response"),
        needs={"prompt": ("prompt",), "response": ("response", "completion")},
        allows=_OPENING,
    ),
    Form(
        "preference",
        "comparison",
        _read_preference,
        needs={
            "chosen": ("chosen", "response_chosen", "chosen_messages"),
            "rejected": ("rejected", "response_rejected", "rejected_messages"),
        },
        allows={"margin": ("margin",), **_SIDES},
    ),
    Form(
        "ranked",
        "comparison",
        _read_ranked,
        needs={"responses": ("responses",)},
        allows={"ranks": ("ranks",), "scores": ("scores", "rewards"), **_SIDES},
    ),
    Form(
        "prompt",
        "prompt",
        _read_prompt,
        needs={"prompt": _PROMPT["prompt"]},
        allows={name: columns for name, columns in _PROMPT.items() if name != "prompt"},
    ),
    Form(
        "prompt_messages",
        "prompt",
        _read_prompt_of_turns,
        needs={"messages": ("messages", "conversations", "conversation")},
        allows=_ALL,
    ),
)
# The same with a label, and comparisons taken apart, for replies that are learned from one by one.
_LABELED = tuple(
    replace(
        form,
        kind="labeled",
        read=_labeled(form.read),
        needs=form.needs | {"label": form.allows["label"]},
        allows={name: columns for name, columns in form.allows.items() if name != "label"},
    )
    if form.kind == "conversation"
    else replace(form, kind="labeled")
    for form in _PLAIN
    if form.kind == "conversation" or form.name == "preference"
)
_FORMS = _PLAIN + _LABELED
