"""One command for each thing that a user does.

Every command imports what it needs when it runs, so that `llm3d --help` does not wait for torch.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

import llm3d
from llm3d.errors import InputError, TrainingAborted
from llm3d.wording import counted

if TYPE_CHECKING:
    import torch

    from llm3d.config import Config, PPOConfig

C = TypeVar("C", bound="Config")


def main() -> NoReturn:
    app(prog_name="llm3d")
    raise SystemExit(0)


def ends_as_promised(command: Callable[..., None]) -> Callable[..., None]:
    """Exit code 2 and the message for wrong input, 3 for aborted training, 130 for Ctrl-C; a bug's traceback.

    Every rank ends with the code; the first one speaks.
    """

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except InputError as error:
            end(str(error), 2)
        except TrainingAborted as error:
            end(str(error), 3)
        except KeyboardInterrupt as error:
            end(str(error) or "interrupted", 130)

    return guarded


def end(message: str, code: int) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        for line in message.splitlines():
            print(f"llm3d: {line}", file=sys.stderr)
    raise typer.Exit(code)


def group(about: str, add_completion: bool = False) -> typer.Typer:
    # Plain help and tracebacks: rich would double the time that --help takes.
    return typer.Typer(
        help=about,
        no_args_is_help=True,
        add_completion=add_completion,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


app = group("Train LLaMA models under tensor, pipeline and data parallelism.", add_completion=True)
tokenizer_app = group("Train tokenizers.")
data_app = group("Prepare data, and look at it.")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
bench_app = group("Measure speed on this machine.")
app.add_typer(bench_app, name="bench")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Settings.", show_default=False)]
ConfigOrRun = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG.yaml|RUN", help="Settings, or a run directory, by its own.", show_default=False
    ),
]
ConfigOrModel = Annotated[
    Path,
    typer.Argument(
        metavar="WHAT",
        help="Settings, a run directory (its latest checkpoint), a checkpoint, or a Hugging Face or PEFT directory.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="section.key=value",
        help="Settings that replace the file's, such as parallel.tensor=2. "
        "A model.preset or model.path replaces the file's whole model section.",
        show_default=False,
    ),
]
CheckOnly = Annotated[
    bool, typer.Option("--check", help="Check the settings and open what they name, then end.")
]
TextFiles = Annotated[
    list[str],
    typer.Argument(
        metavar="FILES...",
        help="Files, directories or patterns: .txt, .jsonl(.gz, .zst), .parquet.",
        show_default=False,
    ),
]
Output = Annotated[Path, typer.Option(help="The directory to write.", show_default=False)]
TextField = Annotated[str, typer.Option(help="The field of .jsonl and .parquet that holds the text.")]
Separator = Annotated[
    str | None,
    typer.Option(help="What ends a document in .txt files, such as '\\n\\n'. [default: the end of the file]"),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out, and count, what cannot be read.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at --output.")]


class Stage(str, Enum):
    pretrain = "pretrain"
    sft = "sft"
    reward = "reward"
    dpo = "dpo"
    ppo = "ppo"


StageOption = Annotated[
    Stage | None,
    typer.Option(
        help="What the settings are for. [default: the stage whose section they have, else pretrain]"
    ),
]


def show_version(asked: bool) -> None:
    if asked:
        print(f"llm3d {llm3d.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=show_version, is_eager=True),
    ] = False,
) -> None:
    pass


# ---- data ----


class TokenizerKind(str, Enum):
    sentencepiece = "sentencepiece"
    byte_level = "byte-level"


@tokenizer_app.command("train")
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
    from llm3d.data.tokenizer import train_tokenizer

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


@data_app.command("tokenize")
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
    from llm3d.data.corpus import tokenize_corpus

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


@data_app.command("show")
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

    from llm3d.stages.show import show

    show(settings, samples, split.value, data_size, Console())


def unescaped(separator: str | None) -> str | None:
    """Line ends and tabs are hard to type in a shell."""
    return separator and separator.replace("\\n", "\n").replace("\\t", "\t")


# ---- runs ----


@app.command("config")
@ends_as_promised
def show_config(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG.yaml|RUN", help="Settings, or a run directory, by its own.", show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Check the layout against this many devices, too.")
    ] = None,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="Print the JSON Schema of settings files, of any stage or of --stage."),
    ] = False,
    stage: StageOption = None,
) -> None:
    """Print the settings as a run would have them, every default filled in."""
    import json

    from llm3d.config import config_to_yaml, json_schema, load_config
    from llm3d.config.uses import settings_at

    config, of_run = settings_at(config) if config is not None else (None, list[str]())
    kind = kind_of_settings(config, stage)
    if schema:
        print(json.dumps(json_schema(kind if config or stage else None), indent=2))
    elif config is None:
        raise InputError("config: give a CONFIG.yaml, or --schema")
    else:
        overrides = [*of_run, *(overrides or [])]
        print(config_to_yaml(load_config(config, overrides, world_size, kind)), end="")


@app.command()
@ends_as_promised
def pretrain(config: ConfigFile, overrides: Overrides = None, check_only: CheckOnly = False) -> None:
    """Train on tokens from `llm3d data tokenize`, or from Megatron."""
    train("pretrain", config, overrides, check_only)


@app.command()
@ends_as_promised
def sft(config: ConfigFile, overrides: Overrides = None, check_only: CheckOnly = False) -> None:
    """Fine-tune on conversations: learn the replies."""
    train("sft", config, overrides, check_only)


@app.command()
@ends_as_promised
def reward(config: ConfigFile, overrides: Overrides = None, check_only: CheckOnly = False) -> None:
    """Train a reward model on comparisons of replies."""
    train("reward", config, overrides, check_only)


@app.command()
@ends_as_promised
def dpo(config: ConfigFile, overrides: Overrides = None, check_only: CheckOnly = False) -> None:
    """Direct preference optimisation on comparisons of replies."""
    train("dpo", config, overrides, check_only)


@app.command()
@ends_as_promised
def ppo(config: ConfigFile, overrides: Overrides = None, check_only: CheckOnly = False) -> None:
    """Reinforcement learning from a reward model or a function: PPO, GRPO or RLOO."""
    train("ppo", config, overrides, check_only)


def train(stage: str, config: Path, overrides: list[str] | None, check_only: bool) -> None:
    """Run a stage of training, or only open what its settings name."""
    from llm3d.config import STAGES, PPOConfig

    settings = load_for_this_world(config, overrides, STAGES[stage])
    if isinstance(settings, PPOConfig) and not check_only:
        say_memory(settings)
    open_stage = importlib.import_module(f"llm3d.stages.{stage}").open_stage
    if check_only:
        from llm3d.stages.training import check_stage, summary

        say_once(summary(check_stage(settings, open_stage)))
    else:
        from llm3d.stages.training import run_stage

        run_stage(settings, open_stage)


def say_once(line: str) -> None:
    """On the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


@app.command("eval")
@ends_as_promised
def evaluate(
    config: ConfigOrRun,
    overrides: Overrides = None,
    check_only: CheckOnly = False,
    stage: StageOption = None,
) -> None:
    """A stage's loss and other numbers on the validation data, by the run's latest checkpoint.

    By settings and run.dir in them, or by a run directory or a checkpoint, whose own settings name the data. The model
    is the first of: checkpoint.resume=PATH among the overrides; the checkpoint that is named, or the latest of the run
    directory; the latest in run.dir; model.path. A layout that does not fit the number of processes is left out.
    """
    from llm3d.config.uses import config_for_evaluation

    settings, remarks = config_for_evaluation(config, overrides or [], world_size_here(), name_of(stage))
    say(remarks)
    from llm3d.stages.evaluate import check, run

    if check_only:
        check(settings)
        say_once("nothing is wrong: the settings and the data can be used; nothing was computed")
    else:
        run(settings)


@app.command()
@ends_as_promised
def generate(
    config: ConfigOrModel,
    overrides: Overrides = None,
    prompt: Annotated[str | None, typer.Option(help="A text to reply to, or to continue.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="A file of prompts, .jsonl, .json or .parquet, by their columns.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk with the model.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue texts as they stand, without a template.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write the replies to --prompts here. [default: standard output]", show_default=False
        ),
    ] = None,
    overwrite: Overwrite = False,
    check_only: CheckOnly = False,
    stage: StageOption = None,
) -> None:
    """Write text; the section `generate` says how.

    The model is the first of: checkpoint.resume=PATH among the overrides; the checkpoint that is named, or the latest
    of the run directory; the latest in run.dir of the settings; model.path. A checkpoint brings its tokenizer and chat
    template, a Hugging Face directory also its generation_config.json; overrides come before these. A layout that
    does not fit the number of processes is left out.
    """
    from llm3d.config.uses import config_for_generation

    settings, remarks = config_for_generation(config, overrides or [], world_size_here(), name_of(stage))
    say(remarks)
    from llm3d.stages.generate import Wanted, check, run

    wanted = Wanted(prompt, prompts, chat, raw, output, overwrite)
    if check_only:
        check(settings, wanted)
        say_once("nothing is wrong: the settings and the prompts can be used; nothing was written")
    else:
        run(settings, wanted)


@app.command()
@ends_as_promised
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT|RUN",
            help="A checkpoint, a run directory or its settings (the latest one), or a PEFT directory.",
            show_default=False,
        ),
    ],
    output: Output,
    base: Annotated[
        str | None,
        typer.Option(
            help="The model that adapters are for. [default: the one that they name]", show_default=False
        ),
    ] = None,
    average: Annotated[
        bool,
        typer.Option("--average", help="The average of the weights over training, of a run with ppo.ema."),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint as a plain Hugging Face directory, adapters merged into their base."""
    from llm3d.config.uses import checkpoint_at

    checkpoint = checkpoint_at(checkpoint)
    from llm3d.stages.export import export

    print(export(checkpoint, output, base, overwrite, average))


class Where(str, Enum):
    cuda = "cuda"
    cpu = "cpu"


@app.command()
@ends_as_promised
def memory(
    config: ConfigOrModel,
    overrides: Overrides = None,
    device: Annotated[Where, typer.Option(help="What will run it.")] = Where.cuda,
    stage: StageOption = None,
) -> None:
    """Bytes that a rank of each pipeline stage will need, by kind; world_size=N among the settings says of how many."""
    from llm3d.config import PPOConfig
    from llm3d.config.uses import config_for_plan

    asked, others = world_size_among(overrides)
    world_size = 1 if asked is None else asked
    settings, _ = config_for_plan(config, others, world_size, name_of(stage))
    if settings.model.vocab_size is None:
        from llm3d.stages.tokenizer import open_tokenizer

        settings, _ = open_tokenizer(settings)
    if isinstance(settings, PPOConfig):
        print(memory_of_phases(settings, world_size, device.value))
        return
    from llm3d.plan.memory import Work, memory_of_stages, table
    from llm3d.stages.by_settings import largest_microbatch, objective_of
    from llm3d.stages.dpo import needs_second_model

    work = Work(objective_of(settings), largest_microbatch(settings), needs_second_model(settings))
    print(table(settings, work, world_size, memory_of_stages(settings, work, world_size, device.value)))


def memory_of_phases(settings: PPOConfig, world_size: int, device: str) -> str:
    from llm3d.plan.phases import phases_of_stages, table
    from llm3d.stages.ppo_roles import bytes_of_writing, planned_models, roles_of

    models, remarks = planned_models(settings)
    phases = phases_of_stages(roles_of(models), bytes_of_writing(settings), world_size, device)
    return "\n".join([*remarks, table(phases)])


def say_memory(settings: PPOConfig) -> None:
    """What a run will need, said by rank 0 before it starts; what is wrong with the settings is said by the run."""
    from llm3d.parallel.mesh import device_of_this_process

    if os.environ.get("RANK", "0") == "0":
        with suppress(InputError):
            print(memory_of_phases(settings, world_size_here(), device_of_this_process().type), flush=True)


# ---- kernels ----

Device = Annotated[
    str | None, typer.Option(help="cpu or cuda. [default: cuda where there is one]", show_default=False)
]


@app.command()
@ends_as_promised
def kernels(
    check: Annotated[
        bool, typer.Option("--check", help="Compute each in three dtypes and print its error against fp64.")
    ] = False,
    device: Device = None,
) -> None:
    """List the operations and what computes each on this machine."""
    from llm3d.kernels.check import print_kernels

    if not print_kernels(device_to_use(device), check):
        raise typer.Exit(1)


class Precision(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@bench_app.command("kernels")
@ends_as_promised
def bench_kernels(
    device: Device = None,
    dtypes: Annotated[
        list[Precision] | None, typer.Option("--dtype", help="[default: bf16 and fp32]")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1)] = 2048,
    hidden_size: Annotated[int, typer.Option(min=32)] = 4096,
    intermediate_size: Annotated[int, typer.Option(min=1)] = 11008,
    vocab_size: Annotated[int, typer.Option(min=2)] = 32000,
    parameters: Annotated[int, typer.Option(min=1, help="Of AdamW and the gradient's norm.")] = 150_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="The contenders take turns this often.")] = 11,
    compiled: Annotated[bool, typer.Option(help="Run torch.compile beside, too.")] = True,
) -> None:
    """Time, traffic and bandwidth of each operation, beside PyTorch, torch.compile and Liger-Kernel."""
    import torch

    from llm3d.kernels.bench import bandwidth, measure_kernels, print_measured
    from llm3d.kernels.cases import Sizes
    from llm3d.train.host_memory import keep_freed_memory

    if hidden_size % 32 or (hidden_size // 32) % 2:
        raise InputError(f"--hidden-size: {hidden_size} is not a multiple of 64, 32 heads of an even size")
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    chosen = [types[dtype.value] for dtype in dtypes or (Precision.bf16, Precision.fp32)]
    where = device_to_use(device)
    sizes = Sizes(tokens, hidden_size, 32, intermediate_size, vocab_size, parameters)
    if where.type == "cpu":
        keep_freed_memory()  # as in training, and for all alike
    streaming = bandwidth(where)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"{where} ({name}), torch {torch.__version__}: {streaming / 1e9:.1f} GB/s copied or updated in place"
    )
    print_measured(measure_kernels(sizes, chosen, where, rounds, compiled), streaming)


def device_to_use(name: str | None) -> torch.device:
    import torch

    from llm3d.kernels import backend

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"--device: {name} is neither cpu nor cuda") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"--device: {name} is not there; torch {torch.__version__} sees no such device")
    backend.use("auto", device)
    return device


def load_for_this_world(config: Path, overrides: list[str] | None, kind: type[C]) -> C:
    """The settings, checked before torch is imported; torchrun says how many ranks there are."""
    from llm3d.config import load_config

    return load_config(config, overrides or [], world_size_here(), kind)


def world_size_here() -> int:
    return whole_number("environment variable WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))


def world_size_among(overrides: list[str] | None) -> tuple[int | None, list[str]]:
    """What world_size=N among the overrides says, if it is there, and the other overrides."""
    given = [text for text in overrides or [] if text.startswith("world_size=")]
    others = [text for text in overrides or [] if text not in given]
    return whole_number("world_size", given[-1].removeprefix("world_size=")) if given else None, others


def kind_of_settings(config: Path | None, stage: Stage | None) -> type[Config]:
    """Of the stage that is named, or else whose section the file has."""
    from llm3d.config import STAGES, PretrainConfig, kind_of

    if stage is not None:
        return STAGES[stage.value]
    return PretrainConfig if config is None else kind_of(config)


def name_of(stage: Stage | None) -> str | None:
    return None if stage is None else stage.value


def say(remarks: list[str]) -> None:
    """On standard error, by the first rank."""
    for remark in remarks if os.environ.get("RANK", "0") == "0" else ():
        print(remark, file=sys.stderr)


def whole_number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"{name}: {text!r} is not a whole number")
    return int(text)
