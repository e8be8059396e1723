"""Verification, laws and drafts by size and sampling rule. Answers are compared with the reference before timing."""

from __future__ import annotations

import numpy as np

from tilewise import speculation
from tilewise.reference import speculation as reference

GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.8}
NUCLEUS = {"temperature": 0.8, "top_p": 0.95}
TOP_K = {"temperature": 0.8, "top_k": 50}

# name: (batch, drafted tokens, vocabulary, rule of the target, whether drafts have laws)
CASES = {
    "bytes-greedy-1x4x256": (1, 4, 256, GREEDY, False),
    "bytes-sampled-1x4x256": (1, 4, 256, SAMPLED, True),
    "bytes-nucleus-1x4x256": (1, 4, 256, NUCLEUS, True),
    "bytes-nucleus-64x4x256": (64, 4, 256, NUCLEUS, True),
    "ngram-nucleus-8x5x32000": (8, 5, 32_000, NUCLEUS, False),
    "words-greedy-8x7x128256": (8, 7, 128_256, GREEDY, False),
    "words-sampled-8x7x128256": (8, 7, 128_256, SAMPLED, True),
    "words-nucleus-8x7x128256": (8, 7, 128_256, NUCLEUS, True),
    "words-top-k-8x7x128256": (8, 7, 128_256, TOP_K, True),
}


class _Case:
    params = tuple(CASES)
    param_names = ("case",)
    timeout = 300

    def setup(self, case: str) -> None:
        batch, depth, vocabulary, self.rule, with_laws = CASES[case]
        rng = np.random.default_rng(0)
        # A heavy head, as language has: the nucleus is a small part of the vocabulary.
        self.logits = rng.standard_normal((batch, depth + 1, vocabulary), np.float32) * 4
        noisy = self.logits[:, :depth] + rng.standard_normal((batch, depth, vocabulary), np.float32) * np.float32(0.3)
        self.where = {"seed": 1, "requests": np.arange(batch)}
        drafted = [
            speculation.draft_token(
                noisy[:, i],
                **(NUCLEUS if with_laws else GREEDY),
                **self.where,
                positions=100 + i,
                laws_dtype="float32",
            )
            for i in range(depth)
        ]
        self.tokens = np.stack([token.tokens for token in drafted], 1)
        self.laws = np.stack([token.laws for token in drafted], 1) if with_laws else None
        self.check()

    def check(self) -> None:
        """The first row, by the reference."""
        result = self.verify()
        expected = reference.verify(
            self.tokens[0],
            None if self.laws is None else self.laws[0],
            self.logits[0],
            **self.rule,
            seed=1,
            request=0,
            position=100,
        )
        assert (result.accepted[0], result.tokens[0]) == expected, (result, expected)

    def verify(self) -> speculation.Verification:
        return speculation.verify(self.tokens, self.laws, self.logits, **self.rule, **self.where, positions=100)


class Verify(_Case):
    """One round for the whole batch."""

    def time_verify(self, case: str) -> None:
        self.verify()


class Laws(_Case):
    """The target's laws at all positions, and one drafted token per row with its law."""

    def time_process(self, case: str) -> None:
        speculation.process(self.logits, **self.rule)

    def time_draft_token(self, case: str) -> None:
        speculation.draft_token(self.logits[:, 0], **self.rule, **self.where, positions=100)

    def time_sample_target(self, case: str) -> None:
        speculation.sample_target(self.logits[:, 0], **self.rule, **self.where, positions=100)
