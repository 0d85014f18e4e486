"""What a run says: metrics.jsonl, examples.jsonl, TensorBoard, a progress bar.

Rank 0 speaks; the others hold a silent report.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llm3d.errors import TrainingAborted
from llm3d.files import atomic_file

METRICS = "metrics.jsonl"
EXAMPLES = "examples.jsonl"
_SHOWN = {"loss": "loss", "objective/scores": "score", "objective/kl": "KL"}


class Report:
    """Use as a context manager. `start_step` is the last step that was already done (0 for a new run)."""

    def __init__(self, run_dir: Path, start_step: int, steps: int, speaks: bool, tensorboard: bool) -> None:
        self.speaks, self.start_step, self.steps = speaks, start_step, steps
        if not speaks:
            return
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
        self._run_dir = run_dir
        for name in (METRICS, EXAMPLES):
            _forget_after(run_dir / name, start_step)
        self._metrics = (run_dir / METRICS).open("a", encoding="utf-8")
        self._tensorboard: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=steps, completed=start_step, numbers="")

    def __enter__(self) -> Report:
        if self.speaks:
            self._progress.start()
            self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.speaks:
            self._progress.stop()
            self._metrics.close()
            if self._tensorboard is not None:
                self._tensorboard.close()

    def say(self, line: str) -> None:
        """A line for the user, above the progress bar."""
        if self.speaks:
            self.console.print(line, markup=False)

    def step(self, metrics: dict[str, Any], log: bool, examples: Sequence[dict[str, Any]] = ()) -> None:
        """Move the progress bar; with `log`, also write the step's metrics (a JSON object a line) to the files.

        examples: of what the model wrote, which go to a file of their own.
        """
        if not self.speaks:
            return
        parts = [f"{name} {rounded(metrics[key])}" for key, name in _SHOWN.items() if key in metrics]
        numbers = "  ".join([*parts, f"{metrics['tokens_per_s']:,.0f} tokens/s"])
        self._progress.update(self._task, completed=metrics["step"], numbers=numbers)
        if not log:
            return
        self._write(metrics, examples)
        if not self.console.is_terminal:
            norm = "overflow" if metrics["grad_norm"] is None else f"{metrics['grad_norm']:.3f}"
            rate = f"lr {metrics['lr']:.2e}  grad norm {norm}"
            self.say(f"step {metrics['step']}/{self.steps}  {numbers}  {rate}  {self._left(metrics['step'])}")

    def _left(self, step: int) -> str:
        """The time that the steps that are left take, if they take what those since the start took, all included."""
        each = (time.monotonic() - self._started) / (step - self.start_step)
        return f"{timedelta(seconds=round(each * (self.steps - step)))} left"

    def _write(self, metrics: dict[str, Any], examples: Sequence[dict[str, Any]]) -> None:
        step, writing = metrics["step"], self._metrics.name
        try:
            self._metrics.write(json.dumps(metrics) + "\n")
            self._metrics.flush()
            if examples:
                writing = str(self._run_dir / EXAMPLES)
                lines = [json.dumps({"step": step, **example}, ensure_ascii=False) for example in examples]
                with open(writing, "a", encoding="utf-8") as file:
                    file.write("\n".join(lines) + "\n")
        except OSError as error:
            raise TrainingAborted(f"{writing}: {error.strerror}; earlier checkpoints are whole") from None
        if self._tensorboard is not None:
            for name, value in metrics.items():
                if name != "step" and value is not None:
                    self._tensorboard.add_scalar(name, value, step)
            for i, example in enumerate(examples):
                text = "\n\n".join(f"**{name}** {value}" for name, value in example.items())
                self._tensorboard.add_text(f"examples/{i}", text, step)


def _forget_after(path: Path, step: int) -> None:
    """Drop metrics of steps that will be done again, and a last line that was cut off; by a new file, renamed."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:
            continue
        if metrics["step"] <= step:
            kept.append(line + "\n")
    with atomic_file(path) as new:
        new.write_text("".join(kept), encoding="utf-8")


def rounded(value: float) -> str:
    """For people: four digits after the point, and no minus before a zero."""
    return f"{round(value, 4) + 0.0:.4f}"


def memory_gib(device_type: str) -> float:
    """Peak memory of this process in GiB: allocated on the GPU, or resident in the host's memory."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
