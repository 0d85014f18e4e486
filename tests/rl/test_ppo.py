"""Reinforcement learning: the same under every layout, resumed exactly, and towards what is rewarded."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llm3d.commands.export import export
from llm3d.corpus.build import tokenize_corpus
from llm3d.data.chat import read_samples
from llm3d.errors import InputError
from llm3d.parallel.mesh import Mesh
from llm3d.rl.rollout import score_sequences
from tests import pool
from tests.closeness import ROUNDING, assert_same_numbers, assert_same_tensors
from tests.stages.common import Settings, command, evaluated, examples, metrics, silent
from tests.stages.post_training import (
    answer,
    conversations,
    opened_task,
    question,
    settings,
    train_on_rank,
    write_model,
    write_reward_model,
    write_rows,
)

FUNCTIONS = '''
def share_of_e(prompts, replies, want):
    """Of its characters; and a bonus for what is wanted."""
    return [reply.count("e") / (1 + len(reply)) + (w in reply) for reply, w in zip(replies, want)]


def broken(prompts, replies, **columns):
    return [1 / (len(columns["want"][i]) - 5) for i in range(len(replies))]


def slow(prompts, replies):
    import time

    time.sleep(60)


def too_few(prompts, replies):
    return [0.0] * (len(replies) - 1)


def nothing_finite(prompts, replies):
    return [float("nan")] * len(replies)


def leaving(prompts, replies):
    import os

    os._exit(7)


def as_the_first(prompts, replies):
    """Of all replies to a prompt the same."""
    return [float(len(prompt)) for prompt in prompts]


def talkative(prompts, replies):
    print("not part of the answer")
    return [float(len(reply)) for reply in replies]
'''


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ppo")
    model = write_model(directory / "model")
    write_reward_model(directory / "reward", model)
    rows = [{"prompt": question(i), "want": answer(i)} for i in range(11)]
    write_rows(directory / "prompts.jsonl", rows)
    write_rows(directory / "valid.jsonl", rows[:5])
    (directory / "rewards.py").write_text(FUNCTIONS)
    (directory / "text.txt").write_text("What comes after one is two, and so on.\n\n" * 90)
    with silent():
        tokenize_corpus([directory / "text.txt"], directory / "corpus", model, separator="\n\n")
    return directory


def given_settings(files: Path, run: Path, **changes: Any) -> Settings:
    """Two steps, the last a smaller one, over both kinds of rewards, with everything that there is to get wrong."""
    function = {"function": f"{files}/rewards.py:share_of_e", "weight": 2.0}
    ppo = {
        "rewards": [{"model": str(files / "reward")}, function],
        "epochs": 2,
        "minibatches": 2,
        "kl_target": 2.0,
        "kl_horizon": 50,
        "scale_scores": True,
        "missing_end_penalty": 0.5,
        "critic_lr": 2e-3,
    }
    given = settings(files / "model", str(files / "prompts.jsonl"), run, **changes)
    given["data"]["valid"] = [str(files / "valid.jsonl")]
    given["optim"] = {"lr": 1e-3, "warmup_steps": 1, **changes.get("optim", {})}
    given["train"] = {"steps": 0, "epochs": 0.5, "eval_every": 2, **changes.get("train", {})}
    given["generate"] = {"max_new_tokens": 17, "num_replies": 2, **changes.get("generate", {})}
    given["ppo"] = ppo | changes.get("ppo", {})
    if given["ppo"].get("ptx_coefficient"):
        given["ppo"]["ptx_data"] = [str(files / "corpus")]
    return given


GROUPS = {
    "advantages": "grpo",
    "critic_lr": None,
    "kl_in_loss": True,
    "kl_estimator": "k3",
    "loss_mean": "sequence",
    "kl_target": None,
    "kl_horizon": 10000.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "adapters": {"lora": {"rank": 3}},
    "grpo": {"ppo": GROUPS, "generate": {"temperature": 0.7}},
    "texts": {"ppo": {"ptx_coefficient": 3.0, "entropy_coefficient": 0.1, "minibatches": 1}},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "interleaved": (2, {"parallel": {"pipeline": 2, "chunks": 2, "schedule": "interleaved"}}),
    "sharded": (2, {"zero": {"stage": 3}}),
    "all": (8, {"parallel": {"tensor": 2, "pipeline": 2}, "zero": {"stage": 2}}),
    "handed over": (
        4,
        {"parallel": {"tensor": 2, "pipeline": 2}, "ppo": {"rollout_tensor": 1, "rollout_pipeline": 1}},
    ),
}

# Those in which the parts of a variant meet; the others of VARIANTS and LAYOUTS are left to the tests of all layouts.
MEETING = {
    "ppo": ("interleaved", "sharded", "handed over"),
    "adapters": ("sharded", "handed over"),
    "grpo": ("all",),
    "texts": ("tensor",),
}
CASES = [
    pytest.param(variant, name, id=f"{variant}-{name}", marks=[] if name in met else pytest.mark.all_layouts)
    for variant, met in MEETING.items()
    for name in LAYOUTS
]


def with_layout(changes: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    return {name: {**changes.get(name, {}), **layout.get(name, {})} for name in {**changes, **layout}}


def said(given: Settings) -> list[dict[str, float]]:
    """What the metrics say of training, not of the machine."""
    of_machine = ("timing", "step_time", "tokens_per", "tflops", "mfu", "memory", "rollout/")
    return [
        {k: v for k, v in line.items() if not k.startswith(of_machine) and v is not None}
        for line in metrics(given)
    ]


def weights(given: Settings, folder: str = "", step: int = 2) -> dict[str, Tensor]:
    directory = Path(given["run"]["dir"]) / "checkpoints" / f"step-{step:08d}" / folder
    return {
        name: x
        for file in sorted(directory.glob("[ma]*/*.safetensors"))
        for name, x in load_file(file).items()
    }


@pytest.fixture(scope="module")
def of_one_process(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Settings]:
    """Settings of a variant's run, which is there: one for all layouts."""

    @functools.cache
    def trained(variant: str) -> Settings:
        given = given_settings(files, tmp_path_factory.mktemp("one process") / "run", **VARIANTS[variant])
        pool.run(train_on_rank, 1, "ppo", given)
        return given

    return trained


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_every_layout_learns_the_same(
    variant: str, name: str, of_one_process: Callable[[str], Settings], files: Path, tmp_path: Path
) -> None:
    """Replies, their scores, losses, gradient norms, and the weights of policy and critic."""
    plain, (world_size, layout) = of_one_process(variant), LAYOUTS[name]
    given = given_settings(files, tmp_path / "run", **with_layout(VARIANTS[variant], layout))
    pool.run(train_on_rank, world_size, "ppo", given)
    for line, expected in zip(said(given), said(plain), strict=True):
        assert_same_numbers(line, expected, relative=2e-4, absolute=1e-5)
    assert [e["reply"] for e in examples(given)] == [e["reply"] for e in examples(plain)]
    for folder in ("", "critic") if variant != "grpo" else ("",):
        assert_same_tensors(weights(given, folder), weights(plain, folder))


def test_examples_and_metrics_say_how_replies_differ(files: Path, tmp_path: Path) -> None:
    """Of groups of replies to a prompt: what each reward gave, how far they are apart, and what is learned of it."""
    rewards = [
        {"function": f"{files}/rewards.py:{name}"} for name in ("share_of_e", "talkative", "as_the_first")
    ]
    given = given_settings(
        files,
        tmp_path / "run",
        ppo={"rewards": rewards[:2], **GROUPS, "missing_end_penalty": 0.0, "scale_scores": False},
        generate={"num_replies": 3},
        train={"steps": 1, "eval_every": None},
    )
    pool.run(train_on_rank, 2, "ppo", given)
    found, (line,) = examples(given), metrics(given)
    assert [each["group"] for each in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len({each["prompt"] for each in found}) == 4
    for each in found:
        assert each["columns"] == {"want": answer(question_number(each["prompt"]))}
        assert each["rewards"].keys() == {"share_of_e", "talkative"}
        assert each["rewards"]["talkative"] == len(each["reply"]) and isinstance(each["ended"], bool)
        assert each["score"] == pytest.approx(sum(each["rewards"].values()), abs=2e-4)
    for first, second in zip(found[::2], found[1::2], strict=True):
        gained, better = (first[key] - second[key] for key in ("advantage", "score"))
        assert gained * better > 0 or gained == better == 0
    assert line["rewards/talkative/mean"] > 0 < line["rewards/talkative/std"] < line["reward_std"] + 1
    assert 0 <= line["frac_reward_zero_std"] < 1
    given["ppo"]["rewards"], given["run"] = rewards[2:], {**given["run"], "dir": str(tmp_path / "alike")}
    pool.run(train_on_rank, 1, "ppo", given)
    (line,) = metrics(given)
    assert (line["frac_reward_zero_std"], line["reward_std"] > 0) == (1.0, True)
    assert {each["advantage"] for each in examples(given)} == {0.0}


def question_number(text: str) -> int:
    return next(i for i in range(11) if question(i) == text)


def test_a_resumed_run_is_the_unbroken_one(files: Path, tmp_path: Path) -> None:
    """Bit for bit: weights, average, critic, the KL's coefficient, the scores so far, what is drawn."""
    changes: dict[str, Any] = {"ppo": {"ema": 0.9}, "train": {"steps": 4}}
    unbroken = given_settings(files, tmp_path / "unbroken", **changes)
    pool.run(train_on_rank, 2, "ppo", unbroken)
    broken = given_settings(files, tmp_path / "broken", **changes)
    broken["train"]["stop_after"] = 2
    pool.run(train_on_rank, 2, "ppo", broken)
    del broken["train"]["stop_after"]
    pool.run(train_on_rank, 2, "ppo", broken)
    assert said(broken) == said(unbroken) and examples(broken) == examples(unbroken)
    for folder in ("", "critic"):
        ours, theirs = weights(broken, folder, 4), weights(unbroken, folder, 4)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    averages = [tmp_path / f"{name}-average" for name in ("broken", "unbroken")]
    for given, exported in zip((broken, unbroken), averages, strict=True):
        export(Path(given["run"]["dir"]) / "checkpoints" / "step-00000004", exported, average=True)
    ours, theirs = (load_file(exported / "model.safetensors") for exported in averages)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for given in (broken, unbroken):
        given["state"] = json.loads(
            (Path(given["run"]["dir"]) / "checkpoints/step-00000004/state.json").read_text()
        )
    assert broken["state"] == unbroken["state"] and broken["state"]["kl_coefficient"] != 0.05


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        (2, {"zero": {"stage": 3}}),
        pytest.param(
            4,
            {"zero": {"stage": 1}, "parallel": {"pipeline": 2}, "precision": {"compute": "bf16"}},
            marks=pytest.mark.all_layouts,
        ),
    ],
    ids=["one process", "sharded", "narrow"],
)
def test_a_critic_with_adapters_is_asked_for_the_reward_model_it_started_from(
    world_size: int, layout: dict[str, Any], files: Path, tmp_path: Path
) -> None:
    """And says what a reward model of its own would, bit for bit, in a run that goes on as well."""
    shutil.copytree(files / "reward", tmp_path / "another" / "reward")
    runs = []
    for name, reward in (("shared", files / "reward"), ("apart", tmp_path / "another" / "reward")):
        ppo = {"rewards": [{"model": str(reward)}], "critic": str(files / "reward")}
        changes: dict[str, Any] = {"lora": {"rank": 3}, "ppo": ppo, **layout}
        given = given_settings(files, tmp_path / name, **changes)
        models = pool.run(models_on_rank, world_size, given)
        assert models[0] == {"shared": 2, "apart": 3}[name]
        for stop_after in (1, None):
            given["train"] = {"steps": 2, "eval_every": 2, "stop_after": stop_after}
            pool.run(train_on_rank, world_size, "ppo", given)
        runs.append(given)
    shared, apart = runs
    assert said(shared) == said(apart) and examples(shared) == examples(apart)
    ours, theirs = weights(shared, "critic"), weights(apart, "critic")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    first = load_file(files / "reward" / "model.safetensors")["score.weight"]
    assert not torch.equal(ours["base_model.model.score.weight"], first), "the critic's head is trained"


def validation_names_on_rank(given: Settings) -> list[str]:
    return sorted(opened_task("ppo", given).validation_names)


def models_on_rank(given: Settings) -> int:
    """That a run has in memory."""
    task = opened_task("ppo", given)
    learner = task.learner(Mesh(pipeline=task.config.parallel.pipeline))
    return len({learner.policy, learner.critic, learner.reference.model, *learner.rewards.models})


def test_adapters_that_go_on_leave_what_they_were(files: Path, tmp_path: Path) -> None:
    """The reference is the policy as it started, in a run that is resumed as well."""
    adapted = given_settings(files, tmp_path / "adapted", lora={"rank": 3})
    pool.run(train_on_rank, 1, "ppo", adapted)
    lora = {"path": str(tmp_path / "adapted" / "checkpoints" / "step-00000002")}
    whole, broken = (given_settings(files, tmp_path / name, lora=lora) for name in ("whole", "broken"))
    pool.run(train_on_rank, 1, "ppo", whole)
    for stop_after in (1, None):
        broken["train"]["stop_after"] = stop_after
        pool.run(train_on_rank, 2, "ppo", broken)
    first, second = said(whole)
    assert abs(first["objective/kl"]) <= ROUNDING * first["objective/entropy"]
    assert abs(second["objective/kl"]) > ROUNDING * second["objective/entropy"]
    for line, expected in zip(said(broken), said(whole), strict=True):
        assert_same_numbers(line, expected, relative=2e-4, absolute=1e-5)


def test_an_evaluation_says_what_the_run_said_last(files: Path, tmp_path: Path) -> None:
    for name, changes in (("all", {}), ("adapters", {"lora": {"rank": 3}})):
        given = given_settings(files, tmp_path / name, **changes)
        ended = command("ppo", given)
        assert ended.code == 0 and "peak, update of the critic" in ended.stdout, "memory is planned first"
        validated = [k.removeprefix("valid_") for k in metrics(given)[-1] if k.startswith("valid_")]
        assert pool.run(validation_names_on_rank, 1, given) == [sorted(validated)]
        last = {k.removeprefix("valid_"): v for k, v in metrics(given)[-1].items() if k.startswith("valid_")}
        source, numbers, counted = evaluated(command("eval", given))
        assert source.endswith("step-00000002") and counted == "5 prompts"
        assert_same_numbers(numbers, last, absolute=1e-4)


def test_the_average_of_the_weights_is_a_model(files: Path, tmp_path: Path) -> None:
    """From the first weights on, each update takes it a little towards where they are; under any layout."""
    averages = []
    for name, world_size, layout in (
        ("one", 1, {}),
        ("two", 2, {"zero": {"stage": 2}, "parallel": {"tensor": 1}}),
    ):
        changes: dict[str, Any] = {"ppo": {"ema": 0.25, "epochs": 1, "minibatches": 1}, **layout}
        given = given_settings(files, tmp_path / name, train={"steps": 2}, checkpoint={"every": 1}, **changes)
        pool.run(train_on_rank, world_size, "ppo", given)
        checkpoint = Path(given["run"]["dir"]) / "checkpoints" / "step-00000002"
        exported = tmp_path / f"{name}-average"
        export(checkpoint, exported, average=True)
        averages.append(load_file(exported / "model.safetensors"))
        first = load_file(files / "model" / "model.safetensors")
        after = [weights(given, "", step) for step in (1, 2)]
        for key, found in averages[-1].items():
            expected = 0.25 * (0.25 * first[key] + 0.75 * after[0][key]) + 0.75 * after[1][key]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert (exported / "config.json").is_file() and (exported / "tokenizer.json").is_file()
    assert_same_tensors(averages[1], averages[0])
    with pytest.raises(InputError, match="neither a checkpoint"):
        export(files / "model", tmp_path / "nothing", average=True)


def test_weights_that_write_something_else_end_the_run(files: Path, tmp_path: Path) -> None:
    ended = command("ppo", given_settings(files, tmp_path / "run", ppo={"log_probability_gate": 1e-12}))
    assert ended.code == 3 and "above ppo.log_probability_gate 1e-12" in ended.stderr


def test_updates_stop_where_the_policy_has_gone_far_enough(files: Path, tmp_path: Path) -> None:
    given = given_settings(
        files, tmp_path / "run", ppo={"stop_kl": 1e-9}, train={"steps": 1, "eval_every": None}
    )
    pool.run(train_on_rank, 1, "ppo", given)
    assert metrics(given)[0]["updates"] == 2, "the first has not moved yet"


def centered_on_rank(given: Settings, path: str) -> tuple[float, float]:
    """The mean score of a file's replies, and of what was subtracted from each."""
    task = opened_task("ppo", given)
    learner = task.learner(Mesh(task.config.parallel.tensor))
    learner.prepare()
    samples, _ = read_samples(path, "conversation", task.tokenizer.template, task.config.data)
    (offset,), (model,) = learner.rewards.offsets, learner.rewards.models
    scores = score_sequences(model, [samples[i] for i in range(len(samples))]) - offset
    return scores.mean().item(), offset


def test_replies_that_a_reward_is_centered_on_score_nothing_on_average(files: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "conversations.jsonl", conversations(7))
    source = {"model": str(files / "reward"), "centered_on": path}
    found = []
    for tensor, zero in ((1, 0), (2, 0), (1, 3)):
        layout = {"parallel": {"tensor": tensor}, "zero": {"stage": zero}}
        given = given_settings(files, tmp_path / "run", ppo={"rewards": [source]}, **layout)
        found += pool.run(centered_on_rank, 1 if tensor == 1 and not zero else 2, given, path)
    for mean, offset in found:
        assert mean == pytest.approx(0, abs=1e-5) and abs(offset) > 0.01
        assert offset == pytest.approx(found[0][1], rel=1e-4)


@pytest.mark.slow
def test_the_reward_rises(files: Path, tmp_path: Path) -> None:
    rewards = [{"function": f"{files}/rewards.py:share_of_e"}]
    given = given_settings(
        files,
        tmp_path / "run",
        ppo={
            "rewards": rewards,
            "kl_target": None,
            "kl_horizon": 10000.0,
            "scale_scores": False,
            "kl_coefficient": 0.0,
        }
        | {"missing_end_penalty": 0.0, "minibatches": 1, "epochs": 4, "critic": str(files / "model")},
        train={"steps": 24, "eval_every": None},
        optim={"lr": 1e-2, "schedule": "constant"},
        batch={"global": 16, "micro": 16},
    )
    pool.run(train_on_rank, 1, "ppo", given)
    scores = [line["objective/scores"] for line in metrics(given)]
    assert sum(scores[-3:]) / 3 > 0.2 > 0.1 > sum(scores[:3]) / 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("broken", ["ZeroDivisionError", "rewards.py line 8", "prompts.jsonl line", "the reply"]),
        ("slow", ["took more than 1 s for 8 replies"]),
        ("too_few", ["number of scores: 7, of replies: 8"]),
        ("nothing_finite", ["a score of nan"]),
        ("leaving", ["its process ended with code 7"]),
        ("absent", ["has no function 'absent'", "share_of_e"]),
    ],
)
def test_a_function_that_fails_ends_the_run_with_what_it_said(
    name: str, expected: list[str], files: Path, tmp_path: Path
) -> None:
    source = {"function": f"{files}/rewards.py:{name}", "time_limit": 1.0}
    given = given_settings(files, tmp_path / "run", ppo={"rewards": [source]})
    ended = command("ppo", given)
    line = ended.stderr.splitlines()[-1]
    assert ended.code == 2 and line.startswith("llm3d: ppo.rewards[0].function: ")
    for words in expected:
        assert words in line
