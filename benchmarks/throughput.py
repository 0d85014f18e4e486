"""Tokens/s, TFLOP/s and MFU of training on this process's device, on random tokens.

    python benchmarks/throughput.py llama-1b --sequence-length 4096 --compute bf16 --recompute selective
    torchrun --nproc-per-node 8 benchmarks/throughput.py llama-2-7b --tensor 2 --sequence-parallel --compute bf16
    python benchmarks/throughput.py llama-7b --recompute full --offload --gradients bf16 --trace trace.json.gz
    python benchmarks/throughput.py llama-1b --micro 2 --then "--micro 4" --then "--set kernels.backend=reference"

Prints a JSON object: medians over the steps after two to warm up, and what they were measured on; then its figures in a
line that begins with =>. With --offload also how long the optimizer's step takes of it. --then measures again in the
same process, with other options after those before; a measurement that fails does not keep the next from being made.
--profile and --trace run one more step, of the first measurement, under PyTorch's profiler.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from llm3d.config import PretrainConfig, make_config
from llm3d.data.pretraining import Microbatch, Window, collate
from llm3d.parallel.mesh import Mesh, start_process_group
from llm3d.train.host_memory import keep_freed_memory
from llm3d.train.report import memory_gib
from llm3d.train.throughput import FORMULA, peak_flops, step_flops
from llm3d.train.trainer import ShardedModel, Trainer

WARM_UP_STEPS = 2


def main(argv: Sequence[str]) -> int:
    first = parse(argv)
    device = start_process_group()
    if device.type == "cpu":
        keep_freed_memory()
    failed = 0
    for options in ["", *first.then]:
        arguments = parse([*argv, *shlex.split(options)])
        if options:
            arguments.profile = arguments.trace = None
        try:
            measure(arguments, device)
        except Exception:
            if dist.get_world_size() > 1:
                raise  # the other ranks would wait
            failed += 1
            traceback.print_exc()
            print(f"=> {called(arguments)}: FAILED, {sys.exc_info()[1]}".splitlines()[0], flush=True)
        forget(device)
    dist.destroy_process_group()
    return int(failed > 0)


def measure(arguments: argparse.Namespace, device: torch.device) -> None:
    """A trainer's steps, and what they take."""
    config = settings(arguments)
    mesh = Mesh(config.parallel.tensor, config.parallel.pipeline, device)
    trainer = Trainer(config, mesh)
    draw_weights(trainer)
    batches = random_batches(arguments, config.num_microbatches(mesh.size), mesh.data_rank, device)
    optimizer_seconds = timed_optimizer(trainer) if arguments.offload else []
    seconds = []
    for number in range(WARM_UP_STEPS + arguments.steps):
        started = time.perf_counter()
        trainer.step(batches, lr=1e-5)
        synchronise(device)
        seconds.append(time.perf_counter() - started)
        if mesh.rank == 0:  # what is stopped half-way has still said this
            print(f"step {number}: {seconds[-1]:.4f} s", file=sys.stderr, flush=True)
    if mesh.rank == 0:
        shown = figures(trainer, batches, statistics.median(seconds[WARM_UP_STEPS:]))
        if optimizer_seconds:
            shown["optimizer_step_s"] = round(statistics.median(optimizer_seconds[WARM_UP_STEPS:]), 4)
        print(json.dumps(shown, indent=1))
        print(f"=> {called(arguments)}: {in_short(shown)}", flush=True)
    if arguments.profile or arguments.trace:
        profile_step(trainer, batches, arguments)
    trainer.flat.wait_all_gathers()


def draw_weights(model: ShardedModel) -> None:
    """Drawn on the device: the real first weights of a large model, the same on every machine, take minutes."""
    for _, weights in model.weights():
        weights.copy_(torch.empty(weights.shape, device=model.mesh.device).normal_(std=0.02))
    model.publish()


def random_batches(
    arguments: argparse.Namespace, count: int, seed: int, device: torch.device
) -> list[Microbatch]:
    generator = torch.Generator().manual_seed(seed)
    shape = (arguments.micro, arguments.sequence_length + 1)
    tokens = (torch.randint(0, arguments.vocab_size, shape, generator=generator) for _ in range(count))
    return [collate([Window(row, [0]) for row in rows]).to(device) for rows in tokens]


def profile_step(trainer: Trainer, batches: Sequence[Microbatch], arguments: argparse.Namespace) -> None:
    with torch.profiler.profile() as profiler:
        trainer.step(batches, lr=1e-5)
        synchronise(trainer.mesh.device)
    if arguments.profile:
        sums = profiler.key_averages()
        table = sums.table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=100)
        Path(arguments.profile).write_text(table)
    if arguments.trace:
        profiler.export_chrome_trace(arguments.trace)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget(device: torch.device) -> None:
    """Nothing of one measurement is counted in the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def timed_optimizer(trainer: Trainer) -> list[float]:
    """Seconds of each of the optimizer's steps, from the gradient's norm being known to the parameters' being back."""
    seconds: list[float] = []
    step = trainer.optimizer.step

    def timed(*arguments: Any) -> None:
        started = time.perf_counter()
        step(*arguments)
        synchronise(trainer.mesh.device)
        seconds.append(time.perf_counter() - started)

    trainer.optimizer.step = timed  # type: ignore[method-assign]
    return seconds


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The last of an option's values counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", nargs="*")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=1, help="on each data rank")
    parser.add_argument("--compute", choices=["fp32", "bf16", "fp16"], default="bf16")
    parser.add_argument("--gradients", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--zero-stage", type=int, choices=[0, 1, 2, 3], default=0)
    parser.add_argument("--offload", action="store_true", help="the optimizer's state in host memory")
    parser.add_argument("--recompute", default="none", help="as the setting")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument(
        "--set", metavar="SECTION.KEY=VALUE", action="append", default=[], help="any other setting"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", metavar="FILE", help="write a table of what takes a step's time")
    parser.add_argument(
        "--trace", metavar="FILE", help="write a profiler's trace of a step; .json or .json.gz"
    )
    parser.add_argument(
        "--then", metavar="OPTIONS", action="append", default=[], help="measure again with them"
    )
    arguments = parser.parse_intermixed_args(argv)
    arguments.preset = arguments.preset[-1] if arguments.preset else "llama-20m"
    return arguments


def settings(arguments: argparse.Namespace) -> PretrainConfig:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    data = world_size // (arguments.tensor * arguments.pipeline)
    given: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {
            "preset": arguments.preset,
            "vocab_size": arguments.vocab_size,
            "max_position_embeddings": arguments.sequence_length,
        },
        "parallel": {
            "tensor": arguments.tensor,
            "pipeline": arguments.pipeline,
            "sequence": arguments.sequence_parallel,
        },
        "zero": {
            "stage": arguments.zero_stage,
            "offload": "optimizer" if arguments.offload else "none",
        },
        "precision": {"compute": arguments.compute, "gradients": arguments.gradients},
        "recompute": arguments.recompute,
        "data": {"train": ["unused"], "sequence_length": arguments.sequence_length},
        "batch": {"global": arguments.micro * arguments.microbatches * data, "micro": arguments.micro},
        "optim": {"lr": 1e-5},
        "train": {"steps": 1},
    }
    for setting in arguments.set:
        path, _, value = setting.partition("=")
        section, _, key = path.partition(".")
        given.setdefault(section, {})[key] = yaml.safe_load(value)
    return make_config(given, world_size)


def figures(trainer: Trainer, batches: Sequence[Microbatch], seconds: float) -> dict[str, object]:
    config, mesh = trainer.config, trainer.mesh
    tokens = config.batch.global_size * config.data.sequence_length
    flops = step_flops(config.model, batches, tokens // mesh.data_size) * mesh.data_size
    device, peak = peak_flops(mesh.device, config.precision.compute)
    per_device = flops / seconds / mesh.size
    return {
        "device": f"{mesh.size} x {device}",
        "torch": torch.__version__,
        "layout": str(mesh),
        "parameters": config.model.num_parameters(),
        "step_time_s": round(seconds, 4),
        "tokens_per_s": round(tokens / seconds),
        "tflops_per_device": round(per_device / 1e12, 2),
        "mfu": round(per_device / peak, 4) if peak else None,
        "mfu_counts": FORMULA,
        "memory_gib": round(memory_gib(mesh.device.type), 2),
    }


def called(arguments: argparse.Namespace) -> str:
    """A measurement's name, of what tells it from others."""
    which = f"{arguments.preset}, {arguments.microbatches} x {arguments.micro} of {arguments.sequence_length} tokens"
    unusual = [
        *([f"vocabulary {arguments.vocab_size:,}"] if arguments.vocab_size != 32000 else []),
        *([f"recompute {arguments.recompute}"] if arguments.recompute != "none" else []),
        *(["offload"] if arguments.offload else []),
        *arguments.set,
    ]
    return ", ".join([which, *unusual])


def in_short(shown: dict[str, Any]) -> str:
    share = f"MFU {shown['mfu']:.1%}, " if shown["mfu"] else ""
    return f"{share}{shown['tokens_per_s']:,} tokens/s, {shown['step_time_s']} s a step, {shown['memory_gib']} GiB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
