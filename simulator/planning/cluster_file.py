"""A plan as a cluster file that `tandem serve --config` and `tandem config validate` accept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml
from pydantic import ValidationError

from contracts.config import ClusterConfig
from contracts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from contracts.config import ExpectedWorkload
    from coordinator.planner.plans import Plan, Pool
    from workload.slo import SloClass


def cluster_file(
    plan: Plan,
    *,
    model: str,
    block_tokens: int,
    max_sequences: int,
    num_blocks: Callable[[Pool], int],
    slos: Sequence[SloClass],
    profile: Path | None,
    expected: ExpectedWorkload,
    heading: Sequence[str],
) -> str:
    """YAML that begins with `heading` as comments. Raises ConfigError for what no cluster file can say."""
    tree: dict[str, object] = {
        "model": model,
        "block_tokens": block_tokens,
        "pools": [_pool(pool, plan.copies, max_sequences, num_blocks(pool)) for pool in plan.pools],
        "slo": {slo.name: {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms} for slo in slos},
    }
    if len(slos) == 1:
        tree["default_slo_class"] = slos[0].name
    coordinator: dict[str, object] = {"replan": {"expected": expected.model_dump(exclude_none=True)}}
    if profile is not None:
        coordinator["dispatch"] = {"profile": str(profile.resolve())}
    tree["coordinator"] = coordinator
    try:
        ClusterConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"the plan cannot be written as a cluster file: {key}: {first['msg']}") from error
    comments = "".join(f"# {line}\n" for line in (*heading, *_notes(plan)))
    return comments + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _pool(pool: Pool, copies: int, max_sequences: int, num_blocks: int) -> dict[str, object]:
    parallel = pool.kind.parallel
    return {
        "name": pool.role,
        "role": pool.role,
        "workers": copies * pool.num_workers,
        "tensor_parallel": parallel.tensor,
        "pipeline_parallel": parallel.pipeline,
        "kv_blocks": num_blocks,
        "max_batch_tokens": pool.kind.max_batch_tokens,
        "max_sequences": max_sequences,
    }


def _notes(plan: Plan) -> list[str]:
    notes: list[str] = []
    if any(pool.kind.parallel.num_devices > 1 for pool in plan.pools):
        notes.append("Workers of several devices can be planned, but not be served yet: tandem serve refuses them.")
    if plan.copies > 1:
        notes.append(
            f"Planned as {plan.copies} groups between which no KV goes; a cluster file cannot say so: serve each group "
            f"as a cluster, with 1/{plan.copies} of these workers and of coordinator.replan.expected.rate_rps."
        )
    return notes
