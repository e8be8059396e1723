"""One call of a user's coroutine: time-outs, retries, and an end that is bounded even if the callee does not want one.

The hazards are known from agent code in the wild: a retry loop with a catch-all swallows the cancellation and asks
again, and a fire-and-forget cancel leaves the call running. Here every call is a task that somebody waits for:

* a time-out and a stop cancel the task and wait; if it does not end, it is cancelled again, up to `patience` seconds;
* a task that still runs then is *abandoned*: reported, never silently;
* a retry catches ``Exception`` and so never a cancellation, and its pause ends at once when the call is stopped.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from tilewise.errors import ArgumentError, ReplyError

__all__ = ["Meter", "Outcome", "Retry", "report_tokens", "supervise"]


@dataclass(frozen=True)
class Retry:
    """How often, and after what pause, a call that raised is made again.

    Attributes:
        attempts: at most, the first one among them.
        delay: seconds before the second attempt; each further pause is `factor` times as long, up to `most`.
        on: exceptions that are worth another attempt. Time-outs (``TimeoutError``) and unreadable answers
            (:class:`~tilewise.errors.ReplyError`) are exceptions like others.

    Raises:
        ArgumentError: no attempt, a negative pause, or an exception class that is none (``CancelledError`` is not an
            ``Exception``, and is never retried).

    Example:
        >>> [Retry(attempts=5, delay=1.0, most=3.0).pause(attempt) for attempt in range(1, 5)]
        [1.0, 2.0, 3.0, 3.0]
    """

    attempts: int = 1
    delay: float = 0.5
    factor: float = 2.0
    most: float = 30.0
    on: tuple[type[Exception], ...] = (Exception,)

    def __post_init__(self) -> None:
        if not isinstance(self.attempts, int) or self.attempts < 1:
            raise ArgumentError(f"Retry: attempts is 1 or more, got {self.attempts!r}")
        if not (self.delay >= 0 and self.factor >= 1 and self.most >= 0):
            raise ArgumentError(
                f"Retry: expected delay >= 0, factor >= 1, most >= 0; got {self.delay}, {self.factor}, {self.most}"
            )
        for kind in self.on:
            if not (isinstance(kind, type) and issubclass(kind, Exception)):
                raise ArgumentError(f"Retry: on holds subclasses of Exception, got {kind!r}")

    def pause(self, attempt: int) -> float:
        """Seconds after attempt number `attempt` (1 for the first)."""
        return min(self.most, self.delay * self.factor ** (attempt - 1))


@dataclass
class Meter:
    """What one attempt of a call has spent so far, as far as its callee says (:func:`report_tokens`)."""

    prompt: int = 0
    generation: int = 0
    known: bool = False


_meter: contextvars.ContextVar[Meter | None] = contextvars.ContextVar("tilewise_meter", default=None)


def report_tokens(*, prompt: int = 0, generation: int = 0) -> None:
    """Called by an agent while it works: what it has spent since it last said so.

    Only needed where a call may end without a :class:`~tilewise.scheduler.planning.Reply`, cancelled or failed: what
    was said goes to the ledger then. Does nothing outside of a planner's call.

    Raises:
        ArgumentError: a negative number.

    Example:
        >>> report_tokens(prompt=812)
    """
    if prompt < 0 or generation < 0:
        raise ArgumentError(f"report_tokens: expected 0 or more, got prompt {prompt}, generation {generation}")
    meter = _meter.get()
    if meter is not None:
        meter.prompt, meter.generation, meter.known = meter.prompt + prompt, meter.generation + generation, True


@dataclass
class Outcome:
    """How a call ended.

    Attributes:
        kind: ``"answer"`` (see `value`), ``"failed"`` (see `error`), ``"cancelled"`` or ``"abandoned"`` (still
            running).
        swallowed: the callee caught a cancellation and went on.
        meter: of the last attempt.
        late: for a stopped call, the value it answered all the same.
    """

    kind: Literal["answer", "failed", "cancelled", "abandoned"]
    value: Any = None
    error: BaseException | None = None
    swallowed: bool = False
    meter: Meter | None = None
    late: Any = None


async def supervise(
    call: Callable[[], Awaitable[Any]],
    stop: asyncio.Future[None],
    *,
    timeout: float | None = None,
    retry: Retry = Retry(),
    patience: float = 1.0,
    check: Callable[[Any], None] = lambda value: None,
    spent: Callable[[Meter], None] = lambda meter: None,
    orphan: Callable[[asyncio.Task[Any]], None] = lambda task: None,
) -> Outcome:
    """Run a call until it answers, gives up, or is stopped; ends at most `patience` seconds after a stop.

    Args:
        call: makes the awaitable of one attempt.
        stop: resolved when the call is not wanted any more.
        timeout: seconds for one attempt.
        retry: what to do with exceptions.
        patience: seconds that a cancelled attempt has for its own clean-up.
        check: raises if a value is no answer.
        spent: told what a failed attempt cost before the next one begins.
        orphan: given the task of an attempt that would not end.
    """
    swallowed = False
    attempt = 0
    while True:
        attempt += 1
        meter = Meter()
        context = contextvars.copy_context()
        context.run(_meter.set, meter)
        task = asyncio.create_task(_attempt(call), context=context)
        try:
            await asyncio.wait({task, stop}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                ended, again = await _end(task, patience)
                swallowed |= again
                if not ended:
                    orphan(task)
                    if stop.done():
                        return Outcome("abandoned", swallowed=True, meter=meter)
                if stop.done():
                    return _stopped(task, swallowed, meter)
                error: BaseException = TimeoutError(f"the call took more than {timeout:g} s")
                if not ended:
                    return Outcome("failed", error=error, swallowed=True, meter=meter)
            elif task.cancelled():
                error = ReplyError("the call cancelled itself: asyncio.CancelledError though nobody had cancelled it")
            else:
                failure = task.exception()
                if failure is None:
                    try:
                        check(task.result())
                        return Outcome("answer", task.result(), swallowed=swallowed, meter=meter)
                    except Exception as unusable:
                        failure = unusable
                        meter = _billed(task.result(), meter)
                error = failure
        finally:
            if not task.done():
                task.cancel()  # this coroutine itself is being cancelled, or the task was abandoned
        if attempt >= retry.attempts or not isinstance(error, retry.on):
            return Outcome("failed", error=error, swallowed=swallowed, meter=meter)
        spent(meter)
        await asyncio.wait({stop}, timeout=retry.pause(attempt))
        if stop.done():
            return Outcome("cancelled", swallowed=swallowed, meter=Meter(known=True))


async def _attempt(call: Callable[[], Awaitable[Any]]) -> Any:
    return await call()


def _billed(value: Any, meter: Meter) -> Meter:
    """What an answer that cannot be used says it cost."""
    prompt, generation = getattr(value, "prompt_tokens", None), getattr(value, "generation_tokens", None)
    if isinstance(prompt, int) and isinstance(generation, int):
        return Meter(prompt, generation, known=True)
    return meter


def _stopped(task: asyncio.Task[Any], swallowed: bool, meter: Meter) -> Outcome:
    if task.cancelled():
        return Outcome("cancelled", swallowed=swallowed, meter=meter)
    if task.exception() is not None:  # its clean-up raised; nobody wants the result, and it has ended
        return Outcome("cancelled", swallowed=swallowed, meter=meter)
    return Outcome("cancelled", swallowed=True, meter=meter, late=task.result())


async def _end(task: asyncio.Task[Any], patience: float) -> tuple[bool, bool]:
    """Cancel a task and wait for it; whether it ended, and whether it had to be told more than once."""
    for turn, share in enumerate((0.5, 0.25, 0.25)):
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=share * patience)
        if done:
            return True, turn > 0
    return False, True
