"""Operator back ends of the engine: one object per device that does the arithmetic of a decoder step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.ops.api import AttentionBatch, Ops, PackedLinear
from engine.ops.torch_ops import TorchOps

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["AttentionBatch", "Ops", "PackedLinear", "TorchOps", "select_ops"]


def select_ops(device: torch.device | str, *, log: Callable[[str], None]) -> Ops:
    """The fastest back end that works on `device` here; `log` gets one line that says which, and why."""
    device = torch.device(device)
    if device.type == "cpu":
        return _select_cpu_ops(log)
    if device.type == "cuda":
        from engine.ops.cuda_ops import CudaOps

        cuda_ops = CudaOps(device)
        log(f"operators: {cuda_ops.name} ({cuda_ops.reason})")
        return cuda_ops
    log(f"operators: {device.type}-torch (no kernels for this device)")
    return TorchOps(device)


def _select_cpu_ops(log: Callable[[str], None]) -> Ops:
    # Imported here, as the build reads compilers and locks that other devices do not need.
    from engine.ops.build import BuildError
    from engine.ops.cpu_ops import CpuOps

    try:
        cpu_ops = CpuOps()
    except BuildError as error:
        log(f"operators: cpu-torch, several times slower than compiled kernels ({error})")
        return TorchOps()
    log(f"operators: {cpu_ops.name} (compiled for this CPU)")
    return cpu_ops
