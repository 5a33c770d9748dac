"""The log of a simulated process, as lines of the program's trace."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

    from structlog.typing import FilteringBoundLogger


def trace_logger(take: Callable[[str], None]) -> FilteringBoundLogger:
    """A logger that gives `take` one line for each event: its name, then its values as `key=value`."""
    logger: FilteringBoundLogger = structlog.wrap_logger(
        _Lines(take),
        processors=[_as_line],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    return logger


class _Lines:
    """What structlog takes for the logger behind its processors."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self.info = self.warning = self.error = self.critical = self.msg = take


def _as_line(logger: object, method: str, event: MutableMapping[str, Any]) -> str:
    values = " ".join(f"{key}={value}" for key, value in event.items() if key != "event")
    return f"{event['event']} {values}"
