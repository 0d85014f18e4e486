"""Text and tokenizers that the tests of data share."""

import json
from pathlib import Path

import pytest
from hypothesis import settings

from llm3d.data.tokenizer import load_tokenizer, train_tokenizer

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

SENTENCES = (
    "It was the best of times, it was the worst of times;",
    "we had everything before us, we had nothing before us.\n\n    def double(x):\n\t    return 2 * x  # 1234567",
    "春眠不觉晓、处处闻啼鸟。\n夜来风雨声、花落知多少。",
    "Ça va? Да, конечно! 😀😀 résumé naïve",
)


def documents(count: int) -> list[str]:
    return [f"{SENTENCES[i % 4]} {i} {SENTENCES[(i * 7 + 1) % 4]}" * (1 + i % 3) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    return path


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", documents(200))


@pytest.fixture(scope="session", params=["sentencepiece", "byte-level"])
def tokenizer_directory(request, tmp_path_factory, corpus_file) -> Path:
    output = tmp_path_factory.mktemp("tokenizer") / request.param
    train_tokenizer([corpus_file], output, request.param, vocab_size=400)
    return output


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory):
    return load_tokenizer(tokenizer_directory)
