"""Speculative speculative decoding: the target verifies here while drafts guess ahead in processes of their own.

:class:`SpeculativeGenerator` carries out what the scheduler (:class:`tilewise.scheduler.Rounds`) decides and tells it
what happened. This is what users call; the work is in :mod:`.loop`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from tilewise.errors import ArgumentError, VocabularyError
from tilewise.hf.engine.drafts import Drafts
from tilewise.hf.engine.loop import Loop
from tilewise.hf.engine.processes import torchrun_rank
from tilewise.hf.engine.requests import Generated, Request, Stops
from tilewise.hf.engine.rules import Settings, rule_of
from tilewise.hf.generate import as_prompt, check_model, model_sizes, step_threads
from tilewise.hf.runners import runners
from tilewise.hf.tokenizers import Tokenizer
from tilewise.scheduler import Rounds
from tilewise.speculation import MixtureDraft, SuffixDraft

__all__ = ["SpeculativeGenerator"]


class SpeculativeGenerator(Loop):
    """Generates from a target while a draft, in another process, guesses what the target will say and drafts on.

    The output is that of plain decoding: under the coupled rule token for token, under the rejection rule in law
    (:mod:`tilewise.hf.engine.rules`). Nothing of that depends on the draft, on timing, or on the draft being alive.

    Args:
        target: a causal language model on the CPU, in evaluation mode, whose cache can be rolled back.
        draft: a smaller one with the same vocabulary; None decodes with look-ups alone.
        workers: draft processes; sequences are divided among them. ``"torchrun"``: those of rank 1 and up of a program
            that torchrun started, on whatever machines, which call :func:`serve_draft` with the draft.
        draft_length: most drafted tokens of a round; None is 32 under the coupled rule, where chains end by themselves
            once they are not worth going on, and look-ups go on behind them; and 8 under the rejection rule, where
            chains must not end by content.
        budget: most branches that grow at once; None is 8 under the coupled rule, where they take turns by their
            probability, and 16 under the rejection rule, where all guessed outcomes are drafted equally far.
        depth: most tokens to draft behind each; None is `draft_length`, but not more than 16.
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
        vocabulary, self._context = model_sizes(target)
        if draft is not None:
            check_model("draft", draft)
            size, context = model_sizes(draft)
            self._context = min(self._context, context)
            if size != vocabulary:
                raise VocabularyError(
                    f"the draft knows {size} tokens and the target {vocabulary}; a draft must speak the "
                    "target's tokens: choose one of the same family, or none"
                )
        if draft_threads < 1:
            raise ArgumentError(f"draft_threads must be at least 1, got {draft_threads}")
        if not 0.0 <= saguaro <= 1.0:
            raise ArgumentError(f"saguaro must lie in [0, 1], got {saguaro}; 1 leaves the draft's law alone")
        if support < 1:
            raise ArgumentError(f"support must be at least 1, got {support}")
        if draft_length is None:
            draft_length = 32 if rule == "coupled" else 8
        if budget is None:
            budget = 8 if rule == "coupled" else 16
        if depth is None:
            depth = min(draft_length, 16)
        fan_out = max(1, round(budget / (draft_length + 1)))
        self.target = target
        settings = Settings(rule, temperature, top_k, top_p, seed, support, saguaro, fan_out)
        made = rule_of(settings, vocabulary)
        self._tokenizer, self._lookup, self._longest = tokenizer, lookup, draft_length
        self._lookups: MixtureDraft | None = None  # what all of them learnt
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
        machine = Rounds(
            draft_length=draft_length, budget=budget, depth=depth, fallback=fallback, max_batch=max_batch,
            patience=patience, adaptive=adaptive, workers=count, vocabulary=vocabulary, seed=seed, ordered=made.free,
            guess_first=True,
        )  # fmt: skip
        self._next_stream = 0
        super().__init__(
            runners(target, rollback=True), step_threads(target, threads), made, settings, vocabulary, budget, machine,
            Drafts(draft, count, draft_threads),
        )  # fmt: skip
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
                each.lookup = MixtureDraft([SuffixDraft()], learnt=self._lookups)
                each.longest = self._longest
                self._lookups = each.lookup
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
