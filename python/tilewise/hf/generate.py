"""Text generation with or without a draft: the same loop, the same sampling, and with a draft more tokens a step.

A round of speculation drafts ``K`` tokens with the small model, runs the large one once over the last committed token
and the drafts, and keeps what :func:`tilewise.speculation.verify` accepts, plus one token of the target's own. Plain
generation is the round with ``K = 0``. See :mod:`tilewise.speculation` for why nothing but the speed changes.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from tilewise import speculation
from tilewise.errors import ArgumentError, DeviceError, ShapeError, VocabularyError
from tilewise.hf.runners import Runner, runners

__all__ = ["SpeculativeDecoder", "Stats"]

# A step of a model with fewer parameters is over before a team of threads has met. On two idle cores the team brings
# nothing then; where something else runs on one of them, waiting for it made steps 8 to 30 times longer.
_SMALL = 50_000_000


@dataclass
class Stats:
    """What a generation did. Times are wall-clock seconds inside the decoder; waiting for the consumer is not in them.

    Attributes:
        tokens: tokens generated.
        rounds: steps of the target, the prompt's not included.
        drafted_at: ``drafted_at[i]``: rounds that drafted a token at place ``i``.
        accepted_at: ``accepted_at[i]``: rounds that accepted the token at place ``i`` (and so all before it).
        seconds: everything, the prompt included.
        prompt_seconds: the prompt, in both models.
        draft_seconds, target_seconds, verify_seconds: where the rounds spent their time.
    """

    tokens: int = 0
    rounds: int = 0
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    seconds: float = 0.0
    prompt_seconds: float = 0.0
    draft_seconds: float = 0.0
    target_seconds: float = 0.0
    verify_seconds: float = 0.0

    @property
    def drafted(self) -> int:
        """Tokens drafted."""
        return sum(self.drafted_at)

    @property
    def accepted(self) -> int:
        """Drafted tokens accepted."""
        return sum(self.accepted_at)

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the drafts at each place of a round that were accepted."""
        return [kept / made for kept, made in zip(self.accepted_at, self.drafted_at, strict=True)]

    @property
    def tokens_per_round(self) -> float:
        """Tokens that one step of the target yields on average; 1 without a draft."""
        return (self.accepted + self.rounds) / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens generated per second, the prompt's time included."""
        return self.tokens / self.seconds if self.seconds > 0.0 else 0.0

    def count(self, drafted: int, accepted: int) -> None:
        """Book a round."""
        self.rounds += 1
        while len(self.drafted_at) < drafted:
            self.drafted_at.append(0)
            self.accepted_at.append(0)
        for place in range(drafted):
            self.drafted_at[place] += 1
            self.accepted_at[place] += place < accepted


class SpeculativeDecoder:
    """Generates tokens from a target model, faster with a draft model and identically distributed.

    Args:
        target: a causal language model on the CPU, in evaluation mode.
        draft: a smaller one with the same vocabulary; ``None`` generates plainly.
        draft_length: most tokens to draft in a round.
        temperature: 0 is greedy (ties: the lowest id); 1 is the model's own law.
        top_p: keep the most probable tokens up to this mass; 1 keeps all.
        top_k: keep this many tokens; 0 keeps all.
        seed: of the random numbers; a generation is a function of models, prompt, settings and seed.
        confidence: stop drafting after a token once the probability that the draft gives the whole chain so far is
            below this; 0 always drafts ``draft_length``. It looks only at tokens that stay in the chain, so a chain
            is merely shorter and the output's law is untouched.
        threads: torch's threads during a step, restored after it; ``None`` is one for targets of less than 50 million
            parameters, and torch's own number for others. tilewise's kernels have theirs (``TILEWISE_NUM_THREADS``).

    Greedy output equals plain greedy output wherever the target's two largest logits are further apart than its
    rounding: a step over several tokens adds in another order than a step over one. In float32 that is all but
    certain, in bfloat16 it is not.

    Raises:
        ArgumentError: a setting outside its range, or a model in training mode.
        VocabularyError: target and draft know different numbers of tokens.
        DeviceError: a model that is not on the CPU.
        UnsupportedError: a draft together with a model whose state cannot be rolled back.

    Example:
        >>> from tilewise.hf.testing import random_draft
        >>> model = random_draft()
        >>> decoder = SpeculativeDecoder(model, model, draft_length=3)
        >>> len(list(decoder.generate([1, 2, 3], 9)))
        9
        >>> decoder.stats.rounds, decoder.stats.tokens_per_round  # a perfect draft: all accepted, and one more
        (2, 4.0)
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel | None = None,
        *,
        draft_length: int = 4,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        confidence: float = 0.0,
        threads: int | None = None,
    ):
        if draft_length < 1:
            raise ArgumentError(f"draft_length must be at least 1, got {draft_length}; without a draft pass draft=None")
        if not 0.0 <= confidence <= 1.0:
            raise ArgumentError(f"confidence must lie in [0, 1], got {confidence}")
        for role, model in (("target", target), ("draft", draft)):
            if model is not None:
                check_model(role, model)
        self._threads = step_threads(target, threads)
        self.stats = Stats()
        self._start_target = runners(target, rollback=draft is not None)
        self._start_draft = None if draft is None else runners(draft, rollback=True, lean=True)
        self._target_size, self._context = model_sizes(target)
        if draft is not None:
            draft_size, draft_context = model_sizes(draft)
            self._context = min(self._context, draft_context)
            if draft_size != self._target_size:
                raise VocabularyError(
                    f"the draft knows {draft_size} tokens and the target {self._target_size}; a draft must speak the "
                    "target's tokens: choose one of the same family, or none"
                )
        self._draft_length, self._confidence, self._seed = draft_length, confidence, seed
        self._greedy = temperature == 0.0
        # As arrays of one row, which the verification reads without converting them again each round.
        self._rules = {
            "temperature": np.array([temperature], dtype=np.float64),
            "top_k": np.array([top_k], dtype=np.int64),
            "top_p": np.array([top_p], dtype=np.float64),
        }
        speculation.sample_target(np.zeros((1, 2)), **self._rules, seed=seed, requests=0, positions=0)  # checks them

    def generate(
        self,
        input_ids: Tensor | Sequence[int],
        max_new_tokens: int,
        *,
        stop_tokens: Collection[int] = (),
        request: int = 0,
    ) -> Iterator[int]:
        """Yield new tokens as they are committed; a committed token never changes.

        Args:
            input_ids: the prompt, ``[n]`` or ``[1, n]``, at least one token.
            max_new_tokens: how many to generate at most.
            stop_tokens: generation ends after the first of these, which is yielded.
            request: name of the random stream; the same seed with another request is independent.

        Raises:
            ArgumentError: an empty prompt, token ids outside the vocabulary, or more positions than the models know.
            ShapeError: more than one sequence.
        """
        prompt = as_prompt(input_ids, self._target_size)
        if max_new_tokens < 0:
            raise ArgumentError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
        if len(prompt) + max_new_tokens > self._context:
            raise ArgumentError(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones exceed the {self._context} positions "
                f"that the models know; shorten the prompt, or ask for {max(0, self._context - len(prompt))} tokens"
            )
        return self._rounds(prompt, max_new_tokens, frozenset(stop_tokens), request)

    def _rounds(self, tokens: list[int], wanted: int, stops: frozenset[int], request: int) -> Iterator[int]:
        stats = self.stats = Stats()
        if wanted == 0:
            return
        began = time.perf_counter()
        target = self._start_target()
        draft = None if self._start_draft is None else self._start_draft()
        with computing(self._threads):
            logits = target.feed(tokens, last=1)
            if draft is not None and len(tokens) > 1:
                draft.feed(tokens[:-1], last=1)
        _, token = self._verify([], None, logits, len(tokens), request)
        stats.seconds = stats.prompt_seconds = time.perf_counter() - began
        fresh = [token]
        while True:
            for token in fresh:
                tokens.append(token)
                stats.tokens += 1
                wanted -= 1
                yield token
                if token in stops:
                    return
            if wanted == 0:
                return
            fresh = self._round(target, draft, tokens, wanted, request)

    def _round(self, target: Runner, draft: Runner | None, tokens: list[int], wanted: int, request: int) -> list[int]:
        """One step of the target: the tokens it commits, between one and ``wanted``."""
        stats, clock, known = self.stats, time.perf_counter, len(tokens)
        began = clock()
        with computing(self._threads):
            drafted: list[int] = []
            laws = None
            # The target adds one token of its own, so the last token wanted needs no draft.
            if draft is not None and wanted > 1:
                drafted, laws = self._draft(draft, tokens, min(self._draft_length, wanted - 1), request)
            then = clock()
            logits = target.feed([tokens[-1], *drafted])
            now = clock()
            accepted, token = self._verify(drafted, laws, logits, known, request)
            if draft is not None:
                target.truncate(known + accepted)
                draft.truncate(min(draft.length, known + accepted))
        ended = clock()
        stats.count(len(drafted), accepted)
        stats.seconds += ended - began
        stats.draft_seconds += then - began
        stats.target_seconds += now - then
        stats.verify_seconds += ended - now
        return [*drafted[:accepted], token]

    def _draft(
        self, draft: Runner, tokens: list[int], count: int, request: int
    ) -> tuple[list[int], NDArray[np.float64] | None]:
        """A chain of at most ``count`` tokens and the laws they were drawn from (``None``: the most probable ones)."""
        drafted: list[int] = []
        laws: list[NDArray[np.float64]] = []
        chain = 1.0
        feed = tokens[draft.length :]
        while True:
            row = as_rows(draft.feed(feed, last=1))
            if self._greedy:
                token = int(row[0].argmax())
                if self._confidence > 0.0:
                    chain /= float(np.exp(row[0] - row[0, token]).sum())
            else:
                draw = speculation.draft_token(
                    row, **self._rules, seed=self._seed, requests=request, positions=len(tokens) + len(drafted)
                )
                token = int(draw.tokens[0])
                laws.append(draw.laws)
                chain *= float(draw.laws[0, token])
            drafted.append(token)
            if len(drafted) == count or chain < self._confidence:
                return drafted, np.stack(laws, axis=1) if laws else None
            feed = [token]

    def _verify(
        self, drafted: list[int], laws: NDArray[np.float64] | None, logits: Tensor, position: int, request: int
    ) -> tuple[int, int]:
        """How many drafts stay, and the token after them."""
        result = speculation.verify(
            np.array([drafted], dtype=np.int64),
            laws,
            as_rows(logits)[None],
            **self._rules,
            seed=self._seed,
            requests=request,
            positions=position,
        )
        return int(result.accepted[0]), int(result.tokens[0])


@contextmanager
def computing(threads: int | None) -> Iterator[None]:
    """Inference mode and torch's threads for the models alone: neither may be left on while the consumer runs."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


def step_threads(target: PreTrainedModel, threads: int | None) -> int | None:
    """Torch's threads during a step of the target; None leaves them.

    Raises:
        ArgumentError: fewer than one.
    """
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads must be at least 1, got {threads}; None chooses")
    if threads is None and sum(parameter.numel() for parameter in target.parameters()) < _SMALL:
        return 1
    return threads


def as_rows(logits: Tensor) -> NDArray[np.floating]:
    """Logits as NumPy sees them, without a copy; half precisions are widened, which is exact."""
    return (logits if logits.dtype in (torch.float32, torch.float64) else logits.float()).numpy()


def check_model(role: str, model: PreTrainedModel) -> None:
    """Refuses models in training mode, or not on the CPU."""
    if model.training:
        raise ArgumentError(f"the {role} is in training mode; call model.eval()")
    devices = sorted({str(parameter.device) for parameter in model.parameters() if parameter.device.type != "cpu"})
    if devices:
        raise DeviceError(f"the {role} is on {', '.join(devices)}; the decoder runs on the CPU: call model.cpu()")


def model_sizes(model: PreTrainedModel) -> tuple[int, int]:
    """Tokens and positions that a model knows."""
    config = model.config.get_text_config(decoder=True)
    return int(config.vocab_size), int(getattr(config, "max_position_embeddings", None) or 2**62)


def as_prompt(input_ids: Tensor | Sequence[int], vocabulary: int) -> list[int]:
    """One checked prompt."""
    if isinstance(input_ids, Tensor):
        if input_ids.dim() == 2 and input_ids.shape[0] == 1:
            input_ids = input_ids[0]
        if input_ids.dim() != 1:
            raise ShapeError(
                f"expected one prompt, [n] or [1, n], got {tuple(input_ids.shape)}; generate one at a time"
            )
        prompt = input_ids.tolist()
    else:
        prompt = [int(token) for token in input_ids]
    if not prompt:
        raise ArgumentError("the prompt is empty; give at least one token (for a byte model, a newline will do)")
    for token in prompt:
        if not 0 <= token < vocabulary:
            raise ArgumentError(f"token {token} of the prompt lies outside the vocabulary [0, {vocabulary})")
    return prompt
