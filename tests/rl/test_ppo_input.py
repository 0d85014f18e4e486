"""What is wrong with settings and files of reinforcement learning is said in a line, before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import tokenizers

from llm3d.config import PPOConfig, make_config
from llm3d.corpus.build import tokenize_corpus
from llm3d.data.prompts import PromptData, read_prompt_set, read_prompt_sets
from llm3d.data.steps import Consumed
from llm3d.parallel.mesh import Mesh
from llm3d.text.templates import load_template
from llm3d.text.tokenizer import load_tokenizer
from tests.stages.common import MODEL, Ended, Settings, command, metrics, silent
from tests.stages.post_training import question, settings, write_model, write_reward_model, write_rows


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("input")
    model = write_model(directory / "model")
    write_reward_model(directory / "reward", model)
    write_model(directory / "other", vocab_size=300)
    write_rows(directory / "prompts.jsonl", [{"prompt": question(i), "number": i} for i in range(11)])
    (directory / "rewards.py").write_text("def score(prompts, replies):\n    return [0.0] * len(replies)\n")
    return directory


def given_settings(files: Path, **changes: Any) -> Settings:
    given = settings(files / "model", str(files / "prompts.jsonl"), files / "run", **changes)
    given["generate"] = {"max_new_tokens": 8, **changes.get("generate", {})}
    given["ppo"] = {"rewards": [{"model": str(files / "reward")}], **changes.get("ppo", {})}
    return given


# Changes of the settings; the setting or file that the message names, and a word that tells this fault from others.
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "no reward": ({"ppo": {"rewards": []}}, "ppo.rewards", ""),
    "two in one": (
        {"ppo": {"rewards": [{"model": "a", "function": "b.py:c"}]}},
        "ppo.rewards[0]",
        "function",
    ),
    "function's name": (
        {"ppo": {"rewards": [{"function": "score"}]}},
        "ppo.rewards[0].function",
        "FILE.py:NAME",
    ),
    "no file": (
        {"ppo": {"rewards": [{"function": "no.py:score"}]}},
        "ppo.rewards[0].function",
        "no.py",
    ),
    "centred function": (
        {"ppo": {"rewards": [{"function": "no.py:score", "centered_on": "x"}]}},
        "ppo.rewards[0].centered_on",
        "model",
    ),
    "no group": (
        {"ppo": {"advantages": "rloo"}},
        "generate.num_replies",
        "ppo.advantages",
    ),
    "critic": (
        {"ppo": {"advantages": "grpo", "critic": "x"}, "generate": {"num_replies": 2}},
        "ppo.critic",
        "ppo.advantages",
    ),
    "no values": (
        {"ppo": {"advantages": "grpo", "lam": 0.5}, "generate": {"num_replies": 2}},
        "ppo.lam",
        "ppo.advantages",
    ),
    "horizon": ({"ppo": {"kl_horizon": 5}}, "ppo.kl_horizon", "ppo.kl_target"),
    "turns": ({"data": {"turns": "last"}}, "data.turns", "prompts"),
    "k1 in the loss": ({"ppo": {"kl_in_loss": True}}, "ppo.kl_in_loss", "ppo.kl_estimator"),
    "minibatches": ({"ppo": {"minibatches": 5}}, "ppo.minibatches", "4"),
    "greedy": ({"generate": {"temperature": 0}}, "generate.temperature", "0"),
    "penalty": ({"generate": {"repetition_penalty": 1.1}}, "generate.repetition_penalty", ""),
    "dropout": ({"lora": {"rank": 2, "dropout": 0.1}}, "lora.dropout", "replies"),
    "no room": (
        {"generate": {"max_new_tokens": 96}},
        "generate.max_new_tokens",
        "prompt",
    ),
    "too long": ({"generate": {"max_new_tokens": 95}}, "prompts.jsonl", "no prompt"),
    "right": (
        {"data": {"truncation": "right"}},
        "data.truncation",
        "cut off",
    ),
    "rollout": ({"ppo": {"rollout_tensor": 2}}, "ppo.rollout_tensor", "parallel.tensor"),
    "ptx": ({"ppo": {"ptx_coefficient": 1.0}}, "ppo.ptx_coefficient", "ppo.ptx_data"),
    "misspelt": ({"ppo": {"kl_coeficient": 0.1}}, "ppo.kl_coeficient", "ppo.kl_coefficient"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_named(name: str, files: Path) -> None:
    changes, setting, keyword = WRONG[name]
    ended = command("ppo", given_settings(files, **changes), "--check")
    assert ended.code == 2 and setting in ended.stderr and keyword in ended.stderr
    assert not (files / "run").exists()


def test_a_language_model_does_not_score(files: Path) -> None:
    ended = command(
        "ppo", given_settings(files, ppo={"rewards": [{"model": str(files / "model")}]}), "--check"
    )
    assert ended.code == 2 and ended.stderr.startswith("llm3d: ppo.rewards[0].model: ")
    assert "has no score head" in ended.stderr


def test_a_model_with_fewer_tokens_is_refused(files: Path) -> None:
    for setting, ppo in (
        ("ppo.rewards[0].model", {}),
        (
            "ppo.critic",
            {"rewards": [{"function": f"{files}/rewards.py:score"}], "critic": str(files / "reward")},
        ),
    ):
        given = given_settings(files, model={"path": str(files / "other")}, ppo=ppo)
        ended = command("ppo", given, "--check")
        assert ended.code == 2 and f"{setting}: " in ended.stderr
        assert "291 tokens, the policy 300; it needs all of the policy's" in ended.stderr


def test_a_reward_model_may_have_tokens_of_its_own(files: Path, tmp_path: Path) -> None:
    """Many were given a token for padding, after the policy's."""
    policy = write_model(tmp_path / "policy")
    model = tokenizers.Tokenizer.from_file(str(policy / "tokenizer.json"))
    model.add_special_tokens(["[PAD]"])
    model.save(str(policy / "tokenizer.json"))
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"vocab_size": 292}))
    larger = write_reward_model(tmp_path / "larger", policy)
    given = given_settings(files, run={"dir": str(tmp_path / "run")}, train={"steps": 1})
    given["ppo"] = {"rewards": [{"model": str(larger)}]}
    ended = command("ppo", given)
    assert ended.code == 0, ended.stderr
    assert [line["step"] for line in metrics(given)] == [1]


def exchanged(directory: Path) -> None:
    """Have the tokenizer of a directory give the letters a and b each other's id."""
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def other(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many tokens, of which two mean something else: a model, a reward model, and a corpus."""
    made = tmp_path_factory.mktemp("exchanged")
    for name in ("model", "reward"):
        shutil.copytree(files / name, made / name)
        exchanged(made / name)
    (made / "text.txt").write_text("What comes after one is two, and so on.\n\n" * 90)
    with silent():
        tokenize_corpus([made / "text.txt"], made / "corpus", made / "model", separator="\n\n")
    return made


def test_token_ids_that_mean_something_else_are_refused(files: Path, other: Path) -> None:
    """In every setting that names what reads the policy's ids, or has written them."""
    rewards = [{"model": str(files / "reward")}, {"model": str(other / "reward")}]
    corpus = {"ptx_data": [str(other / "corpus")], "ptx_coefficient": 1.0}
    for setting, changes in (
        ("ppo.rewards[1].model", {"ppo": {"rewards": rewards}}),
        ("ppo.critic", {"ppo": {"critic": str(other / "model")}}),
        ("ppo.ptx_data[0]", {"ppo": corpus}),
        ("data.tokenizer", {"data": {"tokenizer": str(other / "model")}}),
    ):
        assert_token_is_named(setting, command("ppo", given_settings(files, **changes), "--check"))


def test_tokens_of_a_corpus_mean_what_they_mean_to_the_model(files: Path, other: Path) -> None:
    """Named by data.tokenizer, by the model to start from, or by another corpus."""
    with silent():
        tokenize_corpus([other / "text.txt"], files / "corpus", files / "model", separator="\n\n")
    ours, theirs = (str(directory / "corpus") for directory in (files, other))
    for setting, changes in (
        ("data.train[1]", {"data": {"train": [ours, theirs], "tokenizer": str(files / "model")}}),
        ("data.valid[0]", {"data": {"train": [ours], "valid": [theirs]}}),
        ("data.train[0]", {"data": {"train": [theirs]}, "model": {"path": str(files / "model")}}),
    ):
        given: Settings = given_settings(files) | {"model": {**MODEL, "vocab_size": 291}, **changes}
        del given["ppo"]
        given["data"] |= {"sequence_length": 16}
        assert_token_is_named(setting, command("pretrain", given, "--check"))


def assert_token_is_named(setting: str, ended: Ended) -> None:
    assert (ended.code, ended.stdout) == (2, "") and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"llm3d: {setting}: the tokenizer in ") and "'a'" in ended.stderr


def test_a_model_without_a_tokenizer_scores_nothing(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "reward", tmp_path / "reward")
    (tmp_path / "reward" / "tokenizer.json").unlink()
    ended = command(
        "ppo", given_settings(files, ppo={"rewards": [{"model": str(tmp_path / "reward")}]}), "--check"
    )
    assert ended.code == 2 and "ppo.rewards[0].model: " in ended.stderr and "has no tokenizer" in ended.stderr


def test_a_function_is_held_against_the_columns_of_all_prompts(files: Path) -> None:
    (files / "needy.py").write_text(
        "def score(prompts, replies, numbers):\n    return [0.0] * len(replies)\n"
    )
    source = {"function": f"{files}/needy.py:score"}
    ended = command("ppo", given_settings(files, ppo={"rewards": [source]}), "--check")
    assert ended.code == 2 and "there are: number, prompt; did you mean number?" in ended.stderr


def test_data_show_says_that_these_settings_are_not_its(files: Path) -> None:
    ended = command("data show", given_settings(files))
    assert ended.code == 2 and "these settings are for ppo" in ended.stderr


def test_memory_is_told_by_role_and_phase(files: Path) -> None:
    ended = command("memory", given_settings(files), "--device", "cpu")
    assert ended.code == 0
    for line in (
        "policy, gradients",
        "critic, moments",
        "reward model 0",
        "peak, writing",
        "peak, update of the critic",
    ):
        assert line in ended.stdout
    source = {"function": "not/there.py:score"}
    ended = command("memory", given_settings(files, ppo={"rewards": [source]}), "--device", "cpu")
    assert ended.code == 0 and "reward model" not in ended.stdout, "no function is started for it"


# ---- prompts ----


def data_of(files: Path, **changes: Any) -> PromptData:
    config = make_config(given_settings(files, **changes), 1, PPOConfig)
    template = load_template("auto", load_tokenizer(files / "model"))
    return PromptData(config, [read_prompt_set(str(files / "prompts.jsonl"), template, config)], [])


def test_a_step_has_the_prompts_that_its_number_gives(files: Path) -> None:
    """Each prompt once a pass, with its row; resumed, the same; numbered over the run."""
    data, anywhere = data_of(files), cast(Mesh, None)  # the prompts are the same on every rank
    first = [data.microbatches(step, anywhere) for step in range(1, 12)]
    seen = [prompt.row["number"] for step in first for prompt in step]
    assert [prompt.number for step in first for prompt in step] == list(range(44))
    for start in range(0, 44, 11):
        assert sorted(seen[start : start + 11]) == list(range(11))
    again = data_of(files)
    again.resume(5, Consumed(20, 700))
    again.record(31)
    assert again.consumed(6) == Consumed(24, 731)
    for step in range(6, 12):
        found, expected = again.microbatches(step, anywhere), first[step - 1]
        assert [(p.number, p.row) for p in found] == [(p.number, p.row) for p in expected]


def test_prompts_that_cannot_be_used_are_named_or_left_out(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text((files / "prompts.jsonl").read_text() + '{"prompt": null}\n{"prompt": 7}\n')
    given = given_settings(files)
    given["data"]["train"] = [str(path)]
    ended = command("ppo", given, "--check")
    assert ended.code == 2 and "line 12" in ended.stderr and "line 13" in ended.stderr
    config = make_config(given | {"data": {**given["data"], "skip_bad": True}}, 1, PPOConfig)
    found = read_prompt_set(str(path), load_template("auto", load_tokenizer(files / "model")), config)
    assert len(found) == 11 and str(found.counts) == "11 samples, 2 left out that cannot be used"


def test_a_share_of_the_prompts_is_held_out_for_validation(files: Path) -> None:
    config = make_config(given_settings(files, data={"valid": 0.25}), 1, PPOConfig)
    ((train,), (valid,)) = read_prompt_sets(load_template("auto", load_tokenizer(files / "model")), config)
    assert (len(train), len(valid), str(train.counts)) == (8, 3, "8 samples")
    numbers = [prompt.row["number"] for prompt in (*train.prompts, *valid.prompts)]
    assert sorted(numbers) == list(range(11)) and valid.path.endswith("held out for validation")


def test_prompts_without_room_for_a_reply_are_left_out_or_cut(files: Path) -> None:
    whole = data_of(files).train[0]
    longest = max(len(prompt.tokens) for prompt in whole.prompts)
    few = data_of(files, generate={"max_new_tokens": 96 - longest + 2}).train[0]
    assert few.counts.too_long == sum(len(prompt.tokens) > longest - 2 for prompt in whole.prompts) > 0
    assert len(few) + few.counts.too_long == len(whole) and "left out, too long" in str(few.counts)
    changes: dict[str, Any] = {
        "generate": {"max_new_tokens": 96 - longest + 2},
        "data": {"truncation": "left"},
    }
    cut = data_of(files, **changes).train[0]
    assert len(cut) == len(whole) and cut.counts.cut == few.counts.too_long
    for ours, theirs in zip(cut.prompts, whole.prompts, strict=True):
        assert (
            len(ours.tokens) <= longest - 2
            and (ours.tokens[1:] == theirs.tokens[1 - len(ours.tokens) :]).all()
        )


def test_presets_are_settings_that_load(files: Path) -> None:
    for name in ("ppo", "ppo-n-plus", "grpo"):
        path = Path(__file__).parents[2] / "configs" / "stages" / f"{name}.yaml"
        source = (
            {"model": str(files / "reward")} if name != "grpo" else {"function": f"{files}/rewards.py:score"}
        )
        overrides = {
            "model.path": files / "model",
            "data.train": json.dumps([f"{files}/prompts.jsonl"]),
            "data.sequence_length": 96,
            "generate.max_new_tokens": 8,
            "ppo.rewards": json.dumps([source]),
        }
        ended = command_on(path, *(f"{key}={value}" for key, value in overrides.items()))
        assert ended == 0


def command_on(path: Path, *overrides: str) -> int:
    from typer.testing import CliRunner

    from llm3d.cli import app

    return CliRunner().invoke(app, ["ppo", str(path), *overrides, "--check"]).exit_code
