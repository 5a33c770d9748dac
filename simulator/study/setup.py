"""From flags and a cluster file to the `StudySpec` that the event heap simulates."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.config import PoolConfig, parse_size
from contracts.config_loader import load_config
from contracts.errors import ConfigError
from contracts.transfer_models import LinkTransfer
from coordinator.policy.settings import AdmissionRule, ConductorSettings
from engine.compose import StepBudget
from prefill import PrefillLimits
from prefill.ordering import QueueRules
from simulator.heap.spec import StudySpec, WorkerGroup
from simulator.study.costs import choose_costs
from simulator.study.flags import PolicyFlags

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from contracts.config import ClusterConfig
    from contracts.config_loader import LoadedConfig
    from contracts.messages import Role
    from simulator.study.costs import Costs
    from simulator.study.flags import ClusterFlags, LatencyFlags
    from workload.slo import SloClass

#: Of each role, in one study.
MAX_WORKERS = 100_000

#: One network card of 400 Gbit/s for each worker.
DEFAULT_LINK_BYTES_S = 50e9
DEFAULT_LINK_LATENCY_S = 1e-4
DEFAULT_MAX_CONTEXT_TOKENS = 131_072

_ROLES: Mapping[str, Role] = {"P": "prefill", "D": "decode", "M": "mixed"}
_WORKERS = re.compile(r"(?:[0-9]{1,9}[PDM])+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSetup:
    """What is simulated, said in the three ways a report needs it."""

    spec: StudySpec
    #: A line for each group of workers, and one for the links.
    text: str
    costs: Costs
    #: Plain data that repeats it.
    facts: dict[str, object]
    warnings: tuple[str, ...]


def parse_workers(text: str) -> dict[Role, int]:
    """`8P8D`, `4P4D2M`: how many prefill, decode and mixed workers. Raises ConfigError."""
    if not _WORKERS.fullmatch(text):
        raise ConfigError(f"--workers {text}: write counts and roles, such as 8P8D or 4P4D2M (prefill, decode, mixed)")
    counts: dict[Role, int] = {}
    for count, letter in re.findall(r"([0-9]+)([PDM])", text):
        role = _ROLES[letter]
        if role in counts:
            raise ConfigError(f"--workers {text}: {letter} stands twice")
        if not 1 <= int(count) <= MAX_WORKERS:
            raise ConfigError(f"--workers {text}: {count}{letter} must be between 1 and {MAX_WORKERS:,}")
        counts[role] = int(count)
    if "mixed" not in counts and len(counts) < 2:
        missing = "D (decode)" if "prefill" in counts else "P (prefill)"
        raise ConfigError(f"--workers {text}: without {missing} or M (mixed) no request could finish")
    return counts


def build_setup(
    cluster: ClusterFlags,
    latency: LatencyFlags,
    policy: PolicyFlags | None = None,
    slos: Sequence[SloClass] = (),
) -> ClusterSetup:
    """`slos`: what the coordinator is told of the workload's targets. Raises ConfigError that names the flag or the
    file's key."""
    policy = policy or PolicyFlags()
    _check(cluster, policy)
    loaded = load_config(cluster.config, {}, {})
    config = loaded.config
    if config.models:
        raise ConfigError(f"{cluster.config}: it has several `models`; a study is of one")
    costs = choose_costs(latency, config_model=None if cluster.config is None else config.model)
    pools = _pools(config.pools, cluster.workers)
    groups = tuple(
        WorkerGroup(
            name=pool.name,
            role=pool.role,
            count=count,
            latency=costs.latency,
            num_blocks=_num_blocks(pool, cluster, costs, loaded),
            num_devices=costs.num_devices,
            prefix_cache_tokens=policy.prefix_cache or 0,
            prefill=PrefillLimits(queue=_queue(config)),
            tpot_chunks=config.engine.queue.tpot_chunks,
            budget=StepBudget(
                max_tokens=cluster.max_batch_tokens or pool.max_batch_tokens or config.engine.max_batch_tokens,
                max_sequences=cluster.max_sequences or pool.max_sequences or config.engine.max_sequences,
                saturation_tokens=config.engine.queue.saturation_tokens,
            ),
        )
        for pool, count in pools
    )
    link = _link(cluster, costs)
    spec = StudySpec(
        groups=groups,
        transfer=link,
        kv_token_bytes=costs.kv_token_bytes,
        block_tokens=config.block_tokens,
        max_context_tokens=config.max_model_len or costs.max_context_tokens or DEFAULT_MAX_CONTEXT_TOKENS,
        heartbeat_interval_s=config.coordinator.heartbeat_interval_s,
        message_s=costs.message_s,
        between_steps_s=costs.between_steps_s,
        gateway_s=costs.gateway_s,
        request_timeout_s=config.gateway.request_timeout_s,
        conductor=_conductor(policy, loaded),
        slos=tuple(slos),
        max_output_tokens=policy.max_output,
    )
    return ClusterSetup(
        spec=spec,
        text=_text(spec, link),
        costs=costs,
        facts=_facts(spec, costs, cluster.config),
        warnings=(*costs.warnings, *_extrapolated(groups, costs)),
    )


def _check(cluster: ClusterFlags, policy: PolicyFlags) -> None:
    for flags, name in (
        (cluster, "kv_blocks"),
        (cluster, "max_batch_tokens"),
        (cluster, "max_sequences"),
        (policy, "max_output"),
    ):
        value: int | None = getattr(flags, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if policy.prefix_cache is not None and policy.prefix_cache < 0:
        raise ConfigError(f"--prefix-cache {policy.prefix_cache}: must not be negative")


def _conductor(policy: PolicyFlags, loaded: LoadedConfig) -> ConductorSettings:
    """Nothing is refused for targets unless somebody asks for it: a study is about all of its requests."""
    coordinator = loaded.config.coordinator
    dispatch, admission = coordinator.dispatch, coordinator.admission
    says_form = ("coordinator", "admission", "form") in loaded.sources
    return ConductorSettings(
        policy=policy.dispatch or dispatch.policy,
        decode=dispatch.decode,
        fetch_ratio=dispatch.fetch_ratio,
        replica_share=dispatch.replica_share,
        local_prefill_tokens=dispatch.local_prefill_tokens,
        admission=AdmissionRule(
            form=policy.admission or (admission.form if says_form else "none"),
            ttft_share=admission.ttft_share,
            tpot_share=admission.tpot_share,
            hysteresis=admission.hysteresis,
            miss_share=admission.miss_share,
        ),
        max_directory_blocks=coordinator.max_directory_blocks,
    )


def _queue(config: ClusterConfig) -> QueueRules:
    queue = config.engine.queue
    return QueueRules(
        order=queue.order,
        ageing_s=queue.ageing_s,
        fair=queue.fair,
        tenant_weights={tenant.name: tenant.weight for tenant in config.gateway.tenants},
    )


def _pools(pools: Sequence[PoolConfig], workers: str | None) -> list[tuple[PoolConfig, int]]:
    """The cluster file's pools, with the counts of `--workers` where it is given; roles it lacks come with defaults."""
    if workers is None:
        return [(pool, pool.initial_workers) for pool in pools]
    chosen: list[tuple[PoolConfig, int]] = []
    for role, count in parse_workers(workers).items():
        alike = [pool for pool in pools if pool.role == role]
        if len(alike) > 1:
            names = ", ".join(pool.name for pool in alike)
            raise ConfigError(
                f"--workers {workers}: the file has several {role} pools ({names}); set their counts there"
            )
        chosen.append((alike[0] if alike else PoolConfig(name=role, role=role), count))
    return chosen


def _num_blocks(pool: PoolConfig, cluster: ClusterFlags, costs: Costs, loaded: LoadedConfig) -> int:
    block_tokens = loaded.config.block_tokens
    if cluster.kv_blocks is not None:
        return cluster.kv_blocks
    if pool.kv_blocks is not None:
        return pool.kv_blocks
    if "kv_memory" not in _said_in_file(pool, loaded):
        return max(1, costs.kv_tokens // block_tokens)
    num_blocks = pool.kv_memory // (costs.kv_token_bytes * block_tokens)
    if num_blocks < 1:
        raise ConfigError(
            f"pools.{pool.name}.kv_memory: {pool.kv_memory} bytes hold no block of {block_tokens} tokens with "
            f"{costs.kv_token_bytes} bytes each"
        )
    return num_blocks


def _said_in_file(pool: PoolConfig, loaded: LoadedConfig) -> set[str]:
    """Keys of `pool` that have a source other than the default."""
    for index, each in enumerate(loaded.config.pools):
        if each is pool:
            return {str(path[2]) for path in loaded.sources if len(path) == 3 and path[:2] == ("pools", index)}
    return set()


def _link(cluster: ClusterFlags, costs: Costs) -> LinkTransfer:
    measured = costs.transfer or LinkTransfer(latency_s=DEFAULT_LINK_LATENCY_S, bandwidth_bytes_s=DEFAULT_LINK_BYTES_S)
    bandwidth_bytes_s, efficiency = measured.bandwidth_bytes_s, measured.efficiency
    if cluster.link_bandwidth is not None:
        bandwidth_bytes_s, efficiency = _bytes_per_s(cluster.link_bandwidth), 1.0
    latency_s = measured.latency_s if cluster.link_latency_ms is None else cluster.link_latency_ms / 1e3
    try:
        return LinkTransfer(latency_s=latency_s, bandwidth_bytes_s=bandwidth_bytes_s, efficiency=efficiency)
    except ValueError as error:
        raise ConfigError(f"--link-bandwidth, --link-latency-ms: {error}") from error


def _extrapolated(groups: Sequence[WorkerGroup], costs: Costs) -> tuple[str, ...]:
    most = max(group.budget.max_sequences for group in groups)
    if costs.max_fitted_sequences is None or most <= costs.max_fitted_sequences:
        return ()
    return (
        f"latencies are fitted to batches of at most {costs.max_fitted_sequences} sequences; steps of up to {most:,} "
        f"are extrapolated",
    )


def _bytes_per_s(text: str) -> float:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise ConfigError(f"--link-bandwidth: {error}") from error
    assert isinstance(size, int), "text always parses to a number"
    return float(size)


def _text(spec: StudySpec, link: LinkTransfer) -> str:
    lines = [
        f"{group.count:,} {group.role} worker{'s' * (group.count > 1)} of {group.num_devices} "
        f"device{'s' * (group.num_devices > 1)}: KV of {group.num_blocks * spec.block_tokens:,} tokens, "
        f"steps of at most {group.budget.max_tokens:,} tokens and {group.budget.max_sequences:,} sequences"
        for group in spec.groups
    ]
    lines += _policy_lines(spec)
    lines.append(f"links of {link.bandwidth_bytes_s * link.efficiency / 1e9:g} GB/s and {link.latency_s * 1e3:g} ms")
    return "\n".join(lines)


def _policy_lines(spec: StudySpec) -> list[str]:
    conductor = spec.conductor
    form = conductor.admission.form
    admission = "" if form == "none" else f", admission by {form} load"
    cache_tokens = max(group.prefix_cache_tokens for group in spec.groups)
    cache = f", prefix caches of {cache_tokens:,} tokens" if cache_tokens else ""
    order = next(group.prefill.queue.order for group in spec.groups if group.role != "decode")
    return [f"dispatch {conductor.policy}{admission}, queues {order}{cache}"]


def _facts(spec: StudySpec, costs: Costs, config: Path | None) -> dict[str, object]:
    return {
        "config_file": None if config is None else str(config),
        "groups": [
            {
                "name": group.name,
                "role": group.role,
                "num_workers": group.count,
                "num_devices_per_worker": group.num_devices,
                "num_blocks": group.num_blocks,
                "prefix_cache_tokens": group.prefix_cache_tokens,
                "max_batch_tokens": group.budget.max_tokens,
                "max_sequences": group.budget.max_sequences,
                "prefill_limits": group.prefill,
                "decode_limits": group.decode,
            }
            for group in spec.groups
        ],
        "latency": costs.facts,
        "transfer": spec.transfer,
        **{
            name: getattr(spec, name)
            for name in (
                "kv_token_bytes",
                "block_tokens",
                "max_context_tokens",
                "conductor",
                "slos",
                "max_output_tokens",
                "block_events_s",
                "heartbeat_interval_s",
                "message_s",
                "between_steps_s",
                "gateway_s",
                "overlap",
                "request_timeout_s",
                "max_retries",
            )
        },
    }
