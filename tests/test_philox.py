"""The counter-based generator: known answers, and the same numbers wherever they are computed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewise import _core

# Published with Random123 (kat_vectors, philox4x32 with 10 rounds).
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),  # digits of pi
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
word = st.integers(0, 2**32 - 1)


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The definition (Salmon et al., SC 2011), in Python's own integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        wide0, wide1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (wide1 >> 32) ^ c1 ^ k0, wide1 % 2**32, (wide0 >> 32) ^ c3 ^ k1, wide0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]) -> None:
    assert tuple(_core.philox4x32(counter, key)) == answer
    assert philox(counter, key) == answer


@given(st.tuples(word, word, word, word), st.tuples(word, word))
def test_equals_its_definition(counter: tuple[int, ...], key: tuple[int, ...]) -> None:
    assert tuple(_core.philox4x32(counter, key)) == philox(counter, key)


def test_every_counter_gives_other_numbers() -> None:
    blocks = np.array([_core.philox4x32((i, 0, 0, 0), (7, 9)) for i in range(4096)], np.uint64)
    assert len(np.unique(blocks, axis=0)) == 4096
    # Each of the 128 bits is set in half of the blocks: 4096 coins, six standard deviations.
    bits = (blocks[:, :, None] >> np.arange(32, dtype=np.uint64)) & np.uint64(1)
    assert (abs(bits.mean(axis=0) - 0.5) < 6 * 0.5 / 4096**0.5).all()


@pytest.mark.parametrize("counter", [(0, 0, 0), (0, 0, 0, 0, 0), (-1, 0, 0, 0), (2**32, 0, 0, 0)])
def test_counters_that_do_not_fit_are_refused(counter: tuple[int, ...]) -> None:
    with pytest.raises((ValueError, OverflowError)):
        _core.philox4x32(counter, (0, 0))
