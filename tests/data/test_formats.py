"""Rows become the same samples whatever the format; a row that cannot be used says why."""

import json

import pytest

from llm3d.data.formats import reader_for
from llm3d.errors import InputError
from llm3d.text.conversations import Comparison, Conversation, LabeledReply, Message

U, A, S = "user", "assistant", "system"


def messages(*pairs):
    return tuple(Message(role, content) for role, content in pairs)


def conversation(*pairs):
    return Conversation(messages(*pairs))


def read(row, kind="conversation", **how):
    return reader_for(list(row), kind, **how)(row)


def turns(*pairs, keys=("role", "content")):
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


ONE = conversation((U, "Hi"), (A, "Hello"))
FULL = conversation((S, "Be kind"), (U, "a"), (A, "b"), (U, "Hi"), (A, "Hello"))
OPENING = {"system": "Be kind", "history": [["a", "b"]]}


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("instruction", "output"),
        ("question", "answer"),
        ("prompt", "response"),
        ("prompt", "completion"),
    ],
)
def test_a_question_and_its_answer_are_a_conversation(question, answer):
    row = {question: "Hi", answer: "Hello", "id": 7}
    assert read(row) == ONE
    assert read(row | {"system": " ", "history": []}) == ONE
    assert read(row | {"system": None, "history": None, "input": None}) == ONE
    assert read(row | OPENING) == FULL


def test_an_instruction_takes_in_its_input():
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    assert read(row) == conversation((U, "Add.\n\n### Input:\n1, 2"), (A, "3"))
    assert read(row | {"input": ""}) == conversation((U, "Add."), (A, "3"))


@pytest.mark.parametrize("column", ["conversations", "conversation", "messages"])
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
@pytest.mark.parametrize("names", ["system human gpt", "system user assistant", "System Human ChatGPT"])
def test_lists_of_turns_are_conversations_by_whatever_names(column, keys, names):
    system, user, assistant = names.split()
    pairs = [(user, "a"), (assistant, "b"), (user, "Hi"), (assistant, "Hello")]
    assert read({column: turns((system, "Be kind"), *pairs, keys=keys)}) == FULL
    assert read({column: turns(*pairs, keys=keys), "system": "Be kind"}) == FULL


def test_a_prompt_and_its_completion_may_be_lists_of_messages():
    assert read({"prompt": turns((S, "x"), (U, "Hi")), "completion": turns((A, "Hello"))}) == conversation(
        (S, "x"), (U, "Hi"), (A, "Hello")
    )


PAIR = Comparison(messages((U, "Hi")), (messages((A, "Hello")), messages((A, "Go"))), (0.0, 1.0))


@pytest.mark.parametrize("prompt", ["prompt", "question", "instruction"])
@pytest.mark.parametrize("columns", [("chosen", "rejected"), ("response_chosen", "response_rejected")])
def test_a_preference_puts_the_chosen_reply_first(prompt, columns):
    chosen, rejected = columns
    row = {rejected: "Go", chosen: "Hello", prompt: "Hi"}
    assert read(row, "comparison") == PAIR
    full = read(row | OPENING | {"margin": 2}, "comparison")
    assert full == Comparison(FULL.messages[:-1], PAIR.replies, (0.0, 1.0), 2.0)


def test_a_preference_may_be_written_as_messages():
    hi, hello, go = turns((U, "Hi")), turns((A, "Hello")), turns((A, "Go"))
    assert read({"prompt": hi, "chosen": hello, "rejected": go}, "comparison") == PAIR
    assert read({"prompt": "Hi", "chosen": hello, "rejected": go}, "comparison") == PAIR
    assert read({"prompt": "Hi", "chosen": hi + hello, "rejected": hi + go}, "comparison") == PAIR
    assert read({"chosen": hi + hello, "rejected": hi + go}, "comparison") == PAIR


def test_whole_conversations_share_their_prompt_up_to_the_last_question_in_common():
    start = [(S, "x"), (U, "Hi"), (A, "Hello")]
    row = {"chosen": turns(*start, (U, "more"), (A, "!")), "rejected": turns(*start)}
    assert read(row, "comparison") == Comparison(
        messages(*start[:2]),
        (messages((A, "Hello"), (U, "more"), (A, "!")), messages((A, "Hello"))),
        (0.0, 1.0),
    )


def tools(*names):
    return [{"type": "function", "function": {"name": name, "parameters": {}}} for name in names]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
WITH_TOOLS = Conversation(
    (
        Message(U, "1 + 1?"),
        Message(A, "", extra={"tool_calls": [CALL]}),
        Message("tool", "2"),
        Message(A, "It is 2."),
    ),
    {"tools": tools("add")},
)


def test_calls_of_tools_are_what_templates_expect_however_they_are_spelled():
    said, last = turns((U, "1 + 1?")), turns(("tool", "2"), (A, "It is 2."))
    function, bare = CALL["function"], [tool["function"] for tool in tools("add")]
    openai = {
        "role": A,
        "content": None,
        "tool_calls": [{**CALL, "function": {**function, "arguments": '{"a": 1}'}}],
    }
    rows = [
        {"messages": [*said, {"role": A, "content": "", "tool_calls": [CALL]}, *last], "tools": tools("add")},
        {"messages": [*said, openai, *last], "tools": tools("add")},
        {
            "messages": [*said, {"role": A, "function_call": function}, *last],
            "tools": json.dumps(tools("add")),
        },
        {
            "conversations": turns(
                ("human", "1 + 1?"),
                ("function_call", json.dumps(function)),
                ("observation", "2"),
                ("gpt", "It is 2."),
                keys=("from", "value"),
            ),
            "tools": json.dumps(bare),
        },
        {
            "messages": [
                *said,
                {"role": A, "content": [{"type": "tool_call", "value": json.dumps(function)}]},
                *last,
            ],
            "tools": bare,
        },
    ]
    for row in rows:
        assert read(row) == WITH_TOOLS


@pytest.mark.parametrize("none", [None, "", "[]", []])
def test_no_tools_are_no_tools(none):
    assert read({"question": "Hi", "answer": "Hello", "tools": none, "documents": none}) == ONE


def test_what_beside_messages_the_template_reads_goes_to_it():
    kwargs = {"enable_thinking": False}
    found = read(
        {"messages": turns((U, "Hi"), (A, "Hello")), "chat_template_kwargs": kwargs, "documents": [{"a": 1}]}
    )
    assert found == Conversation(ONE.messages, {"documents": [{"a": 1}], **kwargs})
    assert read({"prompt": "Hi", "tools": tools("add")}, "prompt").template_kwargs == {"tools": tools("add")}
    pair = read({"prompt": "Hi", "chosen": "a", "rejected": "b", "tools": tools("add")}, "comparison")
    assert pair.template_kwargs == {"tools": tools("add")}


def test_further_fields_of_messages_are_kept_for_the_template():
    row = {
        "messages": [*turns((U, "Hi")), {"role": A, "content": "a", "reasoning_content": "b", "name": None}]
    }
    assert read(row).messages[1] == Message(A, "a", extra={"reasoning_content": "b"})


def test_contents_in_parts_are_joined_and_thoughts_are_fields_of_their_own():
    asked = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    said = [{"type": "reasoning", "value": "c"}, {"type": "text", "value": "d"}]
    assert read({"messages": turns((U, asked), (A, said))}) == Conversation(
        (Message(U, "ab"), Message(A, "d", extra={"reasoning_content": "c"}))
    )


@pytest.mark.parametrize(
    ("name", "no", "yes"), [("weight", 0, 1), ("loss_weight", 0.0, 1.0), ("train", False, True)]
)
def test_replies_with_weight_0_are_context(name, no, yes):
    said = [
        {"role": U, "content": "a", name: no},
        {"role": A, "content": "b", name: no},
        {"role": U, "content": "c"},
        {"role": A, "content": "d", name: yes},
    ]
    learned = [message.is_learned for message in read({"messages": said}).messages]
    assert learned == [True, False, True, True]


@pytest.mark.parametrize(
    "pairs",
    [
        [(A, "Welcome"), (U, "Hi"), (A, "Hello")],
        [(U, "a"), (U, "b"), (A, "c"), (A, "d")],
        [(U, "a"), (S, "b"), (A, "c")],
    ],
)
def test_the_order_of_roles_is_for_the_template_to_judge(pairs):
    assert read({"messages": turns(*pairs)}) == conversation(*pairs)


def test_a_system_message_is_said_once() -> None:
    row = {"messages": turns((S, "Be kind"), (U, "Hi"), (A, "Hello"))}
    expected = conversation((S, "Be kind"), (U, "Hi"), (A, "Hello"))
    for system in (None, " ", "Be kind"):
        assert read(row | {"system": system}) == expected
    with pytest.raises(ValueError, match="in a column of its own, and another one"):
        read(row | {"system": "Be brief"})


def test_replies_labeled_for_kto_end_the_command_and_not_only_a_row():
    for row in (
        {"prompt": "Hi", "completion": "Go", "label": False},
        {"messages": turns((U, "a"), (A, "b")), "label": True},
    ):
        with pytest.raises(InputError, match="llm3d kto"):
            read(row | {"label": False})


@pytest.mark.parametrize("label", [True, False, 1, 0])
def test_a_labeled_reply_is_a_conversation_with_its_label(label: bool) -> None:
    for row in (
        {"prompt": "Hi", "completion": "Go"},
        {"instruction": "Hi", "output": "Go"},
        {"messages": turns((U, "Hi"), (A, "Go"))},
        {"conversations": turns(("human", "Hi"), ("gpt", "Go"), keys=("from", "value"))},
    ):
        expected = LabeledReply(messages((U, "Hi"), (A, "Go")), bool(label))
        assert read(row | {"label": label}, "labeled") == expected


def test_a_label_that_says_neither_is_refused() -> None:
    for label in ("good", 2, None, 0.5):
        with pytest.raises(ValueError, match="label"):
            read({"prompt": "Hi", "completion": "Go", "label": label}, "labeled")


def test_the_prompt_of_a_comparison_may_lie_beside_its_sides_as_a_conversation():
    """LLaMA-Factory's preference data."""
    keys = ("from", "value")
    said = turns(("system", "x"), ("human", "a"), ("gpt", "b"), ("human", "Hi"), keys=keys)
    chosen, rejected = turns(("gpt", "Hello"), ("gpt", "Go"), keys=keys)
    expected = Comparison(
        messages((S, "x"), (U, "a"), (A, "b"), (U, "Hi")),
        (messages((A, "Hello")), messages((A, "Go"))),
        (0.0, 1.0),
    )
    assert read({"conversations": said, "chosen": chosen, "rejected": rejected}, "comparison") == expected
    row = {"messages": said, "chosen": [chosen], "rejected": [rejected]}
    assert read(row, "comparison") == expected


def test_a_whole_conversation_beside_its_own_prompt_is_not_asked_twice():
    """HuggingFaceH4/ultrafeedback_binarized has prompt and messages beside whole conversations."""
    hi, hello, go = turns((U, "Hi")), turns((A, "Hello")), turns((A, "Go"))
    row = {"prompt": "Hi", "messages": hi + hello, "chosen": hi + hello, "rejected": hi + go}
    assert read(row, "comparison") == PAIR
    system = messages((S, "x"))
    for change in (
        {"system": "x"},
        {"chosen": turns((S, "x")) + hi + hello, "rejected": turns((S, "x")) + hi + go},
    ):
        assert read(row | change, "comparison").prompt == system + PAIR.prompt


def test_dialogues_in_one_text_are_taken_apart():
    """Anthropic/hh-rlhf, and Dahoas/full-hh-rlhf with the prompt in a column of its own."""
    start = "\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: Hi\n\nAssistant:"
    expected = Comparison(messages((U, "a\n\nb"), (A, "c"), (U, "Hi")), PAIR.replies, (0.0, 1.0))
    row = {"chosen": start + " Hello", "rejected": start + " Go"}
    assert read(row, "comparison") == expected
    assert read({"prompt": start, "chosen": "Hello", "rejected": "Go"}, "comparison") == expected
    assert read({"prompt": start}, "prompt").messages == expected.prompt
    with pytest.raises(ValueError, match="no reply at the end"):
        read(row | {"rejected": start}, "comparison")


def test_two_texts_share_their_prompt():
    """As in TRL, whose extract_prompt gives "The sky is", " blue." and " green."."""
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green.", "id": 7}
    expected = Comparison(
        messages((U, "The sky is")), (messages((A, "blue.")), messages((A, "green."))), (0.0, 1.0)
    )
    assert read(row, "comparison") == expected
    assert read({"chosen": "It is blue", "rejected": "It is black"}, "comparison").replies == (
        messages((A, "blue")), messages((A, "black")),
    ), "no word is cut"  # fmt: skip


@pytest.mark.parametrize("change", [{"rejected": "No sky"}, {"query": "What is the sky?"}])
def test_two_texts_that_may_have_their_prompt_elsewhere_are_refused(change):
    with pytest.raises(
        ValueError, match=r"texts, and there is no prompt column; name it.*{prompt: (query|COLUMN)}"
    ):
        read({"chosen": "The sky is blue.", "rejected": "The sky is green."} | change, "comparison")


def test_what_no_field_reads_is_told_apart():
    reader = reader_for(["question", "answer", "id"], "conversation")
    assert reader.unread({"question": "a", "answer": "b", "id": 3, "source": "c", "empty": None}) == [
        "id",
        "source",
    ]


def test_more_than_two_replies_are_ranked_or_scored():
    row = {"prompt": "Hi", "responses": ["a", "b", "c"]}
    assert read(row | {"ranks": [2, 1, 1]}, "comparison").ranks == (2, 1, 1)
    for name in ("scores", "rewards"):
        ranked = read(row | {name: [0.5, 2, -1]}, "comparison")
        assert ranked.ranks == (-0.5, -2, 1)
        assert ranked.prompt == messages((U, "Hi")) and ranked.replies[1] == messages((A, "b"))


def test_columns_may_be_mapped_and_then_say_which_format_is_meant():
    row = {"ask": "Add.", "context": "1, 2", "says": "3", "messages": []}
    mapping = {"instruction": "ask", "input": "context", "output": "says"}
    assert read(row, mapping=mapping) == conversation((U, "Add.\n\n### Input:\n1, 2"), (A, "3"))
    with pytest.raises(InputError, match="no field 'instruction' in the format question_answer"):
        read(row, name="question_answer", mapping=mapping)


@pytest.mark.parametrize(
    ("columns", "how", "message"),
    [
        ("question anser", {}, r"question, anser fit no format .*map columns: {answer: anser}"),
        ("a b", {}, r"a, b fit no format .*alpaca needs instruction, output or .*{FIELD: COLUMN}"),
        ("text", {}, "llm3d data tokenize"),
        ("", {}, "the columns none fit no format"),
        ("messages conversations", {}, "fit more than one format: sharegpt, messages; name the one"),
        ("prompt response completion", {}, "response and completion can both hold the field 'response'"),
        ("prompt chosen rejected", {}, r"hold a comparison \(preference\), not a conversation"),
        ("question answer", {"name": "alpca"}, "no format 'alpca' .*did you mean 'alpaca'"),
        ("question answer", {"name": "preference"}, "no format 'preference' for a conversation"),
        ("question answer", {"name": "alpaca"}, "alpaca needs instruction, output"),
        ("question answer", {"mapping": {"anser": "answer"}}, "no field 'anser' .*did you mean 'answer'"),
        ("question answers", {"mapping": {"answer": "answer"}}, "no column 'answer' .*mean 'answers'"),
    ],
)
def test_columns_that_fit_no_format_or_two_are_refused(columns, how, message):
    with pytest.raises(InputError, match=message):
        reader_for(columns.split(), "conversation", **how)


def test_a_prompt_in_two_columns_is_refused():
    with pytest.raises(InputError, match="prompt and question can both hold the field 'prompt'"):
        reader_for(["prompt", "question", "chosen", "rejected"], "comparison")


def test_rows_of_another_format_than_the_first_are_refused():
    reader = reader_for(["question", "answer"], "conversation")
    with pytest.raises(ValueError, match=r"no column 'question', which the file's first row has .*messages"):
        reader({"messages": turns((U, "Hi"), (A, "Hello"))})
    with pytest.raises(ValueError, match="column 'answer' is null"):
        reader({"question": "Hi", "answer": None})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "no reply at the end"),
        (turns((U, "Hi")), "no reply at the end"),
        (turns((S, "Hi")), "no reply at the end"),
        (turns((U, "a"), (A, " \n")), "turn 2 is an empty reply"),
        (
            turns((U, "a"), ("owner", "b")),
            "message 2: unknown role 'owner'; known are system, developer, user",
        ),
        (turns((U, "a"), (A, ["b"])), "message 2: a part of type None; only text is read"),
        (turns((U, [{"type": "image", "url": "a.png"}])), "message 1: a part of type 'image'; only text"),
        (turns((U, "a"), ("function_call", "b")), "message 2, tool_calls: not valid JSON"),
        (
            turns((U, "a"), ("function_call", "[3]")),
            "message 2, tool_calls: a call is an object with the name",
        ),
        ([*turns((U, "a")), {"role": A, "content": "b", "weight": 0.5}], "message 2: weight 0.5; 1 .* and 0"),
        ([{"role": U, "content": "a", "weight": 1}, *turns((A, "b"))], "weight 1 on what the user says"),
        (turns((U, "a"), (A, None)), "message 2: null where text must stand"),
        (turns((U, "a"), (A, "\ud83d")), "half of a surrogate pair"),
        ([{"content": "a"}], "unknown role None"),
        (["a"], "message 1: a string where an object"),
        ("a", "a string where a list of messages must stand"),
    ],
)
def test_a_conversation_that_cannot_be_used_says_why(value, message):
    with pytest.raises(ValueError, match=message) as raised:
        read({"messages": value})
    assert not isinstance(raised.value, InputError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": "Go"}, "chosen and rejected are the same"),
        ({"chosen": ""}, "turn 2 is an empty reply"),
        ({"chosen": []}, "no reply"),
        ({"chosen": 3}, "chosen: a number where text must stand"),
        ({"prompt": None}, "no prompt"),
        ({"margin": "1"}, "margin: a string where a number must stand"),
        ({"margin": float("nan")}, "margin: nan is no finite number"),
        ({"history": [["a"]]}, "history: not a list of pairs"),
        ({"history": "a"}, "history: not a list of pairs"),
        ({"system": 1}, "system: a number where text must stand"),
        ({"prompt": turns((U, "Hi"), (A, "x"))}, "no prompt that ends with what the user says"),
        (
            {"chosen": turns((U, "Ho"), (A, "x")), "rejected": turns((U, "Ho"), (A, "y"))},
            "prompt is not among",
        ),
        (
            {"chosen": turns((U, "Hi"), (A, "x")), "rejected": turns((U, "Hi"), (U, "y"), (A, "z"))},
            "one of the",
        ),
        ({"images": ["a.png"]}, "images: only text is read"),
    ],
)
def test_a_preference_that_cannot_be_used_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        read({"prompt": "Hi", "chosen": "Hello", "rejected": "Go"} | change, "comparison")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": ["a"], "ranks": [1]}, "fewer than two responses"),
        ({"responses": "ab"}, "a string where a list"),
        ({"responses": ["a", "a"]}, "two responses are the same"),
        ({"ranks": [1, 1]}, "all equal"),
        ({"ranks": [1, 2, 3]}, "ranks: 3 for 2 responses"),
        ({"ranks": 1}, "ranks: a number for 2 responses"),
        ({"ranks": [1, True]}, "ranks: true or false where a number"),
        ({"ranks": None}, "responses need ranks .* or scores"),
        ({"scores": [1, 2]}, "responses need ranks .* or scores .*one of them"),
    ],
)
def test_ranks_that_cannot_be_used_say_why(change, message):
    with pytest.raises(ValueError, match=message):
        read({"prompt": "Hi", "responses": ["a", "b"], "ranks": [1, 2]} | change, "comparison")
