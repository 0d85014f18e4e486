"""Tokens/s, TFLOP/s and MFU of training on this process's device, on random tokens.

    python benchmarks/throughput.py llama-1b --sequence-length 4096 --compute bf16 --recompute selective
    torchrun --nproc-per-node 8 benchmarks/throughput.py llama-2-7b --tensor 2 --sequence-parallel --compute bf16
    python benchmarks/throughput.py llama-7b --recompute full --offload --gradients bf16 --trace trace.json

Prints one JSON object: medians over the steps after two to warm up, and what they were measured on. With --offload also
how long the optimiser's step takes of it. --trace runs one more step under PyTorch's profiler.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from llm3d.config import PretrainConfig, make_config
from llm3d.data.pretraining import Sample, collate
from llm3d.parallel.mesh import Mesh, start_process_group
from llm3d.train.host_memory import keep_freed_memory
from llm3d.train.report import memory_gib
from llm3d.train.throughput import FORMULA, peak_flops, step_flops
from llm3d.train.trainer import Trainer


def main() -> None:
    arguments = parse()
    config = settings(arguments)
    device = start_process_group()
    if device.type == "cpu":
        keep_freed_memory()
    mesh = Mesh(config.parallel.tensor, config.parallel.pipeline, device)
    trainer = Trainer(config, mesh)
    for _, weights in trainer.weights():  # drawing the real first weights of a large model takes minutes
        weights.copy_(torch.empty(weights.shape, device=device).normal_(std=0.02))
    trainer.publish()
    generator = torch.Generator().manual_seed(mesh.data_rank)
    shape = (arguments.micro, arguments.sequence_length + 1)
    batches = [
        collate(
            [Sample(row, [0]) for row in torch.randint(0, arguments.vocab_size, shape, generator=generator)]
        ).to(device)
        for _ in range(config.num_microbatches(mesh.size))
    ]
    seconds = []
    optimizer_seconds = timed_optimizer(trainer) if arguments.offload else []
    for _ in range(arguments.steps + 2):
        started = time.perf_counter()
        trainer.step(batches, lr=1e-5)
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    if arguments.trace:
        with torch.profiler.profile() as profiler:
            trainer.step(batches, lr=1e-5)
            synchronise(device)
        profiler.export_chrome_trace(arguments.trace)
    if mesh.rank == 0:
        shown = figures(trainer, batches, statistics.median(seconds[2:]))
        if optimizer_seconds:
            shown["optimizer_step_s"] = round(statistics.median(optimizer_seconds[2:]), 4)
        print(json.dumps(shown, indent=1))
    trainer.flat.settle()
    dist.destroy_process_group()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_optimizer(trainer: Trainer) -> list[float]:
    """Seconds of each of the optimiser's steps, from the gradient's norm being known to the parameters' being back."""
    seconds: list[float] = []
    step = trainer.optimizer.step

    def timed(*arguments: Any) -> None:
        started = time.perf_counter()
        step(*arguments)
        synchronise(trainer.mesh.device)
        seconds.append(time.perf_counter() - started)

    trainer.optimizer.step = timed  # type: ignore[method-assign]
    return seconds


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", nargs="?", default="llama-20m")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--micro", type=int, default=1)
    parser.add_argument("--microbatches", type=int, default=1, help="on each data rank")
    parser.add_argument("--compute", choices=["fp32", "bf16", "fp16"], default="bf16")
    parser.add_argument("--gradients", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--zero-stage", type=int, choices=[0, 1, 2, 3], default=0)
    parser.add_argument("--offload", action="store_true", help="the optimizer's state in host memory")
    parser.add_argument("--trace", metavar="FILE", help="write a profiler's trace of a step")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    return parser.parse_args()


def settings(arguments: argparse.Namespace) -> PretrainConfig:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    data = world_size // (arguments.tensor * arguments.pipeline)
    return make_config(
        {
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
        },
        world_size,
    )


def figures(trainer: Trainer, batches: list, seconds: float) -> dict[str, object]:
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


if __name__ == "__main__":
    main()
