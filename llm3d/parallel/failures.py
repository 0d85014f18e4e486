"""A rank that fails or is killed ends the run on all ranks within seconds, and what is said names it.

Otherwise the others would wait for it in a collective, on NCCL until the watchdog's ten minutes are over, and would not
even heed a signal, which Python handles between calls.

Each rank keeps a connection to the first one. The kernel closes it when the process ends, however it ends.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from llm3d.errors import InputError, Interrupted, TrainingAborted

GRACE_SECONDS = 10.0  # for the others to end by themselves, as they do where all ranks see the same error
SETTLE_SECONDS = 1.0  # in which the end of one rank can still explain the error of another, who talked to it
CONNECT_SECONDS = 60.0
# A host is lost when it has not answered the kernel for half a minute.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))


class Failure(NamedTuple):
    """rank: the first that failed.  code: what all processes end with.  killed: it could not say so itself."""

    rank: int
    code: int
    message: str
    killed: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} {self.message}; the run ends on all ranks"


@contextmanager
def failures_end_all_ranks() -> Iterator[None]:
    """For the time of the block, which no rank leaves before all are done with it or Interrupted.

    Any other exception goes on at once; the other ranks end with the exit code that it stands for.
    """
    if dist.get_world_size() == 1:
        yield
        return
    watch = _Watch(*_address())
    watch.start()
    dist.all_reduce(torch.zeros(1))  # all ranks are connected before one can fail
    try:
        yield
    except BaseException as error:
        watch.leave(error)
        raise
    watch.leave()


def _address() -> tuple[int, bytes]:
    """The port on which the first rank hears from all, and what they show it to be known; from it to all, 24 bytes."""
    payload = torch.zeros(24, dtype=torch.uint8)
    if dist.get_rank() == 0:
        hub = _Hub(dist.get_world_size())
        hub.start()
        payload = torch.frombuffer(bytearray(hub.port.to_bytes(8, "little") + hub.token), dtype=torch.uint8)
    dist.broadcast(payload, 0)
    packed = bytes(payload.numpy())
    return int.from_bytes(packed[:8], "little"), packed[8:]


class _Watch(threading.Thread):
    """A rank's end of its connection: tells how this rank ends, and hears of the first failure or that all are done."""

    def __init__(self, port: int, token: bytes) -> None:
        super().__init__(name="failures", daemon=True)
        self.rank = dist.get_rank()
        self.failure: Failure | None = None
        self.heard, self.left, self.ending = threading.Event(), threading.Event(), threading.Lock()
        self.connection = socket.create_connection((os.environ["MASTER_ADDR"], port), CONNECT_SECONDS)
        self.connection.settimeout(None)
        _keep_alive(self.connection)
        self._tell(
            token=token.hex(), rank=self.rank, name=f"on {socket.gethostname()}, process {os.getpid()},"
        )

    def _tell(self, **what: Any) -> None:
        with suppress(OSError):  # the first rank is gone, which `run` hears
            self.connection.sendall(json.dumps(what).encode() + b"\n")

    def run(self) -> None:
        try:
            line = self.connection.makefile("rb").readline()
        except OSError:
            line = b""
        gone = Failure(0, 3, f"on {os.environ['MASTER_ADDR']} {_KILLED}", killed=True)
        fields = json.loads(line) if line else gone._asdict()
        self.failure = Failure(**fields) if fields else None
        self.heard.set()
        if self.failure and (self.failure.killed or not self.left.wait(GRACE_SECONDS)):
            self._end(self.failure)

    def leave(self, error: BaseException | None = None) -> None:
        """Return when all ranks are done, or, with an error, when the others know. May end the process instead."""
        if error is None or isinstance(error, Interrupted):  # all ranks have agreed to stop
            self._tell(done=True)
            self.heard.wait()
            says_enough = False
        else:
            self._tell(code=_exit_code(error), message=_in_words(error))
            self.heard.wait(GRACE_SECONDS)
            says_enough = _exit_code(error) != 1  # another rank's end may be the reason of other errors
        if self.failure and self.failure.rank != self.rank and not says_enough:
            self._end(self.failure)
        self.left.set()

    def _end(self, failure: Failure) -> None:
        """End this process as it is, in the middle of a collective; the first of the ranks left speaks."""
        self.ending.acquire()
        if self.rank == (0 if failure.rank else 1):
            print(f"llm3d: {failure}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failure.code)


class _Hub(threading.Thread):
    """On the first rank: hears from all, and tells all of the first failure, or that all are done."""

    def __init__(self, size: int) -> None:
        super().__init__(name="failures of all ranks", daemon=True)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self.listener = socket.create_server(("", 0), family=family, backlog=size, dualstack_ipv6=both)
        self.port, self.token = int(self.listener.getsockname()[1]), secrets.token_bytes(16)
        self.size, self.num_done = size, 0
        self.ready = selectors.DefaultSelector()
        self.ranks: dict[socket.socket, tuple[int, str]] = {}  # number and name
        self.halves: dict[socket.socket, bytes] = {}  # of lines that have come in part
        self.killed: Failure | None = None
        self.reported: Failure | None = None
        self.reported_at = 0.0

    def run(self) -> None:
        with self.ready, self.listener:
            self.ready.register(self.listener, selectors.EVENT_READ)
            while self.num_done < self.size and not self._verdict():
                for key, _ in self.ready.select(SETTLE_SECONDS if self.reported else None):
                    assert isinstance(key.fileobj, socket.socket)
                    if key.fileobj is self.listener:
                        self._accept()
                    elif not self._hear(key.fileobj):
                        self.ready.unregister(key.fileobj)
        failure = self._verdict()
        line = json.dumps(failure._asdict() if failure else {}).encode() + b"\n"
        # The first rank comes last: hearing of a failure, it may end this process.
        for connection, _ in sorted(self.ranks.items(), key=lambda item: item[1], reverse=True):
            with suppress(OSError):
                connection.sendall(line)

    def _verdict(self) -> Failure | None:
        """The first failure, once all can be told and no end of another rank can still explain it."""
        if len(self.ranks) < self.size:
            return None
        if self.killed or self.reported is None:
            return self.killed
        explains_itself = self.reported.code != 1
        settled = time.monotonic() >= self.reported_at + SETTLE_SECONDS
        return self.reported if explains_itself or settled else None

    def _accept(self) -> None:
        connection, _ = self.listener.accept()
        _keep_alive(connection)
        self.ready.register(connection, selectors.EVENT_READ)

    def _hear(self, connection: socket.socket) -> bool:
        """Read what a rank says; -> whether it may say more."""
        try:
            read = connection.recv(65536)
        except OSError:
            read = b""
        *lines, rest = (self.halves.get(connection, b"") + read).split(b"\n")
        self.halves[connection] = rest
        if not all(self._heed(connection, line) for line in lines):
            return False
        if not read and connection in self.ranks:
            rank, name = self.ranks[connection]
            self.killed = self.killed or Failure(rank, 3, f"{name} {_KILLED}", killed=True)
        return bool(read)

    def _heed(self, connection: socket.socket, line: bytes) -> bool:
        """-> whether it may say more: not a rank that is done or has failed, nor somebody who is no rank."""
        if connection not in self.ranks:
            with suppress(ValueError, KeyError, TypeError):
                message = json.loads(line)
                if secrets.compare_digest(bytes.fromhex(message["token"]), self.token):
                    self.ranks[connection] = message["rank"], message["name"]
            return connection in self.ranks
        message = json.loads(line)
        if "code" in message and not self.reported:
            rank, name = self.ranks[connection]
            self.reported = Failure(rank, message["code"], f"{name} failed: {message['message']}")
            self.reported_at = time.monotonic()
        self.num_done += "done" in message
        return False


_KILLED = "was killed (by the host for want of memory?) or has crashed"


def _exit_code(error: BaseException) -> int:
    """As the command line has it."""
    if isinstance(error, InputError):
        return 2
    if isinstance(error, TrainingAborted):
        return 3
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _in_words(error: BaseException) -> str:
    """One line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError | TrainingAborted) else f"{type(error).__name__}: {text}"


def _keep_alive(connection: socket.socket) -> None:
    """Have the kernel notice that the other host is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
