"""Conversions without torch are torch's, for every pattern of sixteen and eight bits, and for floats near every tie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from coldstart.dtypes import converted, first_lost, widened
from engine.checkpoint import torch_dtype

if TYPE_CHECKING:
    from engine.safetensors_files import StoredDtype

SMALL: tuple[StoredDtype, ...] = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def patterns(dtype: StoredDtype) -> bytes:
    count, kind = (256, np.uint8) if "float8" in dtype else (65536, np.uint16)
    return np.arange(count, dtype=kind).tobytes()


def near_ties() -> bytes:
    """Each bfloat16 and each float16, the middle between it and the next, and both neighbours of that."""
    bases = np.concatenate([widened(patterns(dtype), dtype) for dtype in SMALL[:2]])
    bits = bases.view(np.uint32)
    around = [
        bits + np.uint32(step) for step in (0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0x17FFF, 0x18000)
    ]
    return np.concatenate(around).tobytes()


def as_torch(raw: bytes, dtype: StoredDtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch_dtype(dtype))


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [*SMALL, "float32"])
def test_values_are_those_of_torch(stored: StoredDtype, target: StoredDtype) -> None:
    raw = near_ties() if stored == "float32" else patterns(stored)
    ours = as_torch(converted(raw, stored, target).tobytes(), target)
    theirs = as_torch(raw, stored).to(torch_dtype(target))
    nan = torch.isnan(theirs.float())
    assert torch.equal(torch.isnan(ours.float()), nan)
    assert torch.equal(ours[~nan].view(torch.uint8), theirs[~nan].view(torch.uint8)), "to the bit, signs of zero too"


def test_what_is_too_large_is_told() -> None:
    raw = np.array([1.0, -70000.0, np.inf], np.float32).tobytes()
    assert first_lost(raw, "float32", converted(raw, "float32", "float16"), "float16") == -70000.0
    assert first_lost(raw, "float32", converted(raw, "float32", "bfloat16"), "bfloat16") is None
    largest = np.array([np.finfo(np.float32).max], np.float32).tobytes()
    assert first_lost(largest, "float32", converted(largest, "float32", "bfloat16"), "bfloat16") is not None
