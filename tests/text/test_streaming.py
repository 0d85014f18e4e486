"""Text appears as its tokens come, is never taken back, and ends where it is told to."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from llm3d.text.streaming import Detokenizer, StreamPrinter
from llm3d.text.tokenizer import Tokenizer, load_tokenizer
from tests.stages.post_training import write_tokenizer

STOPS = st.lists(st.text("ab\n é€", min_size=1, max_size=4), max_size=3)
TEXT = st.text("ab\n é€", max_size=20)


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """In both, most characters of the tests are several tokens."""
    directory = tmp_path_factory.mktemp("tokenizer")
    if request.param == "byte-level":
        return load_tokenizer(write_tokenizer(directory / "bytes"))
    return byte_fallback(directory)


def byte_fallback(directory: Path) -> Tokenizer:
    """In the style of LLaMA 1 and 2: characters that are no tokens are spelled in bytes, a run of them at a time."""
    words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁a", "<|im_end|>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    parts = [
        tokenizers.decoders.Replace("▁", " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    ]
    made.decoder = tokenizers.decoders.Sequence(parts)
    made.add_special_tokens(["<unk>", "</s>", "<|im_end|>"])
    made.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory)


@given(text=TEXT, stop=STOPS)
def test_what_is_shown_grows_into_the_text(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    replies = Detokenizer(tokenizer, [], stop)
    shown, printed = StreamPrinter(replies), ""
    tokens = tokenizer.encode_next(text).tolist()
    for i in range(1, len(tokens) + 1):
        printed += shown.more(tokens[:i])
        if replies.ends(tokens[:i]):
            tokens, text = tokens[:i], tokenizer.decode_next(tokens[:i])
            break
    whole = replies.text(tokens)
    first = min((text.find(s) for s in stop if s in text), default=len(text))
    assert whole == text[:first] and printed + shown.up_to(whole) == whole


@given(text=TEXT, stop=STOPS)
def test_a_reply_ends_with_the_token_that_completes_a_stop(
    tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    replies = Detokenizer(tokenizer, [], stop)
    tokens = tokenizer.encode_next(text).tolist()
    for i in range(1, len(tokens) + 1):
        so_far = tokenizer.decode_next(tokens[:i])
        if any(s in so_far for s in stop):
            assert replies.ends(tokens[:i])
            break
        assert not replies.ends(tokens[:i])


def test_end_tokens_end_it_and_are_no_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.special_id("<|im_end|>")
    assert end is not None and tokenizer.eos_id is not None
    replies = Detokenizer(tokenizer, [end], ())
    tokens = tokenizer.encode("one")
    assert not replies.ends(tokens) and replies.ends([*tokens, end])
    assert not replies.ends([*tokens, end, tokens[0]]), "only the last token counts"
    assert not replies.ends([*tokens, tokenizer.eos_id])
    assert replies.text([*tokens, tokenizer.eos_id, end]) == "one"


def test_added_tokens_that_are_text_stay_and_unknown_ones_do_not(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer.from_file(str(write_tokenizer(tmp_path / "plain") / "tokenizer.json"))
    made.add_tokens(["<think>"])
    (tmp_path / "own").mkdir()
    made.save(str(tmp_path / "own" / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "own")
    think = tokenizer.special_id("<think>")
    assert think is not None
    tokens = [*tokenizer.encode("one"), think, tokenizer.vocab_size, tokenizer.vocab_size + 3]
    assert Detokenizer(tokenizer, []).text(tokens) == "one<think>"
    assert Detokenizer(tokenizer, [], ["<think>"]).ends(tokens[:-2])


def test_a_reply_keeps_the_space_that_it_starts_with(tmp_path: Path) -> None:
    """Tokenizers in the style of LLaMA 1 and 2 leave it out of a text that stands alone."""
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({"▁": 0, "a": 1, "▁a": 2, "\n": 3, "</s>": 4}, [("▁", "a")])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    replies = Detokenizer(load_tokenizer(tmp_path), [4])
    assert replies.text([2, 2, 4]) == " a a"
