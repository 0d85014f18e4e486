"""A process that calls a user's reward function, so that what it does to itself it does not do to training.

    python reward_worker.py FILE.py:NAME

The file is a module as Python imports it, of its own name, with its directory first among the places of imports.
The first line on standard output says {"needs": [...], "takes": [...]}: the columns that the function cannot do
without, and all that it has parameters for (null: any). Then each line of standard input is a call in JSON, and each
of standard output its answer: {"scores": [...]}, or {"error": text, "place": number of the reply, if one alone is to
blame}. What the function prints goes to standard error, and its own standard input is empty.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TextIO

Scores = Callable[..., Any]


def main() -> None:
    calls, answers = take_pipes()

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        function = load(sys.argv[1])
    except (Exception, SystemExit) as error:  # whatever the user's file does
        answer({"error": _last_line(error)})
        return
    answer({"needs": function.needs, "takes": function.takes})
    for line in calls:
        answer(called(function, **json.loads(line)))


def take_pipes() -> tuple[TextIO, TextIO]:
    """Standard input and output as they were; from now on they are nothing, and standard error."""
    calls, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    for pipe in (calls, answers):
        os.register_at_fork(after_in_child=functools.partial(os.close, pipe.fileno()))
    return calls, answers


class Function(NamedTuple):
    """call(prompts, replies, **columns).  needs: columns it has no default for.  takes: all it takes; None: any.

    not_columns: its names for prompts and replies.
    """

    call: Scores
    needs: list[str]
    takes: list[str] | None
    not_columns: set[str]

    def of(self, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Those of the columns that it takes."""
        accepted = columns if self.takes is None else self.takes
        return {
            name: values
            for name, values in columns.items()
            if name in accepted and name not in self.not_columns
        }


def load(named: str) -> Function:
    """FILE.py:NAME. Raises what the file raises, and LookupError or TypeError where it has no such function."""
    path, _, name = named.rpartition(":")
    module = imported(Path(path).resolve())
    function = getattr(module, name, None)
    if function is None:
        known = sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
        raise LookupError(f"has no function {name!r}; there are: {', '.join(known) or 'none'}")
    if not callable(function):
        raise TypeError(f"{name} is no function, but of type {type(function).__name__}")
    if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
        raise TypeError(f"{name} is a coroutine function; it must be def, not async def")
    return with_signature(function, name)


def imported(path: Path) -> ModuleType:
    """A file as a module that is found by its name, as classes and functions of it are when they are pickled."""
    this = str(Path(__file__).parent)
    sys.argv, sys.path[:] = [str(path)], [str(path.parent), *(place for place in sys.path if place != this)]
    taken = path.stem in sys.modules or path.stem in sys.stdlib_module_names
    name = f"{path.stem}_of_user" if taken else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "the file's name ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def with_signature(function: Scores, name: str) -> Function:
    """Raises TypeError where it cannot be called with prompts, replies, and columns by name."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a function in C, Python knows no signature
        return Function(function, [], [], set())
    try:
        positional = set(signature.bind_partial(None, None).arguments)
    except TypeError:
        raise TypeError(
            f"{name}{signature} does not take prompts and replies by position, in this order"
        ) from None
    by_name = {
        key: parameter
        for key, parameter in signature.parameters.items()
        if key not in positional
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    needs = [key for key, parameter in by_name.items() if parameter.default is parameter.empty]
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    return Function(function, needs, None if any_name else list(by_name), positional)


def called(
    function: Function, prompts: list[Any], replies: list[str], columns: dict[str, list[Any]]
) -> dict[str, Any]:
    """The scores, or what went wrong, and with which reply where the same goes wrong with that one alone."""
    columns = function.of(columns)
    try:
        return {"scores": _numbers(function.call(prompts, replies, **columns), len(replies))}
    except (Exception, SystemExit) as error:  # whatever the user's function raises
        message = _last_line(error)
    for i in range(len(replies)):
        alone = {name: [values[i]] for name, values in columns.items()}
        alike = _failure(function.call, [prompts[i]], [replies[i]], alone)
        if alike is not None and _last_line(alike) == message:
            return {"error": message, "place": i}
    return {"error": message}


def _failure(
    function: Scores, prompts: list[Any], replies: list[str], columns: dict[str, list[Any]]
) -> BaseException | None:
    try:
        _numbers(function(prompts, replies, **columns), len(replies))
    except (Exception, SystemExit) as error:
        return error
    return None


def _numbers(scores: Iterable[Any], count: int) -> list[float]:
    values = [float(value) for value in scores]
    if len(values) != count:
        raise ValueError(f"number of scores: {len(values)}, of replies: {count}")
    wrong = [value for value in values if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"a score of {wrong[0]}")
    return values


def _last_line(error: BaseException) -> str:
    """What Python says of it, and where in the user's files."""
    message = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, SyntaxError):
        return f"{message} ({error.filename} line {error.lineno})"
    own = (__file__, "<frozen")
    places = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)
    ]
    return f"{message} ({places[-1].filename} line {places[-1].lineno})" if places else message


if __name__ == "__main__":
    main()
