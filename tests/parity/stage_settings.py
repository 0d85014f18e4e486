"""Settings of each training stage in which much of it meets, under any layout."""

from __future__ import annotations

import json
from typing import Any

from llm3d.config import STAGES, Config
from tests.parity.harness import Layout, sections

STAGE_SETTINGS: dict[str, dict[str, Any]] = {
    "sft": {"loss": {"z_loss": 0.01}, "sft": {}},
    "reward": {"reward": {"margin": True, "center": 0.1}},
    "dpo": {"dpo": {"rpo_alpha": 0.5, "rpo_mean": "token", "reference": "none"}},
    "orpo": {"orpo": {"beta": 0.7}},
    "simpo": {"simpo": {"beta": 3.0, "gamma": 0.7}},
    "kto": {"kto": {"beta": 0.3, "undesirable_weight": 1.3}},
    "sft-lora": {"loss": {}, "sft": {"neftune_alpha": 5}, "lora": {"rank": 4, "dropout": 0.2}},
    "reward-lora": {
        "reward": {},
        "lora": {"rank": 3, "alpha": 5, "targets": ["q_proj", "v_proj", "down_proj"]},
    },
    "dpo-lora": {"dpo": {"loss": "ipo", "reference": "none"}, "lora": {"rank": 4, "rslora": True}},
}


def settings(stage: str, layout: Layout) -> Config:
    given = sections(layout) | STAGE_SETTINGS[stage]
    return STAGES[stage.partition("-")[0]].model_validate_json(json.dumps(given))
