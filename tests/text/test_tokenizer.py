"""Tokenizers lose nothing, agree with transformers, and say what is wrong with what they are given."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm3d.corpus.tokenizer_training import train_tokenizer
from llm3d.errors import InputError
from llm3d.text import tokenizer as tokenizer_module
from llm3d.text.tokenizer import load_tokenizer, split_text
from tests.corpora import documents, write_jsonl

text = st.text() | st.text(alphabet=" \n\t\r\0\u2581ab1\u3000春晓😀")
TRICKY = [
    "",
    " ",
    "  leading and trailing  ",
    "\n\n \t\r\n",
    "\0\x01\x7f",
    "\u2581 a\u2581",
    "\ufeff\ufffd\u2028\u0085",
    "<s></s><unk><0x41><|end_of_text|>",
    "床前明月光、疑是地上霜。",
    "👩‍👩‍👧 e\u0301 ﬁ Å",
]


@given(text=text)
def test_round_trip_is_exact(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TRICKY)
def test_round_trip_is_exact_on_tricky_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode_next(text)) == text


@given(texts=st.lists(text.filter(bool), min_size=1, max_size=5))
def test_documents_are_their_tokens_and_an_eos(tokenizer, texts):
    ids, lengths = tokenizer.encode_documents(texts, tokenizer.eos_id)
    expected = [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(texts)]
    assert ids.tolist() == [token for ids in expected for token in ids]
    assert lengths.tolist() == [len(ids) for ids in expected]


def test_text_cannot_forge_a_special_token(tokenizer):
    ids = tokenizer.encode("<s></s><|begin_of_text|><|end_of_text|>")
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@pytest.fixture(scope="module")
def theirs(tokenizer_directory):
    transformers = pytest.importorskip("transformers", reason="transformers is the reference here")
    return transformers.AutoTokenizer.from_pretrained(tokenizer_directory)


@given(text=text)
def test_transformers_gives_the_same_ids(tokenizer, theirs, text):
    text = text.replace("\u2581", "")  # which theirs takes for a space
    ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids == tokenizer.encode(text)
    assert theirs.decode(ids) == text


def test_transformers_knows_the_special_tokens(tokenizer, theirs):
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert theirs("a")["input_ids"] == [tokenizer.bos_id, *tokenizer.encode("a")]
    assert len(theirs) == tokenizer.vocab_size == 400


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer, tmp_path):
    lone = tmp_path / f"lone{tokenizer.file.suffix}"
    lone.write_bytes(tokenizer.file.read_bytes())
    load_tokenizer(lone).save_to(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert (saved.digest, saved.bos_id, saved.eos_id) == (
        tokenizer.digest,
        tokenizer.bos_id,
        tokenizer.eos_id,
    )
    transformers = pytest.importorskip("transformers", reason="transformers is the reference here")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in documents(4):
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)


def test_long_text_is_encoded_in_parts_as_it_is_in_one(tokenizer, monkeypatch):
    text = "\n".join(documents(40))
    whole = tokenizer._encode_whole([text])[0].tolist()
    monkeypatch.setattr(tokenizer, "_limit", 300)
    assert len(split_text(text, 300)) > 10
    assert tokenizer.encode(text) == whole


@given(text=text, limit=st.integers(1, 20))
def test_parts_of_a_text_make_up_the_text(text, limit):
    parts = split_text(text, limit)
    assert "".join(parts) == text
    assert all(parts[:-1])


def test_training_is_deterministic(tokenizer, corpus_file, tmp_path):
    kind = tokenizer.directory.name
    train_tokenizer([corpus_file], tmp_path / "again", kind, 400)
    assert load_tokenizer(tmp_path / "again").digest == tokenizer.digest


def test_training_on_a_part_of_the_text_reads_about_that_much(corpus_file, tmp_path):
    whole = corpus_file.stat().st_size
    summary = train_tokenizer([corpus_file], tmp_path / "part", "byte-level", 300, max_bytes=whole // 2)
    assert 0.3 * whole < summary["bytes"] < 0.7 * whole


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["aaa"], 5000, "5000 is too large for this text.* at most [0-9]+"),
        (["aaa bbb"], 200, "200 is too small"),
        ([], 400, "corpus is empty"),
        (["", "  "], 400, "corpus is empty"),
    ],
)
def test_training_that_cannot_succeed_says_why_and_leaves_nothing(tmp_path, kind, texts, vocab_size, message):
    file = write_jsonl(tmp_path / "text.jsonl", texts)
    with pytest.raises(InputError, match=message):
        train_tokenizer([file], tmp_path / "out", kind, vocab_size)
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_a_record_without_text_is_named_in_one_line(tmp_path, kind):
    """Though it is met inside a library's loop."""
    file = write_jsonl(tmp_path / "text.jsonl", ["first", "second"])
    with file.open("a") as lines:
        lines.write('{"question": "third"}\n')
    with pytest.raises(InputError, match=r"text\.jsonl line 3: no field 'text'") as caught:
        train_tokenizer([file], tmp_path / "out", kind, 400)
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_kind_and_a_taken_output_are_refused(tmp_path, corpus_file):
    with pytest.raises(InputError, match="choose one of sentencepiece, byte-level"):
        train_tokenizer([corpus_file], tmp_path / "out", "wordpiece", 400)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        train_tokenizer([corpus_file], tmp_path, "byte-level", 400)
    with pytest.raises(InputError, match="holds no tokenizer_config"):
        train_tokenizer([corpus_file], tmp_path, "byte-level", 400, overwrite=True)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(InputError, match="holds neither"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "x.model"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(InputError, match="not a"):
            load_tokenizer(tmp_path / name)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "the"}),
        ("tokenizer_config.json", {"eos_token": {"content": "the"}}),
        ("special_tokens_map.json", {"eos_token": "the"}),
        ("generation_config.json", {"eos_token_id": ["ID", 5]}),
    ],
)
def test_eos_is_what_the_files_beside_the_tokenizer_say(tmp_path, file, content):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1, "the": 7}, unk_token="a"))
    model.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).eos_id is None, "a word is no special token, however it is spelled"
    model.add_special_tokens(["</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).eos_id == 1
    (tmp_path / file).write_text(json.dumps(content).replace('"ID"', "7"))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_id, loaded.bos_id, loaded.vocab_size) == (7, None, 8)


def test_importing_tokenizers_does_not_import_torch():
    code = "import sys, llm3d.text.tokenizer, llm3d.corpus.build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_that_puts_a_space_before_every_text_round_trips(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(documents(50)).split("\n")),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    for text in (*TRICKY, *documents(4)):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode("x") + tokenizer.encode_next(text).tolist()) == "x" + text
    texts = [text for text in (*TRICKY, *documents(9)) if text and "\0" not in text]
    ids, lengths = tokenizer.encode_documents(texts, tokenizer.eos_id)
    assert lengths.tolist() == [len(ids) + 1 for ids in tokenizer.encode_batch(texts)]
    assert tokenizer_module.META_SPACE in tokenizer.decode(ids.tolist())


def write_letters(path, letters="abcd", merges=(("a", "b"), ("b", "c")), special=("<s>", "</s>")):
    tokenizers = pytest.importorskip("tokenizers")
    words = [*letters, *sorted(map("".join, merges))]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: i for i, word in enumerate(words)}, list(merges))
    )
    made.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in special])
    path.mkdir()
    made.save(str(path / "tokenizer.json"))
    return load_tokenizer(path)


def test_tokenizers_differ_where_an_id_means_something_else(tmp_path):
    given = {
        "exchanged": {"letters": "abdc"},
        "merged in another order": {"merges": (("b", "c"), ("a", "b"))},
        "special": {"special": ("</s>", "<s>")},
    }
    one, same = (write_letters(tmp_path / name) for name in ("one", "same"))
    (tmp_path / "same" / "tokenizer.json").write_text(
        json.dumps(json.loads(one.file.read_text()), indent=None)
    )
    same = load_tokenizer(tmp_path / "same")
    assert (
        one.digest != same.digest and one.difference_from(same) is None and one.difference_from(one) is None
    )
    for name, changes in given.items():
        other = write_letters(tmp_path / name, **changes)
        for said in (one.difference_from(other), other.difference_from(one)):
            assert said is not None and "\n" not in said
    more = write_letters(tmp_path / "more", special=("<s>", "</s>", "<pad>"))
    assert one.difference_from(more) is None, "all that the one can write means the same in the other"
    assert "<pad>" in str(more.difference_from(one))
