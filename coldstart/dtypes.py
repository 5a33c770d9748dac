"""Weights of one floating-point type as another's, by numpy: what loads and converts need no torch for.

Values are rounded to the nearest, ties to even, as torch and IEEE 754 do; numpy has no bfloat16 and no eight-bit
floats, so these go by their bits.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.safetensors_files import StoredDtype

_QUIET_NAN_BFLOAT16 = 0x7FC0


def converted(raw: bytes | memoryview, stored: StoredDtype, dtype: StoredDtype) -> NDArray[np.uint8]:
    """The bytes of the same values in `dtype`, one of 16 or 32 bits. What is too large becomes infinite."""
    if stored == dtype:
        return np.frombuffer(raw, np.uint8)
    wide = widened(raw, stored)
    match dtype:
        case "float32":
            return wide.view(np.uint8)
        case "float16":
            with np.errstate(over="ignore"):
                return wide.astype(np.float16).view(np.uint8)
        case "bfloat16":
            return _bfloat16_bits(wide).view(np.uint8)
        case _:
            raise ValueError(f"nothing is converted to {dtype}")


def widened(raw: bytes | memoryview, stored: StoredDtype) -> NDArray[np.float32]:
    """As float32, which holds all values of all the others."""
    match stored:
        case "float32":
            return np.frombuffer(raw, np.float32)
        case "float16":
            return np.frombuffer(raw, np.float16).astype(np.float32)
        case "bfloat16":
            return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        case "float8_e4m3fn":
            return _eight_bit_values(exponent_bits=4, bias=7, has_infinity=False)[np.frombuffer(raw, np.uint8)]
        case "float8_e5m2":
            return _eight_bit_values(exponent_bits=5, bias=15, has_infinity=True)[np.frombuffer(raw, np.uint8)]


def first_lost(
    raw: bytes | memoryview, stored: StoredDtype, after: NDArray[np.uint8], dtype: StoredDtype
) -> float | None:
    """A finite value that became infinite on its way; None where there is none."""
    wide = widened(raw, stored)
    lost = np.isfinite(wide) & ~np.isfinite(widened(after.data, dtype))
    return float(wide[lost][0]) if lost.any() else None


def _bfloat16_bits(wide: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = wide.view(np.uint32)
    # Adding just under half of the last place kept, and one more where that place is odd, rounds to the nearest even.
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(wide), np.uint16(_QUIET_NAN_BFLOAT16), rounded).astype(np.uint16)


@cache
def _eight_bit_values(*, exponent_bits: int, bias: int, has_infinity: bool) -> NDArray[np.float32]:
    """Of all 256 patterns (Micikevicius et al., FP8 Formats for Deep Learning, 2022, table 1)."""
    pattern = np.arange(256)
    fraction_bits = 7 - exponent_bits
    sign = np.where(pattern & 0x80, -1.0, 1.0)
    exponent: NDArray[Any] = (pattern >> fraction_bits) & ((1 << exponent_bits) - 1)
    fraction = pattern & ((1 << fraction_bits) - 1)
    scale = np.ldexp(1.0, np.maximum(exponent, 1) - bias - fraction_bits)
    value = sign * scale * (fraction + np.where(exponent > 0, 1 << fraction_bits, 0))
    top = exponent == (1 << exponent_bits) - 1
    if has_infinity:
        value = np.where(top, np.where(fraction == 0, sign * np.inf, np.nan), value)
    else:
        # One pattern of each sign is no number; the others of the greatest exponent are ordinary values.
        value = np.where(top & (fraction == (1 << fraction_bits) - 1), np.nan, value)
    return value.astype(np.float32)
