"""Commands for text: tokenizers, corpora, and a look at samples."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from llm3d.cli.common import (
    ConfigOrRun,
    Output,
    Overrides,
    Overwrite,
    StageOption,
    ends_as_promised,
    kind_of_settings,
    world_size_among,
)
from llm3d.wording import counted

TextFiles = Annotated[
    list[str],
    typer.Argument(
        metavar="FILES...",
        help="Text files, directories or glob patterns: .txt, .jsonl, .json (also .gz, .zst), .parquet.",
        show_default=False,
    ),
]
TextField = Annotated[
    str, typer.Option(help="Field of .jsonl, .json and .parquet records that holds the text.")
]
Separator = Annotated[
    str | None,
    typer.Option(
        help="Document separator in .txt files, such as '\\n\\n'. [default: each file is one document]"
    ),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Skip records that cannot be read, and count them.")
]


class TokenizerKind(str, Enum):
    sentencepiece = "sentencepiece"
    byte_level = "byte-level"


@ends_as_promised
def tokenizer_train(
    files: TextFiles,
    output: Output,
    vocab_size: Annotated[
        int, typer.Option(min=1, help="Vocabulary size, special tokens included.", show_default=False)
    ],
    kind: Annotated[
        TokenizerKind,
        typer.Option(help="Kind of BPE: sentencepiece as in LLaMA 1 and 2, or byte-level as in Llama 3."),
    ] = TokenizerKind.sentencepiece,
    text_field: TextField = "text",
    separator: Separator = None,
    max_bytes: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum amount of text to train on, bytes. Of more, a random sample is taken."
        ),
    ] = 1_000_000_000,
    character_coverage: Annotated[
        float,
        typer.Option(
            min=0.9,
            max=1,
            help="Character coverage of sentencepiece; the other characters are spelled in bytes.",
        ),
    ] = 0.9995,
    skip_bad: SkipBad = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a tokenizer on text."""
    from llm3d.corpus.tokenizer_training import train_tokenizer

    trained = train_tokenizer(
        files,
        output,
        kind.value,
        vocab_size,
        text_field=text_field,
        separator=unescaped(separator),
        max_bytes=max_bytes,
        character_coverage=character_coverage,
        skip_bad=skip_bad,
        overwrite=overwrite,
    )
    text = f"{counted(trained['documents'], 'document')}, {trained['bytes'] / 1e6:,.1f} MB"
    print(f"{output}: {trained['vocab_size']:,} tokens, trained on {text}")
    if trained["skipped"]:
        print(f"left out: {counted(trained['skipped'], 'record')} that cannot be read", file=sys.stderr)


class PrependBos(str, Enum):
    auto = "auto"
    yes = "yes"
    no = "no"


@ends_as_promised
def data_tokenize(
    files: TextFiles,
    output: Output,
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer file or directory.", show_default=False)],
    text_field: TextField = "text",
    separator: Separator = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of worker processes. [default: one per core]")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Random seed for shuffling and the train/valid split.")
    ] = 1234,
    valid_fraction: Annotated[
        float, typer.Option(min=0, max=0.99, help="Fraction of the tokens that is held out for validation.")
    ] = 0.01,
    prepend_bos: Annotated[
        PrependBos,
        typer.Option(
            help="Prepend the bos token to every document. auto: if the tokenizer adds one to a text."
        ),
    ] = PrependBos.auto,
    skip_bad: SkipBad = False,
    overwrite: Overwrite = False,
) -> None:
    """Tokenize text into the .bin and .idx files that pretraining reads."""
    from llm3d.corpus.build import tokenize_corpus

    corpus = tokenize_corpus(
        files,
        output,
        tokenizer,
        text_field=text_field,
        separator=unescaped(separator),
        workers=workers,
        seed=seed,
        valid_fraction=valid_fraction,
        prepend_bos={"auto": None, "yes": True, "no": False}[prepend_bos.value],
        skip_bad=skip_bad,
        overwrite=overwrite,
    )
    for split, documents in corpus["documents"].items():
        tokens = counted(corpus["tokens"][split], "token")
        print(f"{output / split}: {counted(documents, 'document')}, {tokens}")
    bad = corpus["bad_records"]
    if bad["total"]:
        print(f"left out: {counted(bad['total'], 'record')} that cannot be read; the first:", file=sys.stderr)
        print(*(f"  {record}" for record in bad["first"]), sep="\n", file=sys.stderr)


class Split(str, Enum):
    train = "train"
    valid = "valid"


@ends_as_promised
def data_show(
    config: ConfigOrRun,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=0, help="Number of samples to show.")] = 3,
    split: Annotated[
        Split, typer.Option(help="Data to show samples of: data.train or data.valid.")
    ] = Split.train,
    stage: StageOption = None,
) -> None:
    """Show samples of fine-tuning and of comparisons as the model sees them, and statistics of all samples.

    Samples come in the order of training; the tokens that are learned are in color. With world_size=N among the
    overrides, samples are packed for N devices.
    """
    from llm3d.config import load_config
    from llm3d.config.uses import settings_at

    world_size, others = world_size_among(overrides)
    config, of_run = settings_at(config)
    settings = load_config(config, [*of_run, *others], world_size, kind_of_settings(config, stage))
    data_size = settings.data_parallel_size(world_size) if world_size else 1
    from rich.console import Console

    from llm3d.commands.show import show

    show(settings, samples, split.value, data_size, Console())


def unescaped(separator: str | None) -> str | None:
    """Line ends and tabs are hard to type in a shell."""
    return separator and separator.replace("\\n", "\n").replace("\\t", "\t")
