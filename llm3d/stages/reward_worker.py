"""A process that calls a user's reward function, so that what it does to itself it does not do to training.

    python -m llm3d.stages.reward_worker FILE.py:NAME

A call is a line of JSON on standard input, its answer a line on standard output: {"scores": [...]}, or {"error": text,
"place": number of the reply, if one alone is to blame}. What the function prints goes to standard error.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm3d.wording import counted

Function = Callable[..., Any]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(said: dict[str, Any]) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    try:
        function = load(sys.argv[1])
    except Exception as error:  # whatever the user's file does
        answer({"error": _last_line(error)})
        return
    answer({"ready": True})
    for line in sys.stdin:
        answer(called(function, **json.loads(line)))


def load(named: str) -> Function:
    """FILE.py:NAME; the file's directory is where its imports are looked for first."""
    path, name = named.rsplit(":", 1)
    sys.path.insert(0, str(Path(path).resolve().parent))
    found = importlib.util.spec_from_file_location("rewards_of_user", path)
    assert found is not None and found.loader is not None, "the file's name ends in .py"
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        known = sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
        raise LookupError(f"has no function {name!r}; there are: {', '.join(known) or 'none'}")
    assert callable(function)
    return function


def called(
    function: Function, prompts: list[Any], replies: list[str], columns: dict[str, list[Any]]
) -> dict[str, Any]:
    """The scores, or what went wrong, and with which reply where the same goes wrong with that one alone."""
    columns = {name: values for name, values in columns.items() if takes(function, name)}
    try:
        return {"scores": _numbers(function(prompts, replies, **columns), len(replies))}
    except Exception as error:  # whatever the user's function raises
        said = _last_line(error)
    for i in range(len(replies)):
        alone = {name: [values[i]] for name, values in columns.items()}
        alike = _failure(function, [prompts[i]], [replies[i]], alone)
        if alike is not None and _last_line(alike) == said:
            return {"error": said, "place": i}
    return {"error": said}


def takes(function: Function, name: str) -> bool:
    """Whether a function has a parameter of that name, or any."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _failure(
    function: Function, prompts: list[Any], replies: list[str], columns: dict[str, list[Any]]
) -> Exception | None:
    try:
        _numbers(function(prompts, replies, **columns), len(replies))
    except Exception as error:
        return error
    return None


def _numbers(found: Any, count: int) -> list[float]:
    values = [float(value) for value in found]
    if len(values) != count:
        raise ValueError(f"{counted(len(values), 'score')} for {counted(count, 'reply', 'replies')}")
    wrong = [value for value in values if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"a score of {wrong[0]}")
    return values


def _last_line(error: Exception) -> str:
    """What Python says of it, and where in the user's file."""
    said = traceback.format_exception_only(error)[-1].strip()
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    return f"{said} ({places[-1].filename} line {places[-1].lineno})" if places else said


if __name__ == "__main__":
    main()
