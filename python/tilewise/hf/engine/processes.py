"""Starting and ending the drafts' processes, here or on other machines.

A draft's process reads its model from its standard input, calls back, and ends when that input closes. So it ends with
us, however we end: by :meth:`DraftProcess.close`, by an exception, or by a signal that nobody can catch.

With ``torchrun`` the drafts are the processes of rank 1 and up, which call :func:`serve_draft`; where to call back to
is written into torch.distributed's store.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

from torch.distributed.rendezvous import rendezvous
from transformers import PreTrainedModel

import tilewise
from tilewise.errors import ArgumentError
from tilewise.hf.engine.link import Link
from tilewise.hf.engine.worker import Worker, pack_model

__all__ = ["DraftProcess", "serve_draft", "torchrun_rank"]

_KEY = "tilewise/draft/{}"


class DraftProcess:
    """A draft in a process of its own, and the link to it.

    Args:
        draft: its model; None if the process is one of torchrun's, which has its own.
        name: a number that tells the handles of this process from those of others.
        threads: that it computes with.
    """

    def __init__(self, draft: PreTrainedModel | None, name: int, threads: int):
        self.name = name
        self.link: Link | None = None
        self.ready = False
        self._key = secrets.token_bytes(32)
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        # Meeting takes as long as the other process takes to start, which must not hold up the target: a thread.
        if draft is None:
            host = socket.gethostbyname(socket.gethostname())
            self._listener = Listener((host, 0), authkey=self._key)
            address = f"{host} {self._listener.address[1]} {name} {self._key.hex()}"
            _store().set(_KEY.format(name), address)
            content = b""
        else:
            self._listener = Listener(("127.0.0.1", 0), authkey=self._key)
            self._process = self._start(threads)
            content = pack_model(draft, threads)
        threading.Thread(target=self._meet, args=(content,), name=f"tilewise-draft-{name}", daemon=True).start()

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The process, where we started it."""
        return self._process

    def _start(self, threads: int) -> subprocess.Popen[bytes]:
        program = "from tilewise.hf.engine import worker; worker.main()"
        # The package as it was found here, wherever that is.
        paths = [str(Path(tilewise.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads), "TILEWISE_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)
        }  # fmt: skip
        return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, env=environment)

    def _meet(self, content: bytes) -> None:
        process = self._process
        try:
            if process is not None:
                assert process.stdin is not None
                port = int(self._listener.address[1])
                for part in (port.to_bytes(4, "little"), self.name.to_bytes(4, "little"), self._key):
                    process.stdin.write(part)
                process.stdin.write(len(content).to_bytes(8, "little"))
                process.stdin.write(content)
                process.stdin.flush()
                threading.Thread(target=self._watch, daemon=True).start()
            link = Link(self._listener.accept())
        except (OSError, EOFError, ValueError):
            return  # it ended early, or we closed: `lost` says so
        finally:
            self._listener.close()
        self.link = link

    def _watch(self) -> None:
        """If the process ends before it has called, nobody will."""
        assert self._process is not None
        self._process.wait()
        if self.link is None:
            self._listener.close()

    @property
    def lost(self) -> bool:
        """Whether the draft is gone."""
        if self._process is not None and self._process.poll() is not None:
            return True
        return self.link is not None and self.link.lost

    def send(self, commands: list[Any]) -> bool:
        """Send a message; False if the draft is not there."""
        return self.link is not None and self.link.send(commands)

    def close(self) -> None:
        """End the process and wait for its end."""
        if self._closed:
            return
        self._closed = True
        if self.link is not None:
            self.link.send([["exit"]])
            self.link.close()
        process = self._process
        if process is None:
            return
        try:
            assert process.stdin is not None
            process.stdin.close()
        except OSError:  # it is gone already
            pass
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._listener.close()


def torchrun_rank() -> tuple[int, int]:
    """This process's rank and the number of processes, of a run that torchrun started.

    Raises:
        ArgumentError: torchrun did not.
    """
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except KeyError:
        raise ArgumentError("no RANK in the environment: start this program with torchrun") from None


def _store() -> Any:
    rank, size = torchrun_rank()
    return next(iter(rendezvous("env://", rank, size)))[0]


def serve_draft(draft: PreTrainedModel) -> None:
    """Be the draft of the process of rank 0, until that ends: what the other ranks of torchrun call.

    Args:
        draft: the model.

    Raises:
        ArgumentError: torchrun did not start this process, or it is rank 0.
    """
    rank, _ = torchrun_rank()
    if rank == 0:
        raise ArgumentError("rank 0 is the target: it makes a SpeculativeGenerator; the other ranks call serve_draft")
    name = rank - 1
    host, port, _, key = _store().get(_KEY.format(name)).decode().split()
    Worker(draft, Link(Client((host, int(port)), authkey=bytes.fromhex(key))), name).run()
