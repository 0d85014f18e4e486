"""Reinforcement learning from rewards: the policy generates, replies are scored, and their advantages are learned from.

PPO, Schulman et al. 2017, for language models as in Ziegler et al. 2019, Stiennon et al. 2020 and Ouyang et al. 2022:
four models on the same devices, under any layout. The policy and the critic, which predicts returns, are trained; the
reference, which is the starting model, and the reward model are frozen. GRPO (Shao et al. 2024) and RLOO (Ahmadian et
al. 2024) are the same with other advantages, and without a critic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm3d.checkpoint.starting import load_first_adapters, load_first_weights
from llm3d.config import PPOConfig
from llm3d.data.packed import PackedBatch
from llm3d.data.pretraining import PretrainingData
from llm3d.data.prompts import TokenizedPrompt
from llm3d.models.heads import SCORE, LanguageModelHead
from llm3d.parallel.cross_entropy import TokenTerms
from llm3d.permutation import derive_key, permute
from llm3d.rl.advantages import (
    Advantages,
    RunningMoments,
    adapted_coefficient,
    generalized_advantages,
    group_advantages,
    kl_estimate,
    masked_mean,
    token_rewards,
    whiten,
)
from llm3d.rl.models import holds_scores
from llm3d.rl.rewards import Rewards, Scorer, spread_of_scores
from llm3d.rl.rollout import (
    PtxSamples,
    RolloutGenerator,
    Rollouts,
    text_sample,
    token_values,
    training_batches,
)
from llm3d.rl.timing import Timing
from llm3d.text.streaming import Detokenizer
from llm3d.text.templates import Template
from llm3d.train.frozen import FrozenModel
from llm3d.train.learner import Evaluation
from llm3d.train.trainer import Notice, ShardedModel, StepResult, Trainer

VALIDATED = (
    "objective/scores",
    "objective/kl",
    "objective/kl_coefficient",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "objective/entropy",
    "val/num_eos_tokens",
    "response_length/mean",
    "response_length/max",
    "response_length/clip_ratio",
)


class Scored(NamedTuple):
    """rollouts with what the models say of them: tables of fp32 [replies, tokens], and scores, fp32 [replies].

    raw: each source's.  scores: their sum, as it is learned from.
    """

    rollouts: Rollouts
    raw: list[Tensor]
    scores: Tensor
    log_probabilities: Tensor
    reference: Tensor


class PPOModels(NamedTuple):
    """The models of a run, under one layout.

    policy, critic: trained, but in an evaluation.  critic: None: advantages come from groups.  scorers: for each of
    ppo.rewards its reward model or function.
    """

    policy: ShardedModel
    critic: Trainer | None
    reference: FrozenModel
    scorers: list[Scorer]

    @property
    def frozen(self) -> list[FrozenModel]:
        return [self.reference, *(scorer for scorer in self.scorers if isinstance(scorer, FrozenModel))]


class PPOLearner:
    """A `llm3d.train.learner.Learner`: generate, score, evaluate, estimate advantages, update.

    texts: that the policy goes on learning.  record: is told how many tokens a step's prompts and replies had.
    """

    def __init__(
        self,
        models: PPOModels,
        detokenizer: Detokenizer,
        template: Template,
        texts: PretrainingData | None,
        record: Callable[[int], None],
    ) -> None:
        self.policy, self.critic, self.reference, scorers = models
        config = self.policy.config
        assert isinstance(config, PPOConfig)
        self.config, self.settings, self.mesh = config, config.ppo, self.policy.mesh
        self.frozen, self.template, self.texts, self.record = models.frozen, template, texts, record
        self.rewards = Rewards(self.settings.rewards, self.mesh, scorers)
        self.rollout = RolloutGenerator(self.policy, detokenizer)
        self.kl_coefficient = self.settings.kl_coefficient
        self.score_moments = RunningMoments()
        if self.settings.ema and isinstance(self.policy, Trainer):
            self.policy.optimizer.start_average()
        for model in {self.policy, self.reference.model}:
            set_temperature(model, config.generate.temperature)

    @property
    def model(self) -> ShardedModel:
        return self.policy

    @property
    def trainer(self) -> Trainer:
        assert isinstance(self.policy, Trainer)
        return self.policy

    @property
    def others(self) -> dict[str, Trainer]:
        return {} if self.critic is None else {"critic": self.critic}

    def prepare(self) -> None:
        """Load the critic, the reference and the reward models, and freeze those that are not trained."""
        load_first_adapters(self.policy)
        companions = dict.fromkeys([*self.others.values(), *(frozen.model for frozen in self.frozen)])
        for model in companions:
            if model is not self.policy:
                load_first_weights(model)
        if self.critic is not None and not holds_scores(self.critic.config):
            zero_value_head(self.critic)
        self.rewards.center(self.config, self.template)
        for frozen in self.frozen:
            frozen.freeze()

    @property
    def state(self) -> dict[str, Any]:
        return {"kl_coefficient": self.kl_coefficient, "scores": vars(self.score_moments)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.kl_coefficient = state.get("kl_coefficient", self.kl_coefficient)
        self.score_moments = RunningMoments(**state.get("scores", {}))

    def flops(self, batch: Sequence[Any], num_tokens: float) -> float | None:
        return None  # of writing, scoring and several models at once no one figure says much

    def examples(self) -> Sequence[str]:
        return ()

    def step(
        self, batch: Sequence[TokenizedPrompt], lr: float, tell: Callable[[], Notice] | None = None
    ) -> StepResult:
        """Write replies to a batch of prompts, the same on every rank, score them, and learn from them.

        Raises InputError, on all ranks and before any weight is changed, where a reward function fails.
        """
        settings, timing = self.settings, Timing(self.mesh.device)
        scored = self._scored(batch, timing)
        rollouts, mask = scored.rollouts, scored.rollouts.mask
        self.record(rollouts.num_tokens)
        gap = masked_mean((rollouts.rollout_log_probs - scored.log_probabilities).abs(), mask).item()
        if not gap <= settings.log_probability_gate:
            message = (
                f"log-probabilities of replies are on average {gap:.3g} from what they were written with"
            )
            limit = f"above ppo.log_probability_gate {settings.log_probability_gate:g}"
            return StepResult(math.nan, math.nan, {}, problem=f"{message}, {limit}")
        with timing("values"):
            values = torch.zeros(mask.shape)
            if self.critic is not None:
                values = token_values(self.critic, rollouts, lambda output, batch: output)
        kl = kl_estimate(scored.log_probabilities, scored.reference, settings.kl_estimator)
        estimate = self._advantages(scored, kl, values)
        weights = mask.float()
        if settings.loss_mean == "sequence":
            weights /= weights.sum(1, keepdim=True)
        tables = {
            "old_log_probabilities": scored.log_probabilities,
            "reference_log_probabilities": scored.reference,
            "advantages": estimate.advantages,
            "returns": estimate.returns,
            "old_values": values,
            "weights": weights,
        }
        result = self._update(rollouts, tables, lr, timing, tell)
        if result.problem:
            return result
        metrics = self._about(scored, kl) | self._about_values(values, estimate, mask)
        metrics |= {"rollout/log_probability_gap": gap, **result.metrics}
        metrics |= timing.metrics
        if self.rollout.synced is not None:
            metrics["timing_s/hand_over"] = self.rollout.synced.seconds  # part of gen
            metrics["rollout/handed_over_mib"] = self.rollout.synced.received_bytes / 2**20
        self._adapt(metrics["objective/kl"], len(rollouts))
        examples = self.rewards.examples(rollouts, scored.raw, scored.scores, estimate.advantages)
        return result._replace(metrics=metrics, examples=examples)

    def _scored(self, prompts: Sequence[TokenizedPrompt], timing: Timing) -> Scored:
        """Replies, and what the models say of them."""
        with timing("gen"):
            rollouts = self.rollout.generate(prompts)
        with timing("reward"):
            raw = self.rewards.scores(rollouts)
        with timing("old_log_prob"):
            log_p = token_values(self.policy, rollouts, _log_probabilities)
        with timing("ref"), self.reference.loaded() as model:
            reference = token_values(model, rollouts, _log_probabilities)
        return Scored(rollouts, raw, self._shaped(self.rewards.total(raw), rollouts), log_p, reference)

    def _shaped(self, scores: Tensor, rollouts: Rollouts) -> Tensor:
        """Scores with what an unended reply costs."""
        settings, unended = self.settings, ~torch.tensor(rollouts.ended)
        if settings.missing_end_score is not None:
            scores = torch.where(unended, settings.missing_end_score, scores)
        return scores - settings.missing_end_penalty * unended

    def _scaled(self, scores: Tensor) -> Tensor:
        settings = self.settings
        if settings.scale_scores:
            self.score_moments.add(scores.tolist())
            scores = scores / (self.score_moments.deviation + 1e-8)
        if settings.score_clip is not None:
            scores = scores.clamp(-settings.score_clip, settings.score_clip)
        return scores

    def _advantages(self, scored: Scored, kl: Tensor, values: Tensor) -> Advantages:
        settings, mask = self.settings, scored.rollouts.mask
        coefficient = 0.0 if settings.kl_in_loss else self.kl_coefficient
        scores = self._scaled(scored.scores)
        if settings.advantages == "gae":
            rewards = token_rewards(scores, kl, mask, coefficient)
            if settings.whiten_rewards:
                rewards = whiten(rewards, mask, shift_mean=False)
            estimate = generalized_advantages(rewards, values, mask, settings.gamma, settings.lam)
        else:
            scores = scores - coefficient * kl.masked_fill(~mask, 0.0).sum(1)
            above = group_advantages(scores, self.config.generate.num_replies, settings.advantages)
            estimate = Advantages(above[:, None] * mask, above[:, None] * mask)
        if settings.whiten_advantages:
            estimate = estimate._replace(advantages=whiten(estimate.advantages, mask))
        return estimate

    def _update(
        self,
        rollouts: Rollouts,
        tables: dict[str, Tensor],
        lr: float,
        timing: Timing,
        tell: Callable[[], Notice] | None,
    ) -> StepResult:
        """Several passes over the replies; -> means over all updates."""
        policy, values = list[StepResult](), list[StepResult]()
        by_token = self.settings.loss_mean == "token"
        for which in self._minibatches(rollouts):
            batches = training_batches(rollouts, which, tables, self.policy, by_token)
            mixed = batches
            if self.texts is not None:
                ptx = self._ptx_samples(self.texts, rollouts, which)
                mixed = training_batches(rollouts, which, tables, self.policy, by_token, ptx)
            with timing("update_actor"):
                policy.append(self.trainer.step(mixed, lr, tell))
            self.trainer.optimizer.update_average(self.settings.ema)
            if self.critic is not None:
                with timing("update_critic"):
                    rate = lr * self.critic.config.optim.lr / self.config.optim.lr
                    values.append(self.critic.step(batches, rate))
            problem = policy[-1].problem or (values and values[-1].problem)
            if problem:
                return policy[-1]._replace(problem=problem, changed=True)
            stop = self.settings.stop_kl
            if stop is not None and policy[-1].metrics["policy/approxkl_avg"] > stop:
                break
        metrics = _means([result.metrics for result in policy])
        if values:
            metrics |= _means([result.metrics | {"loss/value_avg": result.loss} for result in values])
            metrics["critic/grad_norm"] = float(np.mean([result.grad_norm for result in values]))
        metrics["updates"] = float(len(policy))
        taken = [result for result in policy if not result.skipped]
        norm = float(np.mean([result.grad_norm for result in taken])) if taken else math.inf
        loss = float(np.mean([result.loss for result in policy]))
        last = policy[-1]
        return StepResult(loss, norm, metrics, last.loss_scale, skipped=not taken, notice=last.notice)

    def _minibatches(self, rollouts: Rollouts) -> Iterator[list[int]]:
        """Replies of each update, in an order that the step's first prompt, the epoch and run.seed give.

        A last step of fewer prompts takes fewer minibatches, about as large as the others.
        """
        count, first = len(rollouts), rollouts.prompts[0].number
        whole = self.config.batch.global_size * self.config.generate.num_replies
        minibatches = math.ceil(self.settings.minibatches * count / whole)
        for epoch in range(self.settings.epochs):
            order = permute(np.arange(count), count, derive_key(self.config.run.seed, first, epoch))
            for part in np.array_split(order, minibatches):
                yield sorted(part.tolist())

    def _ptx_samples(self, texts: PretrainingData, rollouts: Rollouts, which: Sequence[int]) -> PtxSamples:
        """As many sequences as replies, of the places in the texts' order that the replies have in the run's."""
        first = rollouts.prompts[0].number * self.config.generate.num_replies
        samples = [text_sample(texts.sample(first + i)) for i in which]
        return PtxSamples(samples, self.settings.ptx_coefficient)

    def _adapt(self, kl: float, num_replies: int) -> None:
        target, horizon = self.settings.kl_target, self.settings.kl_horizon
        if target is not None:
            self.kl_coefficient = adapted_coefficient(self.kl_coefficient, kl, target, horizon, num_replies)

    # ---- what is said of it ----

    def introduction(self) -> list[str]:
        roles: dict[str, ShardedModel | None] = {
            "policy": self.policy,
            "critic": self.critic,
            "reference": self.reference.model,
        }
        roles |= {f"reward model {i}": model for i, model in enumerate(self.rewards.models)}
        first_role: dict[ShardedModel, str] = {}
        lines = list[str]()
        for role, model in roles.items():
            if model is not None:
                first = first_role.setdefault(model, role)
                keeps = memory_between_steps(model) if first == role else f"the {first} as it started"
                lines.append(f"{role}: {keeps}")
        where = (
            "as it is trained"
            if self.rollout.shares_layout
            else f"as {self.rollout.mesh}, weights handed over"
        )
        return [*lines, f"the policy writes {where}"]

    def evaluate(self, batches: Iterable[Sequence[TokenizedPrompt]]) -> Evaluation:
        """Of replies to the validation prompts: their scores, how far the policy has gone, how long they are."""
        metrics = list[dict[str, float]]()
        counts, num_prompts = list[int](), 0
        for prompts in batches:
            scored = self._scored(prompts, Timing(self.mesh.device))
            kl = kl_estimate(scored.log_probabilities, scored.reference, self.settings.kl_estimator)
            metrics.append(self._about(scored, kl))
            counts.append(len(scored.rollouts))
            num_prompts += len(prompts)
        return Evaluation(_means(metrics, counts), num_prompts, "prompt")

    def _about(self, scored: Scored, kl: Tensor) -> dict[str, float]:
        """Names that the users of TRL, and of verl, know."""
        rollouts, mask = scored.rollouts, scored.rollouts.mask
        lengths = mask.sum(1).double()
        kl_of_reply = kl.masked_fill(~mask, 0.0).sum(1).mean().item()
        score = scored.scores.mean().item()
        return {
            "objective/scores": score,
            **spread_of_scores(
                self.rewards.names, scored.raw, scored.scores, self.config.generate.num_replies
            ),
            "objective/kl": kl_of_reply,
            "objective/kl_coefficient": self.kl_coefficient,
            "objective/non_score_reward": -self.kl_coefficient * kl_of_reply,
            "objective/rlhf_reward": score - self.kl_coefficient * kl_of_reply,
            "objective/entropy": -scored.log_probabilities.masked_fill(~mask, 0.0).sum(1).mean().item(),
            "val/num_eos_tokens": float(sum(rollouts.ended)),
            "response_length/mean": lengths.mean().item(),
            "response_length/max": lengths.max().item(),
            "response_length/clip_ratio": 1 - sum(rollouts.ended) / len(rollouts),
        }

    def _about_values(self, values: Tensor, estimate: Advantages, mask: Tensor) -> dict[str, float]:
        if self.critic is None:
            return {}
        left, whole = (estimate.returns - values)[mask].var(), estimate.returns[mask].var()
        return {
            "critic/values/mean": masked_mean(values, mask).item(),
            "critic/returns/mean": masked_mean(estimate.returns, mask).item(),
            "critic/vf_explained_var": (1 - left / (whole + 1e-8)).item(),
        }


def zero_value_head(critic: Trainer) -> None:
    """Of a critic that starts from a language model, a head of zeros: random values would drown the first rewards."""
    for piece, weight in critic.weights():
        if piece.box.name == SCORE:
            weight.zero_()
    critic.publish()


def _log_probabilities(output: TokenTerms, batch: PackedBatch) -> Tensor:
    return output.log_probabilities


def _means(metrics: Sequence[dict[str, float]], weights: Sequence[float] | None = None) -> dict[str, float]:
    return {name: float(np.average([each[name] for each in metrics], weights=weights)) for name in metrics[0]}


def set_temperature(model: ShardedModel, temperature: float) -> None:
    """Log-probabilities are then those that tokens are drawn by."""
    for stage in model.stages:
        if isinstance(stage.head, LanguageModelHead):
            stage.head.temperature = temperature


def memory_between_steps(model: ShardedModel) -> str:
    """What a model keeps of this rank's memory between steps, for people."""
    flat = model.flat
    units = (*flat.units, *flat.frozen)
    parts = {"weights": sum((unit.parameters if unit.frees else unit.whole).nbytes for unit in units)}
    if isinstance(model, Trainer):
        state = [tensor for tensors in model.optimizer.state.values() for tensor in tensors]
        parts["gradients"] = sum(gradients.nbytes for gradients in flat.kept_gradients)
        parts["optimizer"] = sum(tensor.nbytes for tensor in state)
    return ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in parts.items())
