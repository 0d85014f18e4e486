"""Every setting, typed and frozen, a class for each section of the file.

The descriptions below fields go into the JSON Schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from llm3d.config.architecture import Architecture
from llm3d.config.base import Fraction, Name, OneOrMore, Positive, Section, Whole, whole
from llm3d.config.data import DataSource
from llm3d.config.families import ARCHITECTURES
from llm3d.config.schedules import SCHEDULES, ScheduleName

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# ---- model ----


class RopeScaling(Section):
    """RoPE scaling: stretches the rotary frequencies beyond the positions that the model was first trained with."""

    rope_type: Literal["linear", "llama3"]
    """RoPE scaling type. linear: position interpolation (Chen et al. 2023); llama3: that of Llama 3.1, which stretches
    low frequencies only."""
    factor: float = Field(ge=1)
    """RoPE scaling factor: the factor by which the context grows."""
    low_freq_factor: float | None = Field(None, gt=0)
    """Low-frequency factor of llama3: wavelengths above original_max_position_embeddings / low_freq_factor are
    stretched in full."""
    high_freq_factor: float | None = Field(None, gt=0)
    """High-frequency factor of llama3: wavelengths below original_max_position_embeddings / high_freq_factor stay as
    they are."""
    original_max_position_embeddings: Positive | None = None
    """Original context length of llama3, tokens: the positions that the model was first trained with."""

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, given: Any) -> Any:
        if (
            isinstance(given, dict)
            and "type" in given
            and given.get("rope_type", given["type"]) == given["type"]
        ):
            return {"rope_type": given["type"]} | {key: given[key] for key in given if key != "type"}
        return given

    @model_validator(mode="after")
    def _fields_fit_the_type(self) -> RopeScaling:
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        for name in names:
            if (getattr(self, name) is None) == (self.rope_type == "llama3"):
                raise ValueError(f"rope_type {self.rope_type} {_needs(self.rope_type == 'llama3')} {name}")
        if self.low_freq_factor and self.high_freq_factor and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError("low_freq_factor is not below high_freq_factor")
        return self


def _needs(needed: bool) -> str:
    return "needs" if needed else "takes no"


def _no_default_scaling(value: object) -> object:
    """transformers writes `rope_type: default` for no scaling."""
    if isinstance(value, dict) and value.get("rope_type", value.get("type")) == "default":
        return None
    return value


class ModelConfig(Section):
    """The model. The names are those of transformers' configurations."""

    path: Name | None = None
    """Pretrained model: a Hugging Face directory or a checkpoint. Its config.json gives the shape, its weights are the
    start."""
    model_type: Literal["llama", "qwen3"] = "llama"
    """Model family, as config.json names it: LLaMA, or dense Qwen3."""
    vocab_size: Positive | None = None
    """Vocabulary size, tokens. Null: that of data.tokenizer."""
    hidden_size: Positive
    """Hidden size: the width of the residual stream."""
    intermediate_size: Positive
    """Intermediate size: the width inside an MLP."""
    num_hidden_layers: Positive
    """Number of layers."""
    num_attention_heads: Positive
    """Number of attention heads, those of the queries."""
    num_key_value_heads: Positive = Field(default_factory=lambda data: data["num_attention_heads"])
    """Number of key and value heads; below num_attention_heads: grouped-query attention. Default:
    num_attention_heads."""
    head_dim: Positive = Field(
        default_factory=lambda data: data["hidden_size"] // data["num_attention_heads"]
    )
    """Head dimension. Default: hidden_size / num_attention_heads."""
    max_position_embeddings: Positive = 2048
    """Context length, tokens: the longest sequence that the model reads."""
    rope_theta: float = Field(10000.0, gt=0)
    """RoPE base period theta."""
    rope_scaling: Annotated[RopeScaling | None, BeforeValidator(_no_default_scaling)] = None
    """RoPE scaling: stretches the rotary frequencies for contexts longer than those of the first training. Null:
    none."""
    rms_norm_eps: float = Field(1e-5, gt=0)
    """RMSNorm epsilon: added to the mean square before its root is taken."""
    tie_word_embeddings: bool = False
    """Tied embeddings: the output layer shares the weights of the input embedding."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of the random first weights."""
    bos_token_id: Whole | None = None
    """Begin-of-sequence token, its id."""
    eos_token_id: Whole | tuple[Whole, ...] | None = None
    """End-of-sequence token, its id; or a list of ids, each of which ends a reply."""
    pad_token_id: Whole | None = None
    """Padding token, its id."""

    @property
    def architecture(self) -> Architecture:
        """The family that the model is of."""
        return ARCHITECTURES[self.model_type]

    def num_parameters(self, head: Literal["language", "score"] = "language") -> int:
        """The exact number of weights, tied embeddings counted once."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size is not known before the tokenizer is read")
        layer = self.architecture.layer_parameters(self)
        embedding = self.vocab_size * self.hidden_size
        on_top = self.hidden_size if head == "score" else 0 if self.tie_word_embeddings else embedding
        return embedding + self.num_hidden_layers * layer + self.hidden_size + on_top


# ---- the other sections ----


class RunConfig(Section):
    """The run: its directory, its random seed, its device."""

    dir: Name
    """Run directory: config.yaml, metrics.jsonl, TensorBoard events and checkpoints are written there."""
    seed: Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(whole)] = 1234
    """Random seed of first weights, the order of samples, dropout and sampling."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of each process. auto: a GPU of its own, or the CPU on a machine without one; cuda: a GPU, or an error."""


class ParallelConfig(Section):
    """Parallel sizes. The data-parallel size is what is left: world size / (tensor x pipeline)."""

    tensor: Positive = 1
    """Tensor-parallel size, ranks: every layer is split over so many devices."""
    pipeline: Positive = 1
    """Pipeline-parallel size, ranks: the layers are split into so many pipeline stages."""
    chunks: Positive = 1
    """Model chunks on each pipeline rank (virtual pipeline size); above 1 with the interleaved schedule."""
    schedule: ScheduleName = "1f1b"
    """Pipeline schedule: gpipe, 1f1b, or interleaved 1F1B."""
    sequence: bool = False
    """Sequence parallelism: activations outside attention and MLP are split over the tensor-parallel group."""
    layers_per_stage: tuple[Positive, ...] | None = None
    """Layers per pipeline stage: one number for each of the pipeline x chunks stages, in model order. Default: as even
    as possible."""

    @property
    def token_multiple(self) -> int:
        """Tokens of a microbatch come in multiples of it: sequence parallelism divides them over tensor ranks."""
        return self.tensor if self.sequence else 1

    @property
    def interleaves(self) -> bool:
        """Whether the schedule has pipeline ranks take turns between chunks of the model."""
        return SCHEDULES[self.schedule].interleaves

    @property
    def microbatch_multiple(self) -> int:
        """What the number of microbatches of a step is a multiple of, on each data rank."""
        return SCHEDULES[self.schedule].microbatch_multiple(self.pipeline)


class ZeroConfig(Section):
    """ZeRO: data-parallel ranks shard what each would otherwise hold a copy of. Rajbhandari et al. 2020."""

    stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage. 1: data-parallel ranks shard the optimizer state; 2: gradients too; 3: parameters too."""
    prefetch: Positive = 1
    """Prefetch depth of ZeRO stage 3, layers: parameters are all-gathered so many layers ahead."""
    offload: Literal["none", "optimizer"] = "none"
    """CPU offload. optimizer: fp32 master weights and moments are in host memory, and the host's processor steps
    them."""
    offload_fraction: float = Field(1.0, gt=0, le=1)
    """Offload fraction: the share of the optimizer state that is offloaded; the rest stays on the device."""


class LossScaleConfig(Section):
    """Dynamic loss scaling: the loss is multiplied by a scale in fp16, so that small gradients do not become zero."""

    initial: float = Field(2.0**32, gt=0)
    """Initial loss scale. It is large, as the loss is a mean over all tokens of a step: the first steps halve it until
    gradients fit."""
    growth_interval: Positive = 1000
    """Growth interval, steps: the loss scale doubles after so many steps without overflow."""
    hysteresis: Positive = 2
    """Hysteresis, steps: the number of overflows since the last doubling that halves the loss scale."""
    minimum: float = Field(1.0, gt=0)
    """Minimum loss scale: training is aborted below it."""


class PrecisionConfig(Section):
    """Number formats of computing, gradients and optimizer state."""

    compute: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Compute dtype of forward and backward; master weights are fp32. fp16 scales the loss."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """Gradient dtype: gradients are accumulated in it over microbatches, and reduced in it unless reduce_dtype is
    set."""
    reduce_dtype: Literal["fp32", "bf16"] | None = None
    """Gradient reduction dtype: gradients are sent and summed in it over data-parallel ranks; bf16 with fp32 gradients
    halves the traffic. Null: as gradients."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Optimizer state dtype of the two AdamW moments; bf16 is rounded stochastically."""
    loss_scale: LossScaleConfig = LossScaleConfig()
    """Dynamic loss scaling of fp16."""


class BatchConfig(Section):
    """Batch sizes of a step and of a microbatch."""

    global_size: Positive = Field(alias="global")
    """Global batch size: sequences a step, over all ranks; after pretraining, samples: conversations, comparisons, or
    prompts."""
    micro: Positive = 1
    """Micro batch size, sequences on one data-parallel rank; after pretraining, a microbatch has room for so many of
    the longest."""


class LossConfig(Section):
    """Regularizers that are added to the cross-entropy in training; evaluations are without."""

    z_loss: float = Field(0.0, ge=0)
    """z-loss coefficient: multiplies the squared logarithm of the softmax normalizer, which keeps logits from
    drifting."""
    label_smoothing: Fraction = 0.0
    """Label smoothing epsilon: the share of each target's probability that is spread over the whole vocabulary."""


class KernelsConfig(Section):
    """Back ends of fused operations and of attention."""

    backend: Literal["auto", "native", "transformer_engine", "apex", "reference"] = "auto"
    """Kernel back end of norms, rotary positions, activations, losses and AdamW. auto: that of LLM3D_KERNELS, or the
    fastest that is there; native: llm3d's own, or an error; reference: plain PyTorch."""
    attention: Literal["auto", "fa2", "fa3", "fa4", "cudnn"] = "auto"
    """Attention back end on a GPU. fa2 (auto): PyTorch's FlashAttention-2; fa3, fa4: FlashAttention-3 or 4, faster on
    Hopper, from a package that is installed beside; cudnn: cuDNN where all sequences of a microbatch have one length,
    which is not deterministic."""


class LogConfig(Section):
    """Logging of metrics."""

    every: Positive = 1
    """Logging interval, steps between lines of metrics.jsonl."""
    tensorboard: bool = True
    """TensorBoard events: metrics are written to run.dir/tensorboard, too."""


class SFTSettings(Section):
    """Supervised fine-tuning."""

    prompt_loss: bool = False
    """Prompt loss: prompts are learned, too, not only replies."""
    neftune_alpha: float = Field(0.0, ge=0)
    """NEFTune noise alpha: uniform noise of up to alpha / sqrt(length x hidden_size) is added to the embeddings in
    training. Jain et al. 2023."""
    sample_tokens: Whole = 64
    """Sample length, tokens: the maximum length of a reply to the first validation prompt, shown after each evaluation.
    0, or with prompt_loss: none is shown."""


class RewardSettings(Section):
    """Training of a reward model on comparisons of replies."""

    margin: bool = False
    """Margin loss: the margin that the data give to a pair is subtracted from the difference of its rewards."""
    center: float = Field(0.0, ge=0)
    """Centering coefficient: multiplies the squared sum of a pair's rewards, which keeps rewards around 0."""


class DPOSettings(Section):
    """Direct preference optimization."""

    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    """DPO loss type: sigmoid (DPO), ipo, hinge (SLiC) or robust. ipo takes log-probabilities per token."""
    beta: float = Field(0.1, gt=0)
    """DPO beta: the strength of the KL constraint to the reference model."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Label smoothing of conservative and robust DPO: the assumed share of pairs whose labels are swapped; with sigmoid
    and robust."""
    length_normalized: bool = False
    """Length normalization: log-probabilities are compared per token instead of summed over a reply."""
    rpo_alpha: float = Field(0.0, ge=0)
    """RPO alpha: multiplies the negative log-likelihood of the chosen replies, per token, which is added to the
    loss."""
    rpo_mean: Literal["sequence", "token"] = "sequence"
    """RPO mean: the mean that rpo_alpha multiplies. sequence: each reply counts alike (Pang et al. 2024); token: each
    token of the step, as in TRL. The metric nll_loss is over tokens with either."""
    reference: Literal["cached", "live", "none"] = "cached"
    """Reference log-probabilities, those of the starting model. cached: computed once, before the first step, and kept
    in run.dir; live: computed at each step, by a second copy of the model (with adapters, by the same one without
    them); none: all taken as equal."""


class RewardSource(Section):
    """A source of rewards: a reward model, or a function of the user."""

    model: Name | None = None
    """Reward model: a directory or checkpoint whose model has a score head and the policy's tokenizer."""
    function: Name | None = None
    """Reward function FILE.py:NAME, called as NAME(prompts, replies, **columns) -> a number for each reply; lists of
    equal length. The columns are those of the prompts' rows that it has parameters for. It runs in a process of its own
    on each rank."""
    weight: float = 1.0
    """Reward weight: multiplies the scores before they are added to those of other sources."""
    time_limit: float = Field(60.0, gt=0)
    """Time limit of a call of the function, seconds."""
    centered_on: Name | None = None
    """Reference conversations of a reward model: the mean score of their replies is subtracted from every score."""


class PPOSettings(Section):
    """Reinforcement learning from the rewards of replies: PPO, or GRPO or RLOO, which need no critic.

    The settings files in configs/stages name the papers that they follow.
    """

    rewards: Annotated[tuple[RewardSource, ...], Field(min_length=1), OneOrMore()]
    """Reward sources: reward models and reward functions, whose weighted sum is a reply's score."""
    advantages: Literal["gae", "grpo", "rloo"] = "gae"
    """Advantage estimator. gae: for each token, with a critic; grpo, rloo: for each reply, compared with the other
    replies to its prompt."""

    missing_end_penalty: float = Field(0.0, ge=0)
    """Missing-EOS penalty: subtracted from the score of a reply that did not end within generate.max_new_tokens."""
    missing_end_score: float | None = None
    """Missing-EOS score: the score of such a reply, in place of its own. Null: its own."""
    score_clip: float | None = Field(None, gt=0)
    """Score clip range: scores, after scaling, are clipped to [-score_clip, score_clip]. Null: they are not."""
    scale_scores: bool = False
    """Score scaling: scores are divided by the running standard deviation of all scores so far."""

    kl_coefficient: float = Field(0.05, ge=0)
    """KL coefficient beta: multiplies the KL of each token from the reference model, which is subtracted from its
    reward."""
    kl_estimator: Literal["k1", "abs", "k2", "k3"] = "k1"
    """KL estimator (Schulman 2020): k1, k2, k3, or abs, the absolute value of k1."""
    kl_in_loss: bool = False
    """KL in the loss: the KL term is added to the policy's loss instead of to the rewards, as in GRPO; needs k2 or k3,
    whose gradient is one of the KL."""
    kl_target: float | None = Field(None, gt=0)
    """KL target of the adaptive KL controller, nats a reply. Null: the coefficient stays as it is."""
    kl_horizon: float = Field(10000.0, gt=0)
    """KL horizon of the adaptive KL controller, replies."""

    gamma: float = Field(1.0, gt=0, le=1)
    """Discount factor gamma: a reward one token later counts gamma times as much."""
    lam: float = Field(0.95, ge=0, le=1)
    """GAE lambda: 0 trusts the critic, 1 the rewards."""
    whiten_rewards: bool = False
    """Reward whitening: rewards are scaled to a variance of 1 over all tokens of a step's replies; they keep their
    mean."""
    whiten_advantages: bool = True
    """Advantage whitening: advantages are shifted and scaled to a mean of 0 and a variance of 1 over all tokens of a
    step's replies."""

    epochs: Positive = 4
    """PPO epochs: passes over a step's replies."""
    minibatches: Positive = 1
    """PPO minibatches: optimizer steps in each PPO epoch."""
    clip: float = Field(0.2, gt=0)
    """PPO clip range epsilon: the policy ratio is clipped to [1 - clip, 1 + clip]."""
    clip_high: float | None = Field(None, gt=0)
    """Upper PPO clip range: the policy ratio is clipped to [1 - clip, 1 + clip_high]. Null: as clip. Yu et al. 2025
    (DAPO)."""
    dual_clip: float | None = Field(None, gt=1)
    """Dual-clip constant c: where the advantage A is negative, the loss is at most -c A. Null: not bounded. Ye et al.
    2020."""
    loss_mean: Literal["token", "sequence"] = "token"
    """Loss aggregation. token: each token of a minibatch counts alike; sequence: each reply, as in the paper of
    GRPO."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Entropy coefficient: multiplies the entropy of each token's distribution, which is subtracted from the loss."""
    stop_kl: float | None = Field(None, gt=0)
    """Early stopping KL: a step's updates end where the policy's approximate KL from the policy of the rollout exceeds
    it. Null: they do not."""

    critic: Name | None = None
    """Critic (value model): the model that it starts from. Null: the first reward model, else the policy's, with a
    value head of zeros."""
    critic_lr: float | None = Field(None, gt=0)
    """Critic learning rate. Null: optim.lr."""
    value_clip: float | None = Field(0.2, gt=0)
    """Value clip range: a value is clipped to that of the rollout plus or minus value_clip, where this makes the value
    loss larger. Null: not clipped."""

    ptx_data: Annotated[tuple[DataSource, ...], OneOrMore()] = ()
    """PTX data: tokens from `llm3d data tokenize` that the policy goes on learning, as many sequences a step as
    replies."""
    ptx_coefficient: float = Field(0.0, ge=0)
    """PTX coefficient: multiplies the pretraining loss on ptx_data. Ouyang et al. 2022 (InstructGPT), section 3.5."""
    ema: float = Field(0.0, ge=0, lt=1)
    """EMA decay: the share that an exponential moving average of the policy's weights keeps in each update. 0: there is
    none; else checkpoints hold it, too."""

    log_probability_gate: float = Field(0.1, gt=0)
    """Log-probability gate, nats: training is aborted where the log-probabilities of the rollout differ by more than
    this, on average, from those of the training forward pass; the weights that generate are then not those that are
    trained."""
    rollout_tensor: Positive | None = None
    """Rollout tensor-parallel size, ranks: a divisor of parallel.tensor. Null: parallel.tensor."""
    rollout_pipeline: Positive | None = None
    """Rollout pipeline-parallel size, ranks: a divisor of parallel.pipeline. Null: parallel.pipeline."""


class LoRASettings(Section):
    """LoRA: low-rank adapters are trained in place of all weights. Hu et al. 2021."""

    rank: Whole = 0
    """LoRA rank. 0: no adapters, all weights are trained."""
    alpha: float = Field(default_factory=lambda data: 2.0 * data["rank"], ge=0)
    """LoRA alpha: the adapters' output is multiplied by alpha / rank. Default: 2 x rank."""
    dropout: Fraction = 0.0
    """LoRA dropout: the share of an adapter's input that is dropped in training."""
    rslora: bool = False
    """Rank-stabilized LoRA: the adapters' output is multiplied by alpha / sqrt(rank). Kalajdzievski 2023."""
    targets: Annotated[tuple[Projection, ...], Field(min_length=1)] = get_args(Projection)
    """LoRA target modules: the projections that have adapters."""
    path: Name | None = None
    """Pretrained adapters: a PEFT directory, or a checkpoint, whose adapters are the start."""


class GenerateSettings(Section):
    """Text generation: sampling, lengths and memory."""

    max_new_tokens: Positive = 256
    """Maximum new tokens of a reply."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature: logits are divided by it. 0: greedy decoding."""
    top_k: Whole = 0
    """Top-k sampling: tokens are drawn from the k likeliest. 0: from all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Top-p (nucleus) sampling: tokens are drawn from the fewest likeliest ones that together have this probability."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Min-p sampling: tokens are drawn from those with at least this share of the likeliest one's probability."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Repetition penalty: above 1, tokens that the prompt or the reply already has become less likely."""
    stop: Annotated[tuple[Name, ...], OneOrMore()] = ()
    """Stop strings: a reply ends at any of them, and at the model's end token."""
    num_replies: Positive = 1
    """Replies per prompt (in GRPO and RLOO, the group size)."""
    max_sequences: Positive = 64
    """Maximum running sequences: replies that a data-parallel rank generates at a time; at least all those to one
    prompt."""
    cache_gib: float | None = Field(None, gt=0)
    """KV cache size on a rank, GiB. Null: as much as max_sequences of the longest take; on a GPU at most what it has
    left."""

    cuda_graphs: bool = True
    """CUDA graphs: on a GPU, the decoding step is captured once and replayed."""

    @property
    def cache_bytes(self) -> int | None:
        return None if self.cache_gib is None else int(self.cache_gib * 2**30)
