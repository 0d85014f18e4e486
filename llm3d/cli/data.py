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
        help="Files, directories or patterns: .txt, .jsonl(.gz, .zst), .parquet.",
        show_default=False,
    ),
]
TextField = Annotated[str, typer.Option(help="The field of .jsonl and .parquet that holds the text.")]
Separator = Annotated[
    str | None,
    typer.Option(help="What ends a document in .txt files, such as '\\n\\n'. [default: the end of the file]"),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out, and count, what cannot be read.")]


class TokenizerKind(str, Enum):
    sentencepiece = "sentencepiece"
    byte_level = "byte-level"


@ends_as_promised
def tokenizer_train(
    files: TextFiles,
    output: Output,
    vocab_size: Annotated[
        int, typer.Option(min=1, help="Tokens, special ones included.", show_default=False)
    ],
    kind: Annotated[
        TokenizerKind, typer.Option(help="BPE in the style of LLaMA 1 and 2, or of Llama 3.")
    ] = TokenizerKind.sentencepiece,
    text_field: TextField = "text",
    separator: Separator = None,
    max_bytes: Annotated[
        int, typer.Option(min=1, help="Of more text than this, a random part is trained on.")
    ] = 1_000_000_000,
    character_coverage: Annotated[
        float,
        typer.Option(min=0.9, max=1, help="Share of characters that sentencepiece does not spell in bytes."),
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
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer's file or directory.", show_default=False)],
    text_field: TextField = "text",
    separator: Separator = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. [default: a core each]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order of documents and of the split.")] = 1234,
    valid_fraction: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of tokens that is kept for validation.")
    ] = 0.01,
    prepend_bos: Annotated[
        PrependBos,
        typer.Option(help="Put bos before every document; auto: where the tokenizer adds one to a text."),
    ] = PrependBos.auto,
    skip_bad: SkipBad = False,
    overwrite: Overwrite = False,
) -> None:
    """Turn text into the .bin and .idx files that training reads."""
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
    samples: Annotated[int, typer.Option(min=0, help="How many to show.")] = 3,
    split: Annotated[Split, typer.Option(help="Of data.train or of data.valid.")] = Split.train,
    stage: StageOption = None,
) -> None:
    """Show samples of sft, reward or dpo as the model gets them, and what all of them come to.

    In the order of training; what is learned is in colour. world_size=N among the settings: packed for N devices.
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
