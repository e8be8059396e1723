"""The draft processes of a generator: who runs, and what goes to and fro."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray
from transformers import PreTrainedModel

from tilewise.hf.engine.link import ready
from tilewise.hf.engine.processes import DraftProcess

__all__ = ["Drafts"]


class Drafts:
    """Workers 0 .. count - 1, each a process that may not have called yet, serve, or be gone.

    Args:
        draft: the model for those that are started here; None where they are torchrun's.
        count: how many.
        threads: of each.

    Attributes:
        processes: by worker; None where there is none.
        lost: how many died.
    """

    def __init__(self, draft: PreTrainedModel | None, count: int, threads: int):
        self._draft, self._threads = draft, threads
        self.processes: dict[int, DraftProcess | None] = dict.fromkeys(range(count))
        self._outgoing: dict[int, list[Any]] = {}
        self._started = 0
        self.lost = 0

    def start(self) -> None:
        """Start a process for every worker that has none; those of torchrun once."""
        for worker, process in self.processes.items():
            if process is None and (self._draft is not None or self._started == 0):
                name = self._started * len(self.processes) + worker
                self.processes[worker] = DraftProcess(self._draft, name, self._threads)
        self._started += 1

    @property
    def complete(self) -> bool:
        """Whether every worker has a process, serving or not."""
        return all(process is not None for process in self.processes.values())

    @property
    def serving(self) -> bool:
        """Whether every worker serves."""
        return all(process is not None and process.ready for process in self.processes.values())

    @property
    def threads_here(self) -> int:
        """Threads that compute on this machine beside ours."""
        if self._draft is None:
            return 0
        return self._threads * sum(process is not None for process in self.processes.values())

    def made(self, worker: int, handle: int) -> bool:
        """Whether the worker that runs now made the content of this handle."""
        process = self.processes[worker]
        return process is not None and handle % 1024 == process.name % 1024

    def send(self, worker: int, *message: Any) -> None:
        """Note a message; :meth:`flush` sends."""
        self._outgoing.setdefault(worker, []).append(message)

    def flush(self) -> None:
        """Send what was noted, one message a worker."""
        for worker, messages in self._outgoing.items():
            process = self.processes[worker]
            if process is not None:
                process.send(messages)
        self._outgoing.clear()

    def greet(self, worker: int, settings: dict[str, Any]) -> None:
        """A worker called: it serves from now on, with these settings."""
        process = self.processes[worker]
        if process is not None:
            process.ready = True
            process.send([["settings", settings]])

    def wait(self, timeout: float) -> None:
        """Return when something came, or after `timeout` seconds."""
        links = [one.link for one in self.processes.values() if one is not None and one.link is not None]
        # Who has not called yet is looked after from time to time.
        starting = any(one is not None and not one.ready for one in self.processes.values())
        ready(links, min(timeout, 0.01) if starting else timeout)

    def receive(self) -> Iterator[tuple[int, list[Any], list[NDArray[Any]]]]:
        """What has come: worker, event, arrays. ``["lost"]`` is the last of a worker that is gone."""
        for worker, process in self.processes.items():
            if process is None:
                continue
            while process.link is not None and (message := process.link.receive()) is not None:
                for event in message[0]:
                    yield worker, event, message[1]
            if process.lost:
                process.close()
                self.processes[worker] = None
                self.lost += 1
                yield worker, ["lost"], []

    def wait_until_serving(self, deadline: float) -> Iterator[float]:
        """Yields seconds to listen for, until all serve, the deadline has passed, or one is gone."""
        while not self.serving:
            left = deadline - time.perf_counter()
            if left <= 0 or not self.complete:
                return
            yield min(left, 0.05)

    def close(self) -> None:
        """End the processes."""
        for process in self.processes.values():
            if process is not None:
                process.close()
        self.processes = dict.fromkeys(self.processes)
