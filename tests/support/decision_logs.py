"""Records of decision logs, made by hand."""

from __future__ import annotations

from typing import Any

from coordinator.conductor import ConductorSettings
from coordinator.decision_records import (
    FORMAT,
    CostKind,
    Decision,
    Header,
    LinkCosts,
    Surroundings,
    Targets,
    WorkerUp,
)
from tests.support.conductors import PLAIN

HEADER = Header(
    format=FORMAT,
    version="test",
    started_at=1e9,
    at_s=0.0,
    settings=ConductorSettings(),
    slos={"x": Targets(300.0, 50.0)},
    default_slo=None,
    surroundings=Surroundings(),
    link=LinkCosts(latency_s=0.0, bandwidth_bytes_s=1e12, efficiency=1.0, kv_token_bytes=100),
    costs=(CostKind(number=0, latency=PLAIN, max_batch_tokens=512, between_steps_s=0.0),),
    workers=tuple(
        WorkerUp(
            at_s=0.0,
            worker_id=f"{role}-0",
            incarnation=1,
            role=role,
            total_blocks=1000,
            block_tokens=16,
            max_context_tokens=8192,
            max_batch_tokens=512,
            costs=0,
        )
        for role in ("prefill", "decode")
    ),
)


def decision(request: str, **fields: Any) -> Decision:
    """A placement, unless fields say otherwise."""
    given: dict[str, Any] = {"at_s": 0.0, "prompt_tokens": 100, "max_tokens": 16, "outcome": "placement", **fields}
    return Decision(request=request, **given)
