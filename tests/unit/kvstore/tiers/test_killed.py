"""A store, and a worker that gives to it, killed after every single step."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from contracts.ids import LeaseId
from kvstore.tiers.machine import StoreLimits
from tests.support.store_chains import CHAINS
from tests.support.store_world import StoreWorld

if TYPE_CHECKING:
    from collections.abc import Callable

LONG, _, MIDDLE, OTHER_SALT = CHAINS
WHOLE = StoreLimits(reading_share=1.0, ahead_share=1.0, writing_share=1.0, window_share=1.0)


def _steps() -> list[Callable[[StoreWorld], object]]:
    """Two prompts come and are written, one of them is read again from disk for two readers while the other is
    pinned; every step is one that a kill can come after."""
    first, second = LeaseId("k1"), LeaseId("k2")
    return [
        lambda store: store.offer(first, LONG),
        *[partial(StoreWorld.land, lease_id=first)] * 6,
        lambda store: store.adopt(first),
        lambda store: store.offer(second, OTHER_SALT),
        lambda store: store.land_write(1, 0),
        lambda store: store.land(second),
        lambda store: store.land_write(1, 2),
        lambda store: store.ask("f", LONG),
        *[partial(StoreWorld.land, lease_id=second)] * 2,
        lambda store: store.adopt(second),
        lambda store: store.land_write(1, 1),
        lambda store: store.land_write(1, 3),
        lambda store: store.end_write(1),
        lambda store: store.land_write(2, 1),
        lambda store: store.land_write(2, 0),
        lambda store: store.pin(OTHER_SALT),
        lambda store: store.end_write(2),
        lambda store: store.over("f"),
        lambda store: store.take("other", 7),
        lambda store: store.ask("g", LONG),
        lambda store: store.begin_read(3, 0),
        lambda store: store.ask("h", MIDDLE),
        lambda store: store.end_read(3, 1),
        lambda store: store.end_read(3, 0),
        lambda store: store.over("g"),
    ]


@pytest.mark.parametrize("num_steps", range(len(_steps()) + 1))
def test_killed_after_any_step_it_serves_what_was_durable_and_nothing_else(num_steps: int) -> None:
    store = StoreWorld(12, limits=WHOLE)
    for step in _steps()[:num_steps]:
        step(store)
        store.check()
    durable = set(store.disk.stands)
    store.disk.forget_life()
    after = StoreWorld(12, store.disk, limits=WHOLE)
    after.check()
    for number, keys in enumerate(CHAINS):
        leading = next((index for index, key in enumerate(keys) if key not in durable), len(keys))
        fetch = after.ask(f"after {number}", keys)
        after.finish_disk()
        after.check()
        assert fetch.end == leading, "all that was durable, and no more"
        if leading:
            after.over(f"after {number}")
    assert after.machine.idle
    assert after.ledger.load()["owned_blocks"] == 0


@pytest.mark.parametrize("num_landed", range(4))
def test_a_worker_killed_while_it_gives_leaves_nothing_behind(num_landed: int) -> None:
    store = StoreWorld(12, limits=WHOLE)
    lease_id = LeaseId("k")
    assert store.offer(lease_id, OTHER_SALT)
    for _ in range(num_landed):
        store.land(lease_id)
    store.abort(lease_id)
    store.check()
    assert store.ask("f", OTHER_SALT).end == 0
    assert not store.take("other", 10), "bytes may still land there"
    store.settle(lease_id)
    store.check()
    assert store.take("other", 12)
