"""What a tier gives up where there is no room: policies suggest, the store disposes."""

from kvstore.eviction.columns import NO_PARENT
from kvstore.eviction.eviction import Eviction, Victim

__all__ = ["NO_PARENT", "Eviction", "Victim"]
