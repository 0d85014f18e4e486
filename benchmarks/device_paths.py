"""Everything that llm3d does on a device, once, tiny, each by itself: a line for each, and every crash in one list.

    python benchmarks/device_paths.py [--device cpu] [--from NUMBER]

Takes seconds. Says too what the device's PyTorch has that llm3d could use. The exit status is that of what must work.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, get_args

import torch
import torch.distributed as dist
from throughput import draw_weights, forget, synchronise
from torch import Tensor

from llm3d.config import PretrainConfig, make_config
from llm3d.data.pretraining import Microbatch, Window, collate
from llm3d.generate.cuda_graphs import graphs_for
from llm3d.generate.engine import Generator
from llm3d.generate.sampling import Sampling
from llm3d.generate.scheduler import Request
from llm3d.kernels import backend
from llm3d.parallel.collectives import SumInFlight, all_reduce_sum, gather_rows
from llm3d.parallel.mesh import Mesh, start_process_group
from llm3d.train.trainer import ShardedModel, Trainer

LENGTH, VOCABULARY = 64, 2000
Path = Callable[[torch.device], object]  # what it gives is shown

SAMPLINGS = {
    "greedy": Sampling(temperature=0),
    "temperature": Sampling(),
    "top-k": Sampling(top_k=20),
    "top-p": Sampling(top_p=0.9),
    "min-p": Sampling(min_p=0.1),
    "repetition penalty": Sampling(repetition_penalty=1.2),
}


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    device = start_process_group()
    if arguments.device is not None:
        device = torch.device(arguments.device)
    print(f"{device}, torch {torch.__version__}, {backend.describe(device)}")
    must, may = must_work(), may_be_there()
    paths = [*must, *may]
    broken, absent = list(arguments.broken), []
    for number in range(arguments.first, len(paths)):
        (name, path), required = paths[number], number < len(must)
        problem = attempt(name, path, device, required)
        if problem:
            (broken if required or is_a_slip(problem) else absent).append(name)
        if problem and is_lost(device):
            go_on_in_a_new_process(number + 1, broken)
        forget(device)
    dist.destroy_process_group()
    print(f"=> {len(must) - len(broken)} of {len(must)} device paths work")
    for name in broken:
        print(f"=> BROKEN: {name}")
    print(f"=> not there: {', '.join(absent) or 'nothing'}")
    return int(bool(broken))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="instead of the GPU that is there")
    parser.add_argument("--from", dest="first", type=int, default=0, help="leave out so many")
    parser.add_argument("--broken", nargs="*", default=[], help="that are known to be")
    return parser.parse_args(argv)


def attempt(name: str, path: Path, device: torch.device, required: bool) -> Exception | None:
    try:
        said = path(device)
        synchronise(device)
    except Exception as error:
        if required:
            traceback.print_exc()
        print(
            f"{name:36} {'BROKEN' if required else 'not there'}: {str(error).strip().splitlines()[:1]}",
            flush=True,
        )
        return error
    print(f"{name:36} {said}", flush=True)
    return None


def is_a_slip(problem: Exception) -> bool:
    """Of this file, to be seen without a GPU; with one, another PyTorch may lack a function or an argument."""
    return torch.version.cuda is None and isinstance(
        problem, NameError | AttributeError | TypeError | ImportError
    )


def is_lost(device: torch.device) -> bool:
    """Whether the process can use its GPU no more, as after an illegal address."""
    try:
        synchronise(device)
    except RuntimeError:
        return True
    return False


def go_on_in_a_new_process(first: int, broken: Sequence[str]) -> None:
    print("the GPU's context is lost; the rest runs in a new process", flush=True)
    os.execv(sys.executable, [sys.executable, __file__, "--from", str(first), "--broken", *broken])


# ---- what must work ----


def must_work() -> list[tuple[str, Path]]:
    (recompute,) = (
        field.annotation for name, field in PretrainConfig.model_fields.items() if name == "recompute"
    )
    trained: dict[str, dict[str, Any]] = {
        "bf16": {},
        "fp16": {"precision": {"compute": "fp16", "loss_scale": {"initial": 4096}}},
        "fp32": {"precision": {"compute": "fp32"}},
        "gradients in bf16": {"precision": {"gradients": "bf16"}},
        "moments in bf16": {"precision": {"moments": "bf16"}},
        **{f"recompute {kind}": {"recompute": kind} for kind in get_args(recompute) if kind != "none"},
        "optimizer in host memory": {"zero": {"offload": "optimizer"}},
        "half the optimizer in host memory": {"zero": {"offload": "optimizer", "offload_fraction": 0.5}},
        **{f"ZeRO stage {stage}": {"zero": {"stage": stage}} for stage in (1, 2, 3)},
        "untied embedding": {"model": {"tie_word_embeddings": False}},
        "as many key heads as query heads": {"model": {"num_key_value_heads": 4}},
        "plain PyTorch": {"kernels": {"backend": "reference"}},
    }
    written = [
        (f"generation, {name}, graphs {'on' if graphs else 'off'}", partial(generate, sampling, graphs))
        for graphs in (False, True)
        for name, sampling in SAMPLINGS.items()
    ]
    return [
        ("native kernels", native_kernels),
        *((f"training, {name}", partial(train, changes)) for name, changes in trained.items()),
        ("training is repeatable to the bit", repeatable),
        ("evaluation", evaluate),
        *written,
        ("collectives over a group of one", collectives),
    ]


def native_kernels(device: torch.device) -> str:
    said = backend.describe(device)
    assert said.startswith("native"), said
    return said


def train(changes: dict[str, dict[str, Any]], device: torch.device) -> list[float]:
    """Losses of three steps on one microbatch, which fall."""
    trainer = Trainer(config_with(changes), Mesh(device=device))
    trainer.initialize()
    losses = [trainer.step(batches(trainer), lr=1e-3).loss for _ in range(3)]
    trainer.flat.wait_all_gathers()
    assert all(map(math.isfinite, losses)) and losses[2] < losses[0], losses
    return [round(loss, 4) for loss in losses]


def repeatable(device: torch.device) -> str:
    first, second = (trained_weights(device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two runs differ"
    return "yes"


def trained_weights(device: torch.device) -> list[Tensor]:
    trainer = Trainer(config_with({}), Mesh(device=device))
    trainer.initialize()
    for _ in range(2):
        trainer.step(batches(trainer), lr=1e-3)
    trainer.flat.wait_all_gathers()
    return [weights.clone() for _, weights in trainer.weights()]


def evaluate(device: torch.device) -> object:
    model = ShardedModel(config_with({}), Mesh(device=device))
    draw_weights(model)
    return model.evaluate(batches(model))


def generate(sampling: Sampling, graphs: bool, device: torch.device) -> str:
    """Replies of several lengths, so that sequences come and go, and steps are recorded."""
    model = ShardedModel(config_with({}), Mesh(device=device))
    model.initialize()
    recorder = graphs_for(device, graphs)
    writer = Generator(model.config.model, model.stages, model.mesh, model.dtype, recorder)
    requests = [
        Request(list(range(3, 3 + length)), 8, lambda _: False, sampling, num_replies=2)
        for length in (5, 17, 30)
    ]
    replies = [reply for several in writer.generate(requests, max_sequences=4) for reply in several]
    assert all(len(reply.tokens) == 8 for reply in replies)
    return f"{len(replies)} replies" + ("" if recorder is None else ", recorded")


def collectives(device: torch.device) -> str:
    """Through NCCL on a GPU; with one rank nothing changes."""
    x, group = torch.arange(12.0, device=device).view(6, 2), dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    assert torch.equal(all_reduce_sum(x.clone(), group), x)
    assert torch.equal(gather_rows(x, group)[0], x)
    assert torch.equal(SumInFlight(x.clone(), group).finish(), x)
    out = torch.empty_like(x)
    dist.all_gather_into_tensor(out, x, group=group)
    assert torch.equal(out, x)
    dist.broadcast(out, 0, group=group)
    return dist.get_backend(group)


def config_with(changes: dict[str, Any]) -> PretrainConfig:
    given: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {"preset": "llama-tiny", "vocab_size": VOCABULARY, "num_hidden_layers": 2},
        "precision": {"compute": "bf16"},
        "data": {"train": ["unused"], "sequence_length": LENGTH},
        "batch": {"global": 4, "micro": 2},
        "optim": {"lr": 1e-3},
        "train": {"steps": 3},
    }
    for section, values in changes.items():
        given[section] = {**given.get(section, {}), **values} if isinstance(values, dict) else values
    return make_config(given, 1)


def batches(model: ShardedModel) -> list[Microbatch]:
    """One of sequences of one length, one of documents of several."""
    tokens = torch.randint(3, VOCABULARY, (4, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    starts = [[0], [0], [0, 10, 31], [0]]
    samples = [Window(row, begun) for row, begun in zip(tokens, starts, strict=True)]
    return [collate(two).to(model.mesh.device) for two in (samples[:2], samples[2:])]


# ---- what may be there ----

PACKAGES = ("flash_attn", "flash_attn_interface", "cudnn", "transformer_engine", "apex", "liger_kernel")


def may_be_there() -> list[tuple[str, Path]]:
    return [
        ("mm(out_dtype=fp32)", wide_product),
        ("addmm(out_dtype=fp32, out=self)", adding_product),
        ("varlen attention, fewer key heads", grouped_varlen_attention),
        ("flash attention implementations", flash_implementations),
        ("cuDNN attention, deterministic", cudnn_attention),
        *((f"package {name}", partial(package, name)) for name in PACKAGES),
    ]


def wide_product(device: torch.device) -> object:
    a = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
    return torch.mm(a, a, out_dtype=torch.float32).dtype


def adding_product(device: torch.device) -> str:
    """Whether cuBLAS adds a narrow product to a wide sum where it lies."""
    a, total = torch.randn(64, 64, device=device).bfloat16(), torch.ones(64, 64, device=device)
    place = total.data_ptr()
    expected = total + a.t().float() @ a.float()
    torch.addmm(total, a.t(), a, out_dtype=torch.float32, out=total)
    error = float((total - expected).abs().max() / expected.abs().max())
    return f"in place: {total.data_ptr() == place}, error {error:.1e}"


def grouped_varlen_attention(device: torch.device) -> str:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (torch.randn(32, heads, 64, device=device, dtype=torch.bfloat16) for heads in (8, 2, 2))
    starts = torch.tensor([0, 12, 32], dtype=torch.int32, device=device)
    out = varlen_attn(q, k, v, starts, starts, 20, 20, enable_gqa=True)
    repeated = (x.repeat_interleave(4, 1) for x in (k, v))
    expected = varlen_attn(q, *repeated, starts, starts, 20, 20)
    assert isinstance(out, Tensor) and isinstance(expected, Tensor)
    return f"differs from repeated heads by {float((out - expected).abs().max()):.1e}"


def flash_implementations(_: torch.device) -> object:
    from torch.nn.attention import list_flash_attention_impls

    return list_flash_attention_impls()


def cudnn_attention(device: torch.device) -> str:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (
        torch.randn(1, 8, 128, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    return "forward and backward"


def package(name: str, _: torch.device) -> str:
    if find_spec(name) is None:
        raise LookupError("it is not installed")
    return "installed"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
