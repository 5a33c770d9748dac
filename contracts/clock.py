"""Time as an argument. Shells hold a `Clock`; policies and machines get `now_s`."""

from __future__ import annotations

from typing import Protocol


class Clock(Protocol):
    def now_s(self) -> float:
        """Monotonic seconds since an arbitrary origin of this process. Never compared across processes."""
        ...

    def wall_s(self) -> float:
        """Unix time, for people only (`created` fields, logs)."""
        ...

    async def sleep(self, delay_s: float) -> None: ...
