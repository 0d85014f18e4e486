"""Every layout writes what transformers writes, and draws what one process draws."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llm3d.checkpoint.starting import load_first_weights
from llm3d.data.pretraining import Window, collate
from llm3d.generate.cache import BLOCK_SIZE
from llm3d.generate.cuda_graphs import Play
from llm3d.generate.engine import Generator, Reply
from llm3d.generate.sampling import Sampling
from llm3d.generate.scheduler import Request
from llm3d.parallel.mesh import Mesh
from llm3d.train.objective import NextToken
from llm3d.train.trainer import ShardedModel
from tests import pool
from tests.generate.harness import ENDS, MODELS, SHAPE, Call, drawn, ends, prompts, told_as_written
from tests.models.layouts import Layout, config_for

NEW_TOKENS = 14


LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(tensor=4, sequence=True),
    Layout(pipeline=2),
    Layout(pipeline=4),
    Layout(tensor=2, pipeline=2, sequence=True),
    Layout(tensor=4, pipeline=2),
    Layout(tensor=2, pipeline=4),
    Layout(tensor=2, pipeline=2, chunks=2, sequence=True),
    Layout(data=2, zero=3, pipeline=2),
]


def some(*chosen: int) -> list[Any]:
    """All layouts, of which those that are not chosen are left to the tests of all layouts."""
    return [
        pytest.param(layout, id=str(i), marks=[] if i in chosen else pytest.mark.all_layouts)
        for i, layout in enumerate(LAYOUTS)
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import AutoConfig, AutoModelForCausalLM

    paths = {}
    for name, changes in MODELS.items():
        torch.manual_seed(0)
        paths[name] = tmp_path_factory.mktemp(name)
        config = AutoConfig.for_model(**({"model_type": "llama"} | SHAPE | changes))
        AutoModelForCausalLM.from_config(config).save_pretrained(paths[name])
    return paths


def evaluator(path: Path, layout: Layout) -> ShardedModel:
    model = ShardedModel(config_for(path, layout), Mesh(layout.tensor, layout.pipeline))
    load_first_weights(model)
    return model


def write_on_rank(path: Path, layout: Layout, calls: Sequence[Call]) -> list[list[list[Reply]]]:
    model = evaluator(path, layout)
    generator = Generator(model.config.model, model.stages, model.mesh, model.dtype)
    return [told_as_written(generator, call) for call in calls]


class PlayedAgain:
    """What a CPU can do of recording: the function, called again, on the places that it was recorded with."""

    def __init__(self) -> None:
        self.recorded = self.played = 0

    def __call__(self, function: Play) -> Play:
        self.recorded += 1

        def play() -> torch.Tensor:
            self.played += 1
            return function()

        return play


def recorded_on_rank(
    path: Path, layout: Layout, call: Call
) -> tuple[list[list[Reply]], list[list[Reply]], PlayedAgain]:
    """As it is written step by step, and with steps recorded."""
    model, record = evaluator(path, layout), PlayedAgain()
    plain, recording = (
        Generator(model.config.model, model.stages, model.mesh, model.dtype, how)
        for how in (None, lambda: record)
    )
    return told_as_written(plain, call), told_as_written(recording, call), record


def write_all(path: Path, layout: Layout, *calls: Call) -> list[list[list[Reply]]]:
    """What every rank knows in the end, for each call."""
    first, *others = pool.run(write_on_rank, layout.world_size, path, layout, calls)
    assert all(other == first for other in others)
    return first


def write(path: Path, layout: Layout, *arguments: Any) -> list[list[Reply]]:
    (replies,) = write_all(path, layout, Call(*arguments))
    return replies


def never_ends(tokens: Sequence[int]) -> bool:
    return False


@functools.cache
def of_transformers(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path)


def by_transformers(path: Path, prompt: list[int], **changes: Any) -> list[int]:
    ids = torch.tensor([prompt])
    wanted: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "eos_token_id": ENDS,
        "pad_token_id": 0,
    }
    out = of_transformers(path).generate(ids, attention_mask=torch.ones_like(ids), **(wanted | changes))
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_replies_are_those_of_transformers(name: str, models: dict[str, Path]) -> None:
    path = models[name]
    expected = [by_transformers(path, prompt) for prompt in prompts()]
    assert any(len(reply) < NEW_TOKENS for reply in expected), "some end early, and make room"
    requests = [Request(prompt, NEW_TOKENS, ends, Sampling(temperature=0)) for prompt in prompts()]
    # A third of the layouts with as many key/value heads as query heads, and with tables that are tied; with groups of
    # heads, which ranks share, the others.
    for layout in (
        LAYOUTS[::3] if name != "llama-2" else [each for each in LAYOUTS if each not in LAYOUTS[::3]]
    ):
        calls = [Call(requests, 32), Call(requests[:9], 4), Call(requests[:1], 1)]
        for call, replies in zip(calls, write_all(path, layout, *calls), strict=True):
            wanted = expected[: len(call.requests)]
            assert [reply.tokens for (reply,) in replies] == wanted, (layout, call.max_sequences)
            for (reply,) in replies:
                assert reply.reason == ("stop" if reply.tokens[-1] in ENDS else "length")


@functools.cache
def drawn_alone(path: Path) -> list[Reply]:
    """By one process, each request by itself."""
    return [reply for ((reply,),) in write_all(path, Layout(), *(Call([request], 1) for request in drawn()))]


# That every layout has the same logits the greedy replies show; a draw adds what tensor ranks do together.
@pytest.mark.parametrize("layout", some(0, 2, 4, 6, 8))
def test_what_is_drawn_depends_on_neither_layout_nor_company(layout: Layout, models: dict[str, Path]) -> None:
    expected = drawn_alone(models["llama-2"])
    assert len({tuple(reply.tokens) for reply in expected}) == len(expected)
    for (reply,), wanted in zip(write(models["llama-2"], layout, drawn(), 5), expected, strict=True):
        assert reply.tokens == wanted.tokens
        assert reply.log_probabilities == pytest.approx(wanted.log_probabilities, abs=1e-4)


# What is recorded is a pipeline stage's part of a step: alone, first, last, of two chunks, with gathered weights.
@pytest.mark.parametrize("layout", some(0, 5, 8, 9))
def test_recorded_steps_write_what_steps_write(layout: Layout, models: dict[str, Path]) -> None:
    call = Call(drawn(), 5)
    for plain, recording, record in pool.run(
        recorded_on_rank, layout.world_size, models["llama-2"], layout, call
    ):
        assert [[r.tokens for r in several] for several in recording] == [
            [r.tokens for r in several] for several in plain
        ]
        assert 0 < record.recorded <= 4 * layout.chunks < record.played, "for each size of 1, 2, 4 and 8"


def test_several_replies_to_a_prompt_are_as_if_drawn_apart(models: dict[str, Path]) -> None:
    """They share what the cache holds of the prompt; the first is that of a request for one."""
    path = models["llama-2"]
    alone = [
        reply for ((reply,),) in write_all(path, Layout(), *(Call([request], 1) for request in drawn(8)))
    ]
    together = write(path, Layout(), drawn(8, num_replies=3), 4)
    for layout in (Layout(tensor=2), Layout(pipeline=2)):
        assert [
            [r.tokens for r in several] for several in write(path, layout, drawn(8, num_replies=3), 7)
        ] == [[r.tokens for r in several] for several in together]
    assert [several[0].tokens for several in together] == [reply.tokens for reply in alone]
    some = [
        several for several, request in zip(together, drawn(8), strict=True) if request.sampling.temperature
    ]
    assert all(several[0].tokens != several[1].tokens for several in some), "each has its own numbers"


def forward_on_rank(path: Path, sequences: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
    """Log-probabilities of replies by the forward pass of training."""
    model = evaluator(path, Layout())
    assert isinstance(model.objective, NextToken)
    found = []
    for prompt, reply in sequences:
        batch = collate([Window(torch.tensor([*prompt, *reply]), [0])])
        (terms,) = model.outputs([batch], lambda output, _: output.log_probabilities) or []
        found.append(terms[len(prompt) - 1 :].tolist())
    return found


def test_log_probabilities_are_those_of_the_training_forward(models: dict[str, Path]) -> None:
    path = models["llama-3"]
    requests = [Request(prompt, NEW_TOKENS, ends, Sampling(top_k=9), seed=3) for prompt in prompts(20)]
    for layout in (Layout(), Layout(tensor=2, pipeline=2)):
        replies = [reply for (reply,) in write(path, layout, requests, 8)]
        pairs = [
            (list(request.prompt), reply.tokens) for request, reply in zip(requests, replies, strict=True)
        ]
        (expected,) = pool.run(forward_on_rank, 1, path, pairs)
        for reply, wanted in zip(replies, expected, strict=True):
            assert reply.log_probabilities == pytest.approx(wanted, abs=1e-5)


def test_a_small_cache_gives_the_same_in_more_turns(models: dict[str, Path]) -> None:
    path = models["llama-1"]
    block = 4 * 2 * BLOCK_SIZE * 8 * 4 * 4  # layers, keys and values, tokens, heads, head_dim, bytes
    expected = write(path, Layout(), drawn(), 12)
    most = max(-(-(len(request.prompt) + request.max_new_tokens) // BLOCK_SIZE) for request in drawn())
    small = write(path, Layout(), drawn(), 12, most * block)
    assert [reply.tokens for (reply,) in small] == [reply.tokens for (reply,) in expected]
    with pytest.raises(
        pool.WorkerFailed, match=f"take {most} blocks of {BLOCK_SIZE} tokens, and {most - 1} have room"
    ):
        write(path, Layout(), drawn(), 12, most * block - 1)


def test_a_reply_ends_where_the_models_positions_do(models: dict[str, Path]) -> None:
    path = models["llama-1"]
    prompt = prompts()[-1]
    request = Request(prompt, 1000, never_ends, Sampling(temperature=0))
    ((reply,),) = write(path, Layout(), [request], 1)
    assert len(prompt) + len(reply.tokens) == SHAPE["max_position_embeddings"] and reply.reason == "length"
    room = SHAPE["max_position_embeddings"] - len(prompt)
    assert reply.tokens == by_transformers(path, prompt, max_new_tokens=room, eos_token_id=None)


def test_nothing_asked_is_nothing_written(models: dict[str, Path]) -> None:
    for layout in (Layout(), Layout(pipeline=2)):
        assert write(models["llama-1"], layout, [], 4) == []
