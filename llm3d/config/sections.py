"""Every setting, typed and frozen, a class for each section of the file.

The descriptions below fields go into the JSON Schema.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from llm3d.config.architecture import Architecture
from llm3d.config.base import Fraction, Name, OneOrMore, Positive, Section, Whole, whole
from llm3d.config.llama import LLAMA
from llm3d.config.schedules import SCHEDULES, ScheduleName

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# ---- model ----


class RopeScaling(Section):
    """How the rotary frequencies are stretched beyond the positions that the model first saw."""

    rope_type: Literal["linear", "llama3"]
    factor: float = Field(ge=1)
    low_freq_factor: float | None = Field(None, gt=0)
    high_freq_factor: float | None = Field(None, gt=0)
    original_max_position_embeddings: Positive | None = None

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
    """A LLaMA. The names are those of transformers' LlamaConfig."""

    path: Name | None = None
    """A Hugging Face directory, or a checkpoint: its config.json gives the shape, its weights are the start."""
    vocab_size: Positive | None = None
    """Null takes it from data.tokenizer."""
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive = Field(default_factory=lambda data: data["num_attention_heads"])
    """Below num_attention_heads: grouped-query attention. Default: num_attention_heads."""
    head_dim: Positive = Field(
        default_factory=lambda data: data["hidden_size"] // data["num_attention_heads"]
    )
    """Default: hidden_size / num_attention_heads."""
    max_position_embeddings: Positive = 2048
    rope_theta: float = Field(10000.0, gt=0)
    rope_scaling: Annotated[RopeScaling | None, BeforeValidator(_no_default_scaling)] = None
    rms_norm_eps: float = Field(1e-5, gt=0)
    tie_word_embeddings: bool = False
    initializer_range: float = Field(0.02, gt=0)
    bos_token_id: Whole | None = None
    eos_token_id: Whole | tuple[Whole, ...] | None = None
    pad_token_id: Whole | None = None

    @property
    def architecture(self) -> Architecture:
        """The family that the model is of."""
        return LLAMA

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
    dir: Name
    """Where config.yaml, metrics.jsonl, TensorBoard events and checkpoints go."""
    seed: Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(whole)] = 1234
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of each process. auto: a GPU of its own, or the CPU on a machine without one; cuda: a GPU, or an error."""


class ParallelConfig(Section):
    """Degrees; data parallelism is what is left of the world size."""

    tensor: Positive = 1
    pipeline: Positive = 1
    chunks: Positive = 1
    """Model chunks on each pipeline rank; above 1 with the interleaved schedule."""
    schedule: ScheduleName = "1f1b"
    sequence: bool = False
    """Split activations outside attention and MLP over the tensor group (sequence parallelism)."""
    layers_per_stage: tuple[Positive, ...] | None = None
    """Layers of each of the pipeline x chunks stages, in model order. Default: as even as possible."""

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
    """What data ranks share out instead of each holding a copy. Rajbhandari et al. 2020."""

    stage: Literal[0, 1, 2, 3] = 0
    """1: the optimizer's state; 2: gradients too; 3: parameters too."""
    prefetch: Positive = 1
    """Stage 3: how many layers ahead parameters are gathered."""
    offload: Literal["none", "optimizer"] = "none"
    """optimizer: master weights and moments are in host memory, and the host's processor steps them."""
    offload_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the optimizer's state that offload takes; the rest stays on the device."""


class LossScaleConfig(Section):
    """What the loss is multiplied by in fp16, so that small gradients do not become zero."""

    initial: float = Field(2.0**32, gt=0)
    """Large, as the loss is a mean over all tokens of a step: the first steps halve it until gradients fit."""
    growth_interval: Positive = 1000
    """Steps without overflow after which it doubles."""
    hysteresis: Positive = 2
    """Overflows since it last doubled before it is halved."""
    minimum: float = Field(1.0, gt=0)
    """Below this, training is aborted."""


class PrecisionConfig(Section):
    compute: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of forward and backward; master weights are fp32. fp16 scales the loss."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """What gradients are summed in over microbatches, and over ranks where reduce_dtype does not say otherwise."""
    reduce_dtype: Literal["fp32", "bf16"] | None = None
    """Gradient reduction dtype: what gradients are sent and summed in over data ranks; bf16 with fp32 gradients halves
    the traffic. Null: as gradients."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """What the optimizer's moments are kept in; bf16 is rounded stochastically."""
    loss_scale: LossScaleConfig = LossScaleConfig()


class DataSource(Section):
    path: Name
    """Megatron data: the path of a .bin/.idx pair without its ending."""
    weight: float = Field(1.0, gt=0)
    """Share of the samples, relative to the other sources."""

    @model_validator(mode="before")
    @classmethod
    def _bare_path(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "minLength": 1}, handler(schema)]}


class ChatSource(DataSource):
    path: Name
    """A .jsonl, .json or .parquet file, a directory of them, or a pattern."""
    weight: float = Field(1.0, gt=0)
    """How often each of its samples is read in one pass over the data."""


Share = Annotated[float, Field(gt=0, lt=1)]


class DataConfig(Section):
    train: Annotated[tuple[DataSource, ...], Field(min_length=1), OneOrMore()]
    valid: Annotated[Share | tuple[DataSource, ...], OneOrMore()] = ()
    sequence_length: Positive
    tokenizer: Name | None = None
    """A tokenizer.model or tokenizer.json, or the directory of one."""


class TokenDataConfig(DataConfig):
    """Tokens from `llm3d data tokenize`, or from Megatron."""

    valid: Annotated[tuple[DataSource, ...], OneOrMore()] = ()
    split_documents: bool = True
    """Attention does not cross from one document into the next."""


class ChatDataConfig(DataConfig):
    """Conversations, or replies to compare. No sample is longer than sequence_length."""

    train: Annotated[tuple[ChatSource, ...], Field(min_length=1), OneOrMore()]
    valid: Annotated[Share | tuple[ChatSource, ...], OneOrMore()] = ()
    """Validation data: files as for training, or a share of the rows of each of data.train, such as 0.1, that is held
    out of it: whole conversations, comparisons or prompts. Which ones depends on run.seed."""
    tokenizer: Name | None = None
    """A tokenizer.model or tokenizer.json, or the directory of one. Null: that of model.path."""
    format: Name = "auto"
    """auto: by the columns; alpaca, sharegpt, messages, question_answer, preference or ranked."""
    columns: dict[str, str] = Field({})
    """Which column holds what the format calls otherwise, such as {prompt: question}."""
    template: Name = "auto"
    """auto: the tokenizer's own, else alpaca; alpaca, chatml, llama2, llama3, or the path of a .jinja file."""
    turns: Literal["all", "last", "split"] = "all"
    """Of several replies in a conversation, which are learned: all at once, the last, or each as a sample."""
    truncation: Literal["drop", "left", "right"] = "drop"
    """Truncation of samples above sequence_length: drop leaves them out, left cuts their start and right their end; a
    sample that is cut to nothing of a reply is left out, too."""
    skip_bad: bool = False
    """Leave out, and count, samples that cannot be used, for another reason than their length."""

    @property
    def valid_sources(self) -> tuple[ChatSource, ...]:
        return () if isinstance(self.valid, float) else self.valid


class BatchConfig(Section):
    global_size: Positive = Field(alias="global")
    """Sequences a step, over all ranks; after pretraining, samples: conversations, or prompts with their replies."""
    micro: Positive = 1
    """Sequences a microbatch, on one data-parallel rank; after pretraining, how many of the longest fit one."""


class LossConfig(Section):
    """What is added to the cross-entropy that is trained on; evaluations are without."""

    z_loss: float = Field(0.0, ge=0)
    """Times the squared logarithm of the softmax's normaliser: keeps logits from drifting."""
    label_smoothing: Fraction = 0.0
    """Share of each target's probability that is spread over the whole vocabulary."""


class KernelsConfig(Section):
    backend: Literal["auto", "native", "transformer_engine", "apex", "reference"] = "auto"
    """Which code computes norms, rotary positions, activations, losses and AdamW; auto: LLM3D_KERNELS, or the
    fastest that is there; native: llm3d's own, or an error; reference: plain PyTorch."""
    attention: Literal["auto", "fa2", "fa3", "fa4", "cudnn"] = "auto"
    """Attention back end on a GPU. fa2 (auto): PyTorch's FlashAttention-2; fa3, fa4: FlashAttention-3 or 4, faster on
    Hopper, whose package is installed beside; cudnn: cuDNN where all sequences of a microbatch are of one length, which
    is not deterministic."""


class LogConfig(Section):
    every: Positive = 1
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = True


class SFTSettings(Section):
    """Supervised fine-tuning."""

    prompt_loss: bool = False
    """Learn the prompts, too, not only the replies."""
    neftune_alpha: float = Field(0.0, ge=0)
    """Noise on the embeddings in training, up to alpha / sqrt(length x hidden_size). Jain et al. 2023."""
    sample_tokens: Whole = 64
    """Of a reply to the first validation prompt, shown after each evaluation. 0, or with prompt_loss: none is."""


class RewardSettings(Section):
    """The reward model: how much better a reply must score than a worse one."""

    margin: bool = False
    """Ask for the margin that the data give to each pair."""
    center: float = Field(0.0, ge=0)
    """Times the squared sum of a pair's rewards: keeps rewards around 0."""


class DPOSettings(Section):
    """Direct preference optimisation."""

    loss: Literal["sigmoid", "ipo", "hinge", "robust"] = "sigmoid"
    """ipo takes log-probabilities per token."""
    beta: float = Field(0.1, gt=0)
    """How strongly the model is held to the reference."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs that are taken to be labelled the wrong way round; with sigmoid and robust."""
    length_normalized: bool = False
    """Compare log-probabilities per token instead of whole replies'."""
    rpo_alpha: float = Field(0.0, ge=0)
    """Times the negative log-likelihood of the chosen replies, per token, which is added."""
    rpo_mean: Literal["sequence", "token"] = "sequence"
    """Mean that rpo_alpha multiplies. sequence: each reply counts alike (Pang et al. 2024); token: each token of the
    step, as in TRL. The metric nll_loss is over tokens with either."""
    reference: Literal["cached", "live", "none"] = "cached"
    """Where log-probabilities of the starting model come from. cached: computed once, before the first step, and kept
    in run.dir; live: computed at each step, by a second copy of the model (with adapters, by the one there is, without
    them); none: all taken as equal."""


class RewardSource(Section):
    """What scores replies: a reward model or a function of your own."""

    model: Name | None = None
    """The directory or checkpoint of a reward model with the policy's tokenizer."""
    function: Name | None = None
    """FILE.py:NAME, called as NAME(prompts, replies, **columns) -> a number for each reply; lists of equal length. The
    columns are those of the prompts' rows that it has parameters for. It runs in a process of its own on each rank."""
    weight: float = 1.0
    """Times its scores, before they are added to the others'."""
    time_limit: float = Field(60.0, gt=0)
    """Seconds that a call of the function may take."""
    centered_on: Name | None = None
    """Conversations whose replies are to score 0 on average: what the model makes of them is subtracted."""


class PPOSettings(Section):
    """Reinforcement learning from the rewards of replies: PPO, or GRPO or RLOO, which need no critic.

    The presets in configs/stages name their sources.
    """

    rewards: Annotated[tuple[RewardSource, ...], Field(min_length=1), OneOrMore()]
    """Their sum is a reply's score."""
    advantages: Literal["gae", "grpo", "rloo"] = "gae"
    """gae: each token's, by a critic. grpo, rloo: each reply's, against the others to the same prompt."""

    missing_end_penalty: float = Field(0.0, ge=0)
    """Subtracted from the score of a reply that did not end within generate.max_new_tokens."""
    missing_end_score: float | None = None
    """The score of such a reply instead of its own."""
    score_clip: float | None = Field(None, gt=0)
    """Scores, scaled, are kept within plus and minus this."""
    scale_scores: bool = False
    """Divide by the standard deviation of all scores so far."""

    kl_coefficient: float = Field(0.05, ge=0)
    """Times the KL of each token from the starting model, which is subtracted from its reward."""
    kl_estimator: Literal["k1", "abs", "k2", "k3"] = "k1"
    kl_in_loss: bool = False
    """Add it to the policy's loss instead of to the rewards, as GRPO does; needs k2 or k3, whose gradient is one."""
    kl_target: float | None = Field(None, gt=0)
    """KL of a reply that the coefficient is adapted to; null: it stays as it is."""
    kl_horizon: float = Field(10000.0, gt=0)
    """Replies in which it is adapted."""

    gamma: float = Field(1.0, gt=0, le=1)
    """What a reward one token later is worth."""
    lam: float = Field(0.95, ge=0, le=1)
    """Of generalised advantage estimation: 0 trusts the critic, 1 the rewards."""
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    """To a mean of 0 and a variance of 1 over all tokens of a step's replies; rewards keep their mean."""

    epochs: Positive = 4
    """Passes over a step's replies."""
    minibatches: Positive = 1
    """Optimizer steps in each pass."""
    clip: float = Field(0.2, gt=0)
    """How far the probability of a token may go from what it was, as a share of it, before the gain is cut off."""
    clip_high: float | None = Field(None, gt=0)
    """The same upwards. Null: as clip. Yu et al. 2025 (DAPO)."""
    dual_clip: float | None = Field(None, gt=1)
    """Where the advantage is negative, what it can cost is at most this times it. Ye et al. 2020."""
    loss_mean: Literal["token", "sequence"] = "token"
    """token: each token of a minibatch counts alike. sequence: each reply, as in the paper of GRPO."""
    entropy_coefficient: float = Field(0.0, ge=0)
    """Times the entropy of each token's distribution, which is added to the gain."""
    stop_kl: float | None = Field(None, gt=0)
    """A step's updates end where the policy's KL from what wrote the replies is above this."""

    critic: Name | None = None
    """The model that the critic starts from. Null: the first reward model, else the policy's, with a head of zeros."""
    critic_lr: float | None = Field(None, gt=0)
    """Null: optim.lr."""
    value_clip: float | None = Field(0.2, gt=0)
    """How far a value may go from what it was before the gain is cut off."""

    ptx_data: Annotated[tuple[DataSource, ...], OneOrMore()] = ()
    """Tokens from `llm3d data tokenize` that the policy goes on learning, as many sequences a step as replies."""
    ptx_coefficient: float = Field(0.0, ge=0)
    """Times their loss. Ouyang et al. 2022 (InstructGPT), section 3.5."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Share that an average of the policy's weights keeps in each update; the checkpoint then has it, too."""

    log_probability_gate: float = Field(0.1, gt=0)
    """Training is aborted where the log-probabilities that replies were written with are, on average, further than
    this from those of the training forward pass: the weights that write are then not those that are trained."""
    rollout_tensor: Positive | None = None
    """Tensor ranks that write a reply, a divisor of parallel.tensor. Null: as many."""
    rollout_pipeline: Positive | None = None
    """The same of parallel.pipeline."""


class LoRASettings(Section):
    """Low-rank adapters in place of training all weights. Hu et al. 2021."""

    rank: Whole = 0
    """0: no adapters, all weights are trained."""
    alpha: float = Field(default_factory=lambda data: 2.0 * data["rank"], ge=0)
    """What the adapters add is multiplied by alpha / rank. Default: 2 x rank."""
    dropout: Fraction = 0.0
    """Share of an adapter's input that is left out in training."""
    rslora: bool = False
    """By alpha / sqrt(rank) instead. Kalajdzievski 2023."""
    targets: Annotated[tuple[Projection, ...], Field(min_length=1)] = get_args(Projection)
    """The projections that have one."""
    path: Name | None = None
    """A PEFT directory, or a checkpoint, whose adapters are the start."""


class GenerateSettings(Section):
    """How text is written."""

    max_new_tokens: Positive = 256
    """Of a reply, at most."""
    temperature: float = Field(1.0, ge=0)
    """What logits are divided by; 0: always the likeliest token."""
    top_k: Whole = 0
    """Draw from the likeliest tokens only, so many of them. 0: from all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the fewest likeliest tokens that together have this probability."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Draw from tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1: tokens that were there before become less likely."""
    stop: Annotated[tuple[Name, ...], OneOrMore()] = ()
    """Strings at which a reply ends, beside the model's end token."""
    num_replies: Positive = 1
    """To each prompt."""
    max_sequences: Positive = 64
    """Replies that a data rank works on at a time; at least all to one prompt."""
    cache_gib: float | None = Field(None, gt=0)
    """Memory for keys and values on a rank. Null: what max_sequences of the longest take, of a GPU what it has left."""

    cuda_graphs: bool = True
    """On a GPU, record the step that gives each running reply a token more, and play it again."""

    @property
    def cache_bytes(self) -> int | None:
        return None if self.cache_gib is None else int(self.cache_gib * 2**30)
