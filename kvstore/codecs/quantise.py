"""Asymmetric integer quantisation of one block: keys by channel, values by token.

KIVI (Liu et al. 2024, section 3.2): keys have channels that are large in every token, so each channel has a range of
its own, over the tokens of the block; values have none, so each token has one, over groups of its channels, and an
error stays within that token.

A number x of a group becomes the code `round((x - zero) / scale)`. The scale is the width of the group's range over
the codes, rounded up to six significant bits; the zero lies at or below the smallest number of the group, at a whole
multiple of a quarter of the scale. So both take four bytes that compress well, every number of the group lies within
the codes, and `code * scale + zero` is exact in fp32 but for its one sum: decoding gives the same bits everywhere.

Shape legend: K kv heads, L layers, B tokens of the block, E head size, G groups of a head's channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Channels of a value that share a scale, at most.
MAX_GROUP_CHANNELS = 64

#: Steps of the zero in one of the scale: finer ones take more bits, coarser ones more of the codes.
_ZERO_STEPS = 4

#: Of the largest zero in quarters of a scale: it is held in 16 bits.
_MAX_ZERO = 32000

#: Scales beyond have no finite inverse, or products that are not; a model's numbers are far from either.
_MIN_SCALE = np.float32(2.0**-100)
_MAX_SCALE = np.float32(2.0**100)

#: Of a float32's bits, those behind the sixth significant one.
_BELOW_SIX = np.uint32((1 << 18) - 1)


@dataclass(frozen=True, slots=True)
class Quantised:
    """Groups of numbers as codes; the axis of a group has length one in scales and zeros."""

    codes: NDArray[np.uint8]
    #: fp32 with six significant bits.
    scales: NDArray[np.float32]
    #: In quarters of the scale.
    zeros: NDArray[np.int16]


def group_channels(head_dim: int) -> int:
    """Channels of a value that share a scale: all of a head, or an equal part of them."""
    num_groups = -(-head_dim // MAX_GROUP_CHANNELS)
    while head_dim % num_groups:
        num_groups += 1
    return head_dim // num_groups


def quantise(values: NDArray[np.float32], axis: int, levels: int) -> Quantised | None:
    """Codes 0 to `levels` for the groups along `axis`; None where a group has no finite range, or one beyond 1e31."""
    low, high = values.min(axis, keepdims=True), values.max(axis, keepdims=True)
    with np.errstate(over="ignore", invalid="ignore"):
        scales = (high - low) / np.float32(levels - 1 / _ZERO_STEPS)
        np.maximum(scales, np.abs(low) * np.float32(_ZERO_STEPS / _MAX_ZERO), out=scales)
        np.maximum(scales, _MIN_SCALE, out=scales)
        # Said so that NaN is out of range too.
        if not (scales <= _MAX_SCALE).all():
            return None
    bits = scales.view(np.uint32)
    bits += _BELOW_SIX
    bits &= ~_BELOW_SIX
    zeros = np.floor(low * (np.float32(_ZERO_STEPS) / scales))
    steps = values - zeros * (scales * np.float32(1 / _ZERO_STEPS))
    steps *= np.float32(1) / scales
    # Not below zero, and cut off: rounded to the nearest.
    steps += np.float32(0.5)
    return Quantised(steps.astype(np.uint8), scales, zeros.astype(np.int16))


def in_range(scales: NDArray[np.float32]) -> bool:
    """Whether all are such as `quantise` gives."""
    return bool(((scales >= _MIN_SCALE) & (scales <= _MAX_SCALE)).all())


def dequantise(quantised: Quantised, out: NDArray[np.float32]) -> None:
    """Writes the numbers that the codes stand for. Scales are in range."""
    np.copyto(out, quantised.codes)
    out *= quantised.scales
    out += quantised.zeros * (quantised.scales * np.float32(1 / _ZERO_STEPS))
