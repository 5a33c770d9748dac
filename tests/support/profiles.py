"""A latency profile of an engine that is not there."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cluster.profile import store
from contracts.latency import StepWork
from contracts.latency_models import CostCurve, FittedLatency
from contracts.profile import FitErrors, LatencyProfile, ProfilePoint, ServingOverheads
from contracts.transfer_models import LinkTransfer

if TYPE_CHECKING:
    from pathlib import Path

#: Its held-out errors are the largest with which a profile may be used.
PROFILE = LatencyProfile(
    model="small",
    model_fingerprint="f00d",
    kv_token_bytes=1024,
    block_tokens=16,
    num_blocks=100,
    max_context_tokens=2048,
    engine="cpu, float32, 1 thread(s)",
    hardware="a processor, 2 cores",
    threads=1,
    versions={"torch": "2.11"},
    measured_at="2026-01-01T00:00:00+00:00",
    latency=FittedLatency(
        prefill=CostCurve(floor_s=0.01, knots=(0, 64, 512), knot_s=(0.001, 0.02, 0.2)),
        pair_s=1e-8,
        decode=CostCurve.line(0.01, 0.001),
        context_token_s=1e-6,
    ),
    step_overhead_s=1e-4,
    serving=ServingOverheads(first_token_s=0.005, step_s=0.001, handoff_s=0.003),
    transfer=LinkTransfer(latency_s=1e-3, bandwidth_bytes_s=1e9),
    errors=FitErrors(prefill=0.10, decode=0.05, mixed=0.5),
    points=(
        ProfilePoint(work=StepWork(16, 136.0, 1), measured_s=0.01, error=-0.02, held_out=False),
        ProfilePoint(work=StepWork(0, 0.0, 0, 4, 400), measured_s=0.01, error=0.05, held_out=True),
    ),
)


def save_to(profile: LatencyProfile, path: Path) -> None:
    """As `tandem profile` stores one."""
    asyncio.run(store(profile, path))
