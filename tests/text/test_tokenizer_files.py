"""What is saved is in transformers the tokenizer that it is here, whatever files it was made from."""

import json
import random
from typing import Any

import pytest

from llm3d.text.tokenizer import HARD_TEXTS, META_SPACE, load_tokenizer
from tests.corpora import documents

sentencepiece = pytest.importorskip("sentencepiece")
transformers = pytest.importorskip("transformers", reason="transformers is the reference here")
SPECIAL, PLAIN = "<|im_end|>", "<tool>"
BESIDE: dict[str, dict[str, Any]] = {
    "alone": {},
    "null": {"tokenizer_config.json": {"bos_token": None, "eos_token": "</s>"}},
    "no bos": {"tokenizer_config.json": {"add_bos_token": False}},
    "added": {
        "added_tokens.json": {SPECIAL: 400, PLAIN: 401},
        "special_tokens_map.json": {"eos_token": {"content": SPECIAL}},
    },
    "described": {
        "tokenizer_config.json": {
            "eos_token": SPECIAL,
            "added_tokens_decoder": {
                "400": {"content": SPECIAL, "special": True, "normalized": False},
                "401": {"content": PLAIN, "special": False, "normalized": False},
            },
        }
    },
}


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def model(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(documents(50)).split("\n")),
        model_prefix=str(file.with_suffix("")),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        allow_whitespace_only_pieces=True,
        minloglevel=3,
    )
    return file


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_saved_of_a_sentencepiece_model_gives_the_same_ids(model, name, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(model.read_bytes())
    for file, content in BESIDE[name].items():
        (source / file).write_text(json.dumps(content))
    ours = load_tokenizer(source)
    ours.save_to(tmp_path / "saved")
    theirs, again = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"),
        load_tokenizer(tmp_path / "saved"),
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in (*HARD_TEXTS, f"{META_SPACE} a{META_SPACE}", f"a{PLAIN} b", *documents(3)):
        ids = ours.encode(text)
        bos = [ours.bos_id] if ours.adds_bos else []
        assert theirs(text, split_special_tokens=True)["input_ids"] == [*bos, *ids]
        assert again.encode(text) == ids and ours.decode(ids) == text
        if META_SPACE not in text and (PLAIN not in text or ours.vocab_size == 400):
            assert ids == reference.encode(text)
    assert (
        (theirs.bos_token_id, theirs.eos_token_id)
        == (ours.bos_id, ours.eos_id)
        == (again.bos_id, again.eos_id)
    )
    assert len(theirs) == ours.vocab_size == again.vocab_size
    assert (ours.bos_id, ours.adds_bos) == {"null": (None, False), "no bos": (1, False)}.get(name, (1, True))
    if "added_tokens_decoder" in str(BESIDE[name]) or "added_tokens.json" in BESIDE[name]:
        assert (ours.eos_id, ours.encode(f"a{PLAIN}")[-1], ours.vocab_size) == (400, 401, 402)
        assert SPECIAL not in ours.decode(ours.encode(SPECIAL)[:-1]) and 400 not in ours.encode(SPECIAL)
    assert ours.difference_from(again) is None
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == model.read_bytes()


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_a_unigram_model_divides_text_as_sentencepiece_does(byte_fallback, tmp_path):
    """Or, where several divisions score the same, into one that does, which is told."""
    file = tmp_path / "tokenizer.model"
    with file.open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(" ".join(documents(50)).split("\n")),
            model_writer=writer,
            model_type="unigram",
            vocab_size=400,
            hard_vocab_limit=False,
            byte_fallback=byte_fallback,
            user_defined_symbols=["<|im_end|>"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=3,
        )
    ours = load_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    words = [*documents(2)[0].split(" "), "<s>", "</s>", "<unk>", "<0x41>", "", "", "<|im_end|>", "Q\u4f60"]
    drawn = random.Random(0)
    texts = [" ".join(drawn.choices(words, k=9))[drawn.randrange(9) :] for _ in range(500)]
    for text in (*(text for text in HARD_TEXTS if META_SPACE not in text), *texts):
        if text.startswith("<|im_end|>"):  # as a mark at the start of a chat, without a space before it
            assert ours.encode(text)[0] == ours.special_id("<|im_end|>")
            continue
        found, expected = ours.encode(text), reference.encode(text)
        if found != expected:
            score, best = (sum(map(reference.get_score, ids)) for ids in (found, expected))
            assert score == pytest.approx(best, abs=1e-4), text
            assert reference.decode(found) == reference.decode(expected)
    assert "score the same" in ours.remarks[0]


def test_a_null_is_an_answer_and_a_word_is_no_special_token(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1}, unk_token="a"))
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    assert (load_tokenizer(tmp_path).bos_id, load_tokenizer(tmp_path).eos_id) == (None, 2)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    assert load_tokenizer(tmp_path).eos_id is None


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizer", "GemmaTokenizer"])
@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("puts", [True, False], ids=["its processor puts bos", "none"])
def test_the_processor_of_a_tokenizer_json_puts_bos_whatever_stands_beside(kind, asked, puts, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(sorted(letters))}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<s>", "</s>"])
    if puts:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 256)]
        )
    made.save(str(tmp_path / "tokenizer.json"))
    names = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>"}
    beside = names if asked is None else {**names, "add_bos_token": asked}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"]
    assert load_tokenizer(tmp_path).adds_bos == (theirs[0] == 256)
