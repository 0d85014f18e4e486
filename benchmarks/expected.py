"""What a training step should take on a GPU: counted, not measured.

    python benchmarks/expected.py [--layer] [--attention fa2 fa3] [--apart] [--set SECTION.KEY=VALUE ...]

A microbatch of a trainer runs on the meta device, where tensors have shapes and no memory, and each operation is
written down with the bytes and the floating-point operations that its tensors' shapes say. A layer is what a model of
two layers does more than one of one layer. Rates, below, then give times. --layer lists the operations of a layer.
--apart: with a PyTorch whose products in bf16 are not added to fp32 sums as they are made.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from throughput import parse as parse_throughput
from throughput import random_batches, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm3d.config import ModelConfig, PretrainConfig
from llm3d.kernels import linear
from llm3d.kernels.paper import standing_for
from llm3d.models import batch
from llm3d.parallel.mesh import Mesh
from llm3d.plan.memory import META, world_on_paper
from llm3d.train.throughput import FORMULA, step_flops
from llm3d.train.trainer import Trainer


@dataclass(frozen=True)
class Gpu:
    """Rates that are assumed. Operations in TFLOP/s, bandwidth in TB/s."""

    name: str
    peak: float  # dense bf16, of the data sheet
    products: tuple[float, float]  # of matrices whose least side is 4096 or more, and of smaller ones
    attention: dict[str, tuple[float, float]]  # forward and backward, heads of 128
    bandwidth: float  # read and written, by a kernel that does little else


# FlashAttention-2 is deterministic here; in any order its backward takes about a fifth less. H200: 788 TFLOP/s were
# measured for a product of 8192^3, and 4.3 TB/s for a copy. The H100 has the same processor.
HOPPER = {"fa2": (350.0, 230.0), "fa2-any-order": (350.0, 280.0), "fa3": (600.0, 400.0)}
GPUS = (
    Gpu("A100", 312, (255, 235), {"fa2": (185.0, 125.0), "fa2-any-order": (185.0, 150.0)}, 1.75),
    Gpu("H100", 989, (700, 600), HOPPER, 2.9),
    Gpu("H200", 989, (700, 600), HOPPER, 4.0),
)
HEADS_OF_64 = 0.85  # of attention's rate with heads of 128
LEAST_KERNEL = 3e-6  # seconds
HOST_A_LAUNCH = 20e-6  # seconds of Python, autograd and dispatch
MICROBATCHES = 16  # a step

Workload = tuple[str, int, int, int]  # preset, vocabulary, sequences a microbatch, sequence length
WORKLOADS: tuple[Workload, ...] = (
    ("llama-7b", 32_000, 1, 4096),
    ("llama-7b", 32_000, 2, 2048),
    ("llama-1b", 32_000, 2, 4096),
    ("llama-1b", 32_000, 4, 2048),
    ("llama-1b", 128_256, 2, 4096),
    ("llama-1b", 128_256, 4, 2048),
)


@dataclass(frozen=True)
class Operation:
    """One launch. bytes: read and written. least_side: of a product's three dimensions."""

    name: str
    backward: bool
    bytes: int
    flops: int = 0
    least_side: int = 0

    def seconds(self, gpu: Gpu, attention: str, head_dim: int) -> float:
        memory = max(self.bytes / (gpu.bandwidth * 1e12), LEAST_KERNEL)
        if not self.flops:
            return memory
        if self.part == "attention":
            rate = gpu.attention[attention][self.name == "attention backward"] * (
                1 if head_dim >= 128 else HEADS_OF_64
            )
        else:
            rate = gpu.products[self.least_side < 4096]
        return max(memory, self.flops / (rate * 1e12))

    @property
    def part(self) -> str:
        """Of a layer."""
        if self.flops:
            return "attention" if self.name.startswith("attention") else "products"
        adds_a_gradient = self.name in ("accumulate_", "add_", "copy_") and self.backward
        return "gradient sums" if adds_a_gradient else "element-wise"


Operations = Counter[Operation]
PARTS = ("products", "attention", "element-wise", "gradient sums")


# ---- counting ----

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
# Arguments that are only written, or only say a shape.
NOT_READ = {"adamw_": "parameter", **dict.fromkeys(("zero_", "fill_", "copy_"), "self")}
NOT_READ |= dict.fromkeys(("new_zeros", "zeros_like", "ones_like", "full_like"), "self")
READS_ROWS = ("embedding", "index", "index_select", "gather")  # of their first tensor only what they give


class Recorder(TorchDispatchMode):
    """Writes down each operation that a GPU would launch."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Operations = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operation = launched(func, args, kwargs, result)
        if operation is not None:
            self.operations[operation] += 1
        return result

    def attention(self, model: ModelConfig, sequences: int, length: int) -> Any:
        """Causal attention, which launches nothing on paper, is written down by its definition when it is called."""
        compute, column = batch.attention, 2 * sequences * length  # bytes
        queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
        flops = 2 * queries * sequences * length**2  # two products, of which half is seen
        forward = Operation("attention forward", False, column * (2 * queries + 2 * keys), flops)
        # Five products. Reads q, k, v, out and its gradient; writes three.
        backward = Operation("attention backward", True, column * (4 * queries + 4 * keys), 5 * flops // 2)

        def recorded(*args: Any) -> Tensor:
            again = in_backward()  # recomputed
            self.operations[replace(forward, backward=again)] += 1
            self.operations[backward] += not again
            return compute(*args)

        return mock.patch.object(batch, "attention", recorded)


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def tensors(tree: Any) -> list[Tensor]:
    """Each once."""
    return list({id(x): x for x in tree_leaves(tree) if isinstance(x, Tensor)}.values())


def launched(func: Any, args: Any, kwargs: Any, result: Any) -> Operation | None:
    """None: of an operation that only makes a view, or room."""
    name, schema = func._schema.name.split("::")[1], func._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs
    written = [x.name for x in schema if x.alias_info is not None and x.alias_info.is_write]
    changed = tensors([given.get(argument) for argument in written])
    not_read = ("out", NOT_READ.get(name))
    inputs = tensors([value for argument, value in given.items() if argument not in not_read])
    there = {x.untyped_storage()._cdata for x in tensors(given)}
    made = [x for x in tensors(result) if x.untyped_storage()._cdata not in there]
    if not changed and (not made or "empty" in name):
        return None
    read = sum(map(nbytes, inputs))
    if name in READS_ROWS:
        read += sum(map(nbytes, made)) - nbytes(inputs[0])
    elif name == "index_add_":
        read, changed = read - nbytes(inputs[0]) + nbytes(inputs[-1]), [inputs[-1]]
    moved = read + sum(map(nbytes, made)) + sum(map(nbytes, changed))
    if name.rstrip("_") in PRODUCTS:
        first, second = [x for x in args if isinstance(x, Tensor)][-2:]
        flops = 2 * first.numel() * second.shape[-1]
        return Operation("product", in_backward(), moved, flops, min(*first.shape[-2:], second.shape[-1]))
    return Operation(name, in_backward(), moved)


def nbytes(x: Tensor) -> int:
    """What is there, where it is once: an expanded dimension is not."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return math.prod(sizes) * x.element_size()


def count(
    config: PretrainConfig,
    num_layers: int,
    num_microbatches: int,
    arguments: argparse.Namespace,
    device: torch.device = META,
    apart: bool = False,
) -> tuple[Operations, Operations]:
    """What the microbatches of a step, and the optimizer after them, launch."""
    shape = config.model.model_copy(update={"num_hidden_layers": num_layers})
    with standing_for("cuda"), world_on_paper(1, 0):
        trainer = Trainer(config.model_copy(update={"model": shape}), Mesh(device=device))
        batches = random_batches(arguments, 1, 0, device) * num_microbatches
        recorder, optimizer = Recorder(), Recorder()
        adds = mock.patch.object(linear, "_adds_to_fp32", return_value=not apart)
        with adds, recorder, recorder.attention(shape, arguments.micro, arguments.sequence_length):
            trainer.flat.begin_step(num_microbatches)
            trainer.pipeline.run(batches, trainer.objective)
            trainer.flat.finish_gradients()
        with optimizer:
            trainer.optimizer.step(1e-5, trainer.flat.gradient_norm())
    return recorder.operations, optimizer.operations


@dataclass(frozen=True)
class Counted:
    """What is launched: by a layer, and by all else, for a microbatch after the first; by the optimizer, for a step."""

    layer: Operations
    ends: Operations
    optimizer_of_layer: Operations
    optimizer_of_ends: Operations


def counted(
    config: PretrainConfig, arguments: argparse.Namespace, device: torch.device = META, apart: bool = False
) -> Counted:
    (one_1, step_1), (one_2, _) = (count(config, 1, n, arguments, device, apart) for n in (1, 2))
    (two_1, step_2), (two_2, _) = (count(config, 2, n, arguments, device, apart) for n in (1, 2))
    with_one, with_two = difference(one_2, one_1), difference(two_2, two_1)
    # What stands between two layers, as residual adds under full recomputation, is counted with a layer, and once less
    # with the rest.
    layer, step_of_layer = difference(with_two, with_one), difference(step_2, step_1)
    return Counted(layer, difference(with_one, layer), step_of_layer, difference(step_1, step_of_layer))


def difference(more: Operations, less: Operations) -> Operations:
    found = Counter(more)
    found.subtract(less)
    return Counter({operation: n for operation, n in found.items() if n})


# ---- what it takes ----


@dataclass(frozen=True)
class Expected:
    """Seconds: of a layer's parts in a microbatch; of all else in one; of the optimizer; of a step. mfu: a share."""

    layer: dict[str, float]
    host: float  # of a layer, to launch it
    ends: float
    optimizer: float
    step: float
    mfu: float


def expected(
    counts: Counted, config: PretrainConfig, arguments: argparse.Namespace, gpu: Gpu, attention: str
) -> Expected:
    def seconds(operations: Operations) -> float:
        return sum(n * x.seconds(gpu, attention, config.model.head_dim) for x, n in operations.items())

    layer = {
        part: seconds(Counter({x: n for x, n in counts.layer.items() if x.part == part})) for part in PARTS
    }
    layers, host = config.model.num_hidden_layers, counts.layer.total() * HOST_A_LAUNCH
    ends, optimizer = seconds(counts.ends), seconds(counts.optimizer_of_ends)
    optimizer += layers * seconds(counts.optimizer_of_layer)
    microbatch = layers * max(sum(layer.values()), host) + ends
    step = MICROBATCHES * microbatch + optimizer
    tokens = arguments.micro * arguments.sequence_length
    batches = random_batches(arguments, 1, 0, torch.device("cpu"))
    useful = step_flops(config.model, batches, tokens)
    return Expected(layer, host, ends, optimizer, step, MICROBATCHES * useful / step / (gpu.peak * 1e12))


# ---- tables ----


def main(argv: Sequence[str]) -> None:
    given = parse(argv)
    print("\n".join(assumptions()))
    counts = {}
    for workload in WORKLOADS:
        arguments, config = of_workload(workload, given.set)
        counts[workload] = counted(config, arguments, apart=given.apart)
    if given.layer:
        for workload in (WORKLOADS[0], WORKLOADS[2]):
            print("\n".join(["", *table_of_layer(workload, counts[workload], given.set)]))
    print("\n".join(["", *table_of_steps(counts, given)]))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attention", choices=list(HOPPER), nargs="+", default=list(HOPPER))
    parser.add_argument("--layer", action="store_true", help="list the operations of a layer")
    parser.add_argument("--apart", action="store_true", help="weight gradients are added apart")
    parser.add_argument("--set", metavar="SECTION.KEY=VALUE", action="append", default=[], help="any setting")
    return parser.parse_args(argv)


def of_workload(workload: Workload, changes: Sequence[str]) -> tuple[argparse.Namespace, PretrainConfig]:
    preset, vocabulary, micro, length = workload
    options = ["--vocab-size", vocabulary, "--micro", micro, "--sequence-length", length]
    options += ["--microbatches", MICROBATCHES, *(f"--set={change}" for change in changes)]
    arguments = parse_throughput([preset, *map(str, options)])
    return arguments, settings(arguments)


def assumptions() -> list[str]:
    lines = ["Assumed:", ""]
    for gpu in GPUS:
        rates = ", ".join(
            f"{name} {forth:.0f} and {back:.0f}" for name, (forth, back) in gpu.attention.items()
        )
        lines.append(
            f"- {gpu.name}: products {gpu.products[0]} TFLOP/s, {gpu.products[1]} with a side below 4096, of a peak of "
            f"{gpu.peak}; {gpu.bandwidth} TB/s; attention forward and backward, TFLOP/s: {rates}"
        )
    return [
        *lines,
        f"- heads of 64: {HEADS_OF_64} of attention's rate; a kernel takes {LEAST_KERNEL * 1e6:.0f} us or more, and "
        f"{HOST_A_LAUNCH * 1e6:.0f} us of the host's time; {MICROBATCHES} microbatches a step",
        f"- MFU counts {FORMULA}",
        "- operations of one GPU after another; of fa3 also that its package is there",
    ]


def table_of_layer(workload: Workload, counts: Counted, changes: Sequence[str]) -> Iterator[str]:
    preset, _, micro, length = workload
    _, config = of_workload(workload, changes)
    gpu = GPUS[-1]
    yield f"A layer of {preset}, {micro} x {length} tokens: {counts.layer.total()} launches"
    yield ""
    yield f"| operation | launches | MB | GFLOP | us on {gpu.name} |"
    yield "|---|---|---|---|---|"
    for backward in (False, True):
        names = {x.name for x in counts.layer if x.backward == backward}
        for name in sorted(names):
            same = [(x, n) for x, n in counts.layer.items() if x.name == name and x.backward == backward]
            seconds = sum(n * x.seconds(gpu, "fa2", config.model.head_dim) for x, n in same)
            yield (
                f"| {'backward' if backward else 'forward'}, {name} | {sum(n for _, n in same)} | "
                f"{sum(n * x.bytes for x, n in same) / 1e6:.1f} | {sum(n * x.flops for x, n in same) / 1e9:.1f} | "
                f"{seconds * 1e6:.0f} |"
            )


def table_of_steps(counts: dict[Workload, Counted], given: argparse.Namespace) -> Iterator[str]:
    yield "ms of a layer in a microbatch; of all else in one; of the optimizer in a step; and of a step"
    yield ""
    yield f"| model | GPU | attention | {' | '.join(PARTS)} | host | all else | optimizer | step | **MFU** |"
    yield "|---" * (len(PARTS) + 8) + "|"
    for workload, its in counts.items():
        preset, vocabulary, micro, length = workload
        arguments, config = of_workload(workload, given.set)
        for gpu in GPUS:
            for attention in (name for name in given.attention if name in gpu.attention):
                found = expected(its, config, arguments, gpu, attention)
                numbers = [*found.layer.values(), found.host, found.ends, found.optimizer, found.step]
                yield (
                    f"| {preset}, V {vocabulary:,}, {micro} x {length} | {gpu.name} | {attention} | "
                    f"{' | '.join(f'{1e3 * seconds:.2f}' for seconds in numbers)} | **{found.mfu:.1%}** |"
                )


if __name__ == "__main__":
    main(sys.argv[1:])
