"""Training tokens/s of one process beside transformers' LlamaForCausalLM with PyTorch's fused AdamW.

    python benchmarks/against_transformers.py [--compute fp32|bf16] [--rounds 7]

Same model, same batch, one microbatch a step, no padding, attention over whole sequences, clipping by the global
norm. The two take turns, each in its own process; the figure is the median over rounds of the ratio within a
round. In bf16 llm3d keeps fp32 master weights and moments; transformers is timed both with pure bf16 weights and
moments (less work than llm3d does) and with fp32 weights under autocast (the same numerics class as llm3d).
llm3d runs with its own kernels and with LLM3D_KERNELS=reference.

llm3d tells glibc to keep freed memory (llm3d/train/host_memory.py), which a plain PyTorch script does not;
--same-allocator gives transformers that too, and leaves the difference in what is computed.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial

import torch
from contenders import Step, report, take_turns
from transformers import LlamaConfig, LlamaForCausalLM

from llm3d.config import PretrainConfig, make_config
from llm3d.data.pretraining import Window, collate
from llm3d.parallel.mesh import Mesh, start_process_group
from llm3d.train.host_memory import keep_freed_memory
from llm3d.train.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compute", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--preset", default="llama-20m")
    parser.add_argument("--vocab-size", type=int, default=16000)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="a contender's steps in a round")
    parser.add_argument("--same-allocator", action="store_true", help="transformers keeps freed memory too")
    parser.add_argument(
        "--profile", metavar="CONTENDER", help="print a contender's operators by time instead"
    )
    arguments = parser.parse_args()
    if arguments.profile:
        profile(CONTENDERS[arguments.profile](arguments))
        return
    theirs = [name for name in CONTENDERS if name.startswith(f"transformers {arguments.compute}")]
    names = ["llm3d", "llm3d in plain PyTorch", *theirs]
    print(f"{arguments.compute}, {arguments.batch * arguments.sequence_length} tokens a step")
    contenders = {name: partial(CONTENDERS[name], arguments) for name in names}
    report(take_turns(contenders, arguments.rounds, arguments.steps))


def settings(arguments: argparse.Namespace) -> PretrainConfig:
    return make_config(
        {
            "run": {"dir": "unused"},
            "model": {"preset": arguments.preset, "vocab_size": arguments.vocab_size},
            "precision": {"compute": arguments.compute},
            "data": {"train": ["unused"], "sequence_length": arguments.sequence_length},
            "batch": {"global": arguments.batch, "micro": arguments.batch},
            "optim": {"lr": 1e-4},
            "train": {"steps": 1},
        },
        1,
    )


def random_tokens(arguments: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.batch, arguments.sequence_length + 1)
    return torch.randint(0, arguments.vocab_size, shape, generator=generator)


def llm3d_step(arguments: argparse.Namespace, kernels: str = "auto") -> Step:
    keep_freed_memory()  # as `llm3d pretrain` does
    os.environ["LLM3D_KERNELS"] = kernels
    trainer = Trainer(settings(arguments), Mesh(device=start_process_group()))
    trainer.initialize()
    batch = collate([Window(row, [0]) for row in random_tokens(arguments)])

    def step() -> int:
        trainer.step([batch], lr=1e-4)
        return batch.tokens.numel()

    return step


def transformers_step(arguments: argparse.Namespace, dtype: torch.dtype, autocast: bool = False) -> Step:
    if arguments.same_allocator:
        keep_freed_memory()
    model, tokens = settings(arguments).model, random_tokens(arguments)
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_key_value_heads,
            max_position_embeddings=model.max_position_embeddings,
            tie_word_embeddings=model.tie_word_embeddings,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).to(dtype)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = peer(inputs, labels=inputs, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return inputs.numel()

    return step


CONTENDERS: dict[str, Callable[[argparse.Namespace], Step]] = {
    "llm3d": llm3d_step,
    "llm3d in plain PyTorch": partial(llm3d_step, kernels="reference"),
    "transformers fp32": partial(transformers_step, dtype=torch.float32),
    "transformers bf16": partial(transformers_step, dtype=torch.bfloat16),
    "transformers bf16 autocast": partial(transformers_step, dtype=torch.float32, autocast=True),
}


def profile(step: Step) -> None:
    step()
    with torch.profiler.profile() as profiler:
        step()
    print(
        profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50)
    )


if __name__ == "__main__":
    main()
