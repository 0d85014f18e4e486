"""What replies are worth: a reward model's score, a user's function, or their weighted sum."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm3d.config import PPOConfig, RewardSource
from llm3d.config.explain import nearest
from llm3d.data.chat import read_samples
from llm3d.data.prompts import TokenizedPrompt
from llm3d.errors import InputError
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.collectives import all_reduce_sum
from llm3d.parallel.mesh import Mesh
from llm3d.rl.rollout import Rollouts, score_sequences
from llm3d.text.templates import Template
from llm3d.train.frozen import FrozenModel
from llm3d.train.trainer import ShardedModel
from llm3d.wording import counted

_SECONDS_TO_START = 120.0
_SECONDS_TO_END = 5.0  # for what the user's file does at exit
_WORKER = Path(__file__).with_name("reward_worker.py")
_EXAMPLE_PROMPTS, _EXAMPLE_REPLIES = 4, 2  # of a step; replies to each of the prompts
_TAKEN = {"prompts", "replies"}


class RewardFunction:
    """A user's function in a process of its own, which ends when this object does.

    Raises InputError where it cannot be loaded, or needs a column that not all prompts have.
    """

    def __init__(self, source: RewardSource, setting: str, prompts: Sequence[TokenizedPrompt]) -> None:
        """setting: its path among the settings.  prompts: all that it may be asked about."""
        assert source.function is not None
        self.setting, self.named, self.time_limit = setting, source.function, source.time_limit
        path, _, name = source.function.rpartition(":")
        if not path.endswith(".py") or not name.isidentifier():
            raise InputError(f"{setting}: {source.function!r} is not of the form FILE.py:NAME")
        if not Path(path).is_file():
            raise InputError(f"{setting}: no file {path!r}")
        answer = self._start()
        self.takes: list[str] | None = answer["takes"]
        self._check_columns(prompts, answer["needs"])

    def _start(self) -> dict[str, Any]:
        """-> what the function says of columns."""
        # In a session of its own: what a terminal or a launcher sends to training's processes is not for it.
        self.process = subprocess.Popen(
            [sys.executable, str(_WORKER), self.named],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.close = weakref.finalize(self, _end, self.process)
        answer = self._answer(_SECONDS_TO_START, "to load")
        if "error" in answer:
            raise InputError(f"{self.setting}: {self.named}: {answer['error']}")
        return answer

    def columns(self, row: dict[str, Any]) -> dict[str, Any]:
        """What of a prompt's row the function takes."""
        return {name: value for name, value in row.items() if self.takes is None or name in self.takes}

    def _check_columns(self, prompts: Sequence[TokenizedPrompt], needs: Sequence[str]) -> None:
        for prompt in prompts:
            for name in _TAKEN & prompt.row.keys():
                raise InputError(
                    f"{prompt.where}: a column {name!r}, which reward functions get otherwise; rename it"
                )
        for name in needs:
            without = [prompt for prompt in prompts if name not in prompt.row]
            if not without:
                continue
            known, first = sorted({key for prompt in prompts for key in prompt.row}), without[0]
            message = f"{self.setting}: {self.named} needs a column {name!r}"
            if len(without) < len(prompts):
                raise InputError(
                    f"{message}, which is not there in {len(without)} of {counted(len(prompts), 'prompt')}, "
                    f"{first.where} the first; give it a default, such as {name}=None, or add the column"
                )
            raise InputError(
                f"{message}, which no prompt has; there are: {', '.join(known)}{nearest(name, known)}"
            )

    def scores(self, rollouts: Rollouts, which: Sequence[int]) -> list[float]:
        """Of some of the replies. Raises InputError where the function fails or takes too long."""
        if not which:
            return []
        prompts = [rollouts.prompts[i] for i in which]
        names = sorted({name for prompt in prompts for name in prompt.row})
        call = {
            "prompts": [prompt.shown for prompt in prompts],
            "replies": [rollouts.texts[i] for i in which],
            "columns": {name: [prompt.row.get(name) for prompt in prompts] for name in names},
        }
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the answer then says that it has ended
            self.process.stdin.write(json.dumps(call, default=str).encode() + b"\n")
            self.process.stdin.flush()
        answer = self._answer(self.time_limit, f"for {counted(len(which), 'reply', 'replies')}")
        if "error" in answer:
            raise InputError(
                f"{self.setting}: {self.named}: {answer['error']}{self._of(call, answer, prompts)}"
            )
        return list(answer["scores"])

    def _of(self, call: dict[str, Any], answer: dict[str, Any], prompts: Sequence[Any]) -> str:
        if "place" not in answer:
            return ""
        place = answer["place"]
        return f"; {prompts[place].where}, the reply {call['replies'][place]!r}"

    def _answer(self, seconds: float, what: str) -> dict[str, Any]:
        """A line of the process; where none comes in time, it is ended."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                _kill(self.process)
                raise InputError(f"{self.setting}: {self.named} took more than {seconds:g} s {what}")
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise InputError(f"{self.setting}: {self.named}: its process ended with code {code}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    """Have a function's process end by itself, as its input does, or else with all that it has started."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_SECONDS_TO_END)
    _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


Scorer = FrozenModel | RewardFunction


class Rewards:
    """All of ppo.rewards, on a mesh. Every rank holds one and calls it at the same time.

    scorers: of each source, its reward model or its function.
    """

    def __init__(self, sources: Sequence[RewardSource], mesh: Mesh, scorers: Sequence[Scorer]) -> None:
        self.sources, self.mesh, self.scorers = sources, mesh, list(scorers)
        self.offsets = [0.0] * len(self.scorers)  # subtracted from a model's scores

    @property
    def names(self) -> list[str]:
        return reward_names(self.sources)

    def columns(self, row: dict[str, Any]) -> dict[str, Any]:
        """What of a prompt's row the functions take, as JSON has it."""
        functions = [scorer for scorer in self.scorers if isinstance(scorer, RewardFunction)]
        values = {name: value for function in functions for name, value in function.columns(row).items()}
        return dict(json.loads(json.dumps(values, default=str)))

    @property
    def models(self) -> list[ShardedModel]:
        return [scorer.model for scorer in self.scorers if isinstance(scorer, FrozenModel)]

    def scores(self, rollouts: Rollouts) -> list[Tensor]:
        """Of each source, fp32 [replies], on every rank; before weights. Raises InputError on all ranks."""
        scores = []
        for scorer, offset in zip(self.scorers, self.offsets, strict=True):
            if isinstance(scorer, RewardFunction):
                scores.append(self._by_function(scorer, rollouts))
            else:
                with scorer.loaded() as model:
                    scores.append(score_sequences(model, rollouts.samples) - offset)
        return scores

    def center(self, config: PPOConfig, template: Template) -> None:
        """Have the replies of a model's `centered_on` score 0 on average from now on."""
        for i, (source, scorer) in enumerate(zip(self.sources, self.scorers, strict=True)):
            if source.centered_on is not None and isinstance(scorer, FrozenModel):
                with input_errors_on_all(self.mesh.everyone):
                    sample_set, _ = read_samples(source.centered_on, "conversation", template, config.data)
                samples = [sample_set[j] for j in range(len(sample_set))]
                self.offsets[i] = score_sequences(scorer.model, samples).mean().item()

    def total(self, scores: Sequence[Tensor]) -> Tensor:
        return torch.stack([s.weight * x for s, x in zip(self.sources, scores, strict=True)]).sum(0)

    def examples(
        self, rollouts: Rollouts, raw: Sequence[Tensor], scores: Tensor, advantages: Tensor
    ) -> list[dict[str, Any]]:
        """A few replies to each of several prompts, for people. group: those to one prompt, which are compared.

        raw: each source's, before weights, fp32 [replies].  scores: their sum, as it is learned from.
        advantages: fp32 [replies, tokens]; shown is the mean over a reply's tokens.
        """
        size = sum(prompt is rollouts.prompts[0] for prompt in rollouts.prompts)
        of_reply = (advantages * rollouts.mask).sum(1) / rollouts.mask.sum(1)
        return [
            {
                "group": i // size,
                "prompt": rollouts.prompts[i].shown,
                "columns": self.columns(rollouts.prompts[i].row),
                "reply": rollouts.texts[i],
                "ended": rollouts.ended[i],
                "rewards": {name: round(x[i].item(), 4) for name, x in zip(self.names, raw, strict=True)},
                "score": round(scores[i].item(), 4),
                "advantage": round(of_reply[i].item(), 4),
            }
            for i in range(min(len(rollouts), size * _EXAMPLE_PROMPTS))
            if i % size < _EXAMPLE_REPLIES
        ]

    def _by_function(self, function: RewardFunction, rollouts: Rollouts) -> Tensor:
        """Each rank asks its own process, of neighboring replies."""
        mesh = self.mesh
        which = np.array_split(np.arange(len(rollouts)), mesh.size)[mesh.rank].tolist()
        scores = torch.zeros(len(rollouts), dtype=torch.float64)
        with input_errors_on_all(mesh.everyone):
            scores[which] = torch.tensor(function.scores(rollouts, which), dtype=torch.float64)
        return all_reduce_sum(scores, mesh.everyone).float()


def reward_names(sources: Sequence[RewardSource]) -> list[str]:
    """The function's, or the last part of the model's path; numbered where several have one."""
    names = [Path(source.model or str(source.function)).name.rpartition(":")[2] for source in sources]
    return [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names)]


def spread_of_scores(
    names: Sequence[str], raw: Sequence[Tensor], scores: Tensor, group_size: int
) -> dict[str, float]:
    """How far scores are apart, without which there is nothing to learn, under TRL's names.

    raw: each source's, before weights, fp32 [replies].  scores: their sum.
    group_size: replies to a prompt, which stand next to each other.
    """
    metrics = dict[str, float]()
    for name, x in zip(names, raw, strict=True):
        metrics |= {f"rewards/{name}/mean": x.mean().item(), f"rewards/{name}/std": _deviation(x)}
    metrics["reward_std"] = _deviation(scores)
    if group_size > 1:
        apart = scores.view(-1, group_size).std(1)
        metrics["frac_reward_zero_std"] = torch.isclose(apart, torch.zeros(())).float().mean().item()
    return metrics


def _deviation(scores: Tensor) -> float:
    return scores.std().item() if len(scores) > 1 else 0.0
