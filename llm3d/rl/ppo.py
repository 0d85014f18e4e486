"""Reinforcement learning from rewards: the model writes, what it wrote is scored, what scored well becomes likelier.

PPO, Schulman et al. 2017, for language models as in Ziegler et al. 2019, Stiennon et al. 2020 and Ouyang et al. 2022:
four models on the same devices, under any layout. The policy is trained, and so is the critic, which foretells rewards;
the reference, which is the starting model, and the reward model are asked. GRPO (Shao et al. 2024) and RLOO (Ahmadian
et al. 2024) are the same with other advantages, and without a critic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm3d.checkpoint.hugging_face import has_score_head
from llm3d.checkpoint.starting import load_first_adapters, load_first_weights
from llm3d.config import Config, LoRASettings, ModelConfig, PPOConfig, check_plan, model_at
from llm3d.config.hugging_face import hugging_face_directory
from llm3d.data.packed import PackedBatch
from llm3d.data.pretraining import PretrainingData
from llm3d.data.prompts import Prompt, PromptData, read_prompt_sets
from llm3d.data.run_tokenizer import Beside, check_token_ids, corpora, end_ids, open_tokenizer
from llm3d.errors import InputError
from llm3d.models.heads import SCORE, LanguageModelHead
from llm3d.parallel.cross_entropy import TokenTerms
from llm3d.parallel.mesh import Mesh
from llm3d.permutation import derive_key, permute
from llm3d.rl.advantages import (
    Advantages,
    Spread,
    adapted_coefficient,
    generalised_advantages,
    group_advantages,
    kl_estimate,
    masked_mean,
    token_rewards,
    whiten,
)
from llm3d.rl.losses import PolicyObjective, ValueObjective
from llm3d.rl.rewards import RewardFunction, Rewards, reward_names, spread_of_scores
from llm3d.rl.rollout import Rollouts, RolloutWriter, Texts, of_tokens, text_sample, training_batches
from llm3d.rl.timing import Timing
from llm3d.text.chat_tokenizer import ChatTokenizer
from llm3d.text.streaming import Replies
from llm3d.text.templates import load_template
from llm3d.text.tokenizer import Tokenizer
from llm3d.train.parking import Parked, what_it_keeps
from llm3d.train.starting_model import StartingModel
from llm3d.train.trainer import Evaluator, Notice, StepResult, Trainer
from llm3d.wording import counted

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


# ---- what the settings name ----


class OpenedPPO(NamedTuple):
    """What a stage's settings name; see `llm3d.stages.run.Opened`.

    rewards: of each source, the settings of its model, or its function.  critic: its settings; None: there is none.
    texts: that the policy goes on learning.
    """

    config: PPOConfig
    tokenizer: ChatTokenizer
    data: PromptData
    objective: PolicyObjective
    replies: Replies
    rewards: list[PPOConfig | RewardFunction]
    critic: PPOConfig | None
    texts: PretrainingData | None

    @property
    def validation_names(self) -> Sequence[str]:
        none, size = torch.zeros(self.config.generate.num_replies), self.config.generate.num_replies
        names = reward_names(self.config.ppo.rewards)
        return [*VALIDATED, *spread_of_scores(names, [none] * len(names), none, size)]

    def trainer(self, mesh: Mesh) -> PPOTrainer:
        return PPOTrainer(self, mesh)

    def prepare(self, trainer: Trainer) -> None:
        assert isinstance(trainer, PPOTrainer)
        trainer.load_companions()

    def remarks(self, model: Evaluator) -> Sequence[str]:
        return ()


class Models(NamedTuple):
    """What the settings say of models, without their weights.

    config: the policy's settings and the reference's.  critic: its settings; None: there is none.
    rewards: of each source, the settings of its model; None: it is a function.
    """

    config: PPOConfig
    critic: PPOConfig | None
    rewards: list[PPOConfig | None]


def models_of(config: PPOConfig, found: Callable[[str | None, str], PPOConfig]) -> Models:
    """What the settings say of models. Raises InputError where they cannot stand beside each other.

    found: the settings of the model in a directory, None for the policy's, which a setting names.
    """
    rewards = [
        None if source.model is None else found(source.model, f"ppo.rewards[{i}].model")
        for i, source in enumerate(config.ppo.rewards)
    ]
    return Models(config, critic_settings(config, found), rewards)


def open_stage(config: PPOConfig) -> OpenedPPO:
    """Open what the settings name: tokenizer, template, prompts. Raises InputError where it cannot be used."""
    config, tokenizer = open_tokenizer(config)
    assert tokenizer is not None, "a model to start from has a tokenizer"
    _, critic, models = models_of(config, partial(beside, config, tokenizer))
    for i, model in enumerate(models):
        if model is not None and not holds_scores(model):
            raise InputError(
                f"ppo.rewards[{i}].model: {model.model.path} has no score head; name a trained reward model"
            )
    template = load_template(config.data.template, tokenizer)
    train, valid = read_prompt_sets(template, config)
    replies = Replies(tokenizer, end_ids(config, tokenizer, template), config.generate.stop)
    chat = ChatTokenizer(tokenizer, template)
    data, objective = PromptData(config, train, valid), PolicyObjective(config.ppo)
    prompts = [prompt for found in (*train, *valid) for prompt in found.prompts]
    rewards = [
        model or RewardFunction(source, f"ppo.rewards[{i}].function", prompts)
        for i, (source, model) in enumerate(zip(config.ppo.rewards, models, strict=True))
    ]
    return OpenedPPO(config, chat, data, objective, replies, rewards, critic, open_texts(config, tokenizer))


def open_texts(config: PPOConfig, tokenizer: Tokenizer) -> PretrainingData | None:
    """What ppo.ptx_data names. Raises InputError where it cannot be read, or its ids mean something else."""
    sources = [(source.path, source.weight) for source in config.ppo.ptx_data]
    assert config.model.vocab_size is not None, "the tokenizer has told it"
    if not sources:
        return None
    check_token_ids(tokenizer, corpora(config.ppo.ptx_data, "ppo.ptx_data", "train"))
    return PretrainingData(sources, config.data.sequence_length, config.run.seed, config.model.vocab_size)


def critic_settings(config: PPOConfig, found: Callable[[str | None, str], PPOConfig]) -> PPOConfig | None:
    settings = config.ppo
    if settings.advantages != "gae":
        return None
    first_model = next((source.model for source in settings.rewards if source.model is not None), None)
    rate = settings.critic_lr or config.optim.lr
    least = config.optim.min_lr * rate / config.optim.lr
    critic = found(settings.critic or first_model or config.model.path, "ppo.critic")
    lora = config.lora.model_copy(update={"path": None})
    optim = config.optim.model_copy(update={"lr": rate, "min_lr": least})
    return critic.model_copy(update={"lora": lora, "optim": optim})


def critic_started_from(critic: PPOConfig | None, reward_model: PPOConfig, policy: PPOConfig) -> bool:
    """Whether a reward model is what the critic's adapters stand on, and can be asked of it."""
    start = reward_model.model.path
    if critic is None or not critic.lora.rank or start == policy.model.path:
        return False
    return critic.model.path == start


def beside(config: PPOConfig, tokenizer: Tokenizer, path: str | None, setting: str) -> PPOConfig:
    """The settings of the model in a directory, with the policy's tokenizer. Raises InputError where it cannot be."""
    assert path is not None, "checked with the settings"
    found = standing_beside(config, model_at(path), path, setting)
    named = Beside(setting, hugging_face_directory(path), "name a model with the policy's tokenizer")
    if not named.has_tokenizer:
        raise InputError(
            f"{setting}: {path} has no tokenizer, and nothing else says what token ids mean to it; "
            "copy the tokenizer that it was trained with beside its weights"
        )
    check_token_ids(tokenizer, [named])
    return found


def standing_beside(config: PPOConfig, model: ModelConfig, path: str, setting: str) -> PPOConfig:
    """The settings of a model beside the policy, under its layout. Raises InputError where it cannot."""
    tokens, of_policy = model.vocab_size, config.model.vocab_size
    if tokens is None or of_policy is None or tokens < of_policy:
        raise InputError(
            f"{setting}: {path} has {tokens} tokens, the policy {of_policy}; it needs all of the policy's"
        )
    if config.data.sequence_length > model.max_position_embeddings:
        raise InputError(
            f"{setting}: {path} reads {counted(model.max_position_embeddings, 'token')}, fewer than "
            f"data.sequence_length {config.data.sequence_length}"
        )
    parallel = config.parallel
    if model.num_hidden_layers != config.model.num_hidden_layers:
        parallel = parallel.model_copy(update={"layers_per_stage": None})
    other = config.model_copy(update={"model": model, "parallel": parallel, "lora": LoRASettings()})
    try:
        check_plan(other, None)
    except InputError as error:
        raise InputError(f"{setting}: {path}: {error}") from None
    return other


def holds_scores(config: Config) -> bool:
    """Whether the model that the settings name has a reward model's head."""
    assert config.model.path is not None, "checked with the settings"
    return has_score_head(hugging_face_directory(config.model.path))


# ---- a step ----


class Scored(NamedTuple):
    """rollouts with what the models say of them: tables of fp32 [replies, tokens], and scores, fp32 [replies].

    raw: each source's.  scores: their sum, as it is learned from.
    """

    rollouts: Rollouts
    raw: list[Tensor]
    scores: Tensor
    log_probabilities: Tensor
    reference: Tensor


class PPOTrainer(Trainer):
    """The policy's trainer, with the models beside it. Every rank holds one and calls it at the same time."""

    config: PPOConfig

    def __init__(self, opened: OpenedPPO, mesh: Mesh) -> None:
        super().__init__(opened.config, mesh, opened.objective)
        self.opened, self.settings = opened, opened.config.ppo
        self.critic = (
            None if opened.critic is None else Trainer(opened.critic, mesh, ValueObjective(self.settings))
        )
        if self.critic is not None:
            self.companions["critic"] = self.critic
        self.reference: Evaluator = self
        if not opened.config.lora.rank:
            self.reference = Evaluator(opened.config, mesh, opened.objective)
        self.rewards = Rewards(self.settings.rewards, mesh, [self._giver(other) for other in opened.rewards])
        self.writer = RolloutWriter(self, opened.replies)
        self.kl_coefficient = self.settings.kl_coefficient
        self.spread = Spread()
        self.asked: dict[Evaluator, Callable[[], AbstractContextManager[None]]] = {}
        if self.settings.ema:
            self.optimizer.start_average()
        for model in {self, self.reference}:
            set_temperature(model, opened.config.generate.temperature)

    def _giver(self, source: PPOConfig | RewardFunction) -> Evaluator | RewardFunction:
        if isinstance(source, RewardFunction):
            return source
        if self.critic is not None and critic_started_from(self.opened.critic, source, self.config):
            return self.critic
        return Evaluator(source, self.mesh, ValueObjective(self.settings))

    def load_companions(self) -> None:
        """Give the other models their first weights, and have those that are only asked ready for it."""
        trained: list[Evaluator] = [self] if self.critic is None else [self, self.critic]
        asked = dict.fromkeys([self.reference, *self.rewards.models])
        load_first_adapters(self)
        for model in dict.fromkeys([*trained, *asked]):
            if model is not self:
                load_first_weights(model)
        if self.critic is not None and not holds_scores(self.critic.config):
            foretell_nothing(self.critic)
        self.rewards.center(self.opened.config, self.opened.tokenizer.template)
        for model in asked:
            if model in trained:
                self.asked[model] = StartingModel(model).restored
            elif self.mesh.device.type != "cpu":
                self.asked[model] = Parked(model.flat).on_the_device

    def awake(self, model: Evaluator) -> AbstractContextManager[None]:
        """Have a model that is only asked as it started, and on the device, for the time of the block."""
        return self.asked[model]() if model in self.asked else nullcontext()

    def publish(self) -> None:
        super().publish()
        if self.settings.ema:
            self.optimizer.start_average()

    @property
    def state(self) -> dict[str, Any]:
        return super().state | {"kl_coefficient": self.kl_coefficient, "scores": vars(self.spread)}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.kl_coefficient = state.get("kl_coefficient", self.kl_coefficient)
        self.spread = Spread(**state.get("scores", {}))

    def flops(self, microbatches: Sequence[Any], num_tokens: float) -> float | None:
        return None  # of writing, scoring and several models at once no one figure says much

    def step(self, prompts: Sequence[Any], lr: float, tell: Callable[[], Notice] | None = None) -> StepResult:
        """Write replies to the prompts, which every rank has, score them, and learn from them.

        Raises InputError, on all ranks and before any weight is changed, where a reward function fails.
        """
        settings, timing = self.settings, Timing(self.mesh.device)
        scored = self._scored(prompts, timing)
        rollouts, mask = scored.rollouts, scored.rollouts.mask
        self.opened.data.record(rollouts.num_tokens)
        gap = masked_mean((rollouts.written_log_probabilities - scored.log_probabilities).abs(), mask).item()
        if not gap <= settings.log_probability_gate:
            said = f"log-probabilities of replies are on average {gap:.3g} from what they were written with"
            limit = f"above ppo.log_probability_gate {settings.log_probability_gate:g}"
            return StepResult(math.nan, math.nan, {}, problem=f"{said}, {limit}")
        with timing("values"):
            values = torch.zeros(mask.shape)
            if self.critic is not None:
                values = of_tokens(self.critic, rollouts, lambda output, batch: output)
        kl = kl_estimate(scored.log_probabilities, scored.reference, settings.kl_estimator)
        found = self._advantages(scored, kl, values)
        weights = mask.float()
        if settings.loss_mean == "sequence":
            weights /= weights.sum(1, keepdim=True)
        tables = {
            "old_log_probabilities": scored.log_probabilities,
            "reference_log_probabilities": scored.reference,
            "advantages": found.advantages,
            "returns": found.returns,
            "old_values": values,
            "weights": weights,
        }
        result = self._update(rollouts, tables, lr, timing, tell)
        if result.problem:
            return result
        metrics = self._about(scored, kl) | self._about_values(values, found, mask)
        metrics |= {"rollout/log_probability_gap": gap, **result.metrics}
        metrics |= timing.metrics
        if self.writer.moved is not None:
            metrics["timing_s/hand_over"] = self.writer.moved.seconds  # part of gen
            metrics["rollout/handed_over_mib"] = self.writer.moved.received_bytes / 2**20
        self._adapt(metrics["objective/kl"], len(rollouts))
        examples = self.rewards.examples(rollouts, scored.raw, scored.scores, found.advantages)
        return result._replace(metrics=metrics, examples=examples)

    def _scored(self, prompts: Sequence[Prompt], timing: Timing) -> Scored:
        """Replies, and what the models say of them."""
        with timing("gen"):
            rollouts = self.writer.write(prompts)
        with timing("reward"):
            raw = self.rewards.scores(rollouts, self.awake)
        with timing("old_log_prob"):
            log_p = of_tokens(self, rollouts, _log_probabilities)
        with timing("ref"), self.awake(self.reference):
            reference = of_tokens(self.reference, rollouts, _log_probabilities)
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
            self.spread.add(scores.tolist())
            scores = scores / (self.spread.deviation + 1e-8)
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
            found = generalised_advantages(rewards, values, mask, settings.gamma, settings.lam)
        else:
            scores = scores - coefficient * kl.masked_fill(~mask, 0.0).sum(1)
            above = group_advantages(scores, self.config.generate.num_replies, settings.advantages)
            found = Advantages(above[:, None] * mask, above[:, None] * mask)
        if settings.whiten_advantages:
            found = found._replace(advantages=whiten(found.advantages, mask))
        return found

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
            batches = training_batches(rollouts, which, tables, self, by_token)
            mixed = batches
            if self.opened.texts is not None:
                texts = self._texts(rollouts, which)
                mixed = training_batches(rollouts, which, tables, self, by_token, texts)
            with timing("update_actor"):
                policy.append(super().step(mixed, lr, tell))
            self.optimizer.update_average(self.settings.ema)
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

    def _texts(self, rollouts: Rollouts, which: Sequence[int]) -> Texts:
        """As many sequences as replies, of the places in the texts' order that the replies have in the run's."""
        assert self.opened.texts is not None
        first = rollouts.prompts[0].number * self.config.generate.num_replies
        samples = [text_sample(self.opened.texts.sample(first + i)) for i in which]
        return Texts(samples, self.settings.ptx_coefficient)

    def _adapt(self, kl: float, num_replies: int) -> None:
        target, horizon = self.settings.kl_target, self.settings.kl_horizon
        if target is not None:
            self.kl_coefficient = adapted_coefficient(self.kl_coefficient, kl, target, horizon, num_replies)

    # ---- what is said of it ----

    def introduction(self) -> list[str]:
        roles: dict[str, Evaluator | None] = {
            "policy": self,
            "critic": self.critic,
            "reference": self.reference,
        }
        roles |= {f"reward model {i}": model for i, model in enumerate(self.rewards.models)}
        first_role: dict[Evaluator, str] = {}
        lines = list[str]()
        for role, model in roles.items():
            if model is not None:
                first = first_role.setdefault(model, role)
                keeps = what_it_keeps(model) if first == role else f"the {first} as it started"
                lines.append(f"{role}: {keeps}")
        where = "as it is trained" if self.writer.in_place else f"as {self.writer.mesh}, weights handed over"
        return [*lines, f"the policy writes {where}"]

    def validate(self, batches: Iterable[Sequence[Any]]) -> dict[str, float]:
        """Of replies to the validation prompts: their scores, how far the policy has gone, how long they are."""
        found = list[dict[str, float]]()
        counts = list[int]()
        for prompts in batches:
            scored = self._scored(prompts, Timing(self.mesh.device))
            kl = kl_estimate(scored.log_probabilities, scored.reference, self.settings.kl_estimator)
            found.append(self._about(scored, kl))
            counts.append(len(scored.rollouts))
        return _means(found, counts)

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

    def _about_values(self, values: Tensor, found: Advantages, mask: Tensor) -> dict[str, float]:
        if self.critic is None:
            return {}
        left, whole = (found.returns - values)[mask].var(), found.returns[mask].var()
        return {
            "critic/values/mean": masked_mean(values, mask).item(),
            "critic/returns/mean": masked_mean(found.returns, mask).item(),
            "critic/vf_explained_var": (1 - left / (whole + 1e-8)).item(),
        }


def foretell_nothing(critic: Trainer) -> None:
    """Of a critic that starts from a language model, a head of zeros: random values would drown the first rewards."""
    for piece, weight in critic.weights():
        if piece.box.name == SCORE:
            weight.zero_()
    critic.publish()


def _log_probabilities(output: TokenTerms, batch: PackedBatch) -> Tensor:
    return output.log_probabilities


def _means(found: Sequence[dict[str, float]], weights: Sequence[float] | None = None) -> dict[str, float]:
    return {name: float(np.average([each[name] for each in found], weights=weights)) for name in found[0]}


def set_temperature(model: Evaluator, temperature: float) -> None:
    """Log-probabilities are then those that tokens are drawn by."""
    for stage in model.stages:
        if isinstance(stage.head, LanguageModelHead):
            stage.head.temperature = temperature
