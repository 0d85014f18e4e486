"""Training tokens/s and peak memory of llm3d's ZeRO stages beside PyTorch's FSDP2 (`fully_shard`), over gloo.

    python benchmarks/against_fsdp.py [--compute fp32|bf16] [--ranks 2] [--rounds 5]

Same model (FSDP2: transformers' LlamaForCausalLM, each layer sharded), same batch, clipping by the global norm, fused
AdamW, one microbatch a step. Stage 3 is compared with reshard_after_forward=True, stage 2 with False. In bf16 both keep
fp32 master weights and reduce gradients in fp32. The contenders take turns, each with its own processes; the figure is
the median over rounds of the ratio within a round. Peak memory is that of live tensors before a step and what the C
library hands out during it, as seen after every operation; the least of three steps, the largest of the ranks. All
keep freed memory, as llm3d does.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from llm3d.config import PretrainConfig, make_config
from llm3d.data.pretraining import Window, collate
from llm3d.parallel.mesh import Mesh
from llm3d.train.host_memory import PeakAllocated, keep_freed_memory
from llm3d.train.trainer import Trainer

Step = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compute", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--preset", default="llama-20m")
    parser.add_argument("--vocab-size", type=int, default=16000)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step, of all ranks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="a contender's steps in a round")
    parser.add_argument("--only", nargs="*", help="contenders by name")
    arguments = parser.parse_args()
    names = arguments.only or list(CONTENDERS)
    contenders = {name: Contender(name, arguments) for name in names}
    for contender in contenders.values():
        contender.ask(2)  # warm up
    peaks = {name: contender.ask("memory") for name, contender in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name, contender in contenders.items():
            seconds[name].append(contender.ask(arguments.steps))
    losses = {name: contender.ask("loss") for name, contender in contenders.items()}
    for connection in (c for contender in contenders.values() for c in contender.connections):
        connection.send(None)
    tokens = arguments.batch * arguments.sequence_length
    print(
        f"{arguments.compute}, {arguments.ranks} ranks, {tokens} tokens a step, torch {torch.__version__}, "
        f"load average {os.getloadavg()[0]:.2f}"
    )
    for name in names:
        line = {
            "name": name,
            "tokens_per_s": round(tokens / statistics.median(seconds[name])),
            "peak_mib": round(peaks[name] / 2**20, 1),
            "loss": round(losses[name], 3),
        }
        peer = CONTENDERS[name][2]
        if peer in seconds:
            ratios = sorted(theirs / ours for theirs, ours in zip(seconds[peer], seconds[name], strict=True))
            line |= {"faster_than": peer, "by": round(statistics.median(ratios), 3)}
            line["spread"] = [round(ratios[0], 3), round(ratios[-1], 3)]
            line["memory"] = round(peaks[name] / peaks[peer], 3)
        print(json.dumps(line))


class Contender:
    """One side: a gloo world of its own, which runs when it is told to."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        store = tempfile.mktemp()
        self.connections: list[Connection] = []
        for rank in range(arguments.ranks):
            ours, theirs = context.Pipe()
            self.connections.append(ours)
            context.Process(target=contend, args=(name, arguments, rank, store, theirs), daemon=True).start()

    def ask(self, what: int | str) -> float:
        """The largest answer of the ranks: seconds a step over so many steps, peak bytes, or the loss."""
        for connection in self.connections:
            connection.send(what)
        return max(connection.recv() for connection in self.connections)


def contend(name: str, arguments: argparse.Namespace, rank: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // arguments.ranks))
    keep_freed_memory()
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, arguments.ranks), rank=rank, world_size=arguments.ranks
    )
    make, how, _ = CONTENDERS[name]
    step = make(arguments, rank, how)
    while (what := connection.recv()) is not None:
        dist.barrier()
        if what == "loss":
            connection.send(step())
        elif what == "memory":
            connection.send(peak_bytes(step))
        else:
            started = time.perf_counter()
            for _ in range(what):
                step()
            connection.send((time.perf_counter() - started) / what)


def peak_bytes(step: Step) -> int:
    """The most bytes of live CPU tensors during a step."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            local = getattr(thing, "_local_tensor", thing)
            storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    peaks = []
    for _ in range(3):
        with PeakAllocated() as allocated:
            step()
        peaks.append(allocated.peak)
    return sum(storages.values()) + min(peaks)


def settings(arguments: argparse.Namespace, stage: int) -> PretrainConfig:
    return make_config(
        {
            "run": {"dir": "unused"},
            "model": {"preset": arguments.preset, "vocab_size": arguments.vocab_size},
            "zero": {"stage": stage},
            "precision": {"compute": arguments.compute},
            "data": {"train": ["unused"], "sequence_length": arguments.sequence_length},
            "batch": {"global": arguments.batch, "micro": arguments.batch // arguments.ranks},
            "optim": {"lr": 1e-4},
            "train": {"steps": 1},
        },
        arguments.ranks,
    )


def random_tokens(arguments: argparse.Namespace, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    shape = (arguments.batch // arguments.ranks, arguments.sequence_length + 1)
    return torch.randint(0, arguments.vocab_size, shape, generator=generator)


def llm3d_step(arguments: argparse.Namespace, rank: int, stage: int) -> Step:
    trainer = Trainer(settings(arguments, stage), Mesh())
    trainer.initialize()
    batch = collate([Window(row, [0]) for row in random_tokens(arguments, rank)])
    return lambda: trainer.step([batch], lr=1e-4).loss


def fsdp_step(arguments: argparse.Namespace, rank: int, reshard: bool) -> Step:
    model, tokens = settings(arguments, 0).model, random_tokens(arguments, rank)
    torch.manual_seed(0)
    peer = LlamaForCausalLM(
        LlamaConfig(
            **model.model_dump(include=set(SHAPE)),
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    options: dict[str, Any] = {"reshard_after_forward": reshard}
    if arguments.compute == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    mesh = dist.init_device_mesh("cpu", (arguments.ranks,))
    for layer in peer.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(peer, mesh=mesh, **options)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        loss = peer(inputs, labels=inputs, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().float()
        dist.all_reduce(total)
        return total.item() / arguments.ranks

    return step


SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "tie_word_embeddings",
)

# name: how its step is made, with what, and its peer
CONTENDERS: dict[str, tuple[Callable[..., Step], Any, str]] = {
    "llm3d stage 0": (llm3d_step, 0, ""),
    "llm3d stage 1": (llm3d_step, 1, ""),
    "llm3d stage 2": (llm3d_step, 2, "FSDP2, parameters kept"),
    "llm3d stage 3": (llm3d_step, 3, "FSDP2, parameters freed"),
    "FSDP2, parameters kept": (fsdp_step, False, ""),
    "FSDP2, parameters freed": (fsdp_step, True, ""),
}


if __name__ == "__main__":
    main()
