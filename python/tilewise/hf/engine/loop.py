"""The loop of the engine: what the scheduler decides is carried out, and it is told what happened.

```text
take what the drafts have sent            -> events
else run a prompt, if one waits           -> event
else run a verification, if one is asked  -> take what has come meanwhile, then the event of its outcomes
else wait for a draft, or the scheduler's next deadline
every event's commands: messages to the drafts go out at once, work for the target is queued
```
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from tilewise import _core
from tilewise.errors import VocabularyError
from tilewise.hf.engine.builds import Worth
from tilewise.hf.engine.drafts import Drafts
from tilewise.hf.engine.requests import Chain, Content, Request
from tilewise.hf.engine.rules import Rule, Settings
from tilewise.hf.engine.stats import BuildRecord, DraftRecord, EngineStats, RoundRecord
from tilewise.hf.generate import as_rows, computing
from tilewise.hf.runners import Runner
from tilewise.scheduler import Rounds

__all__ = ["Loop"]


class Loop:
    """Sequences in work, any number at once.

    Args:
        start_target: begins a sequence of the target.
        threads: torch's threads in the target; None leaves them, less those of drafts here.
        rule, settings: how tokens are drafted and judged, and what the drafts are told of it.
        vocabulary: how many tokens the target knows.
        most: most branches of a build.
        machine: what decides.
        drafts: the drafts' processes, not started yet.
    """

    def __init__(
        self,
        start_target: Callable[[], Runner],
        threads: int | None,
        rule: Rule,
        settings: Settings,
        vocabulary: int,
        most: int,
        machine: Rounds,
        drafts: Drafts,
    ):
        self._start_target, self._threads = start_target, threads
        self._rule, self.settings = rule, settings
        self._vocabulary, self._most = vocabulary, most
        self._machine, self._drafts = machine, drafts
        self.stats = EngineStats()
        self._requests: dict[int, Request] = {}
        self._contents: dict[int, Content] = {}
        self._prefills: deque[int] = deque()
        self._verifications: deque[tuple[int, list[Any]]] = deque()
        self._known: dict[tuple[int, int], int] = {}
        self._building: dict[tuple[int, int, int], float] = {}
        self._asked: dict[tuple[int, int, int], tuple[float, int]] = {}
        self._told = 0.0
        self._worth: list[float] = []
        self._origin: float | None = None

    def _pump(self, made: list[Request]) -> Iterator[None]:
        """Works until all these are over; yields whenever something may have been emitted."""
        while not all(each.over for each in made):
            began = time.perf_counter()
            if self._origin is None:
                self._origin = began
            self._work()
            self.stats.seconds += time.perf_counter() - began
            yield
        self.stats.machine = self._machine.stats()

    def _work(self) -> None:
        self._take(0.0)
        if self._prefills:
            self._prefill(self._prefills.popleft())
        elif self._verifications:
            self._verify(*self._verifications.popleft())
        else:
            deadline = self._machine.next_deadline()
            began = time.perf_counter()
            left = 60.0 if deadline is None else max(0.0, deadline - began)
            if not self._take(left) and deadline is not None and time.perf_counter() >= deadline:
                self._tell(("tick",))
            self.stats.wait_seconds += time.perf_counter() - began

    def _take(self, timeout: float) -> bool:
        """Takes all messages that have come; waits for one at most so long. Whether anything was heard."""
        heard = self._listen()
        if not heard and timeout > 0.0:
            self._drafts.wait(timeout)
            heard = self._listen()
        return heard

    def _listen(self) -> bool:
        """Takes what has come. Of an entry that came several times, longer each time, the scheduler sees the last."""
        heard = False
        latest: dict[tuple[int, int, int], dict[tuple[int, int], tuple[Any, ...]]] = {}
        ended: dict[tuple[int, int, int], float] = {}
        for worker, event, arrays in self._drafts.receive():
            heard = True
            if event[0] == "entries":
                key = (worker, event[1], event[2])
                entries = latest.setdefault(key, {})
                for entry, content in event[3]:
                    entries[entry[0], entry[1]] = entry, content, arrays
                ended[key] = self._ended(worker, event)
                continue
            if latest:
                self._entries(latest, ended)
            self._heard(worker, event, arrays)
        self._entries(latest, ended)
        return heard

    def _entries(
        self,
        latest: dict[tuple[int, int, int], dict[tuple[int, int], tuple[Any, ...]]],
        ended: dict[tuple[int, int, int], float],
    ) -> None:
        for key, entries in latest.items():
            for (_, _, _, handle, whole), content, arrays in entries.values():
                self._keep(handle, content, arrays, whole)
            self._tell(("entries", *key, [tuple(entry) for entry, _, _ in entries.values()]), ended[key])
        latest.clear()

    def _keep(self, handle: int, content: list[Any], arrays: list[Any], whole: bool) -> None:
        """A chain of a draft's; `whole`: the draft ended it by itself."""
        tokens, index, share = content
        laws = None if index < 0 else list(zip(arrays[index], arrays[index + 1], strict=True))
        self._contents[handle] = Content(tokens, laws, share, whole)

    def _heard(self, worker: int, event: list[Any], arrays: list[Any]) -> None:
        kind = event[0]
        if kind == "ready":
            if event[1] != self._vocabulary:  # one of torchrun's, whose draft we have not seen
                raise VocabularyError(
                    f"draft {worker} knows {event[1]} tokens and the target {self._vocabulary}; call serve_draft with "
                    "one that speaks the target's tokens"
                )
            self._drafts.greet(worker, asdict(self.settings))
            self._worth = []
            self._tell(("worker_ready", worker))
        elif kind == "lost":
            self.stats.lost_workers += 1
            self._tell(("worker_lost", worker))
        elif kind == "opened":
            self._tell(("opened", worker, event[1]))
        elif kind == "rank":
            self._tell((kind, worker, *event[1:]), self._told)
        elif kind == "built":
            self.stats.builds.append(BuildRecord(event[5], event[4], event[3]))
            self._tell((kind, worker, *event[1:-1]), self._ended(worker, event))
        elif kind == "drafted":
            _, stream, number, length, handle, seconds, held, content = event
            began, wanted = self._asked.pop((worker, stream, number), (time.perf_counter(), 0))
            waited = time.perf_counter() - began
            self._keep(handle, content, arrays, length < wanted)
            self.stats.drafts.append(DraftRecord(length - held, seconds, waited))
            self._tell((kind, worker, *event[1:-1]))
        else:
            self._tell((kind, worker, *event[1:]))

    def _ended(self, worker: int, event: list[Any]) -> float:
        """When a build was over: messages are read between verifications, but it ended when it did."""
        sent = self._building.get((worker, event[1], event[2]), float("inf"))
        return min(time.perf_counter(), sent + event[-1])

    def _tell(self, event: tuple[Any, ...], at: float | None = None) -> None:
        """Tells the scheduler what happened (now, or `at` some time), and does what it says."""
        self._told = max(self._told, time.perf_counter() if at is None else at)
        for command in self._machine.handle(self._told, event):
            getattr(self, f"_do_{command[0]}")(*command[1:])
        self._drafts.flush()

    def _weigh(self) -> None:
        """Tells the drafts what a token is worth now, if that is another than it was."""
        worth = list(self._machine.stats()["worth"].values())
        if not self._worth or any(abs(new - old) > 0.1 * old for new, old in zip(worth, self._worth, strict=True)):
            self._worth = worth
            for worker in self._drafts.processes:
                self._drafts.send(worker, "worth", *worth)

    @property
    def _least(self) -> float:
        """The chance of being kept from which on a token is worth verifying."""
        return self._worth[0] if self._worth else Worth().verified

    def _news(self, worker: int, stream: int) -> tuple[int, list[int]]:
        """What was committed since the worker was last told: from where on, and the tokens."""
        tokens = self._requests[stream].tokens
        start = self._known.get((worker, stream), len(tokens))
        self._known[worker, stream] = len(tokens)
        return start, tokens[start:]

    # Commands of the scheduler.

    def _do_prefill(self, stream: int) -> None:
        self._prefills.append(stream)

    def _do_verify(self, batch: int, rows: list[Any]) -> None:
        self._drafts.flush()  # the draft hears of the outcomes while we look up
        for stream, number, source, handle, length in rows:
            request = self._requests[stream]
            if source in ("cached", "drafted"):
                tokens, laws, share, whole = self._contents.pop(handle)
                chain = tokens[:length]
                if self._rule.free and length == len(tokens):
                    # Building was cut off by time, mostly; what is looked up behind costs none.
                    behind = request.look_up_behind(chain, share, self._least)
                    chain = chain + behind
                    if behind:
                        self._tell(("fast", stream, number, len(chain)))
                laws = None if laws is None else laws[:length]
                request.chains[number] = Chain(chain, laws, length, whole and length == len(tokens))
            elif source == "fast" and request.lookup is not None:
                if request.found is None:  # the first round: no outcome came before it
                    request.look_up(self._least)
                chain = (request.found or [])[:length]
                request.chains[number] = Chain(chain, own=len(chain))
                self._tell(("fast", stream, number, len(chain)))
            else:
                request.chains[number] = Chain([])
        self._verifications.append((batch, rows))

    def _do_open(self, worker: int, stream: int) -> None:
        request = self._requests[stream]
        # The last token committed comes with the first outcome or draft, as after any round.
        tokens = request.tokens[:-1] if request.result.tokens else request.tokens
        self._known[worker, stream] = len(tokens)
        self._drafts.send(worker, "open", stream, request.request, self._most, tokens)

    def _do_build(
        self, worker: int, stream: int, number: int, source: str, handle: int, fan_out: list[int], depth: int
    ) -> None:
        chain, _, own, _ = self._requests[stream].chains.get(number, Chain([]))  # none while the prompt is read
        made_there = source in ("cached", "drafted") and self._drafts.made(worker, handle)
        given = None if made_there or not chain else chain
        self._building[worker, stream, number] = time.perf_counter()
        news = self._news(worker, stream)
        self._drafts.send(worker, "build", stream, number, *news, given, chain[own:], fan_out, depth)

    def _do_draft(self, worker: int, stream: int, number: int, accepted: int, token: int, length: int) -> None:
        self._asked[worker, stream, number] = time.perf_counter(), length
        self._drafts.send(worker, "draft", stream, number, *self._news(worker, stream), length)

    def _do_outcome(self, worker: int, stream: int, number: int, accepted: int, token: int, handle: int) -> None:
        self._drafts.send(worker, "outcome", stream, number, *self._news(worker, stream), handle)

    def _do_stop(self, worker: int, stream: int, number: int) -> None:
        self._drafts.send(worker, "stop", stream, number)

    def _do_forget(self, worker: int, stream: int) -> None:
        self._known.pop((worker, stream), None)
        self._drafts.send(worker, "forget", stream)

    def _do_discard(self, handles: list[int]) -> None:
        for handle in handles:
            self._contents.pop(handle, None)

    def _do_finish(self, stream: int, reason: str) -> None:
        request = self._requests[stream]
        request.result.reason = reason
        request.runner = None

    # The target's work.

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """The target's turn, on the cores that the drafts here leave."""
        beside, kernels = self._drafts.threads_here, _core.num_threads()
        threads = self._threads
        if threads is None:
            threads = max(1, torch.get_num_threads() - beside)
        _core.set_num_threads(max(1, kernels - beside))
        try:
            with computing(threads):
                yield
        finally:
            _core.set_num_threads(kernels)

    def _prefill(self, stream: int) -> None:
        request = self._requests.get(stream)
        if request is None or request.over:
            self._tell(("prefilled", stream, True, None, None))
            return
        began = time.perf_counter()
        request.runner = self._start_target()
        with self._computing():
            logits = request.runner.feed(request.tokens, last=1)
        _, token = self._rule.decide([], None, as_rows(logits), request.request, len(request.tokens))
        self.stats.prompt_seconds += time.perf_counter() - began
        self._take(0.0)  # before the token is committed: what is asked of drafts now does not know it yet
        _, stopped = self._emit(request, [token])
        self._tell(("prefilled", stream, stopped, token, request.look_up(self._least)))

    def _emit(self, request: Request, tokens: list[int]) -> tuple[int, bool]:
        count, stopped = request.emit(tokens)
        self.stats.tokens += count
        return count, stopped

    def _verify(self, batch: int, rows: list[Any]) -> None:
        began = time.perf_counter()
        outcomes = []
        with self._computing():
            for stream, number, source, _, _ in rows:
                request = self._requests.get(stream)
                if request is None or request.over or request.runner is None:
                    continue
                chain = request.chains.pop(number)
                logits = request.runner.feed([request.tokens[-1], *chain.tokens])
                outcomes.append((request, number, source, chain, logits))
        computed = time.perf_counter()
        verdicts = []
        for request, number, source, (chain, laws, _, ended), logits in outcomes:
            known = len(request.tokens)
            accepted, token = self._rule.decide(chain, laws, as_rows(logits), request.request, known)
            assert request.runner is not None
            request.runner.truncate(known + accepted)
            emitted, stopped = self._emit(request, [*chain[:accepted], token])
            verdicts.append((request.stream, accepted, token, emitted, stopped, request.look_up(self._least)))
            self.stats.count(
                RoundRecord(computed - (self._origin or began), request.stream, number, source, len(chain), accepted,
                            computed - began, ended)
            )  # fmt: skip
        decided = time.perf_counter()
        self.stats.verifications += 1
        self.stats.target_seconds += computed - began
        self.stats.decide_seconds += decided - computed
        self._take(0.0)
        if self.stats.verifications % 32 == 1:
            self._weigh()
        self._tell(("verified", batch, computed - began, verdicts))
