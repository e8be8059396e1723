"""Starting and ending the drafts' processes.

A draft's process reads its model from its standard input and ends when that closes. So it ends with us, however we end:
by :meth:`DraftProcess.close`, by an exception, or by a signal that nobody can catch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from torch import distributed
from transformers import PreTrainedModel

import tilewise
from tilewise.hf.engine.link import Link
from tilewise.hf.engine.worker import pack_model

__all__ = ["DraftProcess", "start"]


class DraftProcess:
    """A draft in a process of its own, and the link to it."""

    def __init__(self, name: int, process: subprocess.Popen[bytes], store: Any, inbox: SimpleQueue[Any]):
        self.name, self.process = name, process
        self._store, self._inbox = store, inbox
        self.link: Link | None = None
        self.ready = False
        # Meeting takes as long as the other process takes to start: seconds. It must not hold up the target.
        threading.Thread(target=self._meet, name=f"tilewise-meet-{name}", daemon=True).start()
        threading.Thread(target=self._wait, name=f"tilewise-wait-{name}", daemon=True).start()

    def _meet(self) -> None:
        try:
            self.link = Link(distributed.PrefixStore(f"tilewise/{self.name}", self._store), 0, self.name, self._inbox)
        except RuntimeError:
            self._inbox.put(("lost", self.name))

    def _wait(self) -> None:
        self.process.wait()
        self._inbox.put(("lost", self.name))

    def send(self, commands: list[Any]) -> bool:
        """Send a message; False if the draft is not there."""
        return self.link is not None and self.link.send(commands)

    def close(self) -> None:
        """End the process and wait for its end."""
        if self.process.stdin is not None:
            try:
                self.process.stdin.close()
            except OSError:  # it is gone already
                pass
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start(draft: PreTrainedModel, name: int, threads: int, inbox: SimpleQueue[Any], store: Any) -> DraftProcess:
    """Start a draft's process; the inbox hears ``("message", name, [["ready"]], [])`` when it serves.

    Args:
        draft: its model.
        name: a number that no other process of this store has had.
        threads: that it computes with.
        inbox: of the target.
        store: a ``TCPStore`` of this process.
    """
    command = [sys.executable, "-m", "tilewise.hf.engine.worker", store.host, str(store.port), str(name)]
    # The package as it was found here, wherever that is.
    paths = [str(Path(tilewise.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "TILEWISE_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths)
    }  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
    content = pack_model(draft, threads)

    def feed() -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(len(content).to_bytes(8, "little") + content)
            process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass  # it ended early: the inbox hears of it

    threading.Thread(target=feed, name=f"tilewise-feed-{name}", daemon=True).start()
    return DraftProcess(name, process, store, inbox)
