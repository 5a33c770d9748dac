"""One tier's eviction, as a store uses it: every policy keeps the rules, and does what its name says."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.config import EvictionPolicyName
from contracts.errors import InvariantBroken
from kvstore.eviction import NO_PARENT, Eviction

if TYPE_CHECKING:
    from collections.abc import Sequence

POLICIES: tuple[EvictionPolicyName, ...] = get_args(EvictionPolicyName)
every_policy = pytest.mark.parametrize("policy", POLICIES)


def anything(entry: int) -> bool:
    return True


def store(eviction: Eviction, entries: Sequence[int], now_s: float, hint: int = 0, parent: int = NO_PARENT) -> None:
    """A sequence of blocks; their hints are numbers from `hint` on."""
    for position, entry in enumerate(entries):
        key_hint = hint + position if hint else 0
        eviction.stored(entry, position=position, now_s=now_s, key_hint=key_hint, parent=parent)
        parent = entry


def suggested(eviction: Eviction, count: int, now_s: float) -> list[int]:
    return [victim.entry for victim in eviction.victims(count, now_s, anything)]


def evict(eviction: Eviction, count: int, now_s: float) -> list[int]:
    gone = suggested(eviction, count, now_s)
    for entry in gone:
        eviction.removed(entry, evicted=True)
    return gone


@every_policy
def test_the_end_goes_before_the_beginning(policy: EvictionPolicyName) -> None:
    eviction = Eviction(policy, 10)
    store(eviction, [3, 1, 4, 5, 9], 1.0)
    assert suggested(eviction, 5, 2.0) == [9, 5, 4, 1, 3]
    assert evict(eviction, 2, 2.0) == [9, 5]
    # Without being told what is behind what, too.
    others = Eviction(policy, 10)
    for position, entry in enumerate([3, 1, 4, 5, 9]):
        others.stored(entry, position=position, now_s=1.0)
    assert suggested(others, 5, 2.0) == [9, 5, 4, 1, 3]


@every_policy
def test_nothing_goes_that_may_not(policy: EvictionPolicyName) -> None:
    eviction = Eviction(policy, 10)
    store(eviction, [0, 1, 2, 3], 1.0)
    store(eviction, [7, 8], 2.0)
    found = eviction.victims(10, 3.0, lambda entry: entry not in (2, 8))
    assert [victim.entry for victim in found] == [3]
    assert suggested(eviction, 0, 3.0) == []


@every_policy
def test_a_tier_turns_over(policy: EvictionPolicyName) -> None:
    """A thousand prompts through 40 places: there is room each time, and what is hit all the time stays."""
    eviction = Eviction(policy, 40)
    store(eviction, [0, 1], 0.0, hint=1)
    free = list(range(2, 40))
    for number in range(1, 1000):
        now_s = 5.0 * number
        eviction.hit([0, 1], now_s)
        for entry in evict(eviction, 3 - len(free), now_s):
            assert entry not in (0, 1)
            free.append(entry)
        store(eviction, [free.pop() for _ in range(3)], now_s, hint=10 * number, parent=1)
        assert len(eviction) == 40 - len(free)


@every_policy
def test_the_same_again_is_the_same(policy: EvictionPolicyName) -> None:
    def run() -> list[int]:
        eviction = Eviction(policy, 64)
        free, gone = list(range(64)), list[int]()
        for number in range(400):
            victims = evict(eviction, 4 - len(free), float(number))
            free += victims
            gone += victims
            chain = [free.pop() for _ in range(4)]
            store(eviction, chain, float(number), hint=1 + number * number % 97)
            eviction.hit(chain[: number % 5], float(number))
        return gone

    assert run() == run()


def test_lru_and_lfu_differ_in_what_was_hit_often() -> None:
    for policy, expected in (("lru", 0), ("lfu_aged", 1)):
        eviction = Eviction(policy, 2)  # type: ignore[arg-type]
        store(eviction, [0], 0.0)
        for number in range(5):
            eviction.hit([0], 1.0 + number)
        store(eviction, [1], 6.5)
        assert suggested(eviction, 1, 7.0) == [expected]


def test_s3_fifo_keeps_what_was_hit_or_came_back() -> None:
    eviction = Eviction("s3_fifo", 10)
    for entry in range(10):
        eviction.stored(entry, position=0, now_s=float(entry), key_hint=100 + entry)
    eviction.hit([0, 1], 10.0)
    eviction.hit([0], 11.0)
    # 0 was hit twice: to the main queue. 1 once: out, like the others that were not.
    assert evict(eviction, 2, 12.0) == [1, 2]
    # 1 comes back: to the main queue at once, and is there when the small one has gone.
    eviction.stored(1, position=0, now_s=13.0, key_hint=101)
    eviction.stored(2, position=0, now_s=14.0, key_hint=500)
    assert evict(eviction, 8, 15.0) == [3, 4, 5, 6, 7, 8, 9, 0]
    assert [tuple(victim) for victim in eviction.victims(2, 16.0, anything)] == [
        (1, "not_used_again"),
        (2, "used_once"),
    ]


def test_cost_aware_learns_what_comes_back() -> None:
    """Of the prompts one in four has been asked twice; those come back every minute, the others never."""
    eviction = Eviction("cost_aware", 64)
    known = dict.fromkeys(range(8), 0.0)
    store(eviction, [0], 0.0, hint=1)
    for entry in range(1, 8):
        store(eviction, [entry], 0.0, hint=1 + entry)
    free = list(range(8, 64))
    lost = 0
    for number in range(1, 3000):
        now_s = 2.0 * number
        for entry in [entry for entry, used_s in known.items() if now_s - used_s >= 60]:
            eviction.hit([entry], now_s)
            known[entry] = now_s
        if not free:
            (victim,) = eviction.victims(1, now_s, anything)
            eviction.removed(victim.entry, evicted=True)
            free.append(victim.entry)
            if number > 200:
                lost += victim.entry in known
                assert victim.reason in ("never_reused", "least_worth")
            if victim.entry in known:
                known[victim.entry] = now_s
                eviction.stored(free.pop(), position=0, now_s=now_s, key_hint=1 + victim.entry)
                continue
        eviction.stored(free.pop(), position=0, now_s=now_s, key_hint=1000 + number)
    assert lost == 0


def test_scheduler_aware_keeps_what_waits() -> None:
    eviction = Eviction("scheduler_aware", 8)
    store(eviction, [0], 0.0)
    store(eviction, [1], 1.0)
    store(eviction, [2], 2.0)
    store(eviction, [3], 3.0)
    eviction.needed([0, 1])
    assert [tuple(victim) for victim in eviction.victims(4, 4.0, anything)] == [
        (2, "never_reused"),
        (3, "never_reused"),
        (1, "needed_latest"),
        (0, "needed_latest"),
    ]
    # The first time that one is needed counts; those that are not here are passed over.
    eviction.needed([2, 5, 3, 2])
    assert suggested(eviction, 4, 4.0) == [0, 1, 3, 2]
    eviction.needed([])
    assert suggested(eviction, 4, 4.0) == [0, 1, 2, 3]


def test_what_lost_its_beginning_goes_first() -> None:
    eviction = Eviction("lru", 8)
    store(eviction, [0], 0.0)
    store(eviction, [1, 2, 3], 1.0)
    eviction.removed(1, evicted=False)
    store(eviction, [1], 2.0)
    found = eviction.victims(4, 3.0, anything)
    assert [tuple(victim) for victim in found] == [
        (0, "never_reused"),
        (3, "never_reused"),
        (2, "no_beginning"),
        (1, "never_reused"),
    ]


def test_admission_asks_for_as_much_as_went_last() -> None:
    eviction = Eviction("cost_aware", 4)
    for entry in range(4):
        eviction.stored(entry, position=0, now_s=0.0, recompute_s=2.0, key_hint=entry + 1)
    assert suggested(eviction, 1, 0.5) == [0]
    cheap, dear = ({"position": 0, "now_s": 0.5, "recompute_s": each} for each in (1.0, 3.0))
    assert not eviction.admits(**cheap)  # type: ignore[arg-type]
    assert eviction.admits(**dear)  # type: ignore[arg-type]
    eviction.removed(0, evicted=True)
    assert eviction.admits(**cheap)  # type: ignore[arg-type]
    assert Eviction("s3_fifo", 1).admits(**cheap)  # type: ignore[arg-type]


@every_policy
def test_misuse_is_named(policy: EvictionPolicyName) -> None:
    eviction = Eviction(policy, 4)
    store(eviction, [0], 1.0)
    with pytest.raises(InvariantBroken, match="entry 0 of 4 is in use"):
        store(eviction, [0], 1.0)
    with pytest.raises(InvariantBroken, match="entry 4 of 4 is in use or cannot be"):
        store(eviction, [4], 1.0)
    with pytest.raises(InvariantBroken, match="entry 1 behind 2, which is not stored"):
        store(eviction, [1], 1.0, parent=2)
    with pytest.raises(InvariantBroken, match="a block of 0 bytes"):
        eviction.stored(1, position=0, now_s=1.0, size_bytes=0)
    with pytest.raises(InvariantBroken, match="entry 1 is not stored"):
        eviction.removed(1, evicted=True)
    with pytest.raises(InvariantBroken, match=r"a hit of entries \[0, 1\]"):
        eviction.hit([0, 1], 1.0)
    with pytest.raises(InvariantBroken, match="there are 4"):
        eviction.needed([4])
    with pytest.raises(ValueError, match="capacity_entries must be at least 1"):
        Eviction(policy, 0)
    assert suggested(eviction, 4, 2.0) == [0]


STEPS = st.lists(st.tuples(st.sampled_from("shen"), st.integers(0, 10**6)), max_size=80)


@every_policy
@given(steps=STEPS)
def test_what_is_suggested_can_go_in_that_order(policy: EvictionPolicyName, steps: list[tuple[str, int]]) -> None:
    """Store behind something, hit a path, evict, need: whatever came before, suggestions are stored, distinct, not
    refused, without anything behind them, and as many as there can be."""
    eviction = Eviction(policy, 24)
    parents: dict[int, int] = {}

    def path(entry: int) -> list[int]:
        return [] if entry == NO_PARENT else [*path(parents[entry]), entry]

    for number, (what, drawn) in enumerate(steps):
        now_s = 3.0 * number
        known = sorted(parents)
        if what == "s" and len(parents) < 24:
            entry = min(set(range(24)) - parents.keys())
            parent = known[drawn % len(known)] if known and drawn % 3 else NO_PARENT
            parents[entry] = parent
            position = len(path(parent))
            eviction.stored(entry, position=position, now_s=now_s, key_hint=drawn % 50, parent=parent)
        elif what == "h" and known:
            eviction.hit(path(known[drawn % len(known)]), now_s)
        elif what == "n":
            eviction.needed([drawn % 24, drawn % 7])
        elif what == "e":
            refused = {drawn % 24}
            count = 1 + drawn % 30
            victims = [victim.entry for victim in eviction.victims(count, now_s, lambda entry: entry not in refused)]  # noqa: B023
            held = {each for entry in refused & parents.keys() for each in path(entry)}
            assert len(victims) == min(count, len(parents.keys() - held))
            for entry in victims:
                assert entry not in refused
                assert entry not in parents.values()
                del parents[entry]
                eviction.removed(entry, evicted=True)
        assert len(eviction) == len(parents)
