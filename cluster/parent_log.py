"""The log of the process that holds coordinator, gateway and node agent; warnings are also for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from cluster.process_log import LineSink

#: Levels that an operator sees at once.
LOUD = frozenset({"warning", "error", "critical"})


class _Lines:
    """What structlog writes to: a method named as the level takes the rendered line."""

    def __init__(self, log: LineSink, say: Callable[[str], None]) -> None:
        self._log = log
        self._say = say

    def __getattr__(self, level: str) -> Callable[[str], None]:
        def write(line: str) -> None:
            self._log.write(line.encode())
            if level in LOUD:
                self._say(line)

        return write


def structured(log: LineSink, say: Callable[[str], None]) -> FilteringBoundLogger:
    """Events as one line each: time, level, event, key=value."""
    logger = structlog.wrap_logger(
        _Lines(log, say),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
    )
    return cast("FilteringBoundLogger", logger)
