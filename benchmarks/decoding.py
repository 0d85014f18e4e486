"""Tokens a second while text is written, beside what memory allows: weights and cache read once for each token.

    python benchmarks/decoding.py --preset llama-1b [--compute bf16] [--batches 1 64] [--context 512] [--new-tokens 128]
        [--graphs on off]

Random weights; prompts of --context tokens, each reply as long as the next. Reading the prompts and recording a step
are not counted: they are timed by themselves, with replies of four tokens. The bandwidth is that of a copy on the same
device, bytes read and written. --graphs off launches each step's kernels; on records them, on a GPU, and plays them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from throughput import draw_weights, synchronise

from llm3d.config import make_config
from llm3d.generate.cuda_graphs import graphs_for
from llm3d.generate.engine import Generator
from llm3d.generate.sampling import Sampling
from llm3d.generate.scheduler import Request
from llm3d.parallel.mesh import Mesh, start_process_group
from llm3d.train.trainer import ShardedModel

FIRST = 4  # tokens, after which all is as it stays


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    mesh = Mesh(device=start_process_group())
    bandwidth = copy_bandwidth(mesh.device)
    print(f"torch {torch.__version__}, {mesh.device.type}, a copy moves {bandwidth / 1e9:,.0f} GB/s")
    model = ShardedModel(settings(arguments), mesh)
    draw_weights(model)
    weights = sum(unit.whole.nbytes for unit in model.flat.units)
    for graphs, batch in product(arguments.graphs, arguments.batches):
        rate = decode_rate(model, arguments, batch, graphs == "on")
        length = arguments.context + arguments.new_tokens / 2
        read = weights + batch * length * bytes_a_token(model)
        floor = bandwidth / read * batch
        print(
            f"=> {arguments.preset}, batch {batch}, graphs {graphs}: {rate:,.1f} tokens/s, {rate / floor:.1%} of the "
            f"{floor:,.1f} that memory allows",
            flush=True,
        )
    dist.destroy_process_group()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-1b")
    parser.add_argument("--compute", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--graphs", choices=["on", "off"], nargs="+", default=["on"])
    return parser.parse_args(argv)


def settings(arguments: argparse.Namespace) -> Any:
    length = arguments.context + arguments.new_tokens
    given = {
        "run": {"dir": "unused"},
        "model": {"preset": arguments.preset, "vocab_size": arguments.vocab_size},
        "precision": {"compute": arguments.compute},
        "data": {"train": ["unused"], "sequence_length": length},
        "batch": {"global": 1},
        "optim": {"lr": 1},
        "train": {"steps": 1},
    }
    return make_config(given, 1)


def bytes_a_token(model: ShardedModel) -> int:
    """Of keys and values."""
    shape = model.config.model
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * model.dtype.itemsize


def decode_rate(model: ShardedModel, arguments: argparse.Namespace, batch: int, graphs: bool) -> float:
    """Tokens a second, the median of some rounds."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, arguments.vocab_size, (batch, arguments.context), generator=generator).tolist()
    recorder = graphs_for(model.mesh.device, graphs)
    writer = Generator(model.config.model, model.stages, model.mesh, model.dtype, recorder)

    def write(num_tokens: int) -> None:
        requests = [Request(p, num_tokens, lambda _: False, Sampling(temperature=0)) for p in prompts]
        writer.generate(requests, max_sequences=batch)

    write(FIRST)
    rates = []
    for _ in range(arguments.rounds):
        start, whole = (seconds(partial(write, n), model.mesh.device) for n in (FIRST, arguments.new_tokens))
        rates.append(batch * (arguments.new_tokens - FIRST) / (whole - start))
    return statistics.median(rates)


def seconds(work: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written."""
    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    times = [seconds(partial(target.copy_, source), device) for _ in range(7)]  # type: ignore[arg-type]
    return 2 * source.nbytes / statistics.median(times)


if __name__ == "__main__":
    main(sys.argv[1:])
