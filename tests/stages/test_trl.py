"""TRL as the oracle: the losses of preferences, what is reported beside them, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llm3d.checkpoint.load import load_pretrained
from llm3d.config import STAGES, make_config
from llm3d.data.conversations import ChatData
from llm3d.data.samples import Sample, SampleSet, Tokens
from llm3d.parallel.mesh import Mesh
from llm3d.stages.dpo import PreferenceObjective
from llm3d.stages.kto import KTOObjective, KTOReference
from llm3d.stages.orpo import ORPOObjective
from llm3d.stages.reference import reference_log_probabilities
from llm3d.stages.reward import RewardObjective
from llm3d.stages.simpo import SimPOObjective
from llm3d.train.trainer import Trainer
from tests import pool
from tests.closeness import assert_same_numbers, assert_same_tensors
from tests.parity.harness import owned_pieces
from tests.stages.common import Settings, silent
from tests.stages.post_training import settings, write_model

pytest.importorskip("trl")

NUM_PAIRS = 6
BETA = 0.3
PADDING = 280  # <|begin_of_text|>, which no sample has: the oracle gives its embedding no gradient
# Our settings, and TRL's losses with their weights.
LOSSES: list[tuple[dict[str, Any], dict[str, float]]] = [
    ({"loss": "sigmoid"}, {"sigmoid": 1.0}),
    ({"loss": "hinge"}, {"hinge": 1.0}),
    ({"loss": "ipo"}, {"ipo": 1.0}),
    ({"loss": "robust", "label_smoothing": 0.2}, {"robust": 1.0}),
    ({"length_normalized": True}, {"sigmoid_norm": 1.0}),
    ({"rpo_alpha": 0.7, "rpo_mean": "token"}, {"sigmoid": 1.0, "sft": 0.7}),
    ({"loss": "ipo", "rpo_alpha": 0.7, "rpo_mean": "token"}, {"ipo": 1.0, "sft": 0.7}),
]
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def pairs() -> SampleSet:
    """Prompts with a better and a worse reply of other lengths, and margins."""
    random = np.random.default_rng(0)

    def tokens(low: int, high: int) -> np.ndarray:
        return random.integers(10, PADDING, random.integers(low, high + 1)).astype(np.int32)

    samples = []
    for _ in range(NUM_PAIRS):
        prompt = tokens(2, 6)
        replies = [tokens(2, 12) for _ in range(2)]
        sequences = (
            Tokens(np.concatenate([prompt, reply]), np.arange(len(prompt) + len(reply)) >= len(prompt))
            for reply in replies
        )
        samples.append(Sample(tuple(sequences), (0.0, 1.0), float(random.random())))
    return SampleSet.of(samples)


def ids(sample: Sample, side: int) -> tuple[list[int], list[int]]:
    """Of the prompt, and of a reply."""
    tokens, is_target = sample.sequences[side]
    return tokens[~is_target].tolist(), tokens[is_target].tolist()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy, and a reference."""
    directory = tmp_path_factory.mktemp("models")
    return write_model(directory / "policy", seed=0), write_model(directory / "reference", seed=1)


# ---- ours ----


def given_settings(directory: Path, **section: Any) -> Settings:
    batch = {"global": NUM_PAIRS, "micro": 2}
    return settings(directory, "unused", Path("unused"), batch=batch, **section)


def loaded(stage: str, directory: Path, objective: Any, given: Settings) -> tuple[Trainer, ChatData]:
    config = make_config(given, 1, STAGES[stage])
    trainer = Trainer(config, Mesh(1, 1), objective(config))
    load_pretrained(directory, trainer)
    return trainer, ChatData(config, [pairs()], [])


def preferences_on_rank(models: tuple[Path, Path], choices: list[dict[str, Any]]) -> list[Any]:
    """For each choice of settings: what is reported of a step over all pairs, and its gradients."""
    policy, reference = models
    found, known = [], None
    for choice in choices:
        given = given_settings(policy, dpo={"beta": BETA, **choice})
        trainer, data = loaded("dpo", policy, lambda config: PreferenceObjective(config.dpo), given)
        if known is None:
            other, all_pairs = loaded("dpo", reference, lambda config: PreferenceObjective(config.dpo), given)
            known = [reference_log_probabilities(other, all_pairs, 0)]
        data.reference = known
        found.append(step_of(trainer, data))
    return found


def rewards_on_rank(model: Path, choices: list[dict[str, Any]]) -> list[Any]:
    found = []
    for choice in choices:
        given = given_settings(model, reward=choice)
        found.append(step_of(*loaded("reward", model, lambda config: RewardObjective(config.reward), given)))
    return found


def step_of(trainer: Trainer, data: ChatData) -> tuple[dict[str, float], dict[str, Tensor]]:
    result = trainer.step(data.microbatches(1, trainer.mesh), lr=0.0)
    gradients = {box.name: value for box, value in owned_pieces(trainer, trainer.flat.gradients)}
    return {"loss": result.loss, **result.metrics}, gradients


# ---- theirs ----


def trainer_of(name: str, model: Any, directory: Path, tmp_path: Path, **changes: Any) -> Any:
    """A trainer of TRL's, over rows that nothing is computed of."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = "<|begin_of_text|>"
    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, max_length=None
    )
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with silent():
        return getattr(trl, f"{name}Trainer")(
            model, args=arguments, train_dataset=rows, processing_class=tokenizer, **changes
        )


def theirs(trainer: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Loss and metrics of one batch, and the gradients."""
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model.train(), inputs)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return {**metrics, "loss": loss.item()}, gradients


# ---- direct preference optimization ----


@pytest.fixture(scope="module")
def preference_trainer(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import LlamaForCausalLM

    policy, reference = (LlamaForCausalLM.from_pretrained(path) for path in models)
    return trainer_of("DPO", policy, models[0], tmp_path_factory.mktemp("trl"), ref_model=reference)


@pytest.fixture(scope="module")
def our_preferences(models: tuple[Path, Path]) -> list[Any]:
    by_sequence, cdpo = {"rpo_alpha": 0.7}, {"label_smoothing": 0.2}
    return pool.run(preferences_on_rank, 1, models, [*(choice for choice, _ in LOSSES), by_sequence, cdpo])[0]


def preference_inputs(trainer: Any, samples: list[Sample]) -> dict[str, Tensor]:
    rows = []
    for sample in samples:
        (prompt, chosen), (_, rejected) = ids(sample, 0), ids(sample, 1)
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return trainer.data_collator(rows)


@pytest.mark.parametrize("number", range(len(LOSSES)), ids=lambda number: "-".join(LOSSES[number][1]))
def test_preference_losses_are_those_of_trl(
    number: int, preference_trainer: Any, our_preferences: list[Any]
) -> None:
    choice, losses = LOSSES[number]
    preference_trainer.beta = BETA
    preference_trainer.label_smoothing = choice.get("label_smoothing", 0.0)
    preference_trainer.loss_types, preference_trainer.loss_weights = list(losses), list(losses.values())
    inputs = preference_inputs(preference_trainer, [pairs()[i] for i in range(NUM_PAIRS)])
    expected, gradients = theirs(preference_trainer, inputs)
    ours, our_gradients = our_preferences[number]
    assert_same_numbers(*({name: found[name] for name in ("loss", *METRICS)} for found in (ours, expected)))
    assert_same_tensors(our_gradients, gradients, 1e-5)


def test_the_nll_loss_is_trls_sft_loss(preference_trainer: Any, our_preferences: list[Any]) -> None:
    """Whatever the settings add to the loss."""
    preference_trainer.loss_types, preference_trainer.loss_weights = ["sft"], [1.0]
    inputs = preference_inputs(preference_trainer, [pairs()[i] for i in range(NUM_PAIRS)])
    expected, _ = theirs(preference_trainer, inputs)
    for ours, _ in our_preferences:
        assert ours["nll_loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_label_smoothing_is_that_of_trl(preference_trainer: Any, our_preferences: list[Any]) -> None:
    """TRL smooths labels in the loss that sorts its pairs; of one pair by itself it is that of cDPO."""
    preference_trainer.beta, preference_trainer.label_smoothing = BETA, 0.2
    preference_trainer.loss_types, preference_trainer.loss_weights = ["aot"], [1.0]
    alone = [
        theirs(preference_trainer, preference_inputs(preference_trainer, [pairs()[i]]))
        for i in range(NUM_PAIRS)
    ]
    ours, gradients = our_preferences[-1]
    assert ours["loss"] == pytest.approx(np.mean([numbers["loss"] for numbers, _ in alone]), rel=1e-5)
    means = {name: torch.stack([of_pair[name] for _, of_pair in alone]).mean(0) for name in alone[0][1]}
    assert_same_tensors(gradients, means, 1e-5)


# ---- odds ratio preference optimization ----


def short_prompts() -> SampleSet:
    """The pairs with prompts of one token: TRL learns prompts, too, but no model predicts a first token."""
    samples = (pairs()[i] for i in range(NUM_PAIRS))
    return SampleSet.of(
        sample._replace(
            sequences=tuple(
                Tokens(ids[is_target.argmax() - 1 :], is_target[is_target.argmax() - 1 :])
                for ids, is_target in sample.sequences
            )
        )
        for sample in samples
    )


def orpo_on_rank(policy: Path) -> Any:
    given = given_settings(policy, orpo={"beta": BETA})
    trainer, _ = loaded("orpo", policy, lambda config: ORPOObjective(config.orpo), given)
    return step_of(trainer, ChatData(trainer.config, [short_prompts()], []))


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)


def padded_pairs(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The chosen and the rejected replies with their prompts, as TRL's trainers without a reference model take them."""
    inputs = {}
    for side, name in enumerate(("chosen", "rejected")):
        tokens = [sample.sequences[side] for sample in samples]
        rows = [ids.tolist() for ids, _ in tokens]
        inputs[f"{name}_input_ids"] = padded(rows, PADDING)
        inputs[f"{name}_attention_mask"] = padded([[1] * len(row) for row in rows], 0)
        inputs[f"{name}_labels"] = padded(
            [np.where(is_target, ids, -100).tolist() for ids, is_target in tokens], -100
        )
    return inputs


def test_orpo_is_that_of_trl(models: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM
    from trl.experimental.orpo import ORPOTrainer

    model = LlamaForCausalLM.from_pretrained(models[0])
    trainer = ORPOTrainer.__new__(ORPOTrainer)  # its arithmetic alone, without its data and its accelerator
    trainer.__dict__ |= {
        "beta": BETA,
        "is_encoder_decoder": False,
        "aux_loss_enabled": False,
        "padding_value": PADDING,
        "accelerator": SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x),
    }
    inputs = padded_pairs([short_prompts()[i] for i in range(NUM_PAIRS)])
    loss, metrics = trainer.get_batch_loss_metrics(model, inputs)
    loss.backward()
    expected = {"loss": loss.item(), **{name: float(value) for name, value in metrics.items()}}
    ours, gradients = pool.run(orpo_on_rank, 1, models[0])[0]
    names = ("loss", *METRICS, "nll_loss", "log_odds_ratio", "log_odds_chosen")
    assert_same_numbers(*({name: found[name] for name in names} for found in (ours, expected)))
    assert_same_tensors(
        gradients, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, 1e-5
    )


# ---- simple preference optimization ----


def simpo_on_rank(policy: Path) -> Any:
    given = given_settings(policy, simpo={"beta": BETA, "gamma": 0.7})
    return step_of(*loaded("simpo", policy, lambda config: SimPOObjective(config.simpo), given))


def test_simpo_is_that_of_trl(models: tuple[Path, Path]) -> None:
    from transformers import LlamaForCausalLM
    from trl.experimental.cpo import CPOTrainer

    model = LlamaForCausalLM.from_pretrained(models[0])
    trainer = CPOTrainer.__new__(CPOTrainer)  # its arithmetic alone, without its data and its accelerator
    trainer.__dict__ |= {
        "loss_type": "simpo",
        "beta": BETA,
        "simpo_gamma": 0.7,
        "cpo_alpha": 0.0,
        "alpha": 0.0,
        "label_smoothing": 0.0,
        "is_encoder_decoder": False,
        "aux_loss_enabled": False,
        "pad_token_id": PADDING,
        "accelerator": SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x),
    }
    loss, metrics = trainer.get_batch_loss_metrics(
        model, padded_pairs([pairs()[i] for i in range(NUM_PAIRS)])
    )
    loss.backward()
    expected = {"loss": loss.item(), **{name: float(value) for name, value in metrics.items()}}
    ours, gradients = pool.run(simpo_on_rank, 1, models[0])[0]
    assert_same_numbers(*({name: found[name] for name in ("loss", *METRICS)} for found in (ours, expected)))
    assert_same_tensors(
        gradients, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, 1e-5
    )


# ---- Kahneman-Tversky optimization ----


def labeled() -> SampleSet:
    """Each pair's replies alone, in order, so that each has the reply before it for its mismatched one."""
    return SampleSet.of(
        Sample((sequence,), (rank,))
        for i in range(NUM_PAIRS)
        for sequence, rank in zip(pairs()[i].sequences, pairs()[i].ranks, strict=True)
    )


def kto_on_rank(models: tuple[Path, Path]) -> Any:
    policy, other = models
    settings = {"beta": BETA, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    batch = {"global": 2 * NUM_PAIRS, "micro": 5}
    given = given_settings(policy, kto=settings) | {"batch": batch}
    trainer, _ = loaded("kto", policy, lambda config: KTOObjective(config.kto), given)
    data = ChatData(trainer.config, [], [labeled()], mismatched=True)
    reference = KTOReference(trainer)
    load_pretrained(other, reference.live.frozen.model)
    (batches,) = data.evaluation(trainer.mesh)  # in the order that they are stored in
    result = trainer.step(reference.complete(batches), lr=0.0)
    gradients = {box.name: value for box, value in owned_pieces(trainer, trainer.flat.gradients)}
    return {"loss": result.loss, **result.metrics}, gradients


def test_kto_is_that_of_trl(models: tuple[Path, Path], tmp_path: Path) -> None:
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM

    models = (models[1], models[0])  # the KL is then above 0, where it is not cut off
    policy, reference = (LlamaForCausalLM.from_pretrained(path) for path in models)
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    tokenizer.pad_token = "<|begin_of_text|>"
    arguments = trl.KTOConfig(
        output_dir=str(tmp_path),
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_length=None,
        beta=BETA,
        desirable_weight=1.2,
        undesirable_weight=0.7,
        per_device_train_batch_size=2 * NUM_PAIRS,
    )
    rows = Dataset.from_list([{"prompt": "a", "completion": "b", "label": True}] * 2)
    with silent():
        trainer = trl.KTOTrainer(
            policy, ref_model=reference, args=arguments, train_dataset=rows, processing_class=tokenizer
        )
    samples = [labeled()[i] for i in range(2 * NUM_PAIRS)]
    replies = [ids(sample, 0) for sample in samples]
    inputs = trainer.data_collator(
        [
            {
                "prompt_ids": prompt,
                "completion_ids": reply,
                "KL_completion_ids": replies[i - 1][1],
                "label": samples[i].ranks[0] == 0,
            }
            for i, (prompt, reply) in enumerate(replies)
        ]
    )
    expected, gradients = theirs(trainer, inputs)
    ours, our_gradients = pool.run(kto_on_rank, 1, models)[0]
    names = (
        "loss",
        "kl",
        *(f"{name}/{label}" for name in ("rewards", "logps") for label in ("chosen", "rejected")),
    )
    assert ours["kl"] > 0
    assert_same_numbers(*({name: found[name] for name in names} for found in (ours, expected)))
    assert_same_tensors(our_gradients, gradients, 1e-5)


# ---- rewards ----

REWARDS: list[dict[str, Any]] = [{}, {"margin": True}, {"center": 0.3}, {"margin": True, "center": 0.3}]


@pytest.fixture(scope="module")
def reward_trainer(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(3)
    model = LlamaForSequenceClassification.from_pretrained(models[0], num_labels=1, pad_token_id=PADDING)
    return trainer_of("Reward", model, models[0], tmp_path_factory.mktemp("trl"))


@pytest.fixture(scope="module")
def our_rewards(reward_trainer: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    directory = tmp_path_factory.mktemp("reward")
    reward_trainer.model.save_pretrained(directory)
    return pool.run(rewards_on_rank, 1, directory, REWARDS)[0]


@pytest.mark.parametrize(
    "number", range(len(REWARDS)), ids=lambda number: "-".join(REWARDS[number]) or "plain"
)
def test_reward_losses_are_those_of_trl(number: int, reward_trainer: Any, our_rewards: list[Any]) -> None:
    choice, rows = REWARDS[number], []
    for sample in (pairs()[i] for i in range(NUM_PAIRS)):
        chosen, rejected = (sample.sequences[side].ids.tolist() for side in (0, 1))
        margin = {"margin": sample.margin} if choice.get("margin") else {}
        rows.append({"chosen_ids": chosen, "rejected_ids": rejected, **margin})
    reward_trainer.args.center_rewards_coefficient = choice.get("center")
    expected, gradients = theirs(reward_trainer, reward_trainer.data_collator(rows))
    ours, our_gradients = our_rewards[number]
    names = ("loss", "accuracy", "margin", "mean_reward", "max_reward", "min_reward")
    assert_same_numbers(*({name: found[name] for name in names} for found in (ours, expected)), absolute=1e-6)
    assert_same_tensors(our_gradients, gradients, 1e-5)
