"""The eviction policy of a store's memory, by the name that the configuration has for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.eviction import Eviction

if TYPE_CHECKING:
    from contracts.config import EvictionPolicyName
    from kvstore.tiers.dram import EvictionSuggestions


def dram_eviction(policy: EvictionPolicyName, num_blocks: int) -> EvictionSuggestions:
    return Eviction(policy, num_blocks)
