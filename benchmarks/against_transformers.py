"""Training tokens/s of one process beside transformers' LlamaForCausalLM with PyTorch's fused AdamW.

    python benchmarks/against_transformers.py [--compute fp32|bf16] [--rounds 7]

Same model, same batch, one microbatch a step, no padding, attention over whole sequences, clipping by the global
norm. The two take turns; the figure is the median over rounds of the ratio within a round. In bf16 llm3d keeps
fp32 master weights and moments; transformers is timed both with pure bf16 weights and moments (less work than
llm3d does) and with fp32 weights under autocast (the same numerics class as llm3d).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from llm3d.config import Config, make_config
from llm3d.data.pretraining import Sample, collate
from llm3d.parallel.mesh import Mesh, start_process_group
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
    parser.add_argument("--profile", action="store_true", help="print llm3d's operators by time instead")
    arguments = parser.parse_args()
    config = settings(arguments)
    tokens = torch.randint(0, arguments.vocab_size, (arguments.batch, arguments.sequence_length + 1))
    ours = llm3d_step(config, tokens)
    if arguments.profile:
        profile(ours)
        return
    contenders = {"llm3d": ours, **transformers_steps(config, tokens)}
    report(contenders, arguments.rounds, tokens[:, 1:].numel(), arguments.compute)
    dist.destroy_process_group()


def settings(arguments: argparse.Namespace) -> Config:
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


def llm3d_step(config: Config, tokens: torch.Tensor) -> Callable[[], float]:
    trainer = Trainer(config, Mesh(device=start_process_group()))
    trainer.initialise()
    batch = collate([Sample(row, [0]) for row in tokens])
    return lambda: trainer.step([batch], lr=1e-4).loss


def transformers_steps(config: Config, tokens: torch.Tensor) -> dict[str, Callable[[], float]]:
    if config.precision.compute == "fp32":
        return {"transformers fp32": transformers_step(config, tokens, torch.float32, autocast=False)}
    return {
        "transformers bf16": transformers_step(config, tokens, torch.bfloat16, autocast=False),
        "transformers autocast": transformers_step(config, tokens, torch.float32, autocast=True),
    }


def transformers_step(
    config: Config, tokens: torch.Tensor, dtype: torch.dtype, autocast: bool
) -> Callable[[], float]:
    model = config.model
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

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = peer(inputs, labels=inputs, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def report(contenders: dict[str, Callable[[], float]], rounds: int, num_tokens: int, compute: str) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for step in contenders.values():
        step()
        step()
    for _ in range(rounds):
        for name, step in contenders.items():
            started = time.perf_counter()
            step()
            step()
            seconds[name].append((time.perf_counter() - started) / 2)
    print(
        f"{compute}, {num_tokens} tokens a step, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    for name, times in seconds.items():
        line = {"name": name, "tokens_per_s": round(num_tokens / statistics.median(times))}
        if name != "llm3d":
            ratios = sorted(peer / our for peer, our in zip(times, seconds["llm3d"], strict=True))
            line["llm3d_is_faster_by"] = round(statistics.median(ratios), 3)
            line["spread"] = [round(ratios[0], 3), round(ratios[-1], 3)]
        print(json.dumps(line))
    print(f"load average {os.getloadavg()[0]:.2f}")


def profile(step: Callable[[], float]) -> None:
    step()
    with torch.profiler.profile() as profiler:
        step()
    print(
        profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50)
    )


if __name__ == "__main__":
    main()
