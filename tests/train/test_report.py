"""What a run says, and what of an earlier run's metrics it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm3d.errors import TrainingAborted
from llm3d.train.report import METRICS, Report, memory_gib, rounded


def metrics(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 2.0 / step,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "tokens_per_s": 1234.5,
        "mfu": None,
    }


def written(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]


def report(run_dir: Path, start_step: int = 0, speaks: bool = True, tensorboard: bool = False) -> Report:
    return Report(run_dir, start_step, 10, speaks, tensorboard)


def test_a_step_is_an_object_a_line(tmp_path: Path) -> None:
    with report(tmp_path) as run:
        for step in (1, 2, 3):
            run.step(metrics(step), log=step != 2)
            assert written(tmp_path)[-1]["step"] == (step if step != 2 else 1), (
                "at once, not when the run ends"
            )
    assert written(tmp_path) == [metrics(1), metrics(3)]


def test_a_run_that_goes_on_forgets_the_steps_that_it_does_again(tmp_path: Path) -> None:
    with report(tmp_path) as run:
        for step in range(1, 6):
            run.step(metrics(step), log=True)
    with report(tmp_path, start_step=3) as run:
        assert written(tmp_path) == [metrics(step) for step in (1, 2, 3)]
        run.step(metrics(4), log=True)
    assert [line["step"] for line in written(tmp_path)] == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 400), st.integers(0, 4))
def test_a_line_that_was_cut_off_is_dropped_wherever_it_was_cut(
    tmp_path_factory: pytest.TempPathFactory, cut: int, start_step: int
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    lines = [json.dumps(metrics(step)) + "\n" for step in range(1, 5)]
    whole = "".join(lines)
    text = whole[: min(cut, len(whole))]
    (run_dir / METRICS).write_text(text)
    with report(run_dir, start_step):
        pass
    # The line end alone may be missing.
    survivors = sum(1 for i in range(1, 5) if len(text) >= len("".join(lines[:i])) - 1)
    assert written(run_dir) == [metrics(step) for step in range(1, min(survivors, start_step) + 1)]


def test_other_ranks_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with report(tmp_path, speaks=False, tensorboard=True) as run:
        run.say("hello")
        run.step(metrics(1), log=True)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_lines_are_said_as_they_are_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 100.0 + 4 * 700])
    monkeypatch.setattr("llm3d.train.report.time", SimpleNamespace(monotonic=lambda: next(clock)))
    with report(tmp_path) as run:
        run.say("weights from [red]runs/x[/red] :smile: " + "far " * 100)
        run.step(metrics(4), log=True)
        run.step(metrics(5), log=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "weights from [red]runs/x[/red] :smile: " + "far " * 100,
        "step 4/10  loss 0.5000  1,234 tokens/s  lr 1.00e-03  grad norm 1.500  1:10:00 left",
    ]


@pytest.mark.parametrize(("value", "said"), [(-1e-9, "0.0000"), (-0.00004, "0.0000"), (-1.5, "-1.5000")])
def test_a_zero_has_no_minus(value: float, said: str) -> None:
    assert rounded(value) == said


def test_tensorboard_holds_the_numbers_of_each_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with report(tmp_path, tensorboard=True) as run:
        for step in (1, 2):
            run.step(metrics(step), log=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "grad_norm", "tokens_per_s"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (2, 1.0)]


def test_metrics_that_cannot_be_written_end_the_run(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("the system has no /dev/full")
    run = report(tmp_path)
    run._metrics.close()
    run._metrics = full.open("a")
    with pytest.raises(TrainingAborted, match="/dev/full: No space left on device"):
        run.step(metrics(1), log=True)


def test_memory_is_that_of_this_process() -> None:
    assert 0.01 < memory_gib("cpu") < 1000
