"""Ends a run in several processes when a rank is lost, and stops it when its launcher is gone.

Without it the ranks that are left wait for the lost one in a collective, for as long as the backend
pleases, and ranks without their launcher train on, out of reach.

Every rank has a connection to rank 0. The kernel closes it when a process ends in whatever way, and
TCP's keep-alive when a machine does; so a rank that is merely slow is never taken for a lost one.
"""

import os
import secrets
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from tract_det import distributed
from tract_det.errors import UserError

_POLL_SECONDS = 1.0  # between two looks at the launchers
_CONNECT_SECONDS = 30.0
_GREETING_SECONDS = 5.0
# An error of this rank may be the consequence of another's end, which is about to be noticed.
_NOTICE_SECONDS = 1.0
# Ranks that come upon the same error have this long to print it themselves.
_ERROR_SECONDS = 5.0

_ENDED = struct.Struct("!iB")  # a rank, and the exit code it ended with
_LOST = 255
_STDERR = 2
_LOST_CODE = 1


@contextmanager
def watched(mend: str) -> Iterator[None]:
    """Watches the launchers and the other ranks meanwhile. Every rank must enter it.

    When a rank is lost, the process ends at once with exit code 1 and a line that names the rank.
    When a rank ends by an error, which it prints, the process ends with the exit code of that rank.
    When a launcher is gone, the process sends SIGTERM to itself.

    Args:
        mend: what the user can do when a rank is lost, for the message.
    """
    launchers = _launchers()
    is_alone = not distributed.is_initialized() or distributed.world_size() == 1
    if is_alone and not launchers:
        yield
        return
    watch = _Watch({} if is_alone else _connect(), launchers, mend)
    watch.start()
    try:
        yield
    except BaseException as error:
        watch.explain(error)
        raise
    watch.leave(0)


class _Watch(threading.Thread):
    """The thread that waits for news.

    Args:
        peers: the ranks that this one is connected to, with their connections.
        launchers: as `_launchers` gives them.
        mend: as in `watched`.
    """

    def __init__(
        self, peers: dict[int, socket.socket], launchers: tuple[int, ...], mend: str
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self.peers, self.launchers, self.mend = peers, launchers, mend
        self.rank = distributed.rank()
        self.is_ending = threading.Event()
        self.is_lost = self.is_left = False
        self.wake, self.sleeper = socket.socketpair()
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.sleeper, selectors.EVENT_READ, self.rank)
        for peer, connection in peers.items():
            self.selector.register(connection, selectors.EVENT_READ, peer)

    def run(self) -> None:
        """Waits for news until `leave` is called, or ends the process."""
        while not self.is_left:
            timeout = _POLL_SECONDS if self.launchers else None
            for key, _ in self.selector.select(timeout):
                if key.data != self.rank:
                    self._hear(key.data)
            if self.launchers and not self.is_left and _is_gone(self.launchers):
                self._say("the launcher is gone: stopping")
                self.launchers = ()
                os.kill(os.getpid(), signal.SIGTERM)

    def _hear(self, peer: int) -> None:
        """Reads what a peer says; nothing means that it is lost."""
        connection = self.peers[peer]
        message = b""
        with suppress(OSError):
            message = connection.recv(_ENDED.size, socket.MSG_WAITALL)
        rank, code = _ENDED.unpack(message) if len(message) == _ENDED.size else (peer, _LOST)
        if code != 0:
            self._end(rank, code)
        self.selector.unregister(connection)

    def _end(self, rank: int, code: int) -> NoReturn:
        """Ends this process, after it has passed on that a rank is lost or ended by an error."""
        self.is_lost = code == _LOST
        self.is_ending.set()
        self._send(rank, code)
        if self.is_lost:
            self._say(
                f"error: rank {rank} is lost: it was killed, or its machine is down; {self.mend}"
            )
            os._exit(_LOST_CODE)
        threading.Event().wait(_ERROR_SECONDS)
        os._exit(code)

    def _send(self, rank: int, code: int) -> None:
        for connection in self.peers.values():
            with suppress(OSError):  # that one is gone as well
                connection.sendall(_ENDED.pack(rank, code))

    def _say(self, text: str) -> None:
        # Not by `print`: the main thread may hold its lock, stuck in a write.
        with suppress(OSError):
            os.write(_STDERR, f"[rank {self.rank}] {text}\n".encode())

    def explain(self, error: BaseException) -> None:
        """Ends the process if another rank's end explains the error; else tells the others."""
        code = getattr(error, "exit_code", 1)
        if not self.peers:
            self.leave(code)
            return
        is_noticed = self.is_ending.wait(_NOTICE_SECONDS)
        if is_noticed and (self.is_lost or not isinstance(error, UserError)):
            self.join()
        # The thread stays, and may be about to end this process, which is ending anyway.
        self._send(self.rank, code)

    def leave(self, code: int) -> None:
        """Tells the other ranks that this one ends with this exit code, and ends the thread."""
        self.is_left = True
        self.wake.send(b".")
        self.join()
        self._send(self.rank, code)
        for connection in (*self.peers.values(), self.wake, self.sleeper):
            connection.close()
        self.selector.close()


def _connect() -> dict[int, socket.socket]:
    """Rank 0's connections to all others, or this rank's to rank 0. Every rank must call it.

    A connection that cannot be made is a warning: whether that rank is lost, the launcher sees.
    """
    door = _door() if distributed.rank() == 0 else None
    invitation = [(0, b"") if door is None else (door.getsockname()[1], secrets.token_bytes(16))]
    dist.broadcast_object_list(invitation)
    port, token = invitation[0]
    peers = _call(port, token) if door is None else _receive(door, token)
    for connection in peers.values():
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    return peers


def _door() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _call(port: int, token: bytes) -> dict[int, socket.socket]:
    """The connection to rank 0, once that one has confirmed it."""
    address = os.environ["MASTER_ADDR"], port
    try:
        connection = socket.create_connection(address, timeout=_CONNECT_SECONDS)
        connection.sendall(token + _ENDED.pack(distributed.rank(), 0))
        if connection.recv(len(token), socket.MSG_WAITALL) == token:
            return {0: connection}
        _warn("rank 0 does not answer")
    except OSError as error:
        _warn(str(error))
    return {}


def _receive(door: socket.socket, token: bytes) -> dict[int, socket.socket]:
    """The connections to the ranks that call in time."""
    peers: dict[int, socket.socket] = {}
    end = time.monotonic() + _CONNECT_SECONDS
    with door:
        while len(peers) < distributed.world_size() - 1:
            door.settimeout(max(end - time.monotonic(), 0.001))
            try:
                connection, _ = door.accept()
            except TimeoutError:
                _warn(f"{distributed.world_size() - 1 - len(peers)} of them have not called")
                break
            with suppress(OSError):
                connection.settimeout(_GREETING_SECONDS)
                greeting = connection.recv(len(token) + _ENDED.size, socket.MSG_WAITALL)
                if len(greeting) == len(token) + _ENDED.size and secrets.compare_digest(
                    greeting[: len(token)], token
                ):
                    connection.sendall(token)
                    peers[_ENDED.unpack(greeting[len(token) :])[0]] = connection
                    continue
            connection.close()  # of a caller that is no rank, or is gone
    return peers


def _warn(reason: str) -> None:
    print(
        f"warning: rank {distributed.rank()} is not told when another one is lost: {reason}",
        file=sys.stderr,
    )


def _launchers() -> tuple[int, ...]:
    """The processes that launched this rank, the nearest first; empty without a launcher.

    They run the same Python, and their command lines end with this program and its arguments. What
    stands above them, such as a shell, `nohup` or a terminal, may end: the run goes on.
    """
    launchers: list[int] = []
    if "RANK" not in os.environ:
        return ()
    program = [
        argument.encode(errors="surrogateescape")
        for argument in sys.orig_argv[-len(sys.argv) :]
        if not argument.startswith(("--local_rank", "--local-rank"))  # which launchers insert
    ]
    process = os.getppid()
    with suppress(OSError):  # no /proc, or a process of another user
        python = Path("/proc/self/exe").readlink()
        while Path(f"/proc/{process}/exe").readlink() == python:
            command = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")[:-1]
            if command[-len(program) :] != program:
                break
            launchers.append(process)
            process = _parent(process)
    return tuple(launchers)


def _is_gone(launchers: tuple[int, ...]) -> bool:
    """Whether one of the launchers is no longer the parent of the next, or of this process."""
    children = (os.getpid(), *launchers[:-1])
    try:
        return any(
            _parent(child) != parent for child, parent in zip(children, launchers, strict=True)
        )
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:  # /proc cannot be read just now
        return False


def _parent(process: int) -> int:
    """The parent of a process; a process whose parent has ended has another one."""
    status = Path(f"/proc/{process}/stat").read_text(errors="replace")
    return int(status.rpartition(")")[2].split()[1])
