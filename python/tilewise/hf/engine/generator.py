"""Speculative speculative decoding: the target verifies here while drafts guess ahead in processes of their own.

:class:`SpeculativeGenerator` carries out what the scheduler (:class:`tilewise.scheduler.Rounds`) decides and tells it
what happened. The loop, for any number of sequences:

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
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tilewise import _core
from tilewise.errors import ArgumentError, VocabularyError
from tilewise.hf.engine.drafts import Drafts
from tilewise.hf.engine.processes import torchrun_rank
from tilewise.hf.engine.requests import Generated, Request, Stops
from tilewise.hf.engine.rules import Settings, rule_of
from tilewise.hf.engine.stats import BuildRecord, DraftRecord, EngineStats, RoundRecord
from tilewise.hf.generate import as_prompt, as_rows, check_model, computing, model_sizes, step_threads
from tilewise.hf.runners import Runner, runners
from tilewise.hf.tokenizers import Tokenizer
from tilewise.scheduler import Rounds
from tilewise.speculation import MixtureDraft, NGramDraft, SuffixDraft

__all__ = ["SpeculativeGenerator"]


class SpeculativeGenerator:
    """Generates from a target while a draft, in another process, guesses what the target will say and drafts on.

    The output is that of plain decoding: under the coupled rule token for token, under the rejection rule in law
    (:mod:`tilewise.hf.engine.rules`). Nothing of that depends on the draft, on timing, or on the draft being alive.

    Args:
        target: a causal language model on the CPU, in evaluation mode, whose cache can be rolled back.
        draft: a smaller one with the same vocabulary; None decodes with look-ups alone.
        workers: draft processes; sequences are divided among them. ``"torchrun"``: those of rank 1 and up of a program
            that torchrun started, on whatever machines, which call :func:`serve_draft` with the draft.
        draft_length: most drafted tokens of a round; None is 16 under the coupled rule, where chains end by themselves
            once they are not worth going on, and 8 under the rejection rule, where they must not.
        budget: most branches that grow at once; None is 8 under the coupled rule, where they take turns by their
            probability, and 16 under the rejection rule, where all guessed outcomes are drafted equally far.
        depth: most tokens to draft behind each; None is `draft_length`.
        fallback: what a sequence does whose outcome was not guessed: ``"neural"`` (the draft drafts now), ``"fast"``
            (look-ups, no waiting) or ``"adaptive"`` (what is measured to be better).
        rule: ``"coupled"`` or ``"rejection"``.
        temperature, top_k, top_p, seed: as in :class:`tilewise.hf.generate.SpeculativeDecoder`.
        support, saguaro: of the rejection rule: how many tokens a draft's law keeps, and the weight of the likeliest.
        lookup: whether fast drafts are looked up in the text so far; otherwise they are empty.
        max_batch: most sequences verified together.
        patience: seconds to wait for a late draft before going on without; None measures.
        adaptive: whether lengths and budgets follow what is measured; otherwise they are as given.
        threads: torch's threads in the target; None chooses as SpeculativeDecoder does. Draft processes here keep their
            cores: the target's kernels (and torch, where it has many threads) leave `draft_threads` free for each.
        draft_threads: threads of each draft process.
        tokenizer: for stop strings and for text in the results.

    Raises:
        ArgumentError, DeviceError, VocabularyError, UnsupportedError: as :class:`SpeculativeDecoder`.

    Use it as a context manager, or call :meth:`close`: the drafts' processes end with it. They also end with this
    process, however it ends. Not for use from several threads at once.

    Example:
        >>> from tilewise.hf.models import load_pair
        >>> pair = load_pair()
        >>> with SpeculativeGenerator(pair.target, pair.draft, tokenizer=pair.tokenizer) as generator:
        ...     [result] = generator.generate([pair.tokenizer.encode("import ")], 24)
        >>> len(result.tokens)
        24
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel | None = None,
        *,
        workers: int | Literal["torchrun"] = 1,
        draft_length: int | None = None,
        budget: int | None = None,
        depth: int | None = None,
        fallback: Literal["adaptive", "neural", "fast"] = "adaptive",
        rule: Literal["coupled", "rejection"] = "coupled",
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        support: int = 64,
        saguaro: float = 1.0,
        lookup: bool = True,
        max_batch: int = 8,
        patience: float | None = None,
        adaptive: bool = True,
        threads: int | None = None,
        draft_threads: int = 1,
        tokenizer: Tokenizer | None = None,
    ):
        check_model("target", target)
        self._vocabulary, self._context = model_sizes(target)
        if draft is not None:
            check_model("draft", draft)
            size, context = model_sizes(draft)
            self._context = min(self._context, context)
            if size != self._vocabulary:
                raise VocabularyError(
                    f"the draft knows {size} tokens and the target {self._vocabulary}; a draft must speak the "
                    "target's tokens: choose one of the same family, or none"
                )
        if draft_threads < 1:
            raise ArgumentError(f"draft_threads must be at least 1, got {draft_threads}")
        if not 0.0 <= saguaro <= 1.0:
            raise ArgumentError(f"saguaro must lie in [0, 1], got {saguaro}; 1 leaves the draft's law alone")
        if support < 1:
            raise ArgumentError(f"support must be at least 1, got {support}")
        if draft_length is None:
            draft_length = 16 if rule == "coupled" else 8
        if budget is None:
            budget = 8 if rule == "coupled" else 16
        fan_out = max(1, round(budget / (draft_length + 1)))
        self.target = target
        self.settings = Settings(rule, temperature, top_k, top_p, seed, support, saguaro, fan_out)
        self._rule = rule_of(self.settings, self._vocabulary)
        self._start_target: Callable[[], Runner] = runners(target, rollback=True)
        self._threads = step_threads(target, threads)
        self._tokenizer, self._lookup, self._most = tokenizer, lookup, budget
        if workers == "torchrun":
            rank, size = torchrun_rank()
            if rank != 0:
                raise ArgumentError(f"rank 0 is the target, this is rank {rank}: call serve_draft(draft) here")
            if draft is not None:
                raise ArgumentError("with workers='torchrun' the drafts are in the other processes: leave out draft")
            count = size - 1
        elif isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise ArgumentError(f"workers: expected a number of processes, or 'torchrun', got {workers!r}")
        else:
            count = workers if draft is not None else 0
        self._machine = Rounds(
            draft_length=draft_length, budget=budget, depth=depth, fallback=fallback, max_batch=max_batch,
            patience=patience, adaptive=adaptive, workers=count, vocabulary=self._vocabulary, seed=seed,
            ordered=self._rule.free,
        )  # fmt: skip
        self.stats = EngineStats()
        self._requests: dict[int, Request] = {}
        self._contents: dict[int, tuple[list[int], list[Any] | None]] = {}
        self._whole: set[int] = set()  # contents that the draft ended by itself
        self._prefills: deque[int] = deque()
        self._verifications: deque[tuple[int, list[Any]]] = deque()
        self._known: dict[tuple[int, int], int] = {}
        self._building: dict[tuple[int, int, int], float] = {}
        self._asked: dict[tuple[int, int, int], tuple[float, int]] = {}
        self._told = 0.0
        self._worth: list[float] = []
        self._next_stream = 0
        self._origin: float | None = None
        self._drafts = Drafts(draft, count, draft_threads)
        self._drafts.start()

    # Processes.

    def wait_until_ready(self, timeout: float = 120.0) -> bool:
        """Wait for the drafts' processes, which take seconds to start; generation does not need to.

        Returns:
            Whether all of them serve.
        """
        for seconds in self._drafts.wait_until_serving(time.perf_counter() + timeout):
            self._take(seconds)
        return self._drafts.serving

    def close(self) -> None:
        """End the drafts' processes. Sequences that are not over are aborted."""
        for stream, request in list(self._requests.items()):
            if not request.over:
                self._tell(("abort", stream))
        self._drafts.close()

    def __enter__(self) -> SpeculativeGenerator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What users call.

    def generate(
        self,
        prompts: Sequence[Sequence[int] | Tensor],
        max_new_tokens: int,
        *,
        stop_tokens: Collection[int] = (),
        stop_strings: Sequence[str] = (),
        request: int = 0,
    ) -> list[Generated]:
        """Generate for every prompt, as many at once as `max_batch` allows.

        Args:
            prompts: token ids, at least one each.
            max_new_tokens: how many to generate at most, for each.
            stop_tokens: a sequence ends after the first of these, which is kept.
            stop_strings: a sequence ends with the token that completes one of these; needs a tokenizer.
            request: name of the first prompt's random numbers; the others count on from it.

        Returns:
            One :class:`Generated` for each prompt, in order.

        Raises:
            ArgumentError: empty prompts, ids outside the vocabulary, more positions than the models know.
            ShapeError: a prompt that is no single sequence.
        """
        made = self._submit(prompts, max_new_tokens, stop_tokens, stop_strings, request)
        for _ in self._pump(made):
            pass
        return [self._close(each) for each in made]

    def stream(
        self,
        prompts: Sequence[Sequence[int] | Tensor],
        max_new_tokens: int,
        *,
        stop_tokens: Collection[int] = (),
        stop_strings: Sequence[str] = (),
        request: int = 0,
    ) -> Iterator[tuple[int, list[int]]]:
        """As :meth:`generate`, but yields ``(index of the prompt, new tokens)`` as they are committed.

        A committed token never changes. Closing the iterator aborts what is not over.
        """
        made = self._submit(prompts, max_new_tokens, stop_tokens, stop_strings, request)
        return self._streaming(made)

    def _streaming(self, made: list[Request]) -> Iterator[tuple[int, list[int]]]:
        try:
            for _ in self._pump(made):
                for index, each in enumerate(made):
                    if each.unread:
                        tokens, each.unread = each.unread, []
                        yield index, tokens
        finally:
            for each in made:
                if not each.over:
                    self._tell(("abort", each.stream))
                self._close(each)

    # The loop.

    def _submit(
        self,
        prompts: Sequence[Sequence[int] | Tensor],
        wanted: int,
        stop_tokens: Collection[int],
        stop_strings: Sequence[str],
        request: int,
    ) -> list[Request]:
        if wanted < 0:
            raise ArgumentError(f"max_new_tokens must be at least 0, got {wanted}")
        if stop_strings and self._tokenizer is None:
            raise ArgumentError("stop_strings need a tokenizer: pass tokenizer= when making the generator")
        if any(not string for string in stop_strings):
            raise ArgumentError("stop_strings: an empty string stops everything; leave it out")
        made = []
        for index, given in enumerate(prompts):
            prompt = as_prompt(given, self._vocabulary)
            if len(prompt) + wanted > self._context:
                raise ArgumentError(
                    f"prompt {index}: {len(prompt)} tokens and {wanted} new ones exceed the {self._context} positions "
                    f"that the models know; shorten it, or ask for {max(0, self._context - len(prompt))} tokens"
                )
            stops = Stops(stop_tokens, stop_strings, self._tokenizer)
            made.append(
                Request(self._next_stream, request + index, prompt, wanted, stops, Generated(), tokens=prompt[:])
            )
            self._next_stream += 1
        if not self._drafts.complete:
            self._drafts.start()
        for each in made:
            if wanted == 0:
                each.result.reason = "limit"
                continue
            if self._lookup:
                each.lookup = MixtureDraft([NGramDraft(), SuffixDraft()])
            self._requests[each.stream] = each
            self._tell(("join", each.stream, wanted))
        return made

    def _close(self, request: Request) -> Generated:
        self._requests.pop(request.stream, None)
        for times in (self._building, self._asked):
            for key in [key for key in times if key[1] == request.stream]:
                del times[key]
        if self._tokenizer is not None:
            request.result.text = self._tokenizer.decode(request.result.tokens)
        return request.result

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
        latest: dict[tuple[int, int, int], dict[tuple[int, int], list[Any]]] = {}
        ended: dict[tuple[int, int, int], float] = {}
        for worker, event, arrays in self._drafts.receive():
            heard = True
            if event[0] == "entries":
                key = (worker, event[1], event[2])
                entries = latest.setdefault(key, {})
                for entry in event[3]:
                    known = entries.get((entry[0], entry[1]))
                    if known is not None:
                        self._contents.pop(known[3], None)
                    entries[entry[0], entry[1]] = entry
                ended[key] = self._ended(worker, event)
                continue
            if event[0] != "content" and latest:
                self._entries(latest, ended)
            self._heard(worker, event, arrays)
        self._entries(latest, ended)
        return heard

    def _entries(
        self,
        latest: dict[tuple[int, int, int], dict[tuple[int, int], list[Any]]],
        ended: dict[tuple[int, int, int], float],
    ) -> None:
        for key, entries in latest.items():
            self._whole.update(entry[3] for entry in entries.values() if entry[4])
            self._tell(("entries", *key, [tuple(entry) for entry in entries.values()]), ended[key])
        latest.clear()

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
        elif kind == "content":
            _, handle, tokens, index = event
            laws = None if index < 0 else list(zip(arrays[index], arrays[index + 1], strict=True))
            self._contents[handle] = (tokens, laws)
        elif kind == "opened":
            self._tell(("opened", worker, event[1]))
        elif kind == "rank":
            self._tell((kind, worker, *event[1:]), self._told)
        elif kind == "built":
            self.stats.builds.append(BuildRecord(event[5], event[4], event[3]))
            self._tell((kind, worker, *event[1:-1]), self._ended(worker, event))
        elif kind == "drafted":
            _, stream, number, length, handle, seconds, held = event
            began, wanted = self._asked.pop((worker, stream, number), (time.perf_counter(), 0))
            waited = time.perf_counter() - began
            if length < wanted:
                self._whole.add(handle)
            self.stats.drafts.append(DraftRecord(length - held, seconds, waited))
            self._tell((kind, worker, *event[1:]))
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
        for stream, number, source, handle, length in rows:
            request = self._requests[stream]
            if source in ("cached", "drafted"):
                tokens, laws = self._contents.pop(handle)
                request.chains[number] = (tokens[:length], None if laws is None else laws[:length])
                if handle in self._whole and length == len(tokens):
                    request.ended.add(number)
                self._whole.discard(handle)
            elif source == "fast" and request.lookup is not None:
                # It reads what was committed only when it is asked: most rounds have better drafts.
                request.lookup.extend(request.tokens[len(request.lookup) :])
                chain = request.lookup.propose(length)
                request.chains[number] = (chain, None)
                self._tell(("fast", stream, number, len(chain)))
            else:
                request.chains[number] = ([], None)
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
        chain = self._requests[stream].chains[number][0]
        made_there = source in ("cached", "drafted") and self._drafts.made(worker, handle)
        given = None if made_there or not chain else chain
        self._building[worker, stream, number] = time.perf_counter()
        self._drafts.send(worker, "build", stream, number, *self._news(worker, stream), given, fan_out, depth)

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
            self._whole.discard(handle)

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
            self._tell(("prefilled", stream, True))
            return
        began = time.perf_counter()
        request.runner = self._start_target()
        with self._computing():
            logits = request.runner.feed(request.tokens, last=1)
        _, token = self._rule.decide([], None, as_rows(logits), request.request, len(request.tokens))
        self.stats.prompt_seconds += time.perf_counter() - began
        _, stopped = self._emit(request, [token])
        self._tell(("prefilled", stream, stopped))

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
                chain, laws = request.chains.pop(number)
                logits = request.runner.feed([request.tokens[-1], *chain])
                outcomes.append((request, number, source, chain, laws, logits))
        computed = time.perf_counter()
        verdicts = []
        for request, number, source, chain, laws, logits in outcomes:
            known = len(request.tokens)
            accepted, token = self._rule.decide(chain, laws, as_rows(logits), request.request, known)
            assert request.runner is not None
            request.runner.truncate(known + accepted)
            emitted, stopped = self._emit(request, [*chain[:accepted], token])
            verdicts.append((request.stream, accepted, token, emitted, stopped))
            ended = number in request.ended
            request.ended.discard(number)
            self.stats.count(
                RoundRecord(computed - (self._origin or began), request.stream, number, source, len(chain), accepted,
                            computed - began, ended)
            )  # fmt: skip
        ended = time.perf_counter()
        self.stats.verifications += 1
        self.stats.target_seconds += computed - began
        self.stats.decide_seconds += ended - computed
        self._take(0.0)
        if self.stats.verifications % 32 == 1:
            self._weigh()
        self._tell(("verified", batch, computed - began, verdicts))
