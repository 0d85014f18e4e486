"""What the models of reinforcement learning take stays under what is said beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llm3d.checkpoint.starting import load_first_weights
from llm3d.config import PPOConfig, make_config
from llm3d.config.uses import config_for_plan
from llm3d.errors import InputError
from llm3d.generate import engine
from llm3d.parallel.mesh import Mesh
from llm3d.plan.phases import MemoryByPhase, phases_of_stages
from llm3d.rl.models import planned_settings
from llm3d.stages.ppo import open_stage
from llm3d.stages.stage import stage_of
from llm3d.train.trainer import ShardedModel, Trainer
from tests import pool
from tests.plan.live import live_bytes
from tests.stages.common import Settings
from tests.stages.post_training import settings, write_model, write_reward_model, write_rows

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "max_position_embeddings": 256}
SLACK = 2**20  # bytes of activations, and of the replies' own tables
Kept = dict[str, dict[str, int]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("phases")
    model = write_model(directory / "model", **SHAPE)
    write_reward_model(directory / "reward", model)
    write_rows(
        directory / "prompts.jsonl", [{"prompt": "a long question, " * 12 + str(i)} for i in range(16)]
    )
    return directory


def given_settings(files: Path, **changes: Any) -> Settings:
    given = settings(files / "model", str(files / "prompts.jsonl"), files / "run", **changes)
    given["data"]["sequence_length"] = 256
    given["batch"] = {"global": 16, "micro": 4}
    given["generate"] = {"max_new_tokens": 24, "max_sequences": 8}
    given["ppo"] = {"rewards": [{"model": str(files / "reward")}], **changes.get("ppo", {})}
    return given


def measured_on_rank(given: Settings, world_size: int) -> tuple[Kept, int]:
    """Bytes that each model keeps, by kind; and what all tensors take while replies are written, at most."""
    config = make_config(given, world_size, PPOConfig)
    task = open_stage(config)
    before = live_bytes()
    learner = task.learner(Mesh(config.parallel.tensor, config.parallel.pipeline))
    learner.prepare()
    load_first_weights(learner.policy)
    prompts = task.data.microbatches(1, learner.mesh)
    learner.step(prompts, 1e-4)
    peaks: list[int] = []
    choose = engine.choose

    def seen(*args: Any) -> Any:
        if len(peaks) < 4:
            peaks.append(live_bytes() - before)
        return choose(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "choose", seen)
        learner.rollout.generate(prompts)
    models = {"policy": learner.policy, "critic": learner.critic, "reference": learner.reference.model}
    models |= {"reward model 0": learner.rewards.models[0]}
    return {name: kept(model) for name, model in models.items() if model is not None}, max(peaks)


def kept(model: ShardedModel) -> dict[str, int]:
    units = (*model.flat.units, *model.flat.frozen)
    found = {"parameters": sum((unit.parameters if unit.frees else unit.whole).nbytes for unit in units)}
    if isinstance(model, Trainer):
        found["gradients"] = sum(gradients.nbytes for gradients in model.flat.kept_gradients)
        found["moments"] = sum(x.nbytes for xs in model.optimizer.state.values() for x in xs)
    return found


def planned(given: Settings, world_size: int) -> list[MemoryByPhase]:
    config = make_config(given, world_size, PPOConfig)
    return phases_of_stages(stage_of(config).models(config).roles, world_size, "cpu")


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "sharded": (2, {"zero": {"stage": 3}, "ppo": {"ema": 0.9}}),
    "handed over": (2, {"parallel": {"tensor": 2}, "ppo": {"rollout_tensor": 1}}),
    "adapters": (1, {"lora": {"rank": 4}, "ppo": {"ema": 0.9}}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_there_is_what_was_planned(name: str, files: Path) -> None:
    """Of each model, and, not more than that, while replies are written: then gradients take nothing."""
    world_size, changes = LAYOUTS[name]
    given = given_settings(files, **changes)
    (stage,) = planned(given, world_size)
    for models, writing in pool.run(measured_on_rank, world_size, given, world_size):
        for role, memory in stage.trained.items():
            assert all(nearly(size, getattr(memory, part)) for part, size in models[role].items())
        assert all(nearly(models[role]["parameters"], size) for role, size in stage.frozen.items())
        limit = stage.peaks["writing"]
        assert 0.5 * limit < writing < limit + SLACK  # no reply is as long as it may be


def nearly(found: int, plan: int) -> bool:
    """The first rank has most of a vocabulary that does not divide; the others at most as much."""
    return 0.999 * plan <= found <= plan


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"rewards": [{"model": "llama-3.1-8b"}]}, []),
        (
            {"rewards": [{"model": "nowhere"}], "critic": "llama-1b"},
            ["ppo.rewards[0].model: no directory 'nowhere'; taken to be as large as the policy"],
        ),
        ({"rewards": [{"function": "x.py:score"}]}, []),
    ],
    ids=str,
)
def test_models_that_are_not_there_are_planned_by_their_shape(
    others: dict[str, Any], said: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    config = Path(__file__).parent.parent.parent / "configs" / "stages" / "ppo.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"ppo": others}))
    settings, _ = config_for_plan(path, ["model.preset=llama-3.1-8b", "parallel.tensor=8"], 8)
    assert isinstance(settings, PPOConfig)
    models, remarks = planned_settings(settings)
    assert models.critic is not None
    assert models.critic.model.hidden_size == (2048 if "critic" in others else 4096)
    assert [model and model.model.hidden_size for model in models.rewards] == [
        4096 if "model" in source else None for source in others["rewards"]
    ]
    assert remarks == said


def test_weights_that_should_be_there_are_missed(files: Path) -> None:
    given = given_settings(files, ppo={"rewards": [{"model": "nowhere"}]})
    with pytest.raises(InputError, match=r"ppo\.rewards\[0\]\.model: no directory 'nowhere'"):
        planned_settings(make_config(given, 1, PPOConfig))
