"""What models' own templates write is what is trained on, as transformers renders it; replies are found in it.

The templates are those that trl ships, of which some mark replies with {% generation %}.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm3d.errors import InputError
from llm3d.text.conversations import Conversation, Message
from llm3d.text.templates import Encoded, Template, Turns, load_template, turns
from llm3d.text.tokenizer import Tokenizer, load_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is the reference here")
tokenizers = pytest.importorskip("tokenizers")
TEMPLATES = (
    Path(pytest.importorskip("trl", reason="trl has the templates").__file__).parent / "chat_templates"
)

NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
LLAMA3_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Of the templates that trl has not: cut down, with what they do because of contents.
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in loop_messages %}"
    "{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- else %}{{- ' ' + message['content'] | trim + eos_token }}{%- endif %}{%- endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|reader|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|rule|>\\n' + message['content'] + eos_token }}\n"
    "{% else %}\n{{ '<|writer|>\\n' + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|writer|>' }}\n{% endif %}\n{% endfor %}"
)
NEMOTRON = (
    "{{- bos_token }}{%- if tools is not none %}{{- 'Environment: ipython' }}{%- endif %}"
    "{%- if documents is none %}{{- 'Closed book.' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- set said = message.content.split('</think>')[-1].lstrip() if '</think>' in message.content"
    " and not loop.last else message.content -%}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + said + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
CUT_DOWN = {"mistral": MISTRAL, "zephyr": ZEPHYR, "nemotron": NEMOTRON}
SHIPPED = (
    *("qwen2_5", "qwen3", "qwen3_5_think", "deepseek_r1_distill", "deepseekv3", "nemotron_3_nano", "glm4moe"),
    *("llama3", "llama3_1", "gemma", "gemma3", "phi3", "gptoss", "lfm2_2_5", "cohere"),
)


def user(content: str) -> Message:
    return Message("user", content)


def says(content: str, is_learned: bool = True, **extra: Any) -> Message:
    return Message("assistant", content, is_learned, extra)


def calls(content: str = "", **extra: Any) -> Message:
    function = {"name": "add", "arguments": {"a": 1}}
    return says(content, tool_calls=[{"id": "call00001", "type": "function", "function": function}], **extra)


def result(content: str) -> Message:
    return Message("tool", content, extra={"name": "add", "tool_call_id": "call00001"})


NUMBER = {
    "type": "object",
    "properties": {"a": {"type": "integer", "description": "a number"}},
    "required": ["a"],
}
TOOLS = {
    "tools": [{"type": "function", "function": {"name": "add", "description": "Adds", "parameters": NUMBER}}]
}
PLAIN = (user("Hi he"), says("Hello a"), user("1?"), says("2"))
THINKING = (user("q1"), says("<think>\nr1\n</think>\n\na1"), user("q2"), says("<think>\nr2\n</think>\n\na2"))
REASONING = (user("q1"), says("a1", reasoning_content="r1"), user("q2"), says("a2", thinking="r2"))
CALLING = (user("q1"), calls(), result("3"), says("a1"), user("q2"), says("a2"))
CONVERSATIONS = {
    "plain": Conversation(PLAIN),
    "system": Conversation((Message("system", "Be kind."), *PLAIN)),
    "thinking": Conversation(THINKING),
    "reasoning": Conversation(REASONING),
    "no thinking": Conversation(PLAIN, {"enable_thinking": False}),
    "tools": Conversation(CALLING, TOOLS),
}


def shipped(name: str) -> str:
    return CUT_DOWN[name] if name in CUT_DOWN else (TEMPLATES / f"{name}.jinja").read_text()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes, line ends and the special tokens of all templates."""
    found = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "\u010a\u010a", "he"])}
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[("\u010a", "\u010a"), ("h", "e")])
    )
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated")
    letters_of = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, letters_of])
    model.decoder = tokenizers.decoders.ByteLevel()
    sources = "".join(shipped(name) for name in SHIPPED)
    written = sorted(set(re.findall(r"<[|\uff5c][^\s<>|\uff5c'\"]+[|\uff5c]>", sources)))
    model.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, *written)]
    )
    model.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in TAGS])
    model.save(str(found / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **dict(zip(NAMES, SPECIAL, strict=False))}
    (found / "tokenizer_config.json").write_text(json.dumps(config))
    return found


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def reference(directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory)


def as_given(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    return [{"role": m.role, "content": m.content, **m.extra} for m in messages]


def theirs(reference: Any, source: str, given: Conversation, **options: Any) -> dict[str, list[int]] | None:
    """What transformers makes of it; None: its template refuses it."""
    kwargs = {**given.template_kwargs, **options}
    try:
        return reference.apply_chat_template(
            as_given(given.messages), chat_template=source, return_dict=True, **kwargs
        )
    except Exception:  # a template raises what it likes
        return None


def learned(template: Template, encoded: Encoded) -> list[str]:
    """The text of every stretch that is learned."""
    found, before = list[str](), False
    for token, is_target in zip(encoded.tokens.tolist(), encoded.is_target.tolist(), strict=True):
        if is_target:
            found = [*found, ""] if not before else found
            found[-1] += template.tokenizer.decode([token])
        before = is_target
    return found


@pytest.mark.parametrize("name", [*SHIPPED, *CUT_DOWN])
def test_the_tokens_are_those_of_transformers(name: str, tokenizer: Tokenizer, reference: Any) -> None:
    source, compared = shipped(name), 0
    template = Template(name, source, tokenizer, is_own=True)
    for case, said in CONVERSATIONS.items():
        expected = theirs(reference, source, said)
        asked = theirs(
            reference,
            source,
            Conversation(said.messages[:-1], said.template_kwargs),
            add_generation_prompt=True,
        )
        if expected is None or asked is None:
            with pytest.raises(InputError, match="does not take messages"):
                template.encode(*turns(said, "all")[0])
            continue
        compared += 1
        encoded = template.encode(*turns(said, "all")[0])
        prompt = template.encode_prompt(said.messages[:-1], said.template_kwargs)
        text = reference.decode(expected["input_ids"])
        written = tokenizer.decode(encoded.tokens)
        # What ends a reply of GLM stands in the message after it.
        assert written.removesuffix("<|user|>" if name == "glm4moe" else "\0") == text, case
        assert prompt == asked["input_ids"], case
        if encoded.tokens[: len(prompt)].tolist() != prompt:  # thoughts are asked for that are not written
            assert not text.startswith(reference.decode(prompt)), case
        elif name not in ("qwen3_5_think", "glm4moe") and "enable_thinking" not in said.template_kwargs:
            assert encoded.tokens.tolist() == expected["input_ids"], case
        ends = {tokenizer.token(index) for index in template.end_ids}
        replies = learned(template, encoded)
        assert len(replies) == sum(m.role == "assistant" for m in said.messages), case
        assert all(any(reply.rstrip().endswith(str(end)) for end in ends) for reply in replies), case
    assert compared >= 3


@pytest.mark.parametrize("name", ["qwen2_5", "deepseekv3", "gemma", "llama3", "phi3", "gptoss", "cohere"])
def test_where_a_template_marks_replies_they_are_those_of_transformers(
    name: str, tokenizer: Tokenizer, reference: Any
) -> None:
    source = (TEMPLATES / f"{name}_training.jinja").read_text()
    marked, plain = (Template(name, text, tokenizer) for text in (source, shipped(name)))
    compared = 0
    for case, said in CONVERSATIONS.items():
        expected = theirs(reference, source, said, return_assistant_tokens_mask=True)
        if expected is None:
            continue
        compared += 1
        wanted = turns(said, "all")[0]
        encoded = marked.encode(*wanted)
        assert encoded.tokens.tolist() == expected["input_ids"], case
        assert encoded.is_target.tolist() == [bool(mask) for mask in expected["assistant_masks"]], case
        last = marked.encode(said.messages, len(said.messages) - 1, said.template_kwargs)
        assert learned(marked, last) == learned(marked, encoded)[-1:], case
        if name in ("gemma", "llama3", "cohere"):  # which mark no part of what asks for a reply
            ours = learned(plain, plain.encode(*wanted))
            assert ours == [reply.rstrip("\n") for reply in learned(marked, encoded)], case
    assert compared >= 3


def test_thoughts_are_learned_where_the_template_writes_them(tokenizer: Tokenizer) -> None:
    template = Template("qwen3", shipped("qwen3"), tokenizer)
    for messages in (THINKING, REASONING):
        whole, *split = turns(Conversation(messages), "all") + turns(Conversation(messages), "split")
        second = "<think>\nr2\n</think>\n\na2<|im_end|>"
        assert learned(template, template.encode(*whole)) == ["a1<|im_end|>", second]
        first = "<think>\nr1\n</think>\n\na1<|im_end|>"
        assert [learned(template, template.encode(*turn)) for turn in split] == [[first], [second]]
    thought = template.encode(THINKING).tokens.tolist()
    assert [thought.count(tokenizer.special_id(tag)) for tag in TAGS[:2]] == [1, 1]
    empty = template.encode((user("q"), says("a")))
    assert learned(template, empty) == ["<think>\n\n</think>\n\na<|im_end|>"]


def test_what_a_reply_calls_is_part_of_it(tokenizer: Tokenizer) -> None:
    template = Template("qwen3", shipped("qwen3"), tokenizer)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    messages = (user("q1"), calls("So", reasoning_content="hm"), result("3"), says("a1"))
    encoded = template.encode(messages, 0, TOOLS)
    assert learned(template, encoded) == [
        f"<think>\nhm\n</think>\n\nSo\n{call}",
        "<think>\n\n</think>\n\na1<|im_end|>",
    ]
    # After another question, the template leaves the thoughts out.
    longer = template.encode((*messages, user("q2"), says("a2")), 0, TOOLS)
    assert learned(template, longer)[:2] == [f"So\n{call}", "a1<|im_end|>"]
    llama = Template("llama3_1", shipped("llama3_1"), tokenizer)
    found = llama.encode(CALLING, 0, {**TOOLS, "builtin_tools": ["search"]})
    assert [reply.rpartition("<|")[2] for reply in learned(llama, found)] == [
        "eom_id|>",
        "eot_id|>",
        "eot_id|>",
    ]


def test_the_end_of_a_reply_may_be_the_token_that_opens_the_next_message(tokenizer: Tokenizer) -> None:
    template = Template("glm4moe", shipped("glm4moe"), tokenizer)
    assert learned(template, template.encode(CALLING, 0, TOOLS)) == [
        "\n<think></think>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call><|observation|>",
        "\n<think></think>\na1<|user|>",
        "\n<think></think>\na2<|user|>",
    ]


def test_context_is_not_learned(tokenizer: Tokenizer) -> None:
    template = Template("qwen2_5", shipped("qwen2_5"), tokenizer)
    messages = (user("q1"), says("a1", is_learned=False), user("q2"), says("a2"))
    assert learned(template, template.encode(messages)) == ["a2<|im_end|>"]
    assert turns(Conversation(messages), "split") == [Turns(messages, 3)]


def test_what_is_said_beside_messages_reaches_the_template(tokenizer: Tokenizer) -> None:
    source = "{{ documents[0].text if documents }}{{ style }}{{ pad_token }}{{ unk_token }}" + ZEPHYR
    template = Template("own", source, tokenizer, is_own=True)
    kwargs = {"documents": [{"text": "A book. "}], "style": "Brief. "}
    given = Conversation(PLAIN, kwargs)
    for turn in turns(given, "all"):
        assert tokenizer.decode(template.encode(*turn).tokens).startswith("A book. Brief. <pad><unk>")
    assert tokenizer.decode(template.encode_prompt(PLAIN[:1], kwargs)).startswith("A book. Brief. <pad><unk>")


def test_marks_of_text_are_an_error_but_for_the_template_that_lies_with_the_tokenizer(
    directory: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text(ZEPHYR)
    with pytest.raises(InputError, match=r"needs the special token '<\|reader\|>'.*does not have"):
        load_template(str(tmp_path / "own.jinja"), tokenizer)
    tokenizer.save_to(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(ZEPHYR)
    template = load_template("auto", load_tokenizer(tmp_path))
    (remark,) = template.remarks
    assert "<|reader|>" in remark and "<|writer|>" in remark
    assert learned(template, template.encode(PLAIN)) == ["Hello a</s>", "2</s>"]
    assert Template("qwen3", shipped("qwen3"), tokenizer).remarks == []


def test_a_reply_that_cannot_be_found_is_refused_only_if_it_is_learned(tokenizer: Tokenizer) -> None:
    source = (
        "{% if messages | length > 2 %}{{ 'Go on.' }}{% endif %}"
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token if m.role == 'assistant' else m.content }}"
        "{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    )
    template = Template("own", source, tokenizer, is_own=True)
    with pytest.raises(InputError, match=r"in another way when more follows.*data\.turns=split"):
        template.encode(PLAIN)
    assert learned(template, template.encode(PLAIN, 3)) == ["2</s>"]
    for turn in turns(Conversation(PLAIN), "split"):
        assert len(learned(template, template.encode(*turn))) == 1


FORGED = (
    "<|im_end|>",
    "<|im_start|>",
    "<s>",
    "</s>",
    "[INST]",
    "<|<|im_end|>im_end|>",
    "\U0010ff00",
    "\ue001",
)


@given(
    content=st.lists(st.sampled_from([*FORGED, *TAGS, "\n", " ", "a", "\n\n"]) | st.text(max_size=4)).map(
        "".join
    ),
    place=st.integers(0, 3),
    name=st.sampled_from(["qwen3", "nemotron_3_nano", "deepseek_r1_distill", "mistral"]),
)
def test_any_content_is_written_as_transformers_writes_it_and_forges_nothing(
    content: str, place: int, name: str, tokenizer: Tokenizer, reference: Any
) -> None:
    messages = list(PLAIN)
    messages[place] = messages[place]._replace(content=content)
    source = shipped(name)
    template = Template(name, source, tokenizer, is_own=True)
    text = reference.apply_chat_template(as_given(tuple(messages)), chat_template=source, tokenize=False)
    encoded = template.encode(messages)
    assert tokenizer.decode(encoded.tokens) == text
    reserved = [i for i in tokenizer.control_ids if i in encoded.tokens]
    plain = template.encode(PLAIN).tokens.tolist()
    assert all(encoded.tokens.tolist().count(i) == plain.count(i) for i in reserved)
    assert len(learned(template, encoded)) == 2
    if not any(forged in content for forged in FORGED) and name == "qwen3":
        for tag in TAGS:
            assert encoded.tokens.tolist().count(tokenizer.special_id(tag)) == text.count(tag)


def test_nothing_beside_messages_forges_a_special_token_either(tokenizer: Tokenizer) -> None:
    template = Template("qwen3", shipped("qwen3"), tokenizer)
    function = {"name": "f<|im_end|>", "arguments": {"<|im_start|>": "</s>"}}
    forging = says(
        "", tool_calls=[{"type": "function", "function": function}], reasoning_content="<|im_end|>"
    )
    tools = {"tools": [{"type": "function", "function": {"name": "<|im_start|>", "parameters": {}}}]}
    encoded = template.encode((user("q"), forging), 0, tools)
    (reply,) = learned(template, encoded)
    assert '{"name": "f<|im_end|>", "arguments": {"<|im_start|>": "</s>"}}' in reply
    assert (
        encoded.tokens.tolist().count(tokenizer.special_id("<|im_end|>")) == 3
    )  # tools, the user, the reply


def test_marks_decide_what_is_learned(tokenizer: Tokenizer) -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% set x = 1 %}"
        "{% generation %}{% set x = 2 %}{{ m.content }}{% endgeneration %}<|im_end|>{{ x }}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    template = Template("own", source, tokenizer)
    encoded = template.encode(PLAIN)
    assert learned(template, encoded) == ["Hello a", "2"]
    assert "<|im_end|>1" in tokenizer.decode(encoded.tokens)  # what is set inside stays there
    assert learned(template, template.encode(PLAIN, 3)) == ["2"]
    assert template.end_ids == {tokenizer.special_id("<|im_end|>")}
