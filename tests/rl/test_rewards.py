"""A reward file does what plain Python would do with it, and is told at the start what it lacks."""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm3d.config import RewardSource
from llm3d.data.prompts import TokenizedPrompt
from llm3d.errors import InputError
from llm3d.rl.rewards import RewardFunction
from llm3d.rl.rollout import Rollouts

REPLIES = ["a", "bb", "ccc"]
LENGTHS = [1.0, 2.0, 3.0]


def rollouts(*rows: dict[str, Any]) -> Rollouts:
    """REPLIES to three prompts with these rows, or none."""
    none = np.zeros(0, dtype=np.int32)
    prompts = [
        TokenizedPrompt(i, none, "?", row, f"x.jsonl line {i + 1}") for i, row in enumerate(rows or ({},) * 3)
    ]
    return Rollouts(prompts, [none] * 3, REPLIES, [True] * 3, torch.zeros(3, 0))


def started(
    directory: Path, source: str, *rows: dict[str, Any], name: str = "rewards.py:score"
) -> RewardFunction:
    """The function that `source`, a file in the directory, defines."""
    path = directory / name.partition(":")[0]
    path.write_text(source, encoding="utf-8")
    function = RewardSource.model_validate({"function": f"{directory}/{name}"})
    return RewardFunction(function, "ppo.rewards[0].function", rollouts(*rows).prompts)


def scores(
    directory: Path, source: str, *rows: dict[str, Any], name: str = "rewards.py:score"
) -> list[float]:
    return started(directory, source, *rows, name=name).scores(rollouts(*rows), range(3))


# ---- what Python would do with the file ----

MODULE = """
import sys
from dataclasses import dataclass
def length(reply): return float(len(reply))
@dataclass
class Length:
    reply: str
    def score(self): return length(self.reply)
"""
FILES: dict[str, str] = {
    "dataclasses with annotations that are text": f"""
from __future__ import annotations
import typing
{MODULE}
assert typing.get_type_hints(Length) == {{"reply": str}}
def score(prompts, replies): return [Length(reply).score() for reply in replies]
""",
    "pickling": f"""
import pickle
{MODULE}
def score(prompts, replies):
    return [pickle.loads(pickle.dumps(Length(reply))).score() for reply in replies]
""",
    "processes that are forked": f"""
import multiprocessing
{MODULE}
def score(prompts, replies):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return [found.score() for found in pool.map(Length, replies)]
""",
    "processes that are spawned": f"""
import concurrent.futures, multiprocessing
{MODULE}
def score(prompts, replies):
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return [found.score() for found in pool.map(Length, replies)]
""",
    "threads": f"""
import concurrent.futures
{MODULE}
pool = concurrent.futures.ThreadPoolExecutor(2)
def score(prompts, replies): return list(pool.map(length, replies))
""",
    "a module beside it": """
from helper import length
def score(prompts, replies): return [length(reply) for reply in replies]
""",
    "a file beside it": """
import pathlib
assert (pathlib.Path(__file__).parent / "helper.py").is_file() and pathlib.Path(__file__).is_absolute()
def score(prompts, replies): return [len(reply) for reply in replies]
""",
    "a part for when it is run": """
def score(prompts, replies): return [len(reply) for reply in replies]
if __name__ == "__main__": raise SystemExit("it is imported")
assert __name__ == "rewards"
""",
    "arguments of a program": """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--times", type=int, default=1)
times = parser.parse_args().times
def score(prompts, replies): return [times * len(reply) for reply in replies]
""",
    "words on standard output": """
import logging, os, subprocess, sys
logging.basicConfig(stream=sys.stdout, level="INFO")
print("loading")
def score(prompts, replies):
    print('{"scores": [0, 0, 0]}', "\\u2713")
    logging.info("scoring")
    os.write(1, b"raw\\n")
    subprocess.run(["echo", "a child"], check=True)
    return [len(reply) for reply in replies]
""",
    "what reads standard input": """
import subprocess, sys
def score(prompts, replies):
    assert sys.stdin.read() == ""
    assert subprocess.run(["cat"], capture_output=True, check=True).stdout == b""
    return [len(reply) for reply in replies]
""",
    "an alarm": """
import signal
def score(prompts, replies):
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.raise_signal(signal.SIGALRM)
    return [len(reply) for reply in replies]
""",
    "an object that is called": """
import functools, numpy
class Scorer:
    def __call__(self, prompts, replies): return numpy.array([len(reply) for reply in replies])
score = functools.partial(Scorer())
""",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_does_what_python_would_do_with_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def length(reply): return len(reply)\n")
    assert scores(tmp_path, FILES[name]) == LENGTHS


@pytest.mark.parametrize("name", ["my-rewards.py", "rewards.v2.py", "json.py", "signal.py", "llm3d.py"])
def test_a_file_may_have_any_name(name: str, tmp_path: Path) -> None:
    """That of a module of Python's own, too, which then stays what it is."""
    source = (
        "import json\njson.dumps\ndef score(prompts, replies): return [len(reply) for reply in replies]\n"
    )
    if name == "json.py":
        source = source.replace("import json\njson.dumps\n", "")
    assert scores(tmp_path, source, name=f"{name}:score") == LENGTHS


def test_files_where_the_run_was_started_are_not_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inspect.py").write_text("raise SystemExit('not this one')")
    (tmp_path / "files").mkdir()
    monkeypatch.chdir(tmp_path)
    assert scores(tmp_path / "files", FILES["threads"]) == LENGTHS


def test_what_it_does_at_exit_is_done_and_its_processes_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "held")
    held = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
    source = f"""
import atexit, pathlib, subprocess
atexit.register(pathlib.Path({str(tmp_path / "done")!r}).write_text, "all of it")
subprocess.Popen(["sleep", "1000"], stdout=open({str(tmp_path / "held")!r}, "w"))
{FILES["threads"]}"""
    function = started(tmp_path, source)
    assert select.select([held], [], [], 0)[0] == [], "the child holds it open"
    function.close()
    assert function.process.returncode == 0 and (tmp_path / "done").read_text() == "all of it"
    assert select.select([held], [], [], 60)[0] == [held] and os.read(held, 1) == b"", "nobody does"
    os.close(held)


def test_what_a_terminal_sends_to_training_does_not_reach_it(tmp_path: Path) -> None:
    function = started(tmp_path, FILES["threads"])
    assert os.getpgid(function.process.pid) != os.getpgid(0)
    assert os.getsid(function.process.pid) != os.getsid(0)


# ---- what is wrong with it, at the start ----

SCORED = "[0.0] * len(replies)"
WRONG: dict[str, tuple[str, list[str]]] = {
    "a column that no prompt has": (
        f"def score(prompts, replies, answers): return {SCORED}",
        ["needs a column 'answers', which no prompt has; there are: answer, level; did you mean answer?"],
    ),
    "a column that some have": (
        f"def score(prompts, replies, *, level): return {SCORED}",
        ["'level', which is not there in 1 of 3 prompts", "x.jsonl line 2 the first", "level=None"],
    ),
    "columns first": (
        f"def score(replies): return {SCORED}",
        ["score(replies) does not take prompts and replies by position"],
    ),
    "no function of that name": ("def scores(): pass", ["has no function 'score'; there are: scores"]),
    "no function": ("score = 5", ["score is no function, but of type int"]),
    "a coroutine": (
        f"async def score(prompts, replies): return {SCORED}",
        ["score is a coroutine function; it must be def, not async def"],
    ),
    "an import that fails": (
        "import no_such_module",
        ["No module named 'no_such_module'", "rewards.py line 1"],
    ),
    "wrong syntax": ("x = 1\ndef score(:", ["SyntaxError", "rewards.py line 2"]),
    "an end": ("import sys\nsys.exit('enough')", ["SystemExit: enough"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_anything_is_scored(name: str, tmp_path: Path) -> None:
    source, expected = WRONG[name]
    rows = ({"answer": "x", "level": 1}, {"answer": "y"}, {"answer": "z", "level": 2})
    with pytest.raises(InputError) as error:
        started(tmp_path, source, *rows)
    said = str(error.value)
    assert said.startswith("ppo.rewards[0].function: ") and "\n" not in said
    assert [words for words in expected if words not in said] == []


def test_a_column_that_some_prompts_lack_is_none_there(tmp_path: Path) -> None:
    rows: tuple[dict[str, str], ...] = ({"answer": "a"}, {}, {"answer": "c"})
    source = """
def score(prompts, replies, answer=None, other=7):
    assert other == 7
    return [0.5 if wanted is None else float(wanted in reply) for wanted, reply in zip(answer, replies)]
"""
    assert scores(tmp_path, source, *rows) == [1.0, 0.5, 1.0]


def test_a_column_with_the_name_of_prompts_or_replies_is_not_given_twice(tmp_path: Path) -> None:
    rows = ({"prompt": "p", "completion": "c"},) * 3
    source = "def score(prompt, completion, **columns): return [len(columns) + len(c) for c in completion]"
    assert scores(tmp_path, source, *rows) == LENGTHS
    with pytest.raises(
        InputError, match="a column 'replies', which reward functions get otherwise; rename it"
    ):
        started(tmp_path, FILES["threads"], *({"replies": 1},) * 3)


def test_the_process_is_this_python(tmp_path: Path) -> None:
    source = f"import sys\nassert sys.executable == {sys.executable!r}\n{FILES['threads']}"
    assert scores(tmp_path, source) == LENGTHS
