"""The counter-based generator equals numpy's Philox4x64-10, and its numbers are uniform."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.noise import philox_4x64, uniform


@given(st.integers(0, 2**128 - 1), st.integers(0, 2**256 - 2))
def test_equals_numpy(key: int, counter: int) -> None:
    # numpy increments the counter before it draws.
    expected = np.random.Philox(key=key, counter=counter).random_raw(4).tolist()
    assert list(philox_4x64(key, counter + 1)) == expected


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**31))
def test_any_seed_gives_a_number_in_range(seed: int, index: int) -> None:
    assert 0.0 <= uniform(seed, index) < 1.0


def test_spreads_over_seeds_and_indices() -> None:
    """Chi-square over 20 bins, 19 degrees of freedom: 43.8 is passed by one seed in a thousand."""
    counts = Counter(int(20 * uniform(seed, index)) for seed, index in product(range(40), range(100)))
    assert sum((counts[each] - 200) ** 2 / 200 for each in range(20)) < 43.8
