"""Replies to many prompts at once, under tensor and pipeline parallelism.

A rank does one piece of work after the other: reading prompts, or a token more for each running reply. Pipeline stages
work on different groups of replies at a time, as many as there are stages. What the last stage has chosen goes to the
first, and from stage to stage with the activations, so that every rank knows what all ranks do next.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm3d.config import ModelConfig
from llm3d.errors import InputError
from llm3d.generate.cache import BLOCK_SIZE, Cache, Inputs, inputs_of
from llm3d.generate.cuda_graphs import GraphRunner, Graphs
from llm3d.generate.sampling import choose
from llm3d.generate.scheduler import Limits, Reason, Request, Running, Scheduler, Work
from llm3d.kernels.counter_rng import uniform_number
from llm3d.kernels.rope import rope_tables
from llm3d.models.batch import Context
from llm3d.models.decoder import DecoderStage
from llm3d.models.heads import LanguageModelHead, OfLogits
from llm3d.parallel.collectives import all_reduce_max
from llm3d.parallel.mesh import Mesh

MAX_PREFILL_TOKENS = 8192
_READ = ("tokens", "positions", "slots", "block_table", "lengths")  # of Inputs, by layers
_SHARE_OF_FREE_MEMORY = 0.8  # of a GPU, that the cache may take; activations need some

OnToken = Callable[[int, int, int], None]  # request, reply, token


class Reply(NamedTuple):
    """tokens: the token that ended it, if any, is the last.  log_probabilities: of the tokens, at the temperature."""

    tokens: list[int]
    log_probabilities: list[float]
    reason: Reason


class Generator:
    """A model that writes. All ranks of a model's replica hold one and call it with the same requests.

    Under ZeRO stage 3, where a layer is gathered from all data ranks, so do all of those.
    """

    def __init__(
        self,
        config: ModelConfig,
        stages: Sequence[DecoderStage],
        mesh: Mesh,
        dtype: torch.dtype,
        graphs: Graphs | None = None,
    ) -> None:
        """stages: this rank's, as training has them; where they are several, only one group is under way.

        graphs: with it, what gives each running reply a token more is recorded and played again; not under ZeRO
            stage 3, which gathers weights to where there is room.
        """
        self.config, self.stages, self.mesh, self.dtype = config, list(stages), mesh, dtype
        self.graphs = graphs
        self.num_groups = mesh.pipeline_size if len(self.stages) == 1 else 1
        frequencies = self.stages[0].rope_frequencies
        assert isinstance(frequencies, Tensor)
        self.tables = rope_tables(config.max_position_embeddings, frequencies)

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        max_sequences: int,
        cache_bytes: int | None = None,
        on_token: OnToken | None = None,
    ) -> list[list[Reply]]:
        """The replies to each request. Raises InputError where the cache or the model is not fit for them.

        max_sequences: that this replica works on at a time.  cache_bytes: that a rank's keys and values may take;
        None: as many as max_sequences of the longest take.  on_token: told of each token as it is known.
        """
        self.check(requests, cache_bytes)
        limits, affordable = self._limits(requests, max_sequences), self._affordable_blocks(cache_bytes)
        if affordable is not None:
            limits = replace(limits, num_blocks=min(limits.num_blocks, affordable))
        run = _Run(self, Scheduler(requests, self.num_groups, limits), on_token)
        replies: list[dict[int, Reply]] = [{} for _ in requests]
        for running in run.to_the_end():
            assert running.reason is not None
            reply = Reply(running.tokens, running.log_probabilities, running.reason)
            replies[running.number][running.reply] = reply
        return [[by_number[i] for i in range(len(by_number))] for by_number in replies]

    def check(self, requests: Sequence[Request], cache_bytes: int | None) -> None:
        """Raise InputError where one of the requests does not fit the cache. Called by all ranks of a replica."""
        limits, affordable = self._limits(requests, 1), self._affordable_blocks(cache_bytes)
        needed = max(map(limits.needed, requests), default=0)
        if affordable is not None and needed > affordable:
            raise InputError(
                f"generate.cache_gib: keys and values of the longest prompt and its replies take {needed} blocks of "
                f"{BLOCK_SIZE} tokens, and {affordable} have room; raise it, or lower generate.max_new_tokens or "
                "generate.num_replies"
            )

    def _limits(self, requests: Sequence[Request], max_sequences: int) -> Limits:
        """With a cache for as many sequences, the longest ones."""
        most_replies = max((request.num_replies for request in requests), default=1)
        limits = Limits(
            num_blocks=0,
            block_size=BLOCK_SIZE,
            max_sequences=max(most_replies, -(-max_sequences // self.num_groups)),
            max_prefill_tokens=MAX_PREFILL_TOKENS,
            max_length=self.config.max_position_embeddings,
        )
        largest = sorted(map(limits.needed, requests), reverse=True)
        return replace(limits, num_blocks=sum(largest[: limits.max_sequences * self.num_groups]))

    def _affordable_blocks(self, cache_bytes: int | None) -> int | None:
        """That the least of the replica's ranks has room for; None: no limit is known."""
        if cache_bytes is None:
            if self.mesh.device.type != "cuda":
                return None
            torch.cuda.empty_cache()  # what other phases have left counts as free
            cache_bytes = int(_SHARE_OF_FREE_MEMORY * torch.cuda.mem_get_info(self.mesh.device)[0])
        blocks = torch.tensor(-(cache_bytes // self._bytes_a_block()))
        return -int(all_reduce_max(blocks, self.mesh.model))

    def _bytes_a_block(self) -> int:
        """On the rank with most layers."""
        heads, head_dim = self.stages[0].kv_shape
        num_layers = torch.tensor(sum(len(stage.numbers) for stage in self.stages))
        all_reduce_max(num_layers, self.mesh.model)
        return int(num_layers) * 2 * BLOCK_SIZE * heads * head_dim * self.dtype.itemsize


class _Run:
    """One call of `generate`, on one rank."""

    def __init__(self, generator: Generator, scheduler: Scheduler, on_token: OnToken | None) -> None:
        self.generator, self.scheduler, self.on_token = generator, scheduler, on_token
        self.mesh, self.tables = generator.mesh, generator.tables
        self.cache = Cache(generator.stages, scheduler.limits.num_blocks, generator.dtype, self.mesh.device)
        self.graph_runner = GraphRunner(generator.graphs()) if generator.graphs else None
        self.width = scheduler.limits.blocks(scheduler.longest) if generator.graphs else None
        self.under_way: list[Work | None] = [None] * generator.num_groups  # of each group
        self.chosen: list[Tensor] = [torch.empty(0)] * generator.num_groups  # on the last stage
        self.sent: deque[tuple[dist.Work, Tensor]] = deque()

    def to_the_end(self) -> Iterator[Running]:
        """Each reply when it is done."""
        for turn in count():
            group = turn % len(self.under_way)
            work = self.under_way[group]
            if work is not None:
                yield from self._advance(group, work)
            if self.scheduler.finished:
                break
            work = self.under_way[group] = self.scheduler.next(group)
            if work is not None:
                self._do(group, work)
        for sending, _ in self.sent:
            sending.wait()

    def _advance(self, group: int, work: Work) -> list[Running]:
        tokens, log_probabilities = self._what_was_chosen(group, len(work.sequences)).tolist()
        if not all(map(math.isfinite, log_probabilities)):
            raise InputError(
                "the model's logits are not finite: its weights are damaged, or precision.compute is too narrow"
            )
        chosen = [int(token) for token in tokens]
        if self.on_token:
            for running, token in zip(work.sequences, chosen, strict=True):
                self.on_token(running.number, running.reply, token)
        return self.scheduler.advance(group, work, chosen, log_probabilities)

    def _what_was_chosen(self, group: int, num_sequences: int) -> Tensor:
        """fp64 [2, sequences], tokens and log-probabilities, told from stage to stage."""
        if self.mesh.is_last_stage:
            return self.chosen[group]
        chosen = self._receive((2, num_sequences), torch.float64)
        if self.mesh.pipeline_rank < self.mesh.pipeline_size - 2:
            self._send(chosen)
        return chosen

    def _do(self, group: int, work: Work) -> None:
        """This rank's part of the work."""
        multiple_of = self.generator.stages[0].token_multiple
        inputs = inputs_of(work, multiple_of, self.width).to(self.mesh.device)
        for stage in self.generator.stages:
            hidden = None
            if stage.embedding is None:
                shape = (len(inputs.tokens) // multiple_of, self.generator.config.hidden_size)
                hidden = self._receive(shape, self.generator.dtype)
            hidden = self._through(stage, inputs, hidden)
            if stage.head is None:
                self._send(hidden)
                continue
            self.chosen[group] = self._choose(stage.head, hidden, inputs, work.sequences)
            if self.mesh.pipeline_size > 1:
                self._send(self.chosen[group])
        self.cache.copy(inputs.copies)

    def _through(self, stage: DecoderStage, inputs: Inputs, hidden: Tensor | None) -> Tensor:
        """hidden: None where the stage has the embedding."""
        if self.graph_runner is None or inputs.block_table is None:
            return self._layers(stage, inputs, hidden)

        def layers(changing: dict[str, Tensor]) -> Tensor:
            read = {name: changing[name] for name in _READ}
            return self._layers(stage, inputs._replace(**read), changing.get("hidden"))  # type: ignore[arg-type]

        changing = {name: getattr(inputs, name) for name in _READ}
        return self.graph_runner(stage, layers, changing if hidden is None else changing | {"hidden": hidden})

    def _layers(self, stage: DecoderStage, inputs: Inputs, hidden: Tensor | None) -> Tensor:
        if hidden is None:
            assert stage.embedding is not None
            hidden = stage.embedding(inputs.tokens)
        context = Context(*self.tables, inputs.positions, self.cache.attention(inputs))
        return stage.through_layers(hidden, context)

    def _choose(
        self, head: nn.Module, hidden: Tensor, inputs: Inputs, sequences: Sequence[Running]
    ) -> Tensor:
        """fp64 [2, sequences]: each one's next token and its log-probability."""
        assert isinstance(head, LanguageModelHead)
        share = head.sequence_parallel  # of the rows is here, until the head has gathered them
        samplings = [running.request.sampling for running in sequences]
        penalized = any(sampling.repetition_penalty != 1 for sampling in samplings)
        seen = [running.seen if penalized else [] for running in sequences]
        numbers = torch.zeros(len(sequences), dtype=torch.float64)
        if any(sampling.temperature for sampling in samplings):
            places = torch.tensor([(r.request.seed, r.reply, len(r.tokens)) for r in sequences])
            numbers = uniform_number(*places.t())

        def choice(logits: Tensor) -> Tensor:
            rows = logits[inputs.rows] if share else logits
            chosen = choose(rows, head.vocabulary.start, head.group, samplings, numbers, seen)
            return torch.stack([chosen.tokens.double(), chosen.log_probabilities.double()])

        return head(hidden if share else hidden[inputs.rows], None, OfLogits(choice))

    def _send(self, tensor: Tensor) -> None:
        """To the next stage; from the last to the first."""
        mesh = self.mesh
        following = (mesh.pipeline_rank + 1) % mesh.pipeline_size
        tensor = tensor.contiguous()
        work = dist.isend(tensor, group=mesh.channels["forward", mesh.is_last_stage], group_dst=following)
        assert work is not None, "this rank is in its pipeline group"
        self.sent.append((work, tensor))
        while len(self.sent) > 4 * mesh.pipeline_size:  # long since received
            self.sent.popleft()[0].wait()

    def _receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """From the stage before; on the first from the last."""
        mesh = self.mesh
        buffer = torch.empty(shape, dtype=dtype, device=mesh.device)
        before = (mesh.pipeline_rank - 1) % mesh.pipeline_size
        dist.recv(buffer, group=mesh.channels["forward", mesh.is_first_stage], group_src=before)
        return buffer
