"""One AdamW step on the CPU beside PyTorch's and DeepSpeed's: gradients come in bf16, parameters leave in bf16.

    python benchmarks/adamw.py [--parameters 150000000] [--rounds 11]

Each does the same work on buffers of its own: bf16 gradients, fp32 master weights and moments updated, bf16
parameters written. llm3d does it in one pass, and multiplies by the clipping factor on the way; for the others
gradients are cast into an fp32 buffer that stays, and parameters copied out. They take turns; printed are the median
times, and of the rounds' ratios the median, least and largest. Streaming bandwidth is that of an update in place,
x += 1, over the same number of bytes. "llm3d, offloaded" is the host's part of zero.offload, in its chunks.
DeepSpeed is run where it is installed (DS_ACCELERATOR=cpu; it compiles its kernel at the first start).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from llm3d.kernels import backend
from llm3d.kernels.adamw import adamw_
from llm3d.parallel.zero.offload import Chunk, Offload

LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.1, 0.5
BYTES = 28  # a parameter: bf16 in and out; fp32 master and two moments, read and written
Step = Callable[[], object]


def llm3d_step(gradient: torch.Tensor) -> Step:
    master, exp_avg, exp_avg_sq = (torch.zeros(gradient.shape) for _ in range(3))
    parameter = torch.empty_like(gradient)
    step = torch.ones((), dtype=torch.int64)
    lr, clip = (torch.tensor(value, dtype=torch.float64) for value in (LR, CLIP))
    state = master, exp_avg, exp_avg_sq, gradient, parameter, step, lr, clip

    def run() -> None:
        adamw_(*state, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
        step.add_(1)

    return run


def offloaded_step(gradient: torch.Tensor) -> Step:
    master, exp_avg, exp_avg_sq = (torch.zeros(gradient.shape) for _ in range(3))
    device_parameter = torch.empty_like(gradient)
    step = torch.ones((), dtype=torch.int64)
    lr, clip = (torch.tensor(value, dtype=torch.float64) for value in (LR, CLIP))
    offload = Offload(gradient.device, gradient.dtype, staged=False)

    def update(part: slice, arrived: torch.Tensor, parameter: torch.Tensor | None) -> None:
        state = master[part], exp_avg[part], exp_avg_sq[part], arrived, parameter, step, lr, clip
        adamw_(*state, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)

    chunks = [
        Chunk(gradient[part], device_parameter[part], master[part], partial(update, part))
        for part in offload.ranges(0, len(gradient))
    ]

    def run() -> None:
        offload.run(chunks)
        step.add_(1)

    return run


def with_casts(gradient: torch.Tensor, make: Callable[[list[torch.Tensor]], Any]) -> Step:
    """An optimizer of fp32 parameters between a cast of the gradient and a copy of the parameter."""
    master = torch.zeros(gradient.shape, requires_grad=True)
    master.grad = torch.zeros(gradient.shape)
    cast, parameter, optimizer = master.grad, torch.empty_like(gradient), make([master])

    def run() -> None:
        cast.copy_(gradient)
        optimizer.step()
        parameter.copy_(master.detach())

    return run


def torch_step(gradient: torch.Tensor) -> Step:
    def make(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
        )

    return with_casts(gradient, make)


def deepspeed_step(gradient: torch.Tensor) -> Step:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return with_casts(
        gradient, lambda p: DeepSpeedCPUAdam(p, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    )


def stream(parameters: int) -> Step:
    x = torch.zeros(parameters * BYTES // 8)
    return lambda: x.add_(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=150_000_000)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(arguments.parameters, generator=generator).mul_(1e-2).bfloat16()
    contenders: dict[str, Step] = {
        "llm3d": llm3d_step(gradient),
        "llm3d, offloaded": offloaded_step(gradient),
        "torch AdamW(fused=True)": torch_step(gradient),
    }
    if find_spec("deepspeed") is not None:
        contenders["DeepSpeedCPUAdam"] = deepspeed_step(gradient)
    contenders["streaming"] = stream(arguments.parameters)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-2, arguments.rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    print(
        f"{arguments.parameters:,} parameters, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{backend.describe('cpu')}; {arguments.rounds} rounds"
    )
    for name, times in seconds.items():
        median = statistics.median(times)
        over = [f"over {ours} {_ratio(times, seconds[ours])}" for ours in ("llm3d", "llm3d, offloaded")]
        rate = arguments.parameters * BYTES / median / 1e9
        print(f"{name:24} {median * 1e3:7.1f} ms  {rate:5.1f} GB/s  {'  '.join(over)}")


def _ratio(theirs: list[float], ours: list[float]) -> str:
    ratios = sorted(their / our for their, our in zip(theirs, ours, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"


if __name__ == "__main__":
    main()
