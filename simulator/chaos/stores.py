"""The stores of a chaos trial, and the chats that give them something to keep."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from contracts.config import EvictionPolicyName
from simulator.engine import StepTiming, expected_tokens
from simulator.store import StoreDiskSpec

if TYPE_CHECKING:
    import random

    from simulator.clients import Ask
    from simulator.cluster import ClusterSpec

STORE = "s0"
TIMING = StepTiming()
#: Reading a token where it is worth to fetch instead.
DEAR_TOKEN_S = 0.003
#: Chance that a trial has a store.
STORE_CHANCE = 0.4
#: Of workers: hardly more than one chat.
SMALL_POOLS_TOKENS = (192, 256)
#: Chance that a store has a disk, and a disk something that is wrong with it.
DISK_CHANCE = 0.8
BAD_CHANCE = 0.5
#: Chance that a request goes on with a chat, and tokens of its prompt at most: chats are not to take the trial's time.
NEXT_TURN_CHANCE = 0.6
FORK_CHANCE = 0.4
#: Clients that come back at once after a power cut, and how long that takes them.
MAX_RUSH = 8
RUSH_S = 0.1
#: Between two turns, where there are such: what was said is kept by then.
PAUSE_S = 0.5
LONGEST_CHAT_TOKENS = 160


def draw_stores(rng: random.Random, cluster: ClusterSpec) -> ClusterSpec:
    """Most trials have none. Memories are small, so that much of what is asked for stands on disk alone; pools often
    are, so that it is asked for."""
    if rng.random() >= STORE_CHANCE:
        return cluster
    return replace(
        cluster,
        num_blocks=rng.choice([cluster.num_blocks, *(tokens // cluster.block_tokens for tokens in SMALL_POOLS_TOKENS)]),
        stores=(STORE,),
        timing=replace(TIMING, per_new_token_s=rng.choice([TIMING.per_new_token_s, DEAR_TOKEN_S])),
        store_blocks=rng.choice([16, 24, 48, 96]),
        store_disk=_draw_disk(rng) if rng.random() < DISK_CHANCE else None,
        eviction=rng.choice(get_args(EvictionPolicyName)),
    )


def _draw_disk(rng: random.Random) -> StoreDiskSpec:
    is_bad = rng.random() < BAD_CHANCE
    return StoreDiskSpec(
        num_blocks=rng.choice([40, 1_000, 1_000]),
        # From an SSD to what a busy one is at worst: reads that others join, writes that queue up.
        latency_s=rng.choice([0.0002, 0.1, 1.0]),
        block_s=rng.choice([0.0001, 0.005, 0.03]),
        damaged_chance=rng.choice([0.05, 0.3]) if is_bad else 0.0,
        full_chance=rng.choice([0.05, 0.3]) if is_bad else 0.0,
    )


def draw_chats(rng: random.Random, asks: tuple[Ask, ...], cluster: ClusterSpec) -> tuple[Ask, ...]:
    """Where there is a store, some requests are the next turn of an earlier one: they begin with its prompt and its
    answer. Whether that has come by then is not asked. Some come at the same time as the one before and go on with the
    same chat."""
    if not cluster.stores:
        return asks
    drawn: list[Ask] = []
    said: tuple[int, ...] = ()
    for ask in asks:
        if drawn and rng.random() < NEXT_TURN_CHANCE:
            if said and rng.random() < FORK_CHANCE:
                # The order stays: it comes after that one anyway.
                ask = replace(ask, at_s=drawn[-1].at_s)
            else:
                earlier = [each for each in drawn if each.at_s <= ask.at_s - PAUSE_S]
                said = _said(rng.choice(earlier or drawn))
            ask = _go_on(ask, said, cluster)
        drawn.append(ask)
    return tuple(drawn)


def draw_rush(
    rng: random.Random, asks: tuple[Ask, ...], cluster: ClusterSpec, *, cut_s: float, until_s: float
) -> tuple[Ask, ...]:
    """After a power cut at `cut_s`, when most are back, several clients go on with one chat at once, before `until_s`:
    what the store has of it is asked for by several workers, and stands on its disk."""
    before = [ask for ask in asks if ask.at_s <= cut_s - PAUSE_S]
    first = len(asks) - min(len(asks) - len(before), rng.randint(2, MAX_RUSH))
    room = _longest(cluster) - max((ask.sampling.max_tokens for ask in asks[first:]), default=0)
    chats = [said for ask in before if ask.cancel_after is None and len(said := _said(ask)) < room]
    if not chats:
        return asks
    said = max(rng.choices(chats, k=3), key=len)
    rush_s = min(cut_s + rng.uniform(0.5, 3.0), until_s - RUSH_S)
    rush = [replace(_go_on(ask, said, cluster), at_s=rush_s + rng.uniform(0.0, RUSH_S)) for ask in asks[first:]]
    return tuple(sorted((*asks[:first], *rush), key=lambda ask: ask.at_s))


def _go_on(ask: Ask, said: tuple[int, ...], cluster: ClusterSpec) -> Ask:
    """The same request, as the next turn of a chat; as it is where that would be too long."""
    room = _longest(cluster) - ask.sampling.max_tokens
    # The least that is new is its last token.
    new = ask.token_ids[: max(1, room - len(said))]
    return replace(ask, token_ids=(*said, *new)) if len(said) + len(new) <= room else ask


def _longest(cluster: ClusterSpec) -> int:
    return min(cluster.num_blocks * cluster.block_tokens, LONGEST_CHAT_TOKENS)


def _said(ask: Ask) -> tuple[int, ...]:
    """A turn's prompt and its whole answer."""
    return (*ask.token_ids, *expected_tokens(ask.token_ids, ask.sampling, ask.sampling.max_tokens))
