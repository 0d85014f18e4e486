"""The check of a first GPU spends no minute on a slip: its commands are understood, its limits add up, results stay."""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from llm3d.cli import app

ROOT = Path(__file__).parents[2]
OUT = "results-of-a-gpu"
A_CALL_TAKES_AT_MOST, A_CALL_BRINGS_BACK_AT_MOST = 540, 8  # seconds, files


class Part(NamedTuple):
    name: str
    limit: int
    command: list[str]  # behind the interpreter's name


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "benchmarks/gpu_check.sh"), *arguments]
    given = {"PYTHON": "the-python", "CARRIED": "/nothing/carried"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | given)


def listed() -> list[Part]:
    found = []
    for line in check("--list", OUT).stdout.splitlines():
        name, limit, *command = shlex.split(line)
        found.append(Part(name, int(limit), command[command.index("the-python") + 1 :]))
    return found


PARTS = listed()


def test_all_limits_together_fit_into_a_call() -> None:
    assert len(PARTS) == 10
    assert sum(part.limit for part in PARTS) < A_CALL_TAKES_AT_MOST - 10


def test_a_call_brings_all_files_back() -> None:
    written = {word for part in PARTS for word in part.command if word.startswith(OUT)}
    assert len(written | {"all.txt", "verdicts.txt"}) <= A_CALL_BRINGS_BACK_AT_MOST
    assert all(Path(name).parent == Path(OUT) for name in written)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_program_understands_its_command(part: Part) -> None:
    program, *arguments = part.command
    if program == "-m":
        module, *arguments = arguments
        understood = {"llm3d": understood_by_llm3d, "pytest": understood_by_pytest}[module]
        understood(arguments)
        return
    assert (ROOT / program).is_file()
    benchmark = importlib.import_module(Path(program).stem)
    parsed = benchmark.parse(arguments)
    for options in ["", *getattr(parsed, "then", [])]:
        again = benchmark.parse([*arguments, *shlex.split(options)])
        if hasattr(benchmark, "settings"):
            benchmark.settings(again)


def understood_by_llm3d(arguments: list[str]) -> None:
    """Options are read before help is shown."""
    shown = CliRunner().invoke(app, [*arguments, "--help"])
    assert shown.exit_code == 0, shown.output


def understood_by_pytest(arguments: list[str]) -> None:
    assert all((ROOT / word).is_dir() for word in arguments if word.startswith("tests"))


@pytest.fixture
def interpreter(tmp_path: Path) -> Path:
    """In Python's place: a program that does what $DOES says, and is the script's grandchild."""
    path = tmp_path / "interpreter"
    path.write_text('#!/usr/bin/env bash\nread -r _ _ _ script _ </proc/$PPID/stat\neval "$DOES"\n')
    path.chmod(0o755)
    return path


def verdicts(out: Path) -> dict[str, list[str]]:
    """By part, what was said of it, without the seconds."""
    found: dict[str, list[str]] = {}
    for line in (out / "verdicts.txt").read_text().splitlines():
        found.setdefault(line[:9].strip(), []).append(line[18:])
    return found


def test_a_part_that_fails_keeps_no_other_from_running(interpreter: Path, tmp_path: Path) -> None:
    done = check(str(tmp_path), PYTHON=str(interpreter), DOES='echo "=> so far $2"; echo more; exit 1')
    assert done.returncode == 1
    said = verdicts(tmp_path)
    assert [*said][:-1] == [part.name for part in PARTS]
    # compute-sanitizer, of another name, may not be here
    assert {name for name in said if said[name][0] != "FAILED with status 1"} <= {"memcheck", "all"}
    assert said["decoding"][1] == "so far --preset"
    assert (tmp_path / "all.txt").read_text().count("more\n") >= 9


def test_what_a_part_found_is_its_verdict(interpreter: Path, tmp_path: Path) -> None:
    check(
        str(tmp_path), PYTHON=str(interpreter), DOES="echo 'not this'; echo '=> one'; echo '=> two'; echo end"
    )
    assert verdicts(tmp_path)["7b"] == ["one", "two"]
    check(str(tmp_path), PYTHON=str(interpreter), DOES="echo first; echo 12 passed; echo")
    assert verdicts(tmp_path)["tests"] == ["12 passed"]


def test_a_part_that_may_end_too_late_is_not_started(interpreter: Path, tmp_path: Path) -> None:
    check(str(tmp_path), PYTHON=str(interpreter), DOES="echo fine", BUDGET="60")
    said = verdicts(tmp_path)
    assert said["kernels"] == ["fine"]
    assert all(said[part.name][0].startswith("NOT STARTED") for part in PARTS if part.limit > 50)


def test_kernels_that_do_not_load_are_built(interpreter: Path, tmp_path: Path) -> None:
    does = (
        'if [ -e "$BUILT" ]; then echo fine; elif [ "$1" = setup.py ]; then touch "$BUILT"; else exit 2; fi'
    )
    check(str(tmp_path), PYTHON=str(interpreter), DOES=does, BUILT=str(tmp_path / "built"))
    said = verdicts(tmp_path)
    assert [*said][:3] == ["kernels", "build", "paths"]
    assert said["kernels"][-1] == "fine"


def test_when_it_is_stopped_what_it_has_stays(interpreter: Path, tmp_path: Path) -> None:
    does = "case $1 in *device_paths.py) echo half; kill -TERM $script; exec tail -f /dev/null ;; esac; echo fine"
    done = check(str(tmp_path), PYTHON=str(interpreter), DOES=does)
    assert done.returncode == 3
    assert [*verdicts(tmp_path)] == ["kernels", "stopped"]
    assert "half" in (tmp_path / "all.txt").read_text()
