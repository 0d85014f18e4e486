"""Train a tokenizer and a small LLaMA on .jsonl files, from Python.

    python examples/train.py OUTPUT FILES... [section.key=value ...]
    torchrun --nproc-per-node 2 examples/train.py OUTPUT FILES... parallel.tensor=2

OUTPUT gets the tokenizer, the tokens and the run. The settings are those of configs/stages/pretrain-small.yaml.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from llm3d import api
from llm3d.corpus.build import tokenize_corpus
from llm3d.corpus.tokenizer_training import train_tokenizer

SETTINGS = Path(__file__).parent.parent / "configs/stages/pretrain-small.yaml"


def prepare(output: Path, files: list[str], vocab_size: int = 400) -> None:
    """Write OUTPUT/tokenizer, and OUTPUT/corpus with the tokens for training and validation."""
    if not (output / "tokenizer").exists():
        train_tokenizer(files, output / "tokenizer", "byte-level", vocab_size)
    if not (output / "corpus").exists():
        tokenize_corpus(files, output / "corpus", output / "tokenizer", valid_fraction=0.1)


def main() -> None:
    output, arguments = Path(sys.argv[1]), sys.argv[2:]
    files = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    if "RANK" not in os.environ:  # else prepare it before torchrun starts the ranks
        prepare(output, files)
    data = [f"data.{name}={output}/corpus/{name}" for name in ("train", "valid")]
    config = api.load_config(
        SETTINGS, [f"run.dir={output}/run", *data, f"data.tokenizer={output}/tokenizer", *overrides]
    )
    print(f"the model is in {api.train(config)}/model")


if __name__ == "__main__":
    main()
