from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from engine.ops import Ops, TorchOps
from engine.ops.build import NATIVE, load_kernels
from engine.ops.cpu_ops import CpuOps

if TYPE_CHECKING:
    from collections.abc import Iterator

#: What this machine would run; what the oldest would; and what a wider one would, its vectors cut in pieces.
BUILDS = {
    "native": NATIVE,
    "portable": ("-march=x86-64", "-DTANDEM_LANES=4") if platform.machine() == "x86_64" else ("-DTANDEM_LANES=4",),
    "wide": (*NATIVE, "-DTANDEM_LANES=16", "-O1"),  # optimised, it takes a minute to compile
}


@pytest.fixture(scope="session", params=list(BUILDS))
def cpu_ops(request: pytest.FixtureRequest) -> CpuOps:
    return CpuOps(load_kernels(machine_flags=BUILDS[request.param]))


@pytest.fixture(scope="session")
def native_ops() -> CpuOps:
    return CpuOps()


@pytest.fixture(scope="session")
def native_library() -> Path:
    """The file of the library that this machine would run."""
    return Path(load_kernels()._name)


@pytest.fixture(scope="session")
def torch_ops() -> Ops:
    return TorchOps()


@pytest.fixture(autouse=True)
def _keep_num_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
