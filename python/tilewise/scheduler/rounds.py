"""The rounds of speculative decoding, with drafts that are made ahead, as a state machine.

While the target verifies a chain, draft workers guess how that will come out and draft on from each guess. If the true
outcome was guessed (a hit), the next chain is there at once; if not (a miss), the worker drafts now, or a fast draft of
the driver's own (n-grams) steps in. :class:`Rounds` decides who is verified together, what is guessed, how far ahead,
what a miss does, and what happens to requests that come, go, pause, and to workers that are late or die. It never sees
a drafted token or its law, only lengths, outcomes, ranks and times: no choice can bias what is sampled.

A *round* of a stream is one answer of the target: a prefill (nothing accepted, the first token follows), or the
verification of a chain. Round numbers of a stream never repeat, also not where its number is used again. Contents are
the driver's; the machine knows them by *handles*, integers >= 0 that the driver chooses, one for one content.

Events (tuples; times in seconds)::

    ("join", stream, limit)              ("abort", stream)    ("preempt", stream)    ("resume", stream)
    ("prefilled", stream, finished, token, fast)       the target has read the prompt and emitted one token (counts
                                         toward limit); `token` is None where nobody guesses it
    ("opened", worker, stream)           the worker has the stream's context
    ("fast", stream, round, length)      how long the chain came out, before "verified": the driver's own, or one of the
                                         model's with the driver's own tokens behind it
    ("verified", batch, seconds, [(stream, accepted, token, emitted, finished, fast), ...])
    ("entries", worker, stream, round, [(accepted, token, length, handle, ended), ...])   longer ones replace shorter
    ("built", worker, stream, round, seconds, steps, branches)                        that build is over
    ("drafted", worker, stream, round, length, handle, seconds, held)                 the answer to "draft"
    ("rank", worker, stream, round, rank)            of the true token among the guesses; -1: not among those ranked
    ("worker_ready", worker)             ("worker_lost", worker)          ("tick",)

Commands::

    ("prefill", stream)                  ("open", worker, stream)         ("forget", worker, stream)
    ("verify", batch, [(stream, round, source, handle, length), ...])     source "cached", "drafted", "fast" or "none"
    ("build", worker, stream, round, source, handle, fan_out, depth)      guess this round's outcomes, draft on behind
    ("draft", worker, stream, round, accepted, token, length)             token -1: the one the prefill did not tell
    ("outcome", worker, stream, round, accepted, token, handle)           handle -1: no entry is used
    ("stop", worker, stream, round)      ("discard", [handle, ...])
    ("finish", stream, reason)           reason "limit", "stopped" or "aborted"

`fast` is how many tokens of the driver's own draft would be kept now, as far as it can tell from the text so far; None
if it cannot. Where it can, each miss is answered by what is better there.

What the driver owes the machine:

* commands of one call are carried out in their order; those to one worker arrive in order;
* a "prefill" and a "verify" are answered once each, also where the stream was aborted meanwhile (its row then counts
  for nothing); everything that workers say may be late, lost, doubled or of another life: it is counted and ignored;
* a stream's tokens are cut at its limit by nobody but a stop: chains are never longer than the limit leaves room for;
* under rules where the output's law rests on the drafts' (rejection), lengths of entries and drafts do not depend on
  what was drafted. A draft that would end at an end-of-sequence token goes on behind it: otherwise "did it come in
  time" would depend on the content, and the output's law would shift. Under a rule that keeps a draft only where it
  equals what is drawn anyway (greedy, coupled), lengths may depend on anything. `ended` says that drafting ended by
  itself: nobody waits for more;
* when :meth:`Rounds.next_deadline` passes without an event, ``("tick",)``.
"""

from __future__ import annotations

from typing import Any, Literal

from tilewise import _core
from tilewise.errors import ArgumentError

__all__ = ["Rounds"]


class Rounds:
    """Who runs when in speculative decoding with drafts made ahead (events and commands: see the module).

    Args:
        draft_length: most tokens of a chain (K); 0 decodes plainly.
        budget: most branches of one stream's build.
        depth: most tokens that a branch is drafted ahead; None: `draft_length`.
        fallback: what a row without a cached chain does: ``"neural"`` waits for the draft model, ``"fast"`` takes the
            driver's own draft, ``"adaptive"`` whichever is measured to give more tokens per second for the rows there
            are. A draft that does not come in time, or whose worker is gone, is replaced by a fast one in every mode;
            without any worker (``workers=0``) ``"neural"`` decodes plainly.
        max_batch: most rows of one verification.
        patience: seconds to wait for a draft before going on without; None: several times what one takes.
        adaptive: choose chain length and budget from measured times and acceptance; otherwise they are as set.
        workers: how many draft workers there may be. Each counts from its ``("worker_ready", worker)`` on.
        vocabulary: number of different tokens.
        seed: of the few random choices (when to try what is not known well enough).
        ordered: the drafts end chains by themselves and grow branches in order of their probability, as far as time
            permits: chain length and budget are bounds and are not chosen. See `ended` above.
        guess_first: the drafts guess the first token, and draft behind it, while the target reads the prompt.
        together: always verify all streams together; otherwise rows that have their chains go ahead of rows that wait
            for a draft where that is estimated to give more tokens per second.

    Raises:
        ArgumentError: a setting out of its range.

    Example:
        >>> from tilewise.scheduler import Rounds
        >>> rounds = Rounds(draft_length=2, workers=0, fallback="fast", vocabulary=10)
        >>> rounds.handle(0.0, ("join", 7, 3))
        [('prefill', 7)]
        >>> rounds.handle(0.1, ("prefilled", 7, False, None, None))
        [('verify', 1, [(7, 1, 'fast', -1, 1)])]
        >>> rounds.handle(0.2, ("verified", 1, 0.1, [(7, 1, 4, 2, False, None)]))
        [('finish', 7, 'limit')]
    """

    __slots__ = ("_core",)

    def __init__(
        self,
        *,
        draft_length: int = 7,
        budget: int = 24,
        depth: int | None = None,
        fallback: Literal["adaptive", "neural", "fast"] = "adaptive",
        max_batch: int = 8,
        patience: float | None = None,
        adaptive: bool = True,
        workers: int = 1,
        vocabulary: int,
        seed: int = 0,
        together: bool = False,
        ordered: bool = False,
        guess_first: bool = False,
    ) -> None:
        values = {"draft_length": draft_length, "budget": budget, "max_batch": max_batch, "workers": workers}
        values |= {"vocabulary": vocabulary, "seed": seed} | ({} if depth is None else {"depth": depth})
        for name, value in values.items():
            most = 2**64 if name == "seed" else 2**32
            if isinstance(value, bool) or not 0 <= value < most:
                raise ArgumentError(
                    f"{name}: expected an integer in [0, 2^{64 if name == 'seed' else 32}), got {value!r}"
                )
        self._core = _core.Rounds(
            draft_length=draft_length,
            budget=budget,
            depth=depth,
            fallback=fallback,
            max_batch=max_batch,
            patience=patience,
            adaptive=adaptive,
            workers=workers,
            vocabulary=vocabulary,
            seed=seed,
            together=together,
            ordered=ordered,
            guess_first=guess_first,
        )

    def handle(self, now: float, event: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        """Takes an event that happened at time `now` (seconds from any origin) and returns what to do, in order.

        Raises:
            ArgumentError: a tuple that is no event, or numbers that cannot be (the state is as before). Late, doubled
                and unknown events are no errors.
        """
        return self._core.handle(now, event)

    def next_deadline(self) -> float | None:
        """When to send ``("tick",)`` if nothing happens before; None: nothing is waited for that could fail to come."""
        return self._core.next_deadline()

    def stats(self) -> dict[str, Any]:
        """Counters since the start, the present choices (``"plan"``), and what was learnt (``"times"``, ``"learnt"``).

        ``"histogram"[k]`` counts rounds with k accepted tokens; ``"lookups"`` and ``"hits"`` go by what the lookup
        before was; ``"wait_seconds"`` is the target's idle time by cause (``"idle"``: nothing was wanted, ``"start"``,
        ``"miss"``, ``"late"``); ``"discarded"`` counts drafted tokens that were never verified. Seconds, and tokens per
        second. ``"times"``: target seconds are t0 + t1 tokens + t2 rows, those of a chain of s tokens c0 + c1 s
        (``"draft"``), of a build d0 (1 + s) + d1 s branches. ``"learnt"`` is by chains: drafted ahead (``"model"``),
        waited for (``"drafted"``), ``"fast"``. ``"worth"``: what a draft that may choose by content needs to know: the
        probabilities from which on a token is worth verifying (``"verified"``), drafting while the target waits
        (``"drafted"``), and its part of a step of many (``"branch"``); and the tokens a ``"hit"`` is worth.
        """
        return self._core.stats()

    def copy(self) -> Rounds:
        """A machine in the same state that goes its own way (enumerations of what may happen use it)."""
        other = object.__new__(Rounds)
        other._core = self._core.copy()
        return other
