"""The live clocks: the one place below `cluster/` that reads the machine's time."""

from __future__ import annotations

import asyncio
import time


class LiveClock:
    """`contracts.clock.Clock` of a real process."""

    def now_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)


class LiveBlockingClock:
    """`coldstart.blocking_clock.BlockingClock`, for what blocks in threads of a real process."""

    def now_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()

    def sleep(self, delay_s: float) -> None:
        time.sleep(delay_s)
