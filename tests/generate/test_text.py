"""Text appears as its tokens come, is never taken back, and ends where it is told to."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from llm3d.data.tokenizer import Tokenizer, load_tokenizer
from llm3d.generate.text import Replies
from tests.stages.post_training import write_tokenizer

STOPS = st.lists(st.text("ab\n é€", min_size=1, max_size=4), max_size=3)
TEXT = st.text("ab\n é€", max_size=20)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Of bytes, so that most characters of the tests are several tokens."""
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes"))


@given(text=TEXT, stop=STOPS)
def test_what_is_shown_grows_into_the_text(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    replies, shown = Replies(tokenizer, [], stop), ""
    tokens = tokenizer.encode_next(text).tolist()
    for i in range(1, len(tokens) + 1):
        settled = replies.settled(tokens[:i])
        assert settled.startswith(shown)
        shown = settled
        if replies.ends(tokens[:i]):
            break
    whole = replies.text(tokens)
    first = min((text.find(s) for s in stop if s in text), default=len(text))
    assert whole == text[:first] and whole.startswith(shown)


@given(text=TEXT, stop=STOPS)
def test_a_reply_ends_with_the_token_that_completes_a_stop(
    tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    replies = Replies(tokenizer, [], stop)
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
    replies = Replies(tokenizer, [end], ())
    tokens = tokenizer.encode("one")
    assert not replies.ends(tokens) and replies.ends([*tokens, end])
    assert not replies.ends([*tokens, end, tokens[0]]), "only the last token counts"
    assert not replies.ends([*tokens, tokenizer.eos_id])
    assert replies.text([*tokens, tokenizer.eos_id, end]) == "one"


def test_a_reply_keeps_the_space_that_it_starts_with(tmp_path: Path) -> None:
    """Tokenizers in the style of LLaMA 1 and 2 leave it out of a text that stands alone."""
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({"▁": 0, "a": 1, "▁a": 2, "\n": 3, "</s>": 4}, [("▁", "a")])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    replies = Replies(load_tokenizer(tmp_path), [4])
    assert replies.text([2, 2, 4]) == " a a"
