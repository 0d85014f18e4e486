"""Replies to a step's prompts, known to every rank, and what models make of them token by token.

What is known of each token of each reply is a table, fp32 [replies, tokens], padded on the right with 0. A model's
numbers come to such a table, and tables into the microbatches that a model is trained on, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm3d.config import PPOConfig
from llm3d.config.uses import generation_layout
from llm3d.data.packed import PackedBatch, collate
from llm3d.data.packing import pack
from llm3d.data.pretraining import Window
from llm3d.data.prompts import TokenizedPrompt
from llm3d.data.samples import Sample, Tokens
from llm3d.generate.cuda_graphs import graphs_for
from llm3d.generate.engine import Generator, Reply
from llm3d.generate.scheduler import request_for
from llm3d.models.heads import OutputFunction
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.collectives import all_reduce_sum, gather_bytes
from llm3d.parallel.mesh import Mesh
from llm3d.parallel.reshard import SyncStats, WeightSync
from llm3d.text.streaming import Detokenizer
from llm3d.train.frozen import released_storage
from llm3d.train.trainer import ShardedModel, Trainer


@dataclass(frozen=True)
class Rollouts:
    """prompts: of each reply.  tokens: int32 [length], its own, the end token among them.  texts: without it.
    ended: whether the model ended it.  rollout_log_probs: fp32 [replies, tokens], as it was written.
    """

    prompts: list[TokenizedPrompt]
    tokens: list[np.ndarray]
    texts: list[str]
    ended: list[bool]
    rollout_log_probs: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def mask(self) -> Tensor:
        """bool [replies, tokens]: where there is one."""
        lengths = torch.tensor([len(tokens) for tokens in self.tokens])
        return torch.arange(int(lengths.max())) < lengths[:, None]

    def sample(self, reply: int) -> Sample:
        """The prompt with the reply, which is learned."""
        prompt, tokens = self.prompts[reply].tokens, self.tokens[reply]
        is_target = np.arange(len(prompt) + len(tokens)) >= len(prompt)
        return Sample((Tokens(np.concatenate([prompt, tokens]), is_target),))

    @property
    def samples(self) -> list[Sample]:
        return [self.sample(i) for i in range(len(self))]

    @property
    def num_tokens(self) -> int:
        """Of prompts, each with its reply."""
        pairs = zip(self.prompts, self.tokens, strict=True)
        return sum(len(prompt.tokens) + len(tokens) for prompt, tokens in pairs)


def all_gather_rollouts(
    prompts: Sequence[TokenizedPrompt],
    mine: Sequence[int],
    replies: Sequence[Sequence[Reply]],
    text_of: Callable[[Sequence[int]], str],
    mesh: Mesh,
) -> Rollouts:
    """All data ranks' replies on every rank, those to a prompt next to each other.

    mine: which prompts this rank has replied to.  mesh: of those who wrote.
    """
    flat = [(i, reply) for i, some in zip(mine, replies, strict=True) for reply in some]
    header = np.array([[i, len(r.tokens), r.reason == "stop"] for i, r in flat], dtype=np.int64).reshape(
        -1, 3
    )
    tokens = np.array([token for _, r in flat for token in r.tokens], dtype=np.int32)
    log_p = np.array([p for _, r in flat for p in r.log_probabilities], dtype=np.float32)
    payload = np.int64(len(flat)).tobytes() + header.tobytes() + tokens.tobytes() + log_p.tobytes()
    rows = [row for part in gather_bytes(payload, mesh.data) for row in _rows(part)]
    rows.sort(key=lambda row: row[0])
    table = torch.zeros(len(rows), max(len(row[2]) for row in rows))
    for line, row in zip(table, rows, strict=True):
        line[: len(row[3])] = torch.from_numpy(row[3])
    return Rollouts(
        prompts=[prompts[row[0]] for row in rows],
        tokens=[row[2] for row in rows],
        texts=[text_of(row[2].tolist()) for row in rows],
        ended=[row[1] for row in rows],
        rollout_log_probs=table,
    )


def _rows(payload: bytes) -> list[tuple[int, bool, np.ndarray, np.ndarray]]:
    """Of each reply: its prompt's place, whether it ended, its tokens and their log-probabilities."""
    (count,) = np.frombuffer(payload, np.int64, 1)
    header = np.frombuffer(payload, np.int64, 3 * count, 8).reshape(-1, 3)
    num_tokens = int(header[:, 1].sum())
    tokens = np.frombuffer(payload, np.int32, num_tokens, 8 + header.nbytes)
    log_p = np.frombuffer(payload, np.float32, num_tokens, 8 + header.nbytes + tokens.nbytes)
    ends = np.cumsum(header[:, 1])
    parts = [
        (place, bool(ended), slice(end - n, end)) for (place, n, ended), end in zip(header, ends, strict=True)
    ]
    return [(int(place), ended, tokens[part].copy(), log_p[part].copy()) for place, ended, part in parts]


class RolloutGenerator:
    """Has a policy under training reply to prompts. Every rank holds one and calls it at the same time.

    It writes where it is trained, or, where another layout is asked for or weights are spread over data ranks, in a
    layout of its own: whose weights are there, handed over, for the time of the writing. Gradients then take no memory.
    """

    def __init__(self, policy: ShardedModel, detokenizer: Detokenizer) -> None:
        self.policy, self.detokenizer, config = policy, detokenizer, policy.config
        assert isinstance(config, PPOConfig)
        self.config, self.layout = config, generation_config(config)
        degrees = (self.layout.parallel.tensor, self.layout.parallel.pipeline)
        there = (config.parallel.tensor, config.parallel.pipeline)
        self.mesh = policy.mesh.narrowed(*degrees) if degrees != there else policy.mesh
        self.shares_layout = shares_layout(config)
        self.weight_sync: WeightSync | None = None
        self.synced: SyncStats | None = None  # by the last hand-over

    def generate(self, prompts: Sequence[TokenizedPrompt]) -> Rollouts:
        """generate.num_replies to each prompt, which alone, with its number and run.seed, says what is drawn."""
        settings, mine = self.config.generate, range(self.mesh.data_rank, len(prompts), self.mesh.data_size)
        requests = [
            request_for(self.config, self.detokenizer, prompts[i].tokens.tolist(), prompts[i].number)
            for i in mine
        ]
        idle = self.policy.flat.kept_gradients if isinstance(self.policy, Trainer) else []
        with released_storage(idle), self._generator() as generator, input_errors_on_all(self.mesh.everyone):
            replies = generator.generate(requests, settings.max_sequences, settings.cache_bytes)
        return all_gather_rollouts(prompts, mine, replies, self.detokenizer.text, self.mesh)

    @contextmanager
    def _generator(self) -> Iterator[Generator]:
        policy = self.policy
        graphs = graphs_for(self.mesh.device, self.config.generate.cuda_graphs)
        if self.shares_layout:
            yield Generator(self.config.model, policy.stages, policy.mesh, policy.dtype, graphs)
            return
        model = ShardedModel(self.layout, self.mesh, policy.objective)
        if self.weight_sync is None:
            there = [piece.box for piece, _ in policy.flat.local_weights()]
            here = [piece.box for piece, _ in model.weights()]
            self.weight_sync = WeightSync(there, here, self.mesh.everyone)
        self.synced = self.weight_sync.run(policy.flat.local_weights(), model.weights())
        yield Generator(self.config.model, model.stages, self.mesh, model.dtype, graphs)


def shares_layout(config: PPOConfig) -> bool:
    """Whether replies are written with the weights where they are trained."""
    layout, there = generation_config(config).parallel, config.parallel
    return (layout.tensor, layout.pipeline) == (there.tensor, there.pipeline) and config.zero.stage != 3


def generation_config(config: PPOConfig) -> PPOConfig:
    """The settings as replies are written: in the tensor and pipeline ranks that ppo.rollout_... ask for."""
    layout, settings = generation_layout(config), config.ppo
    tensor, pipeline = settings.rollout_tensor, settings.rollout_pipeline
    update: dict[str, Any] = {"tensor": tensor or layout.parallel.tensor}
    if pipeline is not None and pipeline != layout.parallel.pipeline:
        update |= {"pipeline": pipeline, "layers_per_stage": None}
    return layout.model_copy(update={"parallel": layout.parallel.model_copy(update=update)})


# ---- what models make of replies ----


def token_values(model: ShardedModel, rollouts: Rollouts, function: OutputFunction) -> Tensor:
    """A table of a number for each token of each reply, on every rank.

    function: what is wanted of the head's output, fp32 [tokens of the microbatch]; read where the token is predicted.
    """

    def at_targets(output: Any, batch: PackedBatch) -> Tensor:
        return function(output, batch)[batch.targets >= 0]

    table = torch.zeros(rollouts.mask.shape)
    for replies, numbers in _outputs(model, rollouts.samples, at_targets):
        lengths = [len(rollouts.tokens[i]) for i in replies]
        for i, part in zip(replies, numbers.split(lengths), strict=True):
            table[i, : len(part)] = part
    return all_reduce_sum(table, model.mesh.everyone)


def score_sequences(model: ShardedModel, samples: Sequence[Sample]) -> Tensor:
    """The score head's number at the last token of each sample's one sequence: fp32 [samples], on every rank."""
    scores = torch.zeros(len(samples))
    for which, numbers in _outputs(model, samples, lambda output, batch: output[batch.last_tokens]):
        scores[which] = numbers
    return all_reduce_sum(scores, model.mesh.everyone)


def _outputs(
    model: ShardedModel, samples: Sequence[Sample], function: OutputFunction
) -> list[tuple[list[int], Tensor]]:
    """Of this rank's microbatches: which samples are in each, and the numbers; on the ranks that tell the others."""
    mesh = model.mesh
    packed = packed_samples(samples, model)
    outputs = model.outputs([batch.to(mesh.device) for _, batch in packed], function)
    if outputs is None or mesh.tensor_rank:
        return []
    return [(which, output.cpu()) for (which, _), output in zip(packed, outputs, strict=True)]


def packed_samples(samples: Sequence[Sample], model: ShardedModel) -> list[tuple[list[int], PackedBatch]]:
    """This data rank's microbatches, and which samples are in each, in rising order."""
    config, mesh = model.config, model.mesh
    layout, capacity = config.parallel, config.batch.micro * config.data.sequence_length
    ranks = mesh.data_size * layout.microbatch_multiple
    lengths = [sum(len(sequence.ids) for sequence in sample.sequences) for sample in samples]
    bins = pack(np.array(lengths, dtype=np.int64), capacity, ranks)[mesh.data_rank :: mesh.data_size]
    return [(items.tolist(), collate([samples[i] for i in items], layout.token_multiple)) for items in bins]


# ---- what models are trained on ----


@dataclass(frozen=True)
class RolloutBatch(PackedBatch):
    """Replies to learn from, and text that is not to be forgotten; fp32 [T] each, where a token is predicted, else 0.

    old_log_probabilities: by the policy that wrote them.  reference_log_probabilities: by the starting model.
    weights: of a reply's token in the loss.  ptx_weights: of a text's.
    num_terms: of the loss, in this microbatch.
    """

    old_log_probabilities: Tensor = field(default_factory=lambda: torch.empty(0))
    reference_log_probabilities: Tensor = field(default_factory=lambda: torch.empty(0))
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    returns: Tensor = field(default_factory=lambda: torch.empty(0))
    old_values: Tensor = field(default_factory=lambda: torch.empty(0))
    weights: Tensor = field(default_factory=lambda: torch.empty(0))
    ptx_weights: Tensor = field(default_factory=lambda: torch.empty(0))
    num_terms: int = 0


class PtxSamples(NamedTuple):
    """To go on learning beside replies; their loss is a mean over their tokens, times a coefficient."""

    samples: Sequence[Sample]
    coefficient: float

    @property
    def num_targets(self) -> int:
        return sum(int(seq.is_target[1:].sum()) for sample in self.samples for seq in sample.sequences)


NO_PTX = PtxSamples((), 0.0)


def training_batches(
    rollouts: Rollouts,
    which: Sequence[int],
    tables: dict[str, Tensor],
    model: ShardedModel,
    by_token: bool,
    texts: PtxSamples = NO_PTX,
) -> list[RolloutBatch]:
    """This data rank's microbatches of some of the replies, and of texts.

    tables: names of RolloutBatch's fields, with what is known of each token of each reply.
    by_token: a term of the loss is a token, else a reply.
    """
    lengths = [len(tokens) for tokens in rollouts.tokens]
    of_step = sum(lengths[i] for i in which) if by_token else len(which)
    ptx_weight = texts.coefficient * of_step / max(1, texts.num_targets)

    def laid_out(rows: Sequence[Tensor], of_texts: float, batch: PackedBatch) -> Any:
        places = batch.targets >= 0
        known = torch.cat([*rows, torch.empty(0)])
        filled = torch.cat([known, torch.full((batch.num_targets - len(known),), of_texts)])
        return torch.zeros(len(batch.tokens)).masked_scatter(places, filled)

    batches = []
    samples = [*(rollouts.sample(i) for i in which), *texts.samples]
    for items, batch in packed_samples(samples, model):
        replies = [which[i] for i in items if i < len(which)]  # texts come after them
        values = {
            name: laid_out([table[i, : lengths[i]] for i in replies], 0.0, batch)
            for name, table in tables.items()
        }
        values["ptx_weights"] = laid_out([torch.zeros(lengths[i]) for i in replies], ptx_weight, batch)
        values["num_terms"] = sum(lengths[i] for i in replies) if by_token else len(replies)
        batches.append(RolloutBatch(**vars(batch), **values))
    return batches


def text_sample(sample: Window) -> Sample:
    """A window of tokens as pretraining reads it: its documents apart, all of them learned."""
    ids = sample.tokens[:-1].numpy().astype(np.int32)
    parts = np.split(ids, sample.document_starts[1:])
    return Sample(tuple(Tokens(part, np.ones(len(part), dtype=bool)) for part in parts))


def blank_rollout_batch(batch: PackedBatch) -> RolloutBatch:
    """A microbatch of the same size, without content."""
    names = [name for name, kind in RolloutBatch.__annotations__.items() if kind == "Tensor"]
    tables = {name: torch.zeros(len(batch.tokens)) for name in names}
    values: dict[str, Any] = {**vars(batch), **tables, "num_terms": batch.num_targets}
    return RolloutBatch(**values)
