"""The settings of each training stage: which sections it has, and what in them has to fit.

A new stage is a class here, in `STAGES`, and a file of its name in llm3d/stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from llm3d.config.base import Section
from llm3d.config.data import ChatDataConfig, DataConfig, TokenDataConfig
from llm3d.config.sections import (
    BatchConfig,
    DPOSettings,
    GenerateSettings,
    KernelsConfig,
    LogConfig,
    LoRASettings,
    LossConfig,
    ModelConfig,
    ParallelConfig,
    PPOSettings,
    PrecisionConfig,
    RewardSettings,
    RunConfig,
    SFTSettings,
    ZeroConfig,
)
from llm3d.config.training import (
    CheckpointConfig,
    EpochsCheckpointConfig,
    EpochsConfig,
    OptimConfig,
    TrainConfig,
)


class Config(Section):
    """Settings that every training stage has.

    stage: its name.  reads: what its data are; of what is not tokens, each row.  head: of its model.
    """

    stage: ClassVar[str]
    reads: ClassVar[Literal["tokens", "conversation", "comparison", "labeled", "prompt"]] = "tokens"
    head: ClassVar[Literal["language", "score"]] = "language"

    run: RunConfig
    model: ModelConfig
    parallel: ParallelConfig
    zero: ZeroConfig
    precision: PrecisionConfig
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in backward. selective: norms and SwiGLU, without a matrix product; full: whole layers
    and logits."""
    data: DataConfig
    batch: BatchConfig
    lora: LoRASettings
    optim: OptimConfig
    kernels: KernelsConfig
    generate: GenerateSettings
    train: TrainConfig
    checkpoint: CheckpointConfig
    log: LogConfig

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // (self.parallel.tensor * self.parallel.pipeline)

    def num_microbatches(self, world_size: int) -> int:
        """Microbatches a step on each data-parallel rank; of samples of different lengths, at most."""
        return -(-self.batch.global_size // (self.batch.micro * self.data_parallel_size(world_size)))

    @property
    def token_loss(self) -> LossConfig:
        """What is added to a cross-entropy over tokens, where one is trained on."""
        return LossConfig()

    @property
    def neftune_alpha(self) -> float:
        return 0.0

    @property
    def template(self) -> str | None:
        """The chat template that the settings name; None: only the model's own files may have one."""
        return None

    @property
    def columns(self) -> dict[str, str]:
        """Which column of a data file holds what its format calls otherwise."""
        return {}

    def problems(self) -> Iterator[str]:
        """What of the stage's own settings does not fit: the setting's path, what was given, what is allowed."""
        yield from ()


class PretrainConfig(Config):
    """All settings of a pretraining run."""

    stage = "pretrain"

    data: TokenDataConfig
    loss: LossConfig

    @property
    def token_loss(self) -> LossConfig:
        return self.loss

    def problems(self) -> Iterator[str]:
        if self.lora.dropout:
            yield f"lora.dropout: {self.lora.dropout} is for the stages after pretraining; leave it out"


class PostTrainingConfig(Config):
    """Settings that the stages after pretraining have: samples of any length, counted in epochs."""

    data: ChatDataConfig
    train: EpochsConfig
    checkpoint: EpochsCheckpointConfig

    @property
    def template(self) -> str:
        return self.data.template

    @property
    def columns(self) -> dict[str, str]:
        return self.data.columns

    def problems(self) -> Iterator[str]:
        if not (self.train.steps or self.train.epochs):
            yield "train.steps: missing; give it, or train.epochs"


class ComparisonConfig(PostTrainingConfig):
    """Settings that the stages on comparisons of replies have."""

    reads = "comparison"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.batch.micro < 2:
            yield f"batch.micro: {self.batch.micro} holds no two replies to compare; the least is 2"


class SFTConfig(PostTrainingConfig):
    """All settings of supervised fine-tuning."""

    stage, reads = "sft", "conversation"

    loss: LossConfig
    sft: SFTSettings

    @property
    def token_loss(self) -> LossConfig:
        return self.loss

    @property
    def neftune_alpha(self) -> float:
        return self.sft.neftune_alpha


class RewardConfig(ComparisonConfig):
    """All settings of a reward model's training."""

    stage, head = "reward", "score"

    reward: RewardSettings


class DPOConfig(ComparisonConfig):
    """All settings of direct preference optimization."""

    stage = "dpo"

    dpo: DPOSettings

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        dpo = self.dpo
        if dpo.label_smoothing and dpo.loss not in ("sigmoid", "robust"):
            yield f"dpo.label_smoothing: {dpo.label_smoothing} needs dpo.loss sigmoid or robust, not {dpo.loss}"
        if dpo.length_normalized and dpo.loss == "ipo":
            yield "dpo.length_normalized: is always on with dpo.loss ipo; leave it out"
        if dpo.rpo_mean != "sequence" and not dpo.rpo_alpha:
            yield f"dpo.rpo_mean: {dpo.rpo_mean} needs dpo.rpo_alpha"


class ORPOSettings(Section):
    """Odds ratio preference optimization. Hong et al. 2024."""

    beta: float = Field(0.1, gt=0)
    """ORPO beta: the weight of the odds-ratio term beside the negative log-likelihood of the chosen replies; lambda in
    the paper."""


class ORPOConfig(ComparisonConfig):
    """All settings of odds ratio preference optimization."""

    stage = "orpo"

    orpo: ORPOSettings


class SimPOSettings(Section):
    """Simple preference optimization. Meng, Xia and Chen 2024."""

    beta: float = Field(2.0, gt=0)
    """SimPO beta: multiplies the mean log-probability of a reply's tokens, which is its reward. TRL's default, 0.1, is
    for losses of whole replies; the paper takes 2 to 10."""
    gamma: float = Field(0.5, ge=0)
    """SimPO gamma: the target reward margin, subtracted from the difference of a pair's rewards; TRL's simpo_gamma."""


class SimPOConfig(ComparisonConfig):
    """All settings of simple preference optimization."""

    stage = "simpo"

    simpo: SimPOSettings


class KTOSettings(Section):
    """Kahneman-Tversky optimization. Ethayarajh et al. 2024."""

    beta: float = Field(0.1, gt=0)
    """KTO beta: the strength of the KL constraint to the reference model, as in DPO."""
    desirable_weight: float = Field(1.0, gt=0)
    """Desirable weight: multiplies the loss of desirable replies."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Undesirable weight: multiplies the loss of undesirable replies. The paper asks for a ratio of
    desirable_weight x desirable replies to undesirable_weight x undesirable ones from 1 to 4 / 3."""


class KTOConfig(PostTrainingConfig):
    """All settings of Kahneman-Tversky optimization."""

    stage, reads = "kto", "labeled"

    kto: KTOSettings


class PPOConfig(PostTrainingConfig):
    """All settings of reinforcement learning. A batch has prompts, each with generate.num_replies replies."""

    stage, reads = "ppo", "prompt"

    ppo: PPOSettings

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from ppo_problems(self)


STAGES: dict[str, type[Config]] = {
    kind.stage: kind
    for kind in (
        PretrainConfig,
        SFTConfig,
        RewardConfig,
        DPOConfig,
        ORPOConfig,
        SimPOConfig,
        KTOConfig,
        PPOConfig,
    )
}


def ppo_problems(config: PPOConfig) -> Iterator[str]:
    ppo, writes, parallel = config.ppo, config.generate, config.parallel
    for i, source in enumerate(ppo.rewards):
        if (source.model is None) == (source.function is None):
            yield f"ppo.rewards[{i}]: give one of model and function"
        elif source.centered_on is not None and source.model is None:
            yield f"ppo.rewards[{i}].centered_on: is for a model's scores, not a function's"
    if ppo.advantages == "gae":
        if ppo.whiten_rewards and ppo.kl_in_loss:
            yield "ppo.whiten_rewards: has no use with ppo.kl_in_loss, where rewards are scores alone; leave it out"
    else:
        if writes.num_replies < 2:
            yield (
                f"generate.num_replies: {writes.num_replies} leaves ppo.advantages {ppo.advantages} no other reply to "
                "compare with; the least is 2"
            )
        for name in ("critic", "critic_lr", "value_clip", "gamma", "lam", "whiten_rewards"):
            if getattr(ppo, name) != PPOSettings.model_fields[name].default:
                yield f"ppo.{name}: ppo.advantages {ppo.advantages} scores whole replies, with no critic; leave it out"
    if ppo.kl_in_loss and ppo.kl_estimator not in ("k2", "k3"):
        yield f"ppo.kl_in_loss: needs ppo.kl_estimator k2 or k3, whose gradient is the KL's, not {ppo.kl_estimator}"
    if ppo.kl_in_loss and ppo.kl_target is not None:
        yield "ppo.kl_target: adapts the KL penalty in the rewards; with ppo.kl_in_loss there is none; leave it out"
    if ppo.kl_target is None and ppo.kl_horizon != PPOSettings.model_fields["kl_horizon"].default:
        yield "ppo.kl_horizon: needs ppo.kl_target"
    for name in ("format", "turns"):
        if getattr(config.data, name) != ChatDataConfig.model_fields[name].default:
            yield f"data.{name}: prompts have one format, and no replies; leave it out"
    if ppo.missing_end_score is not None and ppo.missing_end_penalty:
        yield "ppo.missing_end_penalty: cannot be given with ppo.missing_end_score; keep one of them"
    if bool(ppo.ptx_coefficient) != bool(ppo.ptx_data):
        yield "ppo.ptx_coefficient: it and ppo.ptx_data need each other"
    replies = config.batch.global_size * writes.num_replies
    if ppo.minibatches > replies:
        yield f"ppo.minibatches: {ppo.minibatches} are more than a step's {replies} replies"
    if not writes.temperature:
        yield "generate.temperature: 0 draws nothing, and the policy learns from sampled replies; set it above 0"
    if config.lora.dropout:
        yield f"lora.dropout: {config.lora.dropout} would change what replies are generated with; leave it out"
    if writes.repetition_penalty != 1:
        yield "generate.repetition_penalty: replies would not be sampled from the policy; leave it out"
    if writes.max_new_tokens >= config.data.sequence_length:
        yield (
            f"generate.max_new_tokens: {writes.max_new_tokens} leaves no room for a prompt within data.sequence_length "
            f"{config.data.sequence_length}"
        )
    if config.data.truncation == "right":
        yield "data.truncation: right would cut off what a prompt asks for; use drop or left"
    for name in ("tensor", "pipeline"):
        requested, there = getattr(ppo, f"rollout_{name}"), getattr(parallel, name)
        if requested is not None and there % requested:
            yield f"ppo.rollout_{name}: {requested} does not divide parallel.{name} {there}"
