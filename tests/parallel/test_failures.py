"""What happens on one rank ends the run on all, with the exit code that it stands for, and is said once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import typer

from llm3d.cli.common import ends_as_promised
from llm3d.errors import InputError, Interrupted, TrainingAborted
from llm3d.parallel.mesh import process_group
from llm3d.train.signals import StopSignals

pytestmark = pytest.mark.distributed  # in processes of its own
SIZE = 3
LIMIT_SECONDS = 300  # far above what any of it takes, below the half hour after which gloo gives up


class Ended(NamedTuple):
    codes: list[int | None]  # of the processes
    said: list[str]  # on standard error


def run(deed: Callable[[int], None], directory: Path) -> Ended:
    """Have SIZE processes do something in one world."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    ranks = [context.Process(target=on_rank, args=(rank, port, directory, deed)) for rank in range(SIZE)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(LIMIT_SECONDS)
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return Ended(codes, [(directory / str(rank)).read_text() for rank in range(SIZE)])


def on_rank(rank: int, port: int, directory: Path, deed: Callable[[int], None]) -> None:
    os.dup2(os.open(directory / str(rank), os.O_CREAT | os.O_WRONLY), sys.stderr.fileno())
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(SIZE), "LOCAL_RANK": str(rank)}
    try:
        ends_as_promised(in_the_world)(rank, deed)
    except typer.Exit as end:
        sys.exit(end.exit_code)


def in_the_world(rank: int, deed: Callable[[int], None]) -> None:
    with process_group():
        deed(rank)


def wait_for_the_living(rank: int) -> None:
    """Wait for a message that never comes, of a rank that goes on: nothing but a watch can end that."""
    living = [other for other in range(SIZE) if other != LOST]
    dist.recv(torch.zeros(1), src=living[1 - living.index(rank)])


LOST = 2


def is_killed(rank: int) -> None:
    if rank == LOST:
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for_the_living(rank)


def first_is_killed(rank: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.recv(torch.zeros(1), src=3 - rank)


def is_killed_in_training(rank: int) -> None:
    """The launcher then asks the others to end, which wait in the step that runs."""
    with StopSignals():
        if rank == LOST:
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for_the_living(rank)


def raises(rank: int) -> None:
    if rank == LOST:
        raise ZeroDivisionError("the loss was divided\nby nothing")
    wait_for_the_living(rank)


def raises_for_want_of_space(rank: int) -> None:
    if rank == LOST:
        raise TrainingAborted("no space left on /data")
    wait_for_the_living(rank)


def is_killed_in_a_collective(rank: int) -> None:
    """Gloo fails in the others, too, for which the one that was killed is the reason."""
    if rank == LOST:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))


@pytest.mark.parametrize("deed", [is_killed, is_killed_in_training, is_killed_in_a_collective])
def test_a_rank_that_is_killed_ends_all_and_is_named(deed: Callable[[int], None], tmp_path: Path) -> None:
    ended = run(deed, tmp_path)
    assert ended.codes == [3, 3, -signal.SIGKILL]
    assert ended.said[0].startswith("llm3d: rank 2 on ") and "was killed" in ended.said[0]
    assert ended.said[1:] == ["", ""]


def test_of_the_first_rank_the_second_speaks(tmp_path: Path) -> None:
    ended = run(first_is_killed, tmp_path)
    assert ended.codes == [-signal.SIGKILL, 3, 3]
    assert ended.said[1].startswith("llm3d: rank 0 ") and "was killed" in ended.said[1]
    assert ended.said[2] == ""


def test_a_bug_on_one_rank_ends_all_and_is_named(tmp_path: Path) -> None:
    ended = run(raises, tmp_path)
    assert ended.codes == [1, 1, 1]
    assert "failed: ZeroDivisionError: the loss was divided by nothing;" in ended.said[0]
    assert ended.said[0].startswith("llm3d: rank 2 on ") and ended.said[1] == ""
    assert "Traceback" in ended.said[2]


def test_what_aborts_training_on_one_rank_aborts_it_on_all(tmp_path: Path) -> None:
    ended = run(raises_for_want_of_space, tmp_path)
    assert ended.codes == [3, 3, 3]
    assert "failed: no space left on /data;" in ended.said[0]


def stop_together(rank: int) -> None:
    with StopSignals() as signals:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        stop = torch.tensor(signals.received or 0)
        dist.all_reduce(stop, dist.ReduceOp.MAX)
        assert stop == signal.SIGTERM
    raise Interrupted(f"saved, says rank {rank}")


def give_up_together(rank: int) -> None:
    raise InputError(f"run.dir: wrong, says rank {rank}")


@pytest.mark.parametrize(("deed", "code"), [(stop_together, 130), (give_up_together, 2)])
def test_ranks_that_end_together_do_so_in_their_own_way(
    deed: Callable[[int], None], code: int, tmp_path: Path
) -> None:
    ended = run(deed, tmp_path)
    assert ended.codes == [code] * SIZE
    assert ended.said[0].endswith("says rank 0\n") and len(ended.said[0].splitlines()) == 1
    assert ended.said[1:] == ["", ""]


def work_longer_on_some(rank: int) -> None:
    """The first rank, which hears from the others, is done long before the last one."""
    if rank < LOST:
        return
    for _ in range(20):
        torch.rand(400, 400) @ torch.rand(400, 400)


def test_all_is_well_that_ends_well(tmp_path: Path) -> None:
    assert run(work_longer_on_some, tmp_path) == ([0] * SIZE, [""] * SIZE)
