"""Faults that come in patterns."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from simulator.faults.network import FaultyNetwork
    from simulator.faults.rules import Clog


class ClogTime(NamedTuple):
    """One host is clogged from `from_s` to `until_s`, counted from the pattern's beginning."""

    host: str
    from_s: float
    until_s: float


def draw_swizzle(rng: random.Random, hosts: Sequence[str], *, over_s: float) -> tuple[ClogTime, ...]:
    """Some of the hosts are clogged one after another within `over_s`, and freed in another order within as long.

    FoundationDB's "swizzle-clogging": it finds what depends on the order in which parts of a cluster go and come
    back. In order of `from_s`.
    """
    victims = rng.sample(hosts, rng.randint(1, len(hosts)))
    from_s = sorted(rng.uniform(0.0, over_s) for _ in victims)
    until_s = [rng.uniform(over_s, 2 * over_s) for _ in victims]
    return tuple(map(ClogTime, victims, from_s, until_s))


async def clog_in_turn(network: FaultyNetwork, times: Sequence[ClogTime]) -> None:
    """Plays such a pattern; returns when all are free."""
    past_s = 0.0
    clogs: list[Clog] = []
    for host, from_s, until_s in times:
        await asyncio.sleep(from_s - past_s)
        past_s = from_s
        clogs.append(network.clog(host, until_s - from_s))
    await asyncio.sleep(max(time.until_s for time in times) - past_s)
    for clog in clogs:
        # The last of them may be over only a rounding error from now.
        network.remove(clog)
