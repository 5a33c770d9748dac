"""Clocks of simulated machines: each stands elsewhere, runs at its own rate, and may be set while it runs."""

from __future__ import annotations

import asyncio

from simulator.clock import WALL_ORIGIN_S

#: Added to every sleep, so that rounding never wakes a sleeper before its own deadline.
_ROUNDING_S = 1e-9

#: The worst that time keeping corrects; clocks that are worse are broken.
MAX_DRIFT = 500e-6


class MachineClock:
    """The clocks of one machine; each process on it reads them through a `ProcessClock`.

    `drift` is what they gain in a second of true time, in seconds; negative: lose. Raises ValueError where it is out
    of `MAX_DRIFT`.
    """

    def __init__(self, *, drift: float = 0.0) -> None:
        if not abs(drift) <= MAX_DRIFT:
            raise ValueError(f"a clock's drift lies within ±{MAX_DRIFT:g}, not at {drift}")
        self.rate = 1.0 + drift
        self._wall_origin_s = WALL_ORIGIN_S

    def wall_s(self) -> float:
        return self._wall_origin_s + asyncio.get_running_loop().time() * self.rate

    def jump_wall(self, by_s: float) -> None:
        """Sets the wall clock forwards or (negative) backwards; monotonic clocks go on as before."""
        self._wall_origin_s += by_s


class ProcessClock:
    """`contracts.clock.Clock` of one process; made on the loop whose time it shows.

    `offset_s` is where its monotonic clock stood at virtual second 0.
    """

    def __init__(self, machine: MachineClock, *, offset_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._machine = machine
        self._rate = machine.rate
        self._offset_s = offset_s

    def now_s(self) -> float:
        return self._loop.time() * self._rate + self._offset_s

    def wall_s(self) -> float:
        return self._machine.wall_s()

    async def sleep(self, delay_s: float) -> None:
        """`delay_s` on this clock: longer in true time where it runs slow."""
        await asyncio.sleep(delay_s / self._rate + _ROUNDING_S if delay_s > 0 else 0)
