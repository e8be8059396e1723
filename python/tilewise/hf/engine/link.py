"""Messages between the target and a draft: short lists of commands, over torch.distributed.

A link is a gloo process group of two, of its own: the user's default group is neither needed nor touched. What crosses
is text (JSON) and, where drafts have laws, arrays behind it. A thread per link waits for messages and puts them into an
inbox; a peer that goes away puts ``("lost", peer)`` there.

Frame: ``uint32`` bytes of text, ``uint32`` bytes in all, text, arrays; the first :data:`FRAME` bytes in one send, the
rest, if there is any, in a second.
"""

from __future__ import annotations

import json
import threading
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

__all__ = ["FRAME", "Link", "pack", "unpack"]

FRAME = 4096
_FOREVER = timedelta(days=365)


def pack(commands: list[Any], arrays: list[NDArray[Any]]) -> bytes:
    """A message of commands, which name arrays by their index."""
    shapes = [[array.dtype.str, list(array.shape)] for array in arrays]
    text = json.dumps([commands, shapes], separators=(",", ":")).encode()
    body = b"".join([text, *(np.ascontiguousarray(array).tobytes() for array in arrays)])
    return len(text).to_bytes(4, "little") + (8 + len(body)).to_bytes(4, "little") + body


def unpack(frame: bytes) -> tuple[list[Any], list[NDArray[Any]]]:
    """What :func:`pack` packed."""
    end = 8 + int.from_bytes(frame[:4], "little")
    commands, shapes = json.loads(frame[8:end])
    arrays = []
    for kind, shape in shapes:
        array = np.frombuffer(frame, np.dtype(kind), int(np.prod(shape)), end).reshape(shape)
        end += array.nbytes
        arrays.append(array)
    return commands, arrays


class Link:
    """One end of a link.

    Args:
        store: where the two ends meet.
        rank: 0 in the target's process, 1 in the draft's.
        name: of the peer, in the inbox.
        inbox: receives ``("message", name, commands, arrays)`` and, at the end, ``("lost", name)``.
    """

    def __init__(self, store: Any, rank: int, name: int, inbox: SimpleQueue[Any]):
        self._group: Any = distributed.ProcessGroupGloo(store, rank, 2, _FOREVER)
        self._peer, self._name, self._inbox = 1 - rank, name, inbox
        self._open = True
        threading.Thread(target=self._listen, name=f"tilewise-link-{name}", daemon=True).start()

    def send(self, commands: list[Any], arrays: list[NDArray[Any]] | None = None) -> bool:
        """Send a message; False if the peer is gone (which the inbox hears too)."""
        if not self._open:
            return False
        frame = pack(commands, arrays or [])
        head = torch.frombuffer(bytearray(frame[:FRAME].ljust(FRAME, b"\0")), dtype=torch.uint8)
        try:
            self._group.send([head], self._peer, 0).wait()
            if len(frame) > FRAME:
                rest = torch.frombuffer(bytearray(frame[FRAME:]), dtype=torch.uint8)
                self._group.send([rest], self._peer, 0).wait()
        except RuntimeError:  # gloo has no class of its own for a closed connection
            self._open = False
            return False
        return True

    def _receive(self) -> bytes:
        head = torch.empty(FRAME, dtype=torch.uint8)
        self._group.recv([head], self._peer, 0).wait()
        frame = head.numpy().tobytes()
        size = int.from_bytes(frame[4:8], "little")
        if size > FRAME:
            rest = torch.empty(size - FRAME, dtype=torch.uint8)
            self._group.recv([rest], self._peer, 0).wait()
            return frame + rest.numpy().tobytes()
        return frame[:size]

    def _listen(self) -> None:
        try:
            while True:
                self._inbox.put(("message", self._name, *unpack(self._receive())))
        except RuntimeError:
            self._open = False
            self._inbox.put(("lost", self._name))
