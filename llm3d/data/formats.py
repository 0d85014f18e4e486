"""What the columns of post-training data mean: rows to conversations, comparisons of replies, and prompts.

    conversation   alpaca              instruction, output; maybe input, system, history
                   sharegpt            conversations (of from, value); maybe system
                   messages            messages (of role, content); maybe system
                   question_answer     question, answer; maybe system, history
                   prompt_response     prompt, response or completion; maybe system, history
    comparison     preference          chosen, rejected; maybe prompt, input, system, history, margin
                   ranked              responses and their ranks or scores; a prompt as for preference
    prompt         prompt              prompt, question or instruction; maybe input, system, history
                   prompt_messages     messages, or conversations, without a reply at their end; maybe system

A prompt or a reply is a string or a list of messages. history: earlier turns, pairs of [user, assistant].
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple

from llm3d.data.documents import HALF_A_PAIR, has_half_a_pair, json_kind
from llm3d.errors import InputError

Role = Literal["system", "user", "assistant", "tool"]
Kind = Literal["conversation", "comparison", "prompt"]

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
    """Maybe a system message, then user and assistant in turn; the assistant has the last word.

    template_kwargs: what the chat template reads beside messages: tools, documents, enable_thinking, ...
    """

    messages: tuple[Message, ...]
    template_kwargs: Fields = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Replies to one prompt and how good each is.

    prompt: as a conversation's messages, up to a user's.  replies: each starts and ends with the assistant.
    ranks: one a reply, lower is better, not all equal.  margin: by how much the better one of two is better.
    """

    prompt: tuple[Message, ...]
    replies: tuple[tuple[Message, ...], ...]
    ranks: tuple[float, ...]
    margin: float | None = None
    template_kwargs: Fields = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """What is to be replied to: as a conversation's messages, up to a user's."""

    messages: tuple[Message, ...]
    template_kwargs: Fields = field(default_factory=dict)


Item = Conversation | Comparison | Prompt
Reader = Callable[[Mapping[str, Any]], Item]
Values = dict[str, Any]  # of a row, by the format's field; None where the row has none

INPUT_HEADING = "\n\n### Input:\n"  # between an instruction and its input: Taori et al. 2023, Stanford Alpaca
ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}


def reader_for(
    columns: Sequence[str], kind: Kind, name: str = "auto", mapping: Mapping[str, str] | None = None
) -> Reader:
    """A function from the rows of a file to samples.

    columns: of the file's first row.  name: of a format, or "auto": the one that the columns fit.
    mapping: for fields of the format, the columns that hold them.
    Raises InputError where no format fits, or more than one. The function raises ValueError for a row that
    cannot be used: why, but not where; the caller knows the row's place.
    """
    mapping = mapping or {}
    form = _format(columns, kind, name, mapping)
    places = {field: _place(form, field, columns, mapping) for field in form.fields}
    needed = {field: places[field] for field in form.needs}

    def read(row: Mapping[str, Any]) -> Item:
        for column in needed.values():
            if column not in row:
                raise ValueError(
                    f"no column {column!r}, which the file's first row has (format {form.name}; there are: "
                    f"{_listed(row)}); rows of another format belong in a file of their own"
                )
            if row[column] is None:
                raise ValueError(f"column {column!r} is null")
        return form.read({field: row.get(column) for field, column in places.items()})

    return read


@dataclass(frozen=True)
class _Form:
    """needs, allows: fields, each with the names of columns that hold it."""

    name: str
    kind: Kind
    read: Callable[[Values], Item]
    needs: dict[str, tuple[str, ...]]
    allows: dict[str, tuple[str, ...]]

    @property
    def fields(self) -> dict[str, tuple[str, ...]]:
        return self.needs | self.allows


def _turns(field: str) -> Callable[[Values], Conversation]:
    def read(values: Values) -> Conversation:
        messages = [*_system(values), *_messages(values[field], field)]
        return Conversation(_checked(messages, ends="assistant"))

    return read


def _pair(question: str, answer: str) -> Callable[[Values], Conversation]:
    def read(values: Values) -> Conversation:
        messages = [*_prompt(values, question), *_reply(values[answer], answer)]
        return Conversation(_checked(messages, ends="assistant"))

    return read


def _read_prompt(values: Values) -> Prompt:
    return Prompt(_checked(_prompt(values, "prompt"), ends="user"))


def _read_prompt_of_turns(values: Values) -> Prompt:
    messages = [*_system(values), *_messages(values["messages"], "messages")]
    if messages and messages[-1].role == "assistant":
        messages.pop()
    return Prompt(_checked(messages, ends="user"))


def _read_preference(values: Values) -> Comparison:
    sides = [_reply(values[field], field) for field in ("chosen", "rejected")]
    prompt, replies = _divided(_prompt(values, "prompt"), sides)
    if replies[0] == replies[1]:
        raise ValueError("chosen and rejected are the same")
    return Comparison(prompt, replies, (0.0, 1.0), _margin(values["margin"]))


def _read_ranked(values: Values) -> Comparison:
    if not isinstance(values["responses"], list):
        raise ValueError(f"responses: {json_kind(values['responses'])} where a list must stand")
    sides = [_reply(reply, f"response {i}") for i, reply in enumerate(values["responses"], 1)]
    if len(sides) < 2:
        raise ValueError(f"fewer than two responses ({len(sides)}); a comparison needs two")
    prompt, replies = _divided(_prompt(values, "prompt"), sides)
    if any(replies[i] == replies[j] for i in range(len(replies)) for j in range(i)):
        raise ValueError("two responses are the same")
    return Comparison(prompt, replies, _ranks(values, len(replies)))


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


def _divided(
    given: Sequence[Message], sides: Sequence[Sequence[Message]]
) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], ...]]:
    """The prompt and the replies to it, where sides may repeat the prompt or hold it alone."""
    length = len(given)
    if all(tuple(side[:length]) == tuple(given) for side in sides):
        sides = [side[length:] for side in sides]
    shared = _shared(sides)
    prompt = _checked([*given, *sides[0][:shared]], ends="user")
    replies = [_checked([*prompt, *side[shared:]], ends="assistant")[len(prompt) :] for side in sides]
    return prompt, tuple(replies)


def _shared(sides: Sequence[Sequence[Message]]) -> int:
    """Messages with which all sides start, up to a user's."""
    if any(not side or side[0].role == "assistant" for side in sides):
        return 0
    alike = 0
    while all(alike < len(side) and side[alike] == sides[0][alike] for side in sides):
        alike += 1
    return max((i + 1 for i in range(alike) if sides[0][i].role == "user"), default=0)


def _prompt(values: Values, field: str) -> list[Message]:
    question = _question(values[field], values.get("input"), field)
    return [*_system(values), *_history(values["history"]), *question]


def _system(values: Values) -> list[Message]:
    if values["system"] is None:
        return []
    text = _text(values["system"], "system")
    return [Message("system", text)] if text.strip() else []


def _history(pairs: Any) -> list[Message]:
    messages: list[Message] = []
    pairs = [] if pairs is None else pairs
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("history: not a list of pairs [what the user said, what the assistant said]")
    for pair in pairs:
        messages.append(Message("user", _text(pair[0], "history")))
        messages.append(Message("assistant", _text(pair[1], "history")))
    return messages


def _question(value: Any, addition: Any, what: str) -> list[Message]:
    if value is None:
        return []
    if isinstance(value, list):
        return _messages(value, what)
    text, addition = _text(value, what), "" if addition is None else _text(addition, "input")
    return [Message("user", text + INPUT_HEADING + addition if addition.strip() else text)]


def _reply(value: Any, what: str) -> list[Message]:
    return _messages(value, what) if isinstance(value, list) else [Message("assistant", _text(value, what))]


def _messages(value: Any, what: str) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError(f"{what}: {json_kind(value)} where a list of messages must stand")
    return [_message(item, f"{what}, message {i}") for i, item in enumerate(value, 1)]


def _message(item: Any, what: str) -> Message:
    if not isinstance(item, dict):
        raise ValueError(f"{what}: {json_kind(item)} where an object with role and content must stand")
    role = item.get("role", item.get("from"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(f"{what}: unknown role {role!r}; known are {', '.join(ROLES)}")
    return Message(ROLES[role.lower()], _text(item.get("content", item.get("value")), what))


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what}: {json_kind(value)} where text must stand")
    if has_half_a_pair(value):
        raise ValueError(f"{what} has {HALF_A_PAIR}")
    return value


def _checked(messages: Iterable[Message], ends: Role) -> tuple[Message, ...]:
    """Messages in their right order. Raises ValueError."""
    messages = tuple(messages)
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for i, (role, content, *_) in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if role == "system":
            raise ValueError("a system message that is not the first message")
        if role != expected:
            raise ValueError(f"turn {i + 1} is the {role}'s where the {expected}'s must stand")
        if role == "assistant" and not content.strip():
            raise ValueError(f"turn {i + 1} is an empty reply")
    if not turns or turns[-1].role != ends:
        missing = "no prompt that ends with what the user says" if ends == "user" else "no reply at the end"
        raise ValueError(missing)
    return messages


_SYSTEM: dict[str, tuple[str, ...]] = {"system": ("system",)}
_OPENING: dict[str, tuple[str, ...]] = {"history": ("history",), **_SYSTEM}
_PROMPT: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction"),
    "input": ("input",),
    **_OPENING,
}
PROMPT_FIELDS = frozenset(_PROMPT)
_FORMS = (
    _Form(
        "alpaca",
        "conversation",
        _pair("instruction", "output"),
        needs={"instruction": ("instruction",), "output": ("output",)},
        allows={"input": ("input",), **_OPENING},
    ),
    _Form(
        "sharegpt",
        "conversation",
        _turns("conversations"),
        needs={"conversations": ("conversations", "conversation")},
        allows=_SYSTEM,
    ),
    _Form(
        "messages",
        "conversation",
        _turns("messages"),
        needs={"messages": ("messages",)},
        allows=_SYSTEM,
    ),
    _Form(
        "question_answer",
        "conversation",
        _pair("question", "answer"),
        needs={"question": ("question",), "answer": ("answer",)},
        allows=_OPENING,
    ),
    _Form(
        "prompt_response",
        "conversation",
        _pair("prompt", "response"),
        needs={"prompt": ("prompt",), "response": ("response", "completion")},
        allows=_OPENING,
    ),
    _Form(
        "preference",
        "comparison",
        _read_preference,
        needs={"chosen": ("chosen", "response_chosen"), "rejected": ("rejected", "response_rejected")},
        allows={"margin": ("margin",), **_PROMPT},
    ),
    _Form(
        "ranked",
        "comparison",
        _read_ranked,
        needs={"responses": ("responses",)},
        allows={"ranks": ("ranks",), "scores": ("scores", "rewards"), **_PROMPT},
    ),
    _Form(
        "prompt",
        "prompt",
        _read_prompt,
        needs={"prompt": _PROMPT["prompt"]},
        allows={name: columns for name, columns in _PROMPT.items() if name != "prompt"},
    ),
    _Form(
        "prompt_messages",
        "prompt",
        _read_prompt_of_turns,
        needs={"messages": ("messages", "conversations", "conversation")},
        allows=_SYSTEM,
    ),
)


def _format(columns: Sequence[str], kind: Kind, name: str, mapping: Mapping[str, str]) -> _Form:
    forms = _named(kind, name, mapping)
    for field, column in mapping.items():
        if column not in columns:
            raise InputError(
                f"no column {column!r} to hold the field {field!r}{_nearest(column, columns)}; "
                f"there are: {_listed(columns)}"
            )
    fitting = [form for form in forms if not _missing(form, columns, mapping)]
    if kind == "prompt":
        fitting = fitting[-1:]  # messages hold more than the prompt that may stand beside them
    if len(fitting) > 1:
        raise InputError(
            f"the columns {_listed(columns)} fit more than one format: "
            f"{', '.join(form.name for form in fitting)}; name the one that is meant"
        )
    if not fitting:
        raise InputError(_why_none_fits(forms, columns, kind, mapping))
    return fitting[0]


def _named(kind: Kind, name: str, mapping: Mapping[str, str]) -> list[_Form]:
    """The formats of a kind that go by a name and have all the fields that are mapped."""
    of_kind = [form for form in _FORMS if form.kind == kind]
    forms = [form for form in of_kind if name in ("auto", form.name)]
    if not forms:
        names = ["auto", *(form.name for form in of_kind)]
        raise InputError(
            f"no format {name!r} for a {kind}{_nearest(name, names)}; choose one of {', '.join(names)}"
        )
    for field in mapping:
        forms, before = [form for form in forms if field in form.fields], forms
        if not forms:
            known = sorted({field for form in before for field in form.fields})
            raise InputError(
                f"no field {field!r} in the format {' or '.join(form.name for form in before)}"
                f"{_nearest(field, known)}; there are: {', '.join(known)}"
            )
    return forms


def _missing(form: _Form, columns: Sequence[str], mapping: Mapping[str, str]) -> list[str]:
    return [
        field
        for field, names in form.needs.items()
        if field not in mapping and not any(name in columns for name in names)
    ]


def _why_none_fits(
    forms: Sequence[_Form], columns: Sequence[str], kind: Kind, mapping: Mapping[str, str]
) -> str:
    # A prompt is part of all the others.
    whole = [form for form in _FORMS if form.kind not in (kind, "prompt")]
    other = [form for form in whole if not _missing(form, columns, {})]
    if other:
        return f"the columns {_listed(columns)} hold a {other[0].kind} ({other[0].name}), not a {kind}"
    needs = "; ".join(f"{form.name} needs {_spelled(form.needs)}" for form in forms)
    guess = _guess(forms, columns, mapping)
    return f"the columns {_listed(columns)} fit no format for a {kind}: {needs}; {guess}"


def _spelled(needs: Mapping[str, Sequence[str]]) -> str:
    return ", ".join(" or ".join(names) for names in needs.values())


def _guess(forms: Sequence[_Form], columns: Sequence[str], mapping: Mapping[str, str]) -> str:
    """What to do: the mapping of the column that is nearest to one that is missing."""
    for form in forms:
        for field in _missing(form, columns, mapping):
            near = get_close_matches(field, columns, n=1)
            if near:
                return f"is {near[0]!r} meant? then map columns: {{{field}: {near[0]}}}"
    return "map its fields to columns, as in columns: {FIELD: COLUMN}"


def _place(form: _Form, field: str, columns: Sequence[str], mapping: Mapping[str, str]) -> str:
    """The column that holds a field, or would hold it if a later row had it."""
    if field in mapping:
        return mapping[field]
    names = form.fields[field]
    present = [name for name in names if name in columns]
    if len(present) > 1:
        raise InputError(
            f"the columns {' and '.join(present)} can both hold the field {field!r} of the format {form.name}; "
            f"say which, as in columns: {{{field}: {present[0]}}}"
        )
    return present[0] if present else names[0]


def _nearest(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _listed(columns: Iterable[str]) -> str:
    shown = list(columns)
    return ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "") or "none"
