"""From the configuration to what lets pools follow the load."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coldstart.keep_alive import KeepRules
from coordinator.policy.lending import LendRules
from coordinator.policy.scaling_terms import ScaleRules
from coordinator.pool_views import ScaledPool
from coordinator.scaling_settings import AutoscaleSettings
from coordinator.scaling_wiring import ShellOperator, autoscaler_of
from coordinator.split_applier import SplitApplier

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.clock import Clock
    from contracts.config import ClusterConfig, PoolConfig
    from contracts.ids import WorkerId
    from contracts.messages import WorkerInfo
    from contracts.pool_config import ScaleConfig
    from coordinator.autoscaler import Autoscaler
    from coordinator.holding import Room
    from coordinator.shell import CoordinatorShell

#: Of the shortest TTFT target: what a prompt may wait before it is begun.
_QUEUE_SHARE = 0.5
_QUEUE_DELAY_S = 1.0


def autoscaler(
    config: ClusterConfig,
    shell: CoordinatorShell,
    clock: Clock,
    log: Callable[[str], None],
    *,
    weight_bytes: int = 0,
    room: Room | None = None,
) -> Autoscaler | None:
    """As `coordinator.scaling_wiring.autoscaler_of`. `weight_bytes`: of the model."""
    return autoscaler_of(shell, autoscale_settings(config, weight_bytes=weight_bytes), clock, log, room=room)


def split_applier(shell: CoordinatorShell, clock: Clock, log: Callable[[str], None]) -> SplitApplier | None:
    """What gives this coordinator's workers other roles. None where it gives no orders."""
    if shell.operations is None:
        return None
    fleet = shell.conductor.fleet

    def infos() -> list[WorkerInfo]:
        return [fleet.info_at(row) for row in range(len(fleet))]

    def requests() -> dict[WorkerId, int]:
        loads = zip(infos(), fleet.loads, strict=True)
        return {info.worker_id: load.open_requests for info, load in loads if load is not None}

    operator = ShellOperator(shell.operations, clock)
    return SplitApplier(clock, infos=infos, requests=requests, operator=operator, log=log)


def autoscale_settings(config: ClusterConfig, *, weight_bytes: int = 0) -> AutoscaleSettings:
    scale, lending = config.coordinator.autoscale, config.coordinator.lend
    return AutoscaleSettings(
        mode=scale.mode,
        interval_s=scale.interval_s,
        pools=tuple(
            ScaledPool(
                name=pool.name,
                role=pool.role,
                rules=scale_rules(config, pool),
                worker_bytes=pool.kv_memory + weight_bytes,
            )
            for pool in config.pools
        ),
        start_s=scale.start_s,
        flip_s=scale.flip_s,
        tpot_s=min((targets.tpot_ms / 1e3 for targets in config.slo.values()), default=None),
        lend_mode=lending.mode,
        lend_rules=LendRules(
            queue_delay_high_s=lending.queue_delay_high_s,
            queue_delay_low_s=lending.queue_delay_low_s,
            memory_high=lending.memory_high,
            memory_low=lending.memory_low,
            min_stay_s=lending.min_stay_s,
            lend_as=lending.lend_as,
        ),
    )


def scale_rules(config: ClusterConfig, pool: PoolConfig) -> ScaleRules:
    """What is not said of a queue follows from the shortest TTFT target."""
    scale = pool.scale
    shortest_s = min((targets.ttft_ms / 1e3 for targets in config.slo.values()), default=_QUEUE_DELAY_S / _QUEUE_SHARE)
    return ScaleRules(
        min_workers=pool.min_workers,
        max_workers=pool.max_workers,
        target_attainment=scale.target_attainment,
        queue_delay_s=scale.queue_delay_s or _QUEUE_SHARE * shortest_s,
        freeness_low=scale.freeness_low,
        freeness_high=scale.freeness_high,
        cooldown_up_s=scale.cooldown_up_s,
        cooldown_down_s=scale.cooldown_s,
        max_step_up=scale.max_step_up,
        max_step_down=scale.max_step_down,
        to_zero_after_s=scale.to_zero_after_s,
        keep=keep_rules(scale),
        keep_bin_s=scale.keep_bin_s,
        flip=scale.flip,
        window_s=scale.window_s,
        recover_s=scale.recover_s,
    )


def keep_rules(scale: ScaleConfig) -> KeepRules | None:
    """None: `to_zero_after_s` says it all."""
    if scale.keep_alive == "fixed":
        return None
    return KeepRules(way=scale.keep_alive, min_times=scale.keep_min_times, wait_s_per_gib_s=scale.keep_price)
