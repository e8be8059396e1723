"""Exact speculative sampling: drafted tokens are verified so that what leaves is distributed as plain sampling's.

The target model's law at a position is p: its logits after temperature, top-k and top-p. A drafted token x came from
a law q. It is kept with probability ``min(1, p(x) / q(x))``; after the first refusal one token is drawn from
``max(p - q, 0)``, renormalised; after a chain without refusal one is drawn from the next p.

Random numbers are not consumed from a generator. Each is a function of ``(seed, request, position, purpose)``:

* ``seed``: one per run, in [0, 2^63);
* ``requests``: ``[B]``, the name of each row's sequence, in [0, 2^32). Two rows of the same name draw the same numbers;
* ``positions``: ``[B]``, the index in its sequence of the *next* token of each row (of the first drafted one in
  :func:`verify`), counted from 0 at the start of the prompt or of the generation, as long as it is always the same.

So a sequence's tokens depend neither on the row it has in a batch, nor on what else is in the batch. Pass the true
position in every round: a position must never be decided twice for one seed and request.

Per-row settings (`temperature`, `top_k`, `top_p`, `positions`) are numbers, for all rows, or ``[B]`` arrays.

Map:

* :mod:`~tilewise.speculation.sampling`: laws, and draws from them;
* :mod:`~tilewise.speculation.verification`: of drafted chains, in one step or in two;
* :mod:`~tilewise.speculation.coupled`: the other exact rule: target and draft race over the same numbers;
* :mod:`~tilewise.speculation.outcomes`: what a draft expects to follow, and the rank of what does;
* :mod:`~tilewise.speculation.cache`: what was drafted ahead, by the outcome it was drafted for;
* :mod:`~tilewise.speculation.fanout`: how many outcomes to guess at each place;
* :mod:`~tilewise.speculation.drafts`: drafts that are no model: n-grams, suffixes, and mixtures of them.

Source: Leviathan et al., "Fast inference from transformers via speculative decoding" (2023); Chen et al.,
"Accelerating large language model decoding with speculative sampling" (2023).
"""

from __future__ import annotations

from tilewise.speculation.cache import Outcome, OutcomeCache
from tilewise.speculation.coupled import Races
from tilewise.speculation.drafts import Draft, MixtureDraft, NGramDraft, Proposal, SuffixDraft
from tilewise.speculation.fanout import (
    RankCurve,
    fan_out_limits,
    geometric_fan_out,
    geometric_miss,
    water_filling,
)
from tilewise.speculation.outcomes import predict_outcomes, token_rank
from tilewise.speculation.sampling import Drafted, SparseLaws, draft_token, process, sample, sample_target
from tilewise.speculation.verification import (
    Verification,
    VerificationLaw,
    accept,
    correct,
    token_probabilities,
    verification_law,
    verify,
)

__all__ = [
    "Draft",
    "Drafted",
    "MixtureDraft",
    "NGramDraft",
    "Outcome",
    "OutcomeCache",
    "Proposal",
    "Races",
    "RankCurve",
    "SparseLaws",
    "SuffixDraft",
    "Verification",
    "VerificationLaw",
    "accept",
    "correct",
    "draft_token",
    "fan_out_limits",
    "geometric_fan_out",
    "geometric_miss",
    "predict_outcomes",
    "process",
    "sample",
    "sample_target",
    "token_probabilities",
    "token_rank",
    "verification_law",
    "verify",
    "water_filling",
]
