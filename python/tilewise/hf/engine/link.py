"""Messages between the target and a draft: short lists of commands over a socket.

What crosses is text (JSON) and, where drafts have laws, arrays behind it. The connection is the standard library's,
with its mutual authentication. Whoever waits for a message or looks for one does so itself: no thread stands between.

torch.distributed brings the two together where they run on several machines (its store: :mod:`.processes`), but does
not carry the messages. Its gloo backend can only be waited for, so it needs a thread a link and has one of its own;
with both cores computing, a message then lay for up to two milliseconds, half a verification of the default pair, until
the threads had had their turn. A socket of our own is written and read in the time of a system call.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Link", "pack", "ready", "unpack"]

_STUCK = 2  # seconds until a peer that takes nothing counts as gone


def pack(commands: Sequence[Any], arrays: Sequence[NDArray[Any]]) -> bytes:
    """A message of commands, which name arrays by their index."""
    shapes = [[array.dtype.str, list(array.shape)] for array in arrays]
    text = json.dumps([commands, shapes], separators=(",", ":")).encode()
    return b"".join([len(text).to_bytes(4, "little"), text, *(np.ascontiguousarray(one).tobytes() for one in arrays)])


def unpack(message: bytes) -> tuple[list[Any], list[NDArray[Any]]]:
    """What :func:`pack` packed."""
    end = 4 + int.from_bytes(message[:4], "little")
    commands, shapes = json.loads(message[4:end])
    arrays = []
    for kind, shape in shapes:
        count = int(np.prod(shape))
        array = np.frombuffer(message, np.dtype(kind), count, end).reshape(shape)
        end += array.nbytes
        arrays.append(array)
    return commands, arrays


class Link:
    """One end of a link.

    Args:
        connection: an open one; the link owns it.

    Attributes:
        lost: whether the peer is gone.
    """

    def __init__(self, connection: Connection):
        self.connection = connection
        self.lost = False
        # Connection.poll makes a selector each time, and both sides ask between any two steps.
        self._poll: Callable[[], Any] = connection.poll
        if hasattr(select, "poll"):
            poll = select.poll()
            poll.register(connection.fileno(), select.POLLIN)
            self._poll = lambda: poll.poll(0)
        if sys.platform != "win32":  # a peer that hangs must not hang us
            with socket.socket(fileno=os.dup(connection.fileno())) as view:
                view.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _STUCK, 0))
                if view.family != socket.AF_UNIX:
                    view.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, commands: Sequence[Any], arrays: Sequence[NDArray[Any]] = ()) -> bool:
        """Send a message; False if the peer is gone."""
        if not self.lost:
            try:
                self.connection.send_bytes(pack(commands, arrays))
            except OSError:  # closed, broken, or stuck
                self.lost = True
        return not self.lost

    def receive(self) -> tuple[list[Any], list[NDArray[Any]]] | None:
        """The next message, if one has come; None if not, or if the peer is gone."""
        if self.lost:
            return None
        try:
            return unpack(self.connection.recv_bytes()) if self._poll() else None
        except (EOFError, OSError):
            self.lost = True
            return None

    def close(self) -> None:
        """Close this end, which the other notices."""
        self.lost = True
        self.connection.close()


def ready(links: Sequence[Link], timeout: float | None) -> None:
    """Return when one of these links has a message or has lost its peer, or after `timeout` seconds."""
    wait([link.connection for link in links if not link.lost], timeout)
