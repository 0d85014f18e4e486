"""PEFT as the oracle: adapters that either wrote give the same logits and rewards in the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm3d.config import STAGES, LoRASettings, make_config
from llm3d.errors import InputError
from tests import pool
from tests.closeness import assert_same_logits
from tests.models.adapted import by_transformers, said_on_rank, trained_and_said_on_rank
from tests.stages.common import Settings
from tests.stages.post_training import comparisons, conversations, settings, write_model, write_rows

peft = pytest.importorskip("peft")

IDS = [[5, 60, 7, 200, 8, 9, 10], [281, 3, 3, 77, 150], [280, 12]]
PADDING = 280
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"rank": 3, "targets": ALL},
    "rslora": {"rank": 4, "alpha": 5, "rslora": True, "targets": ["v_proj", "q_proj"]},
    "mlp": {"rank": 5, "alpha": 1, "targets": ["gate_proj", "down_proj"]},
    "outputs": {"rank": 2, "rslora": True, "targets": ["o_proj", "up_proj", "k_proj"]},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tensor": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "pipeline": (4, {"parallel": {"tensor": 2, "pipeline": 2}}),
    "zero": (2, {"zero": {"stage": 3}}),
}
CASES = [
    ("all", "one process", False),
    ("all", "pipeline", True),
    ("rslora", "tensor", False),
    ("mlp", "zero", True),
    ("outputs", "pipeline", False),
    ("outputs", "one process", True),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A model whose embeddings are not tied to its head, and one whose are."""
    directory = tmp_path_factory.mktemp("bases")
    return {
        tied: write_model(directory / str(tied), seed=2, tie_word_embeddings=tied) for tied in (False, True)
    }


def given_settings(stage: str, base: Path, directory: Path, lora: dict[str, Any], **layout: Any) -> Settings:
    rows = conversations(8) if stage == "sft" else comparisons(8)
    train = write_rows(directory / f"{stage}.jsonl", rows)
    return settings(base, train, directory / "run", lora=lora, **layout)


def language_model(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


def scorer(base: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=PADDING)


@pytest.mark.parametrize(("adapter", "layout", "tied"), CASES)
def test_peft_reads_what_any_layout_trained(
    adapter: str, layout: str, tied: bool, bases: dict[bool, Path], tmp_path: Path
) -> None:
    world_size, changes = LAYOUTS[layout]
    given = given_settings("sft", bases[tied], tmp_path, ADAPTERS[adapter], **changes)
    ours = pool.run(trained_and_said_on_rank, world_size, "sft", given, IDS)[-1]
    base = language_model(bases[tied])
    before = by_transformers(base, IDS)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "run/checkpoints/step-00000002/adapter")
    expected = by_transformers(model, IDS)
    assert_same_logits(ours, expected)
    assert (ours - before).abs().max() > 1e-2, "training has changed something"


@pytest.mark.parametrize(("adapter", "layout", "tied"), CASES)
def test_what_peft_wrote_is_read_under_any_layout(
    adapter: str, layout: str, tied: bool, bases: dict[bool, Path], tmp_path: Path
) -> None:
    lora = ADAPTERS[adapter]
    torch.manual_seed(6)
    how = peft.LoraConfig(
        r=lora["rank"],
        lora_alpha=lora.get("alpha", 7),
        use_rslora=lora.get("rslora", False),
        target_modules=lora["targets"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(language_model(bases[tied]), how).eval()
    expected = by_transformers(model, IDS)
    model.save_pretrained(tmp_path / "theirs")
    world_size, changes = LAYOUTS[layout]
    given = given_settings("sft", bases[tied], tmp_path, {"path": str(tmp_path / "theirs")}, **changes)
    ours = pool.run(said_on_rank, world_size, "sft", given, IDS)[-1]
    assert_same_logits(ours, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reward_models_adapter_carries_its_score_head(
    layout: str, bases: dict[bool, Path], tmp_path: Path
) -> None:
    world_size, changes = LAYOUTS[layout]
    given = given_settings("reward", bases[False], tmp_path, {"rank": 3}, **changes)
    ours = pool.run(trained_and_said_on_rank, world_size, "reward", given, IDS)[-1]
    adapter = tmp_path / "run/checkpoints/step-00000002/adapter"
    model = peft.PeftModel.from_pretrained(scorer(bases[False]), adapter)
    width = max(map(len, IDS))
    padded = torch.tensor([[*ids, *[PADDING] * (width - len(ids))] for ids in IDS])
    with torch.no_grad():
        expected = model(padded).logits[:, 0]
    assert_same_logits(ours, expected)
    again = given_settings("reward", bases[False], tmp_path, {"path": str(adapter.parent)}, **changes)
    torch.testing.assert_close(pool.run(said_on_rank, world_size, "reward", again, IDS)[-1], ours)


def test_a_score_head_that_peft_wrote_is_read(bases: dict[bool, Path], tmp_path: Path) -> None:
    torch.manual_seed(7)
    how = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        init_lora_weights=False,
        task_type="SEQ_CLS",
        modules_to_save=["score"],
    )
    model = peft.get_peft_model(scorer(bases[True]), how).eval()
    with torch.no_grad():
        expected = torch.stack([model(torch.tensor([ids])).logits[0, 0] for ids in IDS])
    model.save_pretrained(tmp_path / "theirs")
    given = given_settings("reward", bases[True], tmp_path, {"path": str(tmp_path / "theirs")})
    ours = pool.run(said_on_rank, 1, "reward", given, IDS)[-1]
    assert_same_logits(ours, expected)


# ---- adapters that cannot be used ----


@pytest.fixture
def written(bases: dict[bool, Path], tmp_path: Path) -> tuple[Path, Settings]:
    """A PEFT directory, and settings that start from it."""
    how = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(language_model(bases[False]), how).save_pretrained(tmp_path / "theirs")
    lora = {"path": str(tmp_path / "theirs")}
    return tmp_path / "theirs", given_settings("sft", bases[False], tmp_path, lora)


def refusal_on_rank(given: Settings) -> str:
    with pytest.raises(InputError) as refused:
        said_on_rank("sft", given, IDS)
    return str(refused.value)


def refusal(given: Settings) -> str:
    first, second = pool.run(refusal_on_rank, 2, {**given, "parallel": {"tensor": 2}})
    assert first == second and "\n" not in first
    return first


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 3}, "lora.rank: 3 is not what lora.path has, 2"),
        ({"alpha": 9}, "lora.alpha: 9 is not what lora.path has, 4"),
        ({"targets": ["q_proj"]}, "lora.targets: "),
        ({"rslora": True}, "lora.rslora: true is not what lora.path has, false"),
    ],
)
def test_settings_that_are_not_the_adapters_are_refused(
    lora: dict[str, Any], message: str, written: tuple[Path, Settings]
) -> None:
    _, given = written
    with pytest.raises(InputError) as refused:
        make_config({**given, "lora": given["lora"] | lora}, 1, STAGES["sft"])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_an_adapter_of_another_base_is_refused(written: tuple[Path, Settings], tmp_path: Path) -> None:
    directory, given = written
    shallow = write_model(tmp_path / "shallow", num_hidden_layers=2)
    assert "has for the model no use for its tensor model.layers.2." in refusal(
        {**given, "model": {"path": str(shallow)}}
    )
    deep = write_model(tmp_path / "deep", num_hidden_layers=5)
    assert "holds no tensor model.layers.4." in refusal({**given, "model": {"path": str(deep)}})
    wide = write_model(tmp_path / "wide", hidden_size=32)
    assert "has shape [2, 24], but the model's settings make it [2, 32]" in refusal(
        {**given, "model": {"path": str(wide)}}
    )
    edit(directory / "adapter_config.json", r=3)
    assert "has shape [2, 24], but the model's settings make it [3, 24]" in refusal(given)


def test_a_directory_that_holds_no_whole_adapter_is_refused(written: tuple[Path, Settings]) -> None:
    directory, given = written
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if "layers.1" not in name}, weights)
    assert "holds no tensor model.layers.1." in refusal(given)
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "adapter_model.safetensors" in refusal(given) and "damaged" in refusal(given)
    weights.rename(directory / "adapter_model.bin")
    assert "adapter_model.safetensors: missing; of a pickled adapter_model.bin" in refusal(given)
    for content, message in (("{", "is not JSON"), ("[]", "does not hold"), (None, "no such file")):
        config.write_text(content) if content else config.unlink()
        with pytest.raises(InputError) as refused:
            make_config(given, 1, STAGES["sft"])
        assert "lora.path: " in str(refused.value) and message in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"task_type": "TOKEN_CLS"}, "task_type 'TOKEN_CLS'"),
        ({"bias": "all"}, "bias 'all'"),
        ({"use_dora": True}, "use_dora true"),
        ({"lora_bias": True}, "lora_bias true"),
        ({"use_qalora": True}, "use_qalora true"),
        ({"layer_replication": [[0, 4]]}, "layer_replication [[0, 4]]"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices [1]"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"a_setting_of_tomorrow": 0.5}, "a_setting_of_tomorrow 0.5"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 8}}, "alpha_pattern"),
        ({"alpha_pattern": {"(": 8}}, "cannot be read"),
        ({"layers_to_transform": [0]}, "layers_to_transform [0] leaves out model.layers.1."),
        ({"modules_to_save": ["score", "embed_tokens"]}, "modules_to_save"),
        ({"target_modules": ["lm_head"]}, "target_modules ['lm_head'] leaves out"),
        ({"target_modules": ["q_proj", "k_proj"]}, "leaves out model.layers.0.self_attn.v_proj"),
        ({"exclude_modules": ["v_proj"]}, "exclude_modules"),
        ({"r": "two"}, "lora.rank"),
    ],
    ids=str,
)
def test_what_adapters_here_do_not_have_is_refused_by_name(
    changes: dict[str, Any], said: str, written: tuple[Path, Settings]
) -> None:
    directory, given = written
    edit(directory / "adapter_config.json", **changes)
    with pytest.raises(InputError) as refused:
        make_config(given, 1, STAGES["sft"])
    assert "lora." in str(refused.value) and "\n" not in str(refused.value)
    assert said in str(refused.value).replace('"', "'")


def written_by_peft(base: Path, directory: Path, **how: Any) -> LoRASettings:
    """What the settings know of adapters that PEFT wrote, asked for in its own ways."""
    config = peft.LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **how)
    peft.get_peft_model(language_model(base), config).save_pretrained(directory)
    given = given_settings("sft", base, directory.parent, {"path": str(directory)})
    return make_config(given, 1, STAGES["sft"]).lora


@pytest.mark.parametrize(
    ("how", "targets"),
    [
        ({"target_modules": "all-linear"}, ALL),
        ({"target_modules": r".*\.(q_proj|v_proj)"}, ["q_proj", "v_proj"]),
        ({"target_modules": ["self_attn.q_proj", "down_proj"]}, ["q_proj", "down_proj"]),
        ({"target_modules": None}, ["q_proj", "v_proj"]),
        ({"target_modules": "all-linear", "exclude_modules": ["o_proj"]}, [p for p in ALL if p != "o_proj"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 1, 2, 3]}, ["q_proj"]),
        ({"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}, ["q_proj"]),
        ({"target_modules": ["q_proj"], "fan_in_fan_out": True}, ["q_proj"]),
    ],
    ids=str,
)
def test_targets_are_what_the_tensors_say_however_they_are_spelled(
    how: dict[str, Any], targets: list[str], bases: dict[bool, Path], tmp_path: Path
) -> None:
    found = written_by_peft(bases[False], tmp_path / "theirs", **how)
    assert (sorted(found.targets), found.rank, found.alpha) == (sorted(targets), 2, 6)


def test_patterns_that_give_all_modules_the_same_are_read_as_peft_reads_them(
    bases: dict[bool, Path], tmp_path: Path
) -> None:
    patterns = {"rank_pattern": {"q_proj": 3, "v_.*": 3}, "alpha_pattern": {r".*self_attn\..*": 5}}
    found = written_by_peft(
        bases[False], tmp_path / "theirs", target_modules=["q_proj", "v_proj"], **patterns
    )
    assert (found.rank, found.alpha) == (3, 5)


def test_layers_that_differ_are_refused(bases: dict[bool, Path], tmp_path: Path) -> None:
    pattern = r".*layers\.[01]\..*(q_proj|v_proj)|.*layers\.[23]\..*q_proj"
    with pytest.raises(InputError, match="layer 2 has adapters of q_proj, layer 0 of q_proj, v_proj"):
        written_by_peft(bases[False], tmp_path / "theirs", target_modules=pattern)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight", "has for the model no use"),
        ("base_model.model.model.embed_tokens.weight", "has for the model no use"),
        ("base_model.model.score.weight", "adapters of a reward model"),
        ("base_model.model.model.layers.x.self_attn.q_proj.lora_A.weight", "has for the model no use"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "is not named as PEFT names it"),
    ],
)
def test_no_tensor_of_an_adapter_is_left_out(name: str, said: str, written: tuple[Path, Settings]) -> None:
    directory, given = written
    tensors = load_file(directory / "adapter_model.safetensors")
    save_file(tensors | {name: torch.zeros(2, 24)}, directory / "adapter_model.safetensors")
    assert said in refusal(given)
