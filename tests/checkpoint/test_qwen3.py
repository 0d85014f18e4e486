"""A Qwen3 with adapters and as a reward model, in llm3d and in PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch

from llm3d.config import ModelConfig, model_at
from llm3d.config.families import ARCHITECTURES
from llm3d.errors import InputError
from llm3d.models.build import FAMILIES
from tests import pool
from tests.checkpoint.test_peft import IDS, LAYOUTS, PADDING, given_settings, language_model, scorer
from tests.closeness import assert_same_logits
from tests.models.adapted import by_transformers, said_on_rank, trained_and_said_on_rank
from tests.stages.post_training import write_model

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "qwen3", seed=2, model_type="qwen3", head_dim=12)


@pytest.mark.parametrize("layout", ["one process", "tensor"])
def test_peft_reads_adapters_of_a_qwen3(layout: str, base: Path, tmp_path: Path) -> None:
    world_size, changes = LAYOUTS[layout]
    given = given_settings("sft", base, tmp_path, {"rank": 3}, **changes)
    ours = pool.run(trained_and_said_on_rank, world_size, "sft", given, IDS)[-1]
    adapter = tmp_path / "run/checkpoints/step-00000002/adapter"
    assert_same_logits(
        ours, by_transformers(peft.PeftModel.from_pretrained(language_model(base), adapter), IDS)
    )
    again = given_settings("sft", base, tmp_path, {"path": str(adapter.parent)}, **changes)
    torch.testing.assert_close(pool.run(said_on_rank, world_size, "sft", again, IDS)[-1], ours)


def test_a_reward_model_is_a_qwen3_for_sequence_classification(base: Path, tmp_path: Path) -> None:
    given = given_settings("reward", base, tmp_path, {"rank": 0}, parallel={"tensor": 2})
    ours = pool.run(trained_and_said_on_rank, 2, "reward", given, IDS)[-1]
    model = scorer(tmp_path / "run/checkpoints/step-00000002/model")
    assert type(model).__name__ == "Qwen3ForSequenceClassification"
    width = max(map(len, IDS))
    padded = torch.tensor([[*ids, *[PADDING] * (width - len(ids))] for ids in IDS])
    with torch.no_grad():
        assert_same_logits(ours, model(padded).logits[:, 0])


QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def read(directory: Path, **changes: object) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(QWEN3_8B | changes))
    return model_at(str(directory))


def test_each_family_is_a_setting_and_has_layers() -> None:
    settings = get_args(ModelConfig.model_fields["model_type"].annotation)
    assert set(settings) == set(ARCHITECTURES) == set(FAMILIES)


def test_the_published_settings_are_read(tmp_path: Path) -> None:
    model = read(tmp_path)
    assert model.num_parameters() == 8_190_735_360
    assert read(tmp_path, layer_types=["full_attention"] * 36, sliding_window=4096) == model


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_sliding_window": True, "sliding_window": 9}, "use_sliding_window true is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"attention_bias": True}, "attention_bias true is not supported"),
        ({"mlp_bias": True}, "mlp_bias true is not known here"),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        read(tmp_path, **changes)
