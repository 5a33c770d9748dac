"""Importing `rpc` loads nothing of gRPC, and offers the live network all the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rpc
from rpc import LiveClock

ROOT = Path(__file__).parents[3]

PROGRAM = """
import sys
import rpc
assert not [name for name in sys.modules if name.split(".")[0] == "grpc"], "rpc loads gRPC"
assert rpc.GrpcNetwork.__module__ == "rpc.grpc_network"
assert "grpc" in sys.modules
"""


def test_grpc_is_loaded_on_first_use_only() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, check=True, timeout=100)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'CarrierPigeon'"):
        _ = rpc.CarrierPigeon


async def test_the_live_clock_goes_forward() -> None:
    clock = LiveClock()
    before_s = clock.now_s()
    await clock.sleep(0.01)
    assert clock.now_s() > before_s
    assert clock.wall_s() > 1_700_000_000
