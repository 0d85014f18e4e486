"""DPO's reference: the starting model, computed once whatever the layout, and again when anything about it changes; or
asked at each step.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llm3d.stages import reference
from tests import pool
from tests.closeness import assert_same_numbers
from tests.models.adapted import trained_and_said_on_rank
from tests.stages.common import Settings, command, metrics
from tests.stages.post_training import comparisons, rankings, settings, train_on_rank, write_model, write_rows

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "tensor": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "interleaved": (2, {"parallel": {"pipeline": 2, "chunks": 2, "schedule": "interleaved"}}),
    "all": (4, {"parallel": {"tensor": 2}, "zero": {"stage": 3}}),
    "all pipelined": (4, {"parallel": {"pipeline": 2}, "zero": {"stage": 2}}),
}


# The first test compares the reference under each layout. Where it is only asked for at another time, or of other
# weights, layouts in which all axes meet tell as much.
MEETING = ("one process", "all", "all pipelined")
IN_LAYOUTS = pytest.mark.parametrize(
    "layouts",
    [
        pytest.param(MEETING, id="where axes meet"),
        pytest.param(
            [name for name in LAYOUTS if name not in MEETING], id="others", marks=pytest.mark.all_layouts
        ),
    ],
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def given_settings(model: Path, directory: Path, run: str = "run", **changes: Any) -> Settings:
    """Over two files, one of pairs and one of longer lists, and a third to validate on."""
    train = write_rows(directory / "train.jsonl", comparisons(6))
    given = settings(model, train, directory / run, **changes)
    given["data"]["train"].append(write_rows(directory / "ranked.jsonl", rankings(5)))
    given["data"]["valid"] = [write_rows(directory / "valid.jsonl", comparisons(3))]
    given["batch"] = {"global": 4, "micro": 3}
    return given


def stored(given: Settings) -> dict[str, Tensor]:
    """All that is kept of the reference, by file."""
    files = Path(given["run"]["dir"]).glob("reference-*.safetensors")
    return {path.name: torch.cat([*load_file(path).values()]) for path in sorted(files)}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by an entry for each set of samples of which the reference is computed."""
    calls: list[int] = []
    compute = reference.reference_log_probabilities

    def counted(model: Any, data: Any, number: int) -> Tensor:
        calls.append(number)
        return compute(model, data, number)

    monkeypatch.setattr(reference, "reference_log_probabilities", counted)
    return calls


# ---- what it is ----


def assert_own_reference(line: dict[str, float]) -> None:
    """Of a model that is its reference the rewards are 0, but for the rounding of the log-probabilities."""
    nothing = {f"rewards/{name}": 0.0 for name in ("chosen", "rejected", "margins")}
    expected = nothing | {
        "loss": math.log(2),
        **{name: x for name, x in line.items() if name.startswith("logps/")},
    }
    assert_same_numbers({name: line[name] for name in expected}, expected)


@pytest.mark.parametrize("lora", [{}, {"rank": 3}], ids=["all weights", "adapters"])
def test_the_first_loss_is_that_of_a_model_that_is_its_reference(
    lora: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    references = {}
    for name, (world_size, layout) in LAYOUTS.items():
        given = given_settings(model, tmp_path, name, lora=lora, train={"steps": 2}, **layout)
        pool.run(train_on_rank, world_size, "dpo", given)
        first, second = metrics(given)
        assert_own_reference(first)
        assert second["loss"] != pytest.approx(math.log(2), rel=1e-4), "the model leaves its reference"
        references[name] = stored(given)
    expected = references["one process"]
    assert len(expected) == 3 and len(torch.cat([*expected.values()])) == 2 * 6 + 3 * 5 + 2 * 3
    for found in references.values():
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> dict[str, str]:
    """Settings that go on from trained adapters."""
    given = given_settings(model, tmp_path, "adapted", lora={"rank": 3})
    pool.run(trained_and_said_on_rank, 1, "dpo", given, [[1, 2]])
    return {"path": str(tmp_path / "adapted" / "checkpoints" / "step-00000002")}


def test_with_new_adapters_the_reference_is_the_model_without_them(model: Path, tmp_path: Path) -> None:
    kept = []
    for name, lora in (("plain", {}), ("adapted", {"rank": 3})):
        given = given_settings(model, tmp_path, name, lora=lora, train={"steps": 1})
        pool.run(train_on_rank, 1, "dpo", given)
        kept.append(stored(given))
    torch.testing.assert_close(*kept, rtol=0, atol=0)


@IN_LAYOUTS
@pytest.mark.parametrize("reference", ["cached", "live"])
def test_adapters_that_go_on_leave_what_they_were(
    reference: str, layouts: Sequence[str], model: Path, adapter: dict[str, str], tmp_path: Path
) -> None:
    """Each of their first losses is that of a model that is its own reference, whatever the layout."""
    for name in layouts:
        world_size, layout = LAYOUTS[name]
        changes: dict[str, Any] = {"lora": adapter, "train": {"steps": 2}, "dpo": {"reference": reference}}
        given = given_settings(model, tmp_path, name, **changes, **layout)
        pool.run(train_on_rank, world_size, "dpo", given)
        first, second = metrics(given)
        assert_own_reference(first)
        assert second["loss"] != pytest.approx(math.log(2), rel=1e-4), name


def test_without_a_reference_the_rewards_are_log_probabilities(model: Path, tmp_path: Path) -> None:
    given = given_settings(model, tmp_path, dpo={"reference": "none", "beta": 0.5}, train={"steps": 1})
    assert command("dpo", given).code == 0
    (first,) = metrics(given)
    for side in ("chosen", "rejected"):
        assert first[f"rewards/{side}"] == pytest.approx(0.5 * first[f"logps/{side}"], rel=1e-5)
    assert stored(given) == {}


# ---- asked at each step ----


def numbers(given: Settings) -> list[dict[str, float]]:
    """Of each step, what the objective says, in training and in evaluations, and the gradient's norm."""
    ours = ("loss", "grad_norm", "rewards/", "logps/", "nll_loss", "valid_")
    return [{key: line[key] for key in line if key.startswith(ours)} for line in metrics(given)]


@IN_LAYOUTS
@pytest.mark.parametrize("kind", ["all weights", "new adapters", "adapters that go on"])
def test_asked_at_each_step_it_says_what_it_would_have_said_beforehand(
    kind: str, layouts: Sequence[str], model: Path, adapter: dict[str, str], tmp_path: Path
) -> None:
    loras: dict[str, dict[str, Any]] = {
        "all weights": {},
        "new adapters": {"rank": 3, "dropout": 0.3},
        "adapters that go on": {**adapter, "dropout": 0.3},
    }
    changes = {"lora": loras[kind], "train": {"steps": 3, "eval_every": 2}}
    cached = given_settings(model, tmp_path, "cached", **changes)
    pool.run(train_on_rank, 1, "dpo", cached)
    for name in layouts:
        world_size, layout = LAYOUTS[name]
        given = given_settings(model, tmp_path, name, dpo={"reference": "live"}, **changes, **layout)
        pool.run(train_on_rank, world_size, "dpo", given)
        for line, expected in zip(numbers(given), numbers(cached), strict=True):
            assert_same_numbers(line, expected, relative=2e-5, absolute=1e-6)
        assert stored(given) == {}


@pytest.mark.parametrize("adapted", [False, True], ids=["all weights", "adapters that go on"])
def test_a_run_that_asks_goes_on_as_if_it_had_not_stopped(
    adapted: bool, model: Path, adapter: dict[str, str], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"dpo": {"reference": "live"}, "lora": adapter if adapted else {}}
    given, whole = (given_settings(model, tmp_path, name, **changes) for name in ("run", "whole"))
    assert command("dpo", given, "train.stop_after=2").code == command("dpo", given).code == 0
    assert command("dpo", whole).code == 0
    assert numbers(given) == numbers(whole)
    assert (
        command("eval", given).stdout.partition(": ")[2] == command("eval", whole).stdout.partition(": ")[2]
    )


# ---- when it is computed ----


def test_it_is_computed_once(model: Path, tmp_path: Path, computed: list[int]) -> None:
    given = given_settings(model, tmp_path)
    assert command("dpo", given, "train.stop_after=2").code == 0
    assert computed == [0, 1, 2]
    before = stored(given)
    assert command("dpo", given).code == 0
    assert computed == [0, 1, 2], "the run that goes on takes what is there"
    assert stored(given).keys() == before.keys()
    fresh = given_settings(model, tmp_path, "fresh")
    assert command("dpo", fresh).code == 0
    assert [line["loss"] for line in metrics(given)] == [line["loss"] for line in metrics(fresh)]


def test_it_is_computed_again_for_other_samples_and_for_those_alone(
    model: Path, tmp_path: Path, computed: list[int]
) -> None:
    given = given_settings(model, tmp_path)
    assert command("dpo", given, "train.stop_after=1").code == 0
    before = stored(given)
    computed.clear()
    write_rows(tmp_path / "ranked.jsonl", rankings(5)[::-1])
    assert command("dpo", given, "train.stop_after=2").code == 0
    assert computed == [1]
    assert len(stored(given).keys() - before.keys()) == 1
    computed.clear()
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # what goes on from one keeps its template
    assert command("dpo", given, "train.stop_after=3", "data.template=llama3").code == 0
    assert computed == [0, 1, 2], "another template makes other tokens"


@pytest.mark.parametrize("change", ["other weights", "another directory", "other precision", "touched"])
def test_it_is_computed_again_for_another_model(
    change: str, model: Path, tmp_path: Path, computed: list[int]
) -> None:
    given = given_settings(model, tmp_path, train={"steps": 2, "stop_after": 1})
    assert command("dpo", given).code == 0
    before = stored(given)
    computed.clear()
    given["train"] = {"steps": 2}
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # what goes on from one keeps its model
    if change == "other weights":
        other = write_model(tmp_path / "other", seed=9)
        (other / "model.safetensors").replace(model / "model.safetensors")
    elif change == "another directory":
        given["model"] = {"path": str(write_model(tmp_path / "other", seed=9))}
    elif change == "other precision":
        given["precision"] = {"compute": "bf16"}
    else:
        os.utime(model / "model.safetensors", ns=(1, 1))
    assert command("dpo", given).code == 0
    assert computed == [0, 1, 2] and len(stored(given).keys() - before.keys()) == 3
    assert not list((tmp_path / "run").glob("*.partial"))


def test_it_is_computed_again_for_other_adapters(
    model: Path, adapter: dict[str, str], tmp_path: Path, computed: list[int]
) -> None:
    given = given_settings(model, tmp_path, lora=adapter, train={"steps": 2, "stop_after": 1})
    assert command("dpo", given).code == 0
    assert command("dpo", given | {"train": {"steps": 2}}).code == 0
    assert computed == [0, 1, 2], "the run that goes on takes what is there"
    os.utime(Path(adapter["path"]) / "adapter" / "adapter_model.safetensors", ns=(1, 1))
    assert command("dpo", given | {"train": {"steps": 3}}).code == 0
    assert computed == [0, 1, 2] * 2
