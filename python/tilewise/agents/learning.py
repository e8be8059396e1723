"""Training beside planning: one worker thread, never awaited.

The predictor holds two copies. :meth:`Trainer.poll` is called on the event loop between two events of an episode and
returns at once: it puts a finished copy into service, and hands the next job to the thread. So the two never share
anything that changes, and need no lock.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import weakref
from typing import Any

from tilewise.scheduler.planning import State
from tilewise.scheduler.planning.predictor import Predictor

__all__ = ["Trainer"]


class Trainer:
    """Drives a predictor's training, and its predictions where those may take long.

    Args:
        predictor: see :class:`tilewise.scheduler.planning.predictor.Predictor`.

    Attributes:
        updates: copies that went into service.
        errors: exceptions of training; planning goes on with the copy in service.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.updates = 0
        self.errors: list[BaseException] = []
        self._job: concurrent.futures.Future[Any] | None = None
        # Two pools of one thread: a prediction must not queue behind a training.
        self._training = concurrent.futures.ThreadPoolExecutor(1, "tilewise-planner-training")
        self._predicting = concurrent.futures.ThreadPoolExecutor(1, "tilewise-planner-predicting")
        for pool in (self._training, self._predicting):
            weakref.finalize(self, pool.shutdown, wait=False, cancel_futures=True)

    async def predict(self, state: State) -> int:
        """k for a state, from the thread of predictions."""
        return await asyncio.wrap_future(self._predicting.submit(self.predictor.predict, state))

    def poll(self) -> None:
        """Publish what is trained, start what is to be trained; never waits."""
        if self._job is not None and self._job.done():
            job, self._job = self._job, None
            error = job.exception()
            if error is not None:
                self.errors.append(error)
            elif self.predictor.publish(job.result()):
                self.updates += 1
        if self._job is None:
            prepared = self.predictor.prepare()
            if prepared is not None:
                self._job = self._training.submit(self.predictor.fit, prepared)

    def settle(self, timeout: float | None = None) -> None:
        """Wait for the training in progress and publish it: between episodes, if at all (blocks the thread).

        Raises:
            TimeoutError: it took longer.
        """
        if self._job is not None:
            done, _ = concurrent.futures.wait([self._job], timeout)
            if not done:
                raise TimeoutError(f"training took more than {timeout:g} s")
            self.poll()

    def close(self) -> None:
        """Accept no more work; what runs in a thread runs to its end."""
        for pool in (self._training, self._predicting):
            pool.shutdown(wait=False, cancel_futures=True)
