"""Generated tokens/s of one process beside transformers' `generate`, at several batch sizes.

    python benchmarks/generating.py --model MODEL [--compute fp32|bf16] [--batches 1 16 64] [--rounds 5]

Same model, same prompts of mixed length, the likeliest token or a drawn one, every reply of the same length, so that
neither side stops early. transformers pads prompts on the left and runs a batch to its end; llm3d keeps no padding.
Timed is a whole call, prompts among it. The two take turns, each in a process of its own; a figure is the median over
rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from contenders import Step, report, take_turns

from llm3d.train.host_memory import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--compute", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument(
        "--prompt-tokens", type=int, default=64, help="on average; the longest has three times as many"
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(
        f"{arguments.compute}, temperature {arguments.temperature:g}, transformers {version('transformers')}"
    )
    for batch in arguments.batches:
        print(f"batch {batch}")
        contenders = {
            "llm3d": partial(llm3d_step, arguments, batch),
            "transformers": partial(transformers_step, arguments, batch),
        }
        report(take_turns(contenders, arguments.rounds, 1))


def prompts(arguments: argparse.Namespace, batch: int, vocab_size: int) -> list[list[int]]:
    """Lengths from a fourth of the mean up to three times the mean, geometrically."""
    generator = torch.Generator().manual_seed(0)
    mean = arguments.prompt_tokens
    lengths = [int(mean / 4 * 12 ** ((i + 0.5) / batch)) for i in range(batch)] if batch > 1 else [mean]
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def never_ends(tokens: Sequence[int]) -> bool:
    return False


def llm3d_step(arguments: argparse.Namespace, batch: int) -> Step:
    from llm3d.checkpoint.starting import load_first_weights
    from llm3d.config import PretrainConfig, make_config
    from llm3d.generate.engine import Generator
    from llm3d.generate.sampling import Sampling
    from llm3d.generate.scheduler import Request
    from llm3d.parallel.mesh import Mesh, start_process_group
    from llm3d.train.trainer import ShardedModel

    keep_freed_memory()  # as the command does
    settings: dict[str, Any] = {
        "run": {"dir": "unused"},
        "model": {"path": arguments.model},
        "precision": {"compute": arguments.compute},
        "data": {"train": ["unused"], "sequence_length": 1},
        "batch": {"global": 1},
        "optim": {"lr": 1},
        "train": {"steps": 1},
    }
    config = make_config(settings, 1, PretrainConfig)
    model = ShardedModel(config, Mesh(device=start_process_group()))
    load_first_weights(model)
    writer = Generator(config.model, model.stages, model.mesh, model.dtype)
    assert config.model.vocab_size is not None
    sampling = Sampling(temperature=arguments.temperature)
    requests = [
        Request(prompt, arguments.new_tokens, never_ends, sampling, seed=i)
        for i, prompt in enumerate(prompts(arguments, batch, config.model.vocab_size))
    ]

    def step() -> int:
        replies = writer.generate(requests, max_sequences=batch)
        return sum(len(reply.tokens) for (reply,) in replies)

    return step


def transformers_step(arguments: argparse.Namespace, batch: int) -> Step:
    from transformers import AutoModelForCausalLM

    keep_freed_memory()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.compute]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    asked = prompts(arguments, batch, model.config.vocab_size)
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in asked])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked])
    drawn = {"do_sample": True, "temperature": arguments.temperature, "top_k": 0}
    how: dict[str, Any] = drawn if arguments.temperature else {"do_sample": False}

    def step() -> int:
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=arguments.new_tokens,
            min_new_tokens=arguments.new_tokens,
            pad_token_id=0,
            **how,
        )
        return batch * (out.shape[1] - longest)

    return step


if __name__ == "__main__":
    main()
