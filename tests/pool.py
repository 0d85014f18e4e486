"""A persistent pool of gloo processes, so that a distributed test costs milliseconds to start.

@spawn(world_size=4, tensor=2)
def test_something(mesh): ...       # runs on four ranks; an assertion that fails on any of them fails the test
"""

from __future__ import annotations

import atexit
import functools
import importlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

MAX_RANKS = 8
TIMEOUT_SECONDS = 300  # that only ranks which wait for each other reach, however busy the machine is


class WorkerFailed(AssertionError):
    """A test function raised on a rank; the message is that rank's traceback."""


def run(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call function(*args), a module's top-level function, on ranks 0 .. world_size - 1; -> each rank's result."""
    global _pool
    if _pool is None:
        _pool = _Pool()
    try:
        return _pool.run(function, world_size, args)
    except WorkerFailed:
        _pool.stop()  # the other ranks may wait for the failed one forever
        _pool = None
        raise


def spawn(world_size: int, **layout: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a test function whose first argument is the mesh; pytest passes the others."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def on_the_pool(**arguments: Any) -> None:
            run(_run_test, world_size, test.__module__, test.__qualname__, layout, arguments)

        # pytest looks at the signature for fixtures; the mesh is not one.
        import inspect

        parameters = list(inspect.signature(test).parameters.values())[1:]
        on_the_pool.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return on_the_pool

    return decorate


def _run_test(module: str, name: str, layout: dict[str, Any], arguments: dict[str, Any]) -> None:
    from llm3d.parallel.mesh import Mesh

    getattr(importlib.import_module(module), name).__wrapped__(Mesh(**layout), **arguments)


class _Pool:
    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.preload"])
        self.directory = tempfile.TemporaryDirectory()
        self.connections: list[Connection] = []
        self.processes = []
        self.tasks = 0
        for rank in range(MAX_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], world_size: int, args: tuple[Any, ...]) -> list[Any]:
        waiting: dict[Any, int] = {
            connection: rank for rank, connection in enumerate(self.connections[:world_size])
        }
        self.tasks += 1
        store = os.path.join(self.directory.name, f"store-{self.tasks}")
        for connection in waiting:
            connection.send((store, world_size, function, args))
        results: list[Any] = [None] * world_size
        while waiting:
            ready = wait(list(waiting), timeout=TIMEOUT_SECONDS)
            if not ready:
                raise WorkerFailed(f"ranks {sorted(waiting.values())} did not answer in {TIMEOUT_SECONDS} s")
            answered: Any
            for answered in ready:
                rank = waiting.pop(answered)
                try:
                    results[rank], error = answered.recv()
                except EOFError:
                    error = f"process ended with exit code {self.processes[rank].exitcode}"
                if error:
                    raise WorkerFailed(f"on rank {rank} of {world_size}:\n{error}")
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.directory.cleanup()


def _work(rank: int, connection: Connection) -> None:
    while True:
        try:
            store, world_size, function, args = connection.recv()
        except EOFError:
            return
        answer: tuple[Any, str | None]
        try:
            answer = (_in_a_new_world(rank, store, world_size, function, args), None)
        except BaseException:
            answer = (None, traceback.format_exc())
        connection.send(answer)
        del answer, function, args  # what they hold would count as the next function's memory


def _in_a_new_world(rank: int, store: str, world_size: int, function: Callable[..., Any], args: Any) -> Any:
    import torch.distributed as dist

    from llm3d.parallel.mesh import meet, prepare_for_many_ranks

    prepare_for_many_ranks()
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    try:
        meet()
        return function(*args)
    finally:
        dist.destroy_process_group()


_pool: _Pool | None = None


def renew() -> None:
    """Have the next function run in new processes, in which no other test has left anything."""
    global _pool
    if _pool is not None:
        _pool.stop()
        _pool = None


@atexit.register
def _stop() -> None:
    if _pool is not None:
        _pool.stop()
