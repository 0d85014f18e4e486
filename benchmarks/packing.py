"""Sample packing in seconds, native beside the same algorithm in Python, and what the bins leave unused.

    python benchmarks/packing.py [--capacity 4096] [--rounds 5] [--jsonl TRAIN.jsonl] [--tokenizer DIRECTORY]

Lengths are log-normal (mean of the logarithm 5.5, its standard deviation 1), cut off at the capacity; with --jsonl
also those of its lines, drawn with replacement: all texts of a line, in the tokenizer's tokens, or without one in
characters / 4. Timed is all of `pack`: sorting, the search for the least capacity, and the bins as arrays. The two
take turns on a million samples; printed are the median times, and of the rounds' ratios the median, least and
largest. Five million are packed by the native code alone. Unused is what padding every bin to the fullest adds, as a
share of all; beside it the same of batches of consecutive samples, each padded to its longest, of as many samples as
a bin holds on average. One thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from llm3d.data import packing
from llm3d.data.packing import Ints, pack, unused_share

COMPARED, MOST = 1_000_000, 5_000_000
Draw = Callable[[int], Ints]


def lognormal(capacity: int) -> Draw:
    def draw(count: int) -> Ints:
        lengths = np.random.default_rng(0).lognormal(5.5, 1.0, count)
        return np.clip(lengths, 1, capacity).astype(np.int64)

    return draw


def from_jsonl(path: Path, tokenizer: Path | None, capacity: int) -> Draw:
    length = _tokens_by(tokenizer) if tokenizer else lambda text: len(text) // 4
    with path.open(encoding="utf-8") as file:
        every = [length("\n".join(_texts(json.loads(line)))) for line in file]
    known = np.clip(np.array(every, np.int64), 1, capacity)
    print(
        f"{path.name}: {len(known):,} lines, {known.mean():.0f} tokens on average, {known.max()} the longest"
    )
    return lambda count: np.random.default_rng(0).choice(known, count)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _tokens_by(directory: Path) -> Callable[[str], int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text).ids)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_python(lengths: Ints, capacity: int) -> object:
    with patch.object(packing, "first_fit", packing.first_fit_in_python):
        return pack(lengths, capacity)


def compare(lengths: Ints, capacity: int, rounds: int) -> str:
    native, python = [], []
    for _ in range(rounds):
        native.append(seconds(partial(pack, lengths, capacity)))
        python.append(seconds(partial(in_python, lengths, capacity)))
    ratios = sorted(slow / fast for slow, fast in zip(python, native, strict=True))
    spread = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f})"
    return f"{statistics.median(native):6.2f} s  in Python {statistics.median(python):6.2f} s, over native {spread}"


def padded(lengths: Ints, num_bins: int) -> float:
    """What batches of consecutive samples leave unused, without packing."""
    together = max(1, round(len(lengths) / num_bins))
    batches = lengths[: len(lengths) // together * together].reshape(-1, together)
    return float(1 - batches.sum() / (batches.max(1).sum() * together))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capacity", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jsonl", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="a directory with tokenizer.json")
    arguments = parser.parse_args()
    if packing.first_fit is packing.first_fit_in_python:
        raise SystemExit(
            "the native code is not there; installing llm3d builds it where there is a C++ compiler"
        )
    capacity, rounds = arguments.capacity, arguments.rounds
    sources = {"log-normal": lognormal(capacity)}
    if arguments.jsonl:
        sources[arguments.jsonl.name] = from_jsonl(arguments.jsonl, arguments.tokenizer, capacity)
    for name, draw in sources.items():
        for count in (COMPARED, MOST):
            lengths = draw(count)
            if count == COMPARED:
                took = compare(lengths, capacity, rounds)
            else:
                took = f"{statistics.median(seconds(partial(pack, lengths, capacity)) for _ in range(rounds)):6.2f} s"
            packed = pack(lengths, capacity)
            unused = f"unused {unused_share(lengths, packed):.4%}, without packing {padded(lengths, len(packed)):.1%}"
            fewest = -(-int(lengths.sum()) // capacity)
            print(
                f"{name:12} {count:9,} samples  {len(packed):8,} bins (at least {fewest:,})  {unused}  {took}"
            )


if __name__ == "__main__":
    main()
