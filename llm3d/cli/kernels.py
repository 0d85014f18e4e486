"""Commands about kernels: what computes each operation here, how exactly, and how fast."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from llm3d.cli.common import ends_as_promised
from llm3d.errors import InputError

if TYPE_CHECKING:
    import torch


Device = Annotated[
    str | None, typer.Option(help="Device: cpu or cuda. [default: cuda if there is one]", show_default=False)
]


@ends_as_promised
def kernels(
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Run each operation in three dtypes and print its error relative to fp64."
        ),
    ] = False,
    device: Device = None,
) -> None:
    """List the operations and the back end of each on this machine."""
    from llm3d.bench.accuracy import print_kernels

    if not print_kernels(device_to_use(device), check):
        raise typer.Exit(1)


class Precision(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@ends_as_promised
def bench_kernels(
    device: Device = None,
    dtypes: Annotated[
        list[Precision] | None,
        typer.Option(
            "--dtype", help="Dtype to measure; may be given several times. [default: bf16 and fp32]"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens in a batch.")] = 2048,
    hidden_size: Annotated[int, typer.Option(min=32, help="Hidden size, a multiple of 64.")] = 4096,
    intermediate_size: Annotated[int, typer.Option(min=1, help="Intermediate size of SwiGLU.")] = 11008,
    vocab_size: Annotated[int, typer.Option(min=2, help="Vocabulary size of the cross-entropy.")] = 32000,
    parameters: Annotated[
        int, typer.Option(min=1, help="Number of parameters for AdamW and the gradient norm.")
    ] = 150_000_000,
    rounds: Annotated[
        int, typer.Option(min=1, help="Number of rounds, in each of which every contender runs once.")
    ] = 11,
    compiled: Annotated[bool, typer.Option(help="Measure torch.compile, too.")] = True,
) -> None:
    """Measure time, traffic and bandwidth of each operation, against PyTorch, torch.compile and Liger-Kernel."""
    import torch

    from llm3d.bench.cases import Sizes
    from llm3d.bench.kernels import bandwidth, measure_kernels, print_measured
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
