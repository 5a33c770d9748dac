"""From the configuration to the workers of this machine: ids, cores, threads, limits. Pure."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cores import CoreDemand, CoreShare, assign_cores
from cluster.launch import QueueOptions, SnapshotOptions, SsdOptions, StoreLaunch, TransferOptions, WorkerLaunch
from cluster.remote_model import DEFAULT_TIER
from contracts.errors import ConfigError
from contracts.ids import Incarnation, WorkerId

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coldstart.handing import WeightsDoor
    from contracts.config import ClusterConfig, PoolConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What the workers of one start share beside the configuration."""

    model_dir: str
    model_name: str
    coordinator_address: str
    cluster_token: str
    runtime_dir: str
    #: Of the store's name, where there are several models.
    prefix: str = ""
    #: Where rpc servers listen; port 0.
    bind: str
    #: None: the workers are nobody's children.
    parent_pid: int | None
    #: Cores this process may run on, ascending.
    allowed_cores: tuple[int, ...]
    #: Names this machine.
    node: str = "node"
    #: Where its node agent hands out weights; None: workers read their own.
    weights: WeightsDoor | None = None


def worker_slots(config: ClusterConfig) -> list[tuple[PoolConfig, int]]:
    """All workers that pools may have on this machine, by pool and number in it, counted from 0."""
    return [(pool, index) for pool in config.pools for index in range(pool.max_workers)]


def plan_launches(config: ClusterConfig, site: Site) -> list[WorkerLaunch]:
    """One launch for each of `worker_slots`: each has its cores, whether the others run or not. Raises ConfigError."""
    return plan_cells([(config, site)])[0]


def plan_cells(cells: Sequence[tuple[ClusterConfig, Site]]) -> list[list[WorkerLaunch]]:
    """The same for several models on one machine, whose workers divide its cores among all. Raises ConfigError."""
    for config, site in cells:
        for pool in config.pools:
            _check_cores(pool, site.allowed_cores)
    slots = [worker_slots(config) for config, _ in cells]
    demands = [CoreDemand(cores=pool.cores, threads=pool.threads) for own in slots for pool, _ in own]
    shares = iter(assign_cores(cells[0][1].allowed_cores, demands))
    return [
        [
            _launch(config, site, pool, WorkerId(f"{pool.name}-{config.first_worker + index}"), next(shares))
            for pool, index in own
        ]
        for (config, site), own in zip(cells, slots, strict=True)
    ]


def plan_store(config: ClusterConfig, site: Site) -> StoreLaunch | None:
    """The machine's store; None where the configuration has none."""
    store = config.store
    if store.dram is None:
        return None
    ssd = store.ssd
    options = None
    if ssd.path is not None:
        path = str(Path(ssd.path).expanduser())
        options = SsdOptions(path=path, size_bytes=ssd.size, codec=ssd.codec, direct=ssd.direct)
    return StoreLaunch(
        worker_id=WorkerId(f"{site.prefix}store-{site.node}"),
        incarnation=Incarnation(0),
        coordinator_address=site.coordinator_address,
        cluster_token=site.cluster_token,
        model_name=site.model_name,
        dram_bytes=store.dram,
        ssd=options,
        policy=store.policy,
        bind=site.bind,
        transport=config.transport,
        transfer=transfer_options(config),
        runtime_dir=site.runtime_dir,
        parent_pid=site.parent_pid,
        node=site.node,
    )


def node_name(config: ClusterConfig) -> str:
    """How this machine is called: as configured, or its host name."""
    return config.node or re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().lower()).strip("-")[:40] or "node"


def worker_environ(environ: Mapping[str, str], threads: int) -> dict[str, str]:
    """A worker's environment: OpenMP and MKL read these when they are loaded, before any code can say so."""
    return {
        **environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # Waiting threads sleep instead of spinning on cores that other processes need.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
        # gRPC tells of every connection that ends; errors it cannot report otherwise remain.
        "GRPC_VERBOSITY": "ERROR",
    }


def _check_cores(pool: PoolConfig, allowed: Sequence[int]) -> None:
    if pool.cores == "auto":
        return
    if not pool.cores:
        raise ConfigError(f"pools.{pool.name}.cores: the list is empty; write auto or core numbers")
    missing = sorted(set(pool.cores) - set(allowed))
    if missing:
        raise ConfigError(
            f"pools.{pool.name}.cores: this process may not run on cores {missing}; it has {list(allowed)}"
        )


def transfer_options(config: ClusterConfig) -> TransferOptions:
    transfer = config.transfer
    return TransferOptions(
        interface=transfer.interface,
        checksum=transfer.checksum,
        lease_ttl_s=transfer.lease_ttl_s,
        probe=transfer.probe,
        expect_bytes_per_s=transfer.expect_bandwidth,
        allow_slow=transfer.allow_slow,
    )


def queue_options(config: ClusterConfig) -> QueueOptions:
    queue = config.engine.queue
    return QueueOptions(
        order=queue.order,
        ageing_s=queue.ageing_s,
        fair=queue.fair,
        tenant_weights={tenant.name: tenant.weight for tenant in config.gateway.tenants if tenant.weight != 1.0},
        saturation_tokens=queue.saturation_tokens,
        tpot_chunks=queue.tpot_chunks,
    )


def snapshot_options(config: ClusterConfig) -> SnapshotOptions | None:
    """Beside the disk tier of checkpoints, or where that is when nobody says."""
    size = config.weights.snapshot
    if size is None:
        return None
    tier = Path(config.weights.ssd.path or DEFAULT_TIER).expanduser()
    return SnapshotOptions(folder=str(tier.absolute() / "snapshots"), size_bytes=size)


def _launch(config: ClusterConfig, site: Site, pool: PoolConfig, worker_id: WorkerId, share: CoreShare) -> WorkerLaunch:
    return WorkerLaunch(
        worker_id=worker_id,
        incarnation=Incarnation(0),
        role=pool.role,
        coordinator_address=site.coordinator_address,
        cluster_token=site.cluster_token,
        model_dir=site.model_dir,
        model_name=site.model_name,
        dtype=config.dtype,
        device=pool.device,
        max_model_len=config.max_model_len,
        block_tokens=config.block_tokens,
        kv_memory_bytes=pool.kv_memory,
        num_blocks=pool.kv_blocks,
        threads=share.threads,
        cores=share.cores,
        max_batch_tokens=pool.max_batch_tokens or config.engine.max_batch_tokens,
        max_sequences=pool.max_sequences or config.engine.max_sequences,
        prefix_cache=config.engine.prefix_cache,
        queue=queue_options(config),
        bind=site.bind,
        transport=config.transport,
        transfer=transfer_options(config),
        runtime_dir=site.runtime_dir,
        parent_pid=site.parent_pid,
        node=site.node,
        weights=site.weights,
        snapshot=snapshot_options(config),
    )
