"""How far a search is: a line that changes on a terminal, one every ten seconds elsewhere. Both go to stderr."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from rich.console import Console

from simulator.study.progress import LINE_INTERVAL_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


class PlanProgress:
    """A context; call `update` before each study. Nothing remains of the changing line when it is left."""

    def __init__(self, *, console: Console | None = None, now_s: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True)
        self._now_s = now_s
        self._num_studies = 0
        self._status = self._console.status("planning") if self._console.is_terminal else None
        self._next_line_s = now_s() + LINE_INTERVAL_S

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def update(self, what: str) -> None:
        self._num_studies += 1
        text = f"study {self._num_studies}: {what}"
        if self._status is not None:
            self._status.update(text)
        elif self._now_s() >= self._next_line_s:
            self._next_line_s = self._now_s() + LINE_INTERVAL_S
            self._console.print(text, highlight=False, soft_wrap=True)
