"""Tokenizing in MB of text a CPU-second, beside what the tokenizer's library alone does on the same text.

    python benchmarks/tokenizing.py corpus.jsonl tokenizer [--rounds 5]

llm3d's figure is all of `llm3d data tokenize` with one worker: reading, encoding, shuffling, writing. The library's
is its batch call on texts that are in memory already, on one thread. The two take turns; the ratio is the median
over rounds. Documents come one a line, in the field "text".
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path, help="a directory")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with arguments.corpus.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    alone = library(arguments.tokenizer, texts)
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(arguments.rounds):
            theirs.append(megabytes / cpu_seconds(alone))
            ours.append(megabytes / cpu_seconds(lambda: llm3d(arguments, Path(directory) / "corpus")))
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    result = {
        "corpus": arguments.corpus.name,
        "library_mb_per_cpu_s": round(statistics.median(theirs), 2),
        "llm3d_mb_per_cpu_s": round(statistics.median(ours), 2),
        "llm3d_over_library": round(statistics.median(ratios), 3),
        "spread": [round(ratios[0], 3), round(ratios[-1], 3)],
    }
    print(json.dumps(result))


def library(tokenizer: Path, texts: list[str]) -> Callable[[], object]:
    if (tokenizer / "tokenizer.json").exists():
        from tokenizers import Tokenizer

        model = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        return lambda: [encoding.ids for encoding in model.encode_batch_fast(texts, add_special_tokens=False)]
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    return lambda: processor.encode(texts, num_threads=1)


def llm3d(arguments: argparse.Namespace, output: Path) -> None:
    from llm3d.corpus.build import tokenize_corpus

    tokenize_corpus(
        [arguments.corpus], output, arguments.tokenizer, workers=1, overwrite=True, progress=False
    )


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
