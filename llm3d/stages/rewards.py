"""What replies are worth: a reward model's score, a user's function, or their weighted sum."""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm3d.config import PPOConfig, RewardSource
from llm3d.data.chat import read_samples
from llm3d.data.templates import Template
from llm3d.errors import InputError
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.collectives import all_reduce_sum
from llm3d.parallel.mesh import Mesh
from llm3d.stages.rollout import Rollouts, of_replies
from llm3d.train.trainer import Evaluator
from llm3d.wording import counted

_SECONDS_TO_START = 120.0
Awake = Callable[[Evaluator], AbstractContextManager[None]]
_TAKEN = ("prompts", "replies")


class RewardFunction:
    """A user's function in a process of its own. Raises InputError where it cannot be loaded."""

    def __init__(self, source: RewardSource, setting: str) -> None:
        """setting: its path among the settings."""
        assert source.function is not None
        self.setting, self.named, self.time_limit = setting, source.function, source.time_limit
        path, _, name = source.function.rpartition(":")
        if not path.endswith(".py") or not name.isidentifier():
            raise InputError(f"{setting}: {source.function!r} is not of the form FILE.py:NAME")
        if not Path(path).is_file():
            raise InputError(f"{setting}: no file {path!r}")
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", "llm3d.stages.reward_worker", self.named]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        said = self._answer(_SECONDS_TO_START, "to load")
        if "error" in said:
            raise InputError(f"{self.setting}: {self.named}: {said['error']}")

    def scores(self, rollouts: Rollouts, which: Sequence[int]) -> list[float]:
        """Of some of the replies. Raises InputError where the function fails or takes too long."""
        if not which:
            return []
        prompts = [rollouts.prompts[i] for i in which]
        names = sorted({name for prompt in prompts for name in prompt.row})
        for name in _TAKEN:
            if name in names:
                raise InputError(
                    f"{prompts[0].where}: a column {name!r}, which reward functions get otherwise; rename it"
                )
        call = {
            "prompts": [prompt.shown for prompt in prompts],
            "replies": [rollouts.texts[i] for i in which],
            "columns": {name: [prompt.row.get(name) for prompt in prompts] for name in names},
        }
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the answer then says that it has ended
            self.process.stdin.write(json.dumps(call, default=str).encode() + b"\n")
            self.process.stdin.flush()
        said = self._answer(self.time_limit, f"for {counted(len(which), 'reply', 'replies')}")
        if "error" in said:
            raise InputError(f"{self.setting}: {self.named}: {said['error']}{self._of(call, said, prompts)}")
        return list(said["scores"])

    def _of(self, call: dict[str, Any], said: dict[str, Any], prompts: Sequence[Any]) -> str:
        if "place" not in said:
            return ""
        place = said["place"]
        return f"; {prompts[place].where}, the reply {call['replies'][place]!r}"

    def _answer(self, seconds: float, what: str) -> dict[str, Any]:
        """A line of the process; where none comes in time, it is ended."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                self.close()
                raise InputError(f"{self.setting}: {self.named} took more than {seconds:g} s {what}")
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise InputError(f"{self.setting}: {self.named}: its process ended with code {code}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


class Rewards:
    """All of ppo.rewards, on a mesh. Every rank holds one and calls it at the same time.

    givers: of each source, its reward model or its function.
    """

    def __init__(
        self, sources: Sequence[RewardSource], mesh: Mesh, givers: Sequence[Evaluator | RewardFunction]
    ) -> None:
        self.sources, self.mesh, self.givers = sources, mesh, list(givers)
        self.offsets = [0.0] * len(self.givers)  # subtracted from a model's scores

    @property
    def models(self) -> list[Evaluator]:
        return [giver for giver in self.givers if isinstance(giver, Evaluator)]

    def scores(self, rollouts: Rollouts, awake: Awake) -> list[Tensor]:
        """Of each source, fp32 [replies], on every rank; before weights. Raises InputError on all ranks.

        awake: has a model's weights where they are needed, for the time of a block.
        """
        found = []
        for giver, offset in zip(self.givers, self.offsets, strict=True):
            if isinstance(giver, RewardFunction):
                found.append(self._by_function(giver, rollouts))
            else:
                with awake(giver):
                    found.append(of_replies(giver, rollouts.samples) - offset)
        return found

    def center(self, config: PPOConfig, template: Template) -> None:
        """Have the replies of a model's `centered_on` score 0 on average from now on."""
        for i, (source, giver) in enumerate(zip(self.sources, self.givers, strict=True)):
            if source.centered_on is not None and isinstance(giver, Evaluator):
                with input_errors_on_all(self.mesh.everyone):
                    found, _ = read_samples(source.centered_on, "conversation", template, config.data)
                self.offsets[i] = of_replies(giver, [found[j] for j in range(len(found))]).mean().item()

    def total(self, found: Sequence[Tensor]) -> Tensor:
        return torch.stack([s.weight * x for s, x in zip(self.sources, found, strict=True)]).sum(0)

    def _by_function(self, function: RewardFunction, rollouts: Rollouts) -> Tensor:
        """Each rank asks its own process, of neighbouring replies."""
        mesh = self.mesh
        which = np.array_split(np.arange(len(rollouts)), mesh.size)[mesh.rank].tolist()
        scores = torch.zeros(len(rollouts), dtype=torch.float64)
        with input_errors_on_all(mesh.everyone):
            scores[which] = torch.tensor(function.scores(rollouts, which), dtype=torch.float64)
        return all_reduce_sum(scores, mesh.everyone).float()
