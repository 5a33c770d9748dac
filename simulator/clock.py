"""The clock of a program on virtual time."""

from __future__ import annotations

import asyncio

#: Unix time at virtual second 0: some date, for people who read logs.
WALL_ORIGIN_S = 1_700_000_000.0


class VirtualClock:
    """`contracts.clock.Clock` of one simulated host; made on the loop whose time it shows.

    `offset_s` is where this host's monotonic clock stood when the simulation began: hosts given different
    ones show code that compares clocks of two processes. `wall_offset_s` is its error against true time.
    """

    def __init__(self, *, offset_s: float = 0.0, wall_offset_s: float = 0.0) -> None:
        self._loop = asyncio.get_running_loop()
        self._offset_s = offset_s
        self._wall_origin_s = WALL_ORIGIN_S + wall_offset_s

    def now_s(self) -> float:
        return self._loop.time() + self._offset_s

    def wall_s(self) -> float:
        return self._loop.time() + self._wall_origin_s

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
