"""Messages of a conversation as files spell them: names of roles, contents in parts, calls of tools, weights.

What OpenAI, ShareGPT, LLaMA-Factory, axolotl and TRL write becomes what transformers hands to a chat template.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from llm3d.text.conversations import Message, Role
from llm3d.text.unicode import HALF_A_PAIR, has_half_a_pair
from llm3d.wording import json_kind

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",  # its text is the call
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
WEIGHTS = ("weight", "loss_weight", "train", "training")  # OpenAI, LLaMA-Factory, axolotl
THOUGHTS = ("reasoning", "thinking")  # parts of a content that are not part of what is said
DIALOGUE: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
SPEAKER = re.compile("\n\n(Human|Assistant):")  # Bai et al. 2022, hh-rlhf


def read_messages(value: Any, what: str) -> list[Message]:
    """A list of messages, or a single one. Raises ValueError for what is none."""
    if isinstance(value, dict):
        return [_message(value, what)]
    if not isinstance(value, list):
        raise ValueError(f"{what}: {json_kind(value)} where a list of messages must stand")
    return [_message(item, f"{what}, message {i}") for i, item in enumerate(value, 1)]


def is_dialogue(text: str) -> bool:
    """Whether a text is a whole conversation, as hh-rlhf has it: "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    return text.startswith("\n\nHuman:") and "\n\nAssistant:" in text


def read_dialogue(text: str, what: str) -> list[Message]:
    """The turns of a text for which `is_dialogue`; one that ends with "\\n\\nAssistant:" asks for a reply."""
    _, *parts = SPEAKER.split(read_text(text, what))
    turns = [
        Message(DIALOGUE[who], content.strip()) for who, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    return turns if turns[-1].content or turns[-1].role == "user" else turns[:-1]


def read_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what}: {json_kind(value)} where text must stand")
    if has_half_a_pair(value):
        raise ValueError(f"{what} has {HALF_A_PAIR}")
    return value


def read_json_field(value: Any, what: str) -> Any:
    """A JSON value, or one that is written out as text. None for what says nothing: "", [], {}, null."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{what}: not valid JSON ({error})") from None
    return checked_json(value, what) if value else None


def checked_json(value: Any, what: str) -> Any:
    """The value. Raises ValueError where JSON could not hold it, or a tokenizer not its texts."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f"{what}: no JSON value ({error})") from None
    read_text(text, what)
    return value


def read_tools(value: Any) -> list[Any] | None:
    """What a model may call, each as transformers has it: {type: function, function: {name, ...}}."""
    tools = read_json_field(value, "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError("tools: no list of objects")
    return tools and [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
    ]


def checked_turns(messages: Iterable[Message], ends: Sequence[Role]) -> tuple[Message, ...]:
    """Messages that hold what they must; which roles may follow each other is for the chat template to say.

    ends: the roles of which the last message must have one. Raises ValueError.
    """
    messages = tuple(messages)
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    for i, message in enumerate(turns, 1):
        if (
            message.role == "assistant"
            and not message.content.strip()
            and not message.extra.get("tool_calls")
        ):
            raise ValueError(f"turn {i} is an empty reply")
    if not messages or messages[-1].role not in ends:
        raise ValueError(
            "no reply at the end" if "assistant" in ends else "no prompt that ends with what the user says"
        )
    return messages


# ---- one message ----


def _message(item: Any, what: str) -> Message:
    if not isinstance(item, dict):
        raise ValueError(f"{what}: {json_kind(item)} where an object with role and content must stand")
    given = {name: value for name, value in item.items() if value is not None}
    name = given.pop("role", given.pop("from", None))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"{what}: unknown role {name!r}; known are {', '.join(ROLES)}")
    content = given.pop("content", given.pop("value", None))
    is_learned = _is_learned(given, role, what)
    extra: dict[str, Any] = given
    if isinstance(content, list):
        content, fields = _joined(content, what)
        extra |= fields
    if str(name).lower() == "function_call":
        content, extra["tool_calls"] = "", content
    spelled = [
        extra.pop(name, None) for name in ("tool_calls", "function_call")
    ]  # the second was OpenAI's first
    calls = next((candidate for candidate in spelled if candidate), None)
    if calls:
        extra["tool_calls"] = _calls(calls, what)
    text = "" if content is None and calls and role == "assistant" else read_text(content, what)
    return Message(role, text, is_learned, checked_json(extra, what) if extra else {})


def _is_learned(given: dict[str, Any], role: Role, what: str) -> bool:
    """What a weight of the message says, which is taken out of `given`."""
    weights = {name: given.pop(name) for name in WEIGHTS if isinstance(given.get(name), int | float)}
    for name, weight in weights.items():
        if weight not in (0, 1):
            raise ValueError(f"{what}: {name} {weight:g}; 1 (a reply is learned) and 0 (it is not) are known")
        if weight and role != "assistant":
            raise ValueError(f"{what}: {name} {weight:g} on what the {role} says; only replies are learned")
    return role != "assistant" or all(weights.values())


def _joined(parts: Sequence[Any], what: str) -> tuple[str, dict[str, Any]]:
    """The text of a content in parts, as templates join it; its thoughts and its calls, as fields of the message."""
    texts, thoughts, calls = list[str](), list[str](), list[Any]()
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "tool_call", *THOUGHTS):
            raise ValueError(f"{what}: a part of type {kind!r}; only text is read, and no pictures or sounds")
        value = next((part[name] for name in (kind, "value") if part.get(name) is not None), None)
        if kind == "tool_call":
            calls.append(value)
        else:
            (thoughts if kind in THOUGHTS else texts).append(read_text(value, what))
    extra: dict[str, Any] = {"reasoning_content": "".join(thoughts)} if thoughts else {}
    return "".join(texts), extra | ({"tool_calls": calls} if calls else {})


def _calls(value: Any, what: str) -> list[Any]:
    """Calls of tools as transformers has them: {type: function, function: {name, arguments: an object}}."""
    calls = read_json_field(value, f"{what}, tool_calls")
    return [_call(call, f"{what}, tool_calls") for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: Any, what: str) -> Any:
    call = read_json_field(call, what)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{what}: a call is an object with the name and the arguments of a function")
    # As servers do before they render a template (vLLM): OpenAI writes arguments as text, templates expect an object.
    arguments = read_json_field(function.get("arguments"), f"{what}, arguments") or {}
    outside = call if function is not call else {"type": "function"}
    return {**outside, "function": {**function, "arguments": arguments}}
