"""Rotary position embedding: frequencies and the table of cosines and sines.

Formulas: RoFormer (Su et al. 2021, section 3.4.2); linear position interpolation (Chen et al. 2023); the
band-wise scaling of Llama 3.1; YaRN (Peng et al. 2023, sections 3.2-3.4). Evaluated in float32 in the order
of the reference implementation, so that the tables agree to the bit.

Shape legend: P positions, E head size.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from engine.model_config import RopeConfig


def cos_sin_table(rope: RopeConfig, head_dim: int, num_positions: int) -> Tensor:
    """fp32 `[P, E]`: row p holds E/2 cosines, then E/2 sines of position p, attention factor included."""
    frequencies, attention_factor = inverse_frequencies(rope, head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos() * attention_factor, angles.sin() * attention_factor), dim=-1)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """(fp32 `[E / 2]` radians per position, factor on cosines and sines)."""
    plain = 1.0 / _wave_base(rope, head_dim)
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, head_dim), _yarn_attention_factor(rope)
    return plain, 1.0


def _wave_base(rope: RopeConfig, head_dim: int) -> Tensor:
    exponents: Tensor = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return torch.pow(rope.theta, exponents)


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Waves longer than the original context are stretched by `factor`, short ones kept, a band blended."""
    wavelength = 2 * math.pi / plain
    longest = rope.original_max_positions / rope.low_freq_factor
    shortest = rope.original_max_positions / rope.high_freq_factor
    stretched = torch.where(wavelength > longest, plain / rope.factor, plain)
    blend = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * stretched / rope.factor + blend * stretched
    in_band = (wavelength >= shortest) & (wavelength <= longest)
    return torch.where(in_band, blended, stretched)


def _yarn(rope: RopeConfig, head_dim: int) -> Tensor:
    """Fast dimensions extrapolate (unchanged), slow ones interpolate (divided), a linear ramp between."""
    base = _wave_base(rope, head_dim)
    low, high = _yarn_ramp_bounds(rope, head_dim)
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp
    return (1.0 / (rope.factor * base)) * (1 - keep) + (1.0 / base) * keep


def _yarn_ramp_bounds(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    def dimension_of(rotations: float) -> float:
        """The dimension whose wave turns `rotations` times within the original context."""
        ratio = rope.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # Equal bounds would divide by zero; the reference widens them by this much.
    return low, high + 0.001 if low == high else high


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
