"""What all tests share: properties are tried without a deadline, for a machine may be busy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.corpora import documents, write_jsonl

if TYPE_CHECKING:
    from llm3d.text.tokenizer import Tokenizer

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Files that take longest, the longest first: where one of them came last, a worker would run it while the other waits.
LONGEST_FIRST = (
    "rl/test_ppo.py",
    "plan/test_memory.py",
    "csrc/test_cuda_compiles.py",
    "parity/test_zero.py",
    "checkpoint/test_checkpoint.py",
    "stages/test_dpo.py",
    "parity/test_post_training.py",
    "generate/test_engine.py",
    "parity/test_parity.py",
    "plan/test_phases.py",
    "parity/test_samples.py",
    "train/test_waiting.py",
)


@pytest.hookimpl(tryfirst=True)  # before tests are left out by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of modules that know the pool of ranks, and put files that take long first."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    for item in items:
        if isinstance(item, pytest.Function) and {"pool", "spawn", "trained"} & vars(item.module).keys():
            item.add_marker(pytest.mark.distributed)


@pytest.fixture
def world_of_one() -> Iterator[None]:
    """A process group of this process alone, on a GPU if there is one."""
    import torch.distributed as dist

    from llm3d.parallel.mesh import start_process_group

    start_process_group()
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run as a world of one, whatever started the tests."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


# ---- tokenizers of either kind, trained once ----


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", documents(200))


@pytest.fixture(scope="session", params=["sentencepiece", "byte-level"])
def tokenizer_directory(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus_file: Path
) -> Path:
    from llm3d.corpus.tokenizer_training import train_tokenizer

    output = tmp_path_factory.mktemp("tokenizer") / request.param
    train_tokenizer([corpus_file], output, request.param, vocab_size=400)
    return output


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    from llm3d.text.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_directory)
