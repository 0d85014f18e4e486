"""Rows become the same samples whatever the format; a row that cannot be used says why."""

import pytest

from llm3d.data.formats import Comparison, Conversation, Message, reader_for
from llm3d.errors import InputError

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
        ("a b", {}, r"a, b fit no format .*alpaca needs instruction, output; .*{FIELD: COLUMN}"),
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
        (turns((A, "Hi")), "turn 1 is the assistant's where the user's must stand"),
        (turns((U, "a"), (U, "b"), (A, "c")), "turn 2 is the user's where the assistant's"),
        (turns((U, "a"), (S, "b"), (A, "c")), "a system message that is not the first"),
        (turns((U, "a"), (A, " \n")), "turn 2 is an empty reply"),
        (turns((U, "a"), ("tool", "b")), "message 2: unknown role 'tool'; known are system, user"),
        (turns((U, "a"), (A, ["b"])), "message 2: a list where text must stand"),
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
