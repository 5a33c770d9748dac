"""Counter-based noise: one uniform number per (seed, output index), and no state.

Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11): the number is a
function of key and counter alone, so that a sampled answer is the same in any batch, on any worker, and
after a replay.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10


def philox_4x64(key: int, counter: int) -> tuple[int, int, int, int]:
    """Four 64-bit words. The low 128 bits of `key` and the low 256 bits of `counter` are used."""
    key0, key1 = key & _MASK, (key >> 64) & _MASK
    word0, word1, word2, word3 = ((counter >> shift) & _MASK for shift in (0, 64, 128, 192))
    for _ in range(_ROUNDS):
        product0, product1 = word0 * _MULTIPLIERS[0], word2 * _MULTIPLIERS[1]
        word0, word1 = (product1 >> 64) ^ word1 ^ key0, product1 & _MASK
        word2, word3 = (product0 >> 64) ^ word3 ^ key1, product0 & _MASK
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return word0, word1, word2, word3


def uniform(seed: int, output_index: int) -> float:
    """In `[0, 1)`, 53 random bits."""
    return (philox_4x64(seed, output_index)[0] >> 11) * 2.0**-53
