"""When requests move between workers, as a cluster file says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.policy.move_terms import MoveRules
from coordinator.policy.virtual_usage import UsageRules
from coordinator.rebalancer import RebalanceSettings

if TYPE_CHECKING:
    from contracts.config import ClusterConfig
    from coordinator.policy.move_terms import Purpose


def rebalance_settings(config: ClusterConfig) -> RebalanceSettings | None:
    """None: nothing moves."""
    migration = config.coordinator.migration
    if migration.mode == "off":
        return None
    purposes: frozenset[Purpose] = frozenset({"draining"})
    if migration.mode == "on":
        purposes = purposes.union(migration.purposes)
    rules = MoveRules(
        usage=UsageRules(headroom_tokens=migration.headroom_tokens),
        low_tokens=migration.low_tokens,
        high_tokens=migration.high_tokens,
        purposes=purposes,
        max_moving=migration.max_moving,
        max_moving_draining=migration.max_moving_draining,
        max_moving_total=migration.max_moving_total,
        cooldown_s=migration.cooldown_s,
        prompt_gain_s=migration.prompt_gain_s,
    )
    return RebalanceSettings(rules=rules, interval_s=migration.interval_s)
