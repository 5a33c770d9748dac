"""The services that run inside a `tandem` process: coordinator, gateway. Each an async context manager.

This is where the rooms meet: it makes the live network, clock and sockets, and hands them down.
"""

from __future__ import annotations

import asyncio
import os
import random
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.autoscaling import autoscaler, split_applier
from cluster.decision_file import DecisionFile
from cluster.kept import kept
from cluster.progress import can_serve
from cluster.rebalancing import rebalance_settings
from cluster.replanning import replanning
from contracts.errors import ConfigError
from contracts.ids import GatewayId
from contracts.profile import load_profile
from coordinator import CoordinatorShell
from coordinator.conductor import Conductor
from coordinator.decision_log import DecisionLog
from coordinator.decision_records import Surroundings
from coordinator.live_costs import LiveCostLimits, LiveCosts
from coordinator.membership import MembershipLimits
from coordinator.policy.settings import AdmissionRule, ConductorSettings
from engine.model_config import load_model_config
from gateway.core import GatewayCore
from gateway.front import ServedModel, apis_of, front_of
from gateway.limits import GatewayLimits
from gateway.server import serve
from gateway.settings import GatewaySettings, TenantSettings
from gateway.terms import Tenant
from gateway.tokenizer import TextTokenizer
from prefill.ordering import UNHURRIED_AGEINGS
from workload.slo import SloClass

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

    from pydantic import SecretStr
    from structlog.typing import FilteringBoundLogger

    from contracts.clock import Clock
    from contracts.config import ClusterConfig
    from contracts.messages import DispatchItem
    from coordinator.decision import Chosen, Refused
    from coordinator.holding import Room
    from coordinator.replan_terms import Split
    from coordinator.replanner import Replanner
    from coordinator.split_applier import SplitApplier
    from gateway.app import Api
    from rpc import Network

    OnDecision = Callable[[DispatchItem, Chosen | Refused, float], None]

#: Open calls of a stopping coordinator get this long.
COORDINATOR_GRACE_S = 0.5


@asynccontextmanager
async def coordinator_service(
    config: ClusterConfig,
    network: Network,
    clock: Clock,
    bind: str,
    log: Callable[[str], None],
    *,
    weight_bytes: int = 0,
    room: Room | None = None,
) -> AsyncGenerator[str]:
    """Yields the address that it listens on. `weight_bytes`: of the model, where they are known; `room`: memory that
    its workers share with other models'. Raises ConfigError for a profile that cannot be used."""
    limits = MembershipLimits(
        heartbeat_interval_s=config.coordinator.heartbeat_interval_s,
        suspect_after_s=config.coordinator.suspect_after_s,
        heartbeat_timeout_s=config.coordinator.dead_after_s,
    )
    costs = live_costs(config)
    conductor = Conductor(
        costs=costs,
        slos=slo_classes(config),
        default_slo=config.default_slo_class,
        settings=conductor_settings(config),
        rng=random.Random(),
    )
    appliers: list[SplitApplier] = []

    def apply(split: Split) -> None:
        for each in appliers:
            each.apply(split)

    async with (
        _decision_log(config, conductor, costs, clock, log) as write_decision,
        replanning(config, conductor, costs, slo_classes(config), clock, log, apply=apply) as replanner,
        AsyncExitStack() as stack,
    ):
        shell = CoordinatorShell(
            clock,
            conductor=conductor,
            membership=limits,
            on_decision=_hearing(write_decision, replanner),
            on_transfers=costs.observe_transfers,
            on_gone=costs.forget_links,
            network=network,
            rebalancing=rebalance_settings(config),
            bandwidth=costs.bandwidth_bytes_s,
            log=log,
        )
        shell.figures.replanning = None if replanner is None else replanner.figures
        server = network.server(bind)
        shell.register_on(server)
        await stack.enter_async_context(shell)
        if config.coordinator.replan.mode == "apply" and (applier := split_applier(shell, clock, log)) is not None:
            appliers.append(await stack.enter_async_context(applier))
        if (scaler := autoscaler(config, shell, clock, log, weight_bytes=weight_bytes, room=room)) is not None:
            scaler.register_on(server)
            await stack.enter_async_context(scaler)
        try:
            yield await server.start()
        finally:
            await server.stop(COORDINATOR_GRACE_S)


def _hearing(write_decision: OnDecision | None, replanner: Replanner | None) -> OnDecision | None:
    """Passes on each decision to both."""
    if replanner is None:
        return write_decision

    def hear(item: DispatchItem, decision: Chosen | Refused, now_s: float) -> None:
        if write_decision is not None:
            write_decision(item, decision, now_s)
        replanner.decided(item, now_s)

    return hear


@asynccontextmanager
async def _decision_log(
    config: ClusterConfig, conductor: Conductor, costs: LiveCosts, clock: Clock, log: Callable[[str], None]
) -> AsyncGenerator[OnDecision | None]:
    """Yields what is to hear of decisions; None where nothing is. Raises ConfigError for a file that cannot be used."""
    if config.coordinator.decision_log is None:
        yield None
        return
    path = Path(config.coordinator.decision_log)
    decisions = DecisionLog(
        conductor,
        costs,
        settings=conductor_settings(config),
        slos=slo_classes(config),
        default_slo=config.default_slo_class,
        surroundings=_surroundings(config),
        version=version("tandem-serve"),
        started_at=clock.wall_s(),
        started_s=clock.now_s(),
    )
    async with DecisionFile(path, max_bytes=config.coordinator.decision_log_size, log=log) as file:

        def write(item: DispatchItem, decision: Chosen | Refused, now_s: float) -> None:
            file.write(decisions.decided(item, decision, now_s), lambda: decisions.opening(now_s))

        yield write


def _surroundings(config: ClusterConfig) -> Surroundings:
    """Of pools with the same role the smallest limit counts."""
    max_sequences: dict[str, int] = {}
    for pool in config.pools:
        limit = pool.max_sequences or config.engine.max_sequences
        max_sequences[pool.role] = min(limit, max_sequences.get(pool.role, limit))
    return Surroundings(
        heartbeat_interval_s=config.coordinator.heartbeat_interval_s,
        max_sequences=max_sequences,
        queue_ageing_s=config.engine.queue.ageing_s,
        queue_fair=config.engine.queue.fair,
        tpot_chunks=config.engine.queue.tpot_chunks,
    )


def conductor_settings(config: ClusterConfig) -> ConductorSettings:
    dispatch, admission = config.coordinator.dispatch, config.coordinator.admission
    return ConductorSettings(
        policy=dispatch.policy,
        decode=dispatch.decode,
        fetch_ratio=dispatch.fetch_ratio,
        replica_share=dispatch.replica_share,
        local_prefill_tokens=dispatch.local_prefill_tokens,
        headroom_tokens=dict(config.coordinator.migration.headroom_tokens),
        queue_order=config.engine.queue.order,
        unhurried_s=UNHURRIED_AGEINGS * config.engine.queue.ageing_s,
        priority_s=config.engine.queue.ageing_s,
        admission=AdmissionRule(
            form=admission.form,
            ttft_share=admission.ttft_share,
            tpot_share=admission.tpot_share,
            hysteresis=admission.hysteresis,
            miss_share=admission.miss_share,
        ),
        block_tokens=config.block_tokens,
        max_directory_blocks=config.coordinator.max_directory_blocks,
    )


def live_costs(config: ClusterConfig) -> LiveCosts:
    """Raises ConfigError or ProfileRefused for a profile that cannot be used."""
    named = config.coordinator.dispatch.profile
    profile = None if named is None else load_profile(Path(named).expanduser())
    return LiveCosts(profile, LiveCostLimits(max_batch_tokens=config.engine.max_batch_tokens))


def slo_classes(config: ClusterConfig) -> dict[str, SloClass]:
    return {name: SloClass(name, targets.ttft_ms, targets.tpot_ms) for name, targets in config.slo.items()}


def check_servable(config: ClusterConfig) -> None:
    """Raises ConfigError for a configuration that is good for plans only."""
    for pool in config.pools:
        for key in ("tensor_parallel", "pipeline_parallel"):
            number = getattr(pool, key)
            if number > 1:
                raise ConfigError(
                    f"pools.{pool.name}.{key} = {number}: workers of more than one device can be planned and "
                    "simulated, not served yet"
                )


def gateway_settings(config: ClusterConfig, folder: Path, model_name: str) -> GatewaySettings:
    """Raises ConfigError for settings that cannot work and for a model that cannot be served."""
    gateway = config.gateway
    longest = load_model_config(folder).max_position_embeddings
    return GatewaySettings(
        served_model_names=(model_name,),
        max_model_len=min(config.max_model_len or longest, longest),
        host=gateway.host,
        port=gateway.port,
        api_keys=_secrets(gateway.api_keys),
        tenants=tuple(
            TenantSettings(
                tenant=Tenant(name=tenant.name, max_priority=tenant.max_priority, slo_class=tenant.slo_class),
                api_keys=_secrets(tenant.api_keys),
            )
            for tenant in gateway.tenants
        ),
        slos=slo_classes(config),
        default_slo_class=config.default_slo_class,
        kv_class="lossy" if config.store.lossy else "exact",
        allow_unauthenticated=gateway.allow_unauthenticated,
        strict_fields=gateway.strict_fields,
        max_body_bytes=gateway.max_body,
        request_timeout_s=gateway.request_timeout_s,
        max_replays=gateway.max_replays,
        snapshot_ttl_s=gateway.snapshot_ttl_s,
        graceful_stop_s=gateway.graceful_stop_s,
        max_heartbeat_age_s=config.coordinator.dead_after_s,
        may_sleep=not can_serve([pool.role for pool in config.pools if pool.min_workers > 0]),
        version=version("tandem-serve"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontedModel:
    """A model as the gateway needs it."""

    settings: GatewaySettings
    folder: Path
    coordinator_address: str
    #: Of its cell; "" where there is but one.
    name: str = ""


@asynccontextmanager
async def gateway_service(
    models: Sequence[FrontedModel],
    network: Network,
    clock: Clock,
    sock: socket.socket,
    log: FilteringBoundLogger,
) -> AsyncGenerator[None]:
    """Answers on `sock`. Leaving lets open requests end for `graceful_stop_s`. A model's part that a bug ends begins
    anew; meanwhile its requests are refused, and those to other models are not."""
    first_id = f"gateway-{os.getpid()}-{int(clock.wall_s() * 1000)}"
    async with AsyncExitStack() as stack:
        served: list[ServedModel] = []
        apis: list[Api] = []
        for number, model in enumerate(models):
            tokenizer = TextTokenizer.load(model.folder, wall_s=clock.wall_s)
            own_id = f"{first_id}-{model.name}" if model.name else first_id
            core = await stack.enter_async_context(
                kept(
                    f"the gateway of {model.name or model.settings.served_model_names[0]}",
                    partial(_next_core, model, own_id, count(1), network, clock, log),
                    clock,
                    log.error,
                    # No part ends before all have begun.
                    on_down=lambda reason, number=number: apis[number].fail(reason),  # type: ignore[misc]
                    on_up=lambda core, number=number: apis[number].renew(core),  # type: ignore[misc]
                )
            )
            served.append(ServedModel(core=core, tokenizer=tokenizer, settings=model.settings))
        apis += apis_of(served, clock)
        app = front_of(served, apis, clock)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        serving = tasks.create_task(serve(app, models[0].settings, sock), name="gateway-http")
        try:
            yield
        finally:
            serving.cancel()


def _next_core(
    model: FrontedModel, own_id: str, lives: Iterator[int], network: Network, clock: Clock, log: FilteringBoundLogger
) -> GatewayCore:
    """Of a name of its own: workers must not take its requests for those of the life before."""
    life, settings = next(lives), model.settings
    limits = GatewayLimits(
        max_replays=settings.max_replays,
        snapshot_ttl_s=settings.snapshot_ttl_s,
        silent_after_s=settings.max_heartbeat_age_s / 2,
        unnamed_for_s=settings.max_heartbeat_age_s,
    )
    gateway_id = GatewayId(own_id if life == 1 else f"{own_id}-{life}")
    return GatewayCore(network, clock, gateway_id, model.coordinator_address, limits, log)


def _secrets(values: Sequence[SecretStr]) -> tuple[str, ...]:
    return tuple(value.get_secret_value() for value in values)


def base_url(sock: socket.socket) -> str:
    """How a client on this machine reaches the gateway."""
    name: tuple[str, int] = sock.getsockname()[:2]
    host, port = name
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
