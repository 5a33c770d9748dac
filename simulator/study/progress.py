"""How far a study is: a bar on a terminal, a line every ten seconds elsewhere. Both go to stderr.

The bar is drawn when it is told something, not by a thread: studies may fork.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

LINE_INTERVAL_S = 10.0
_BAR_INTERVAL_S = 0.1


class StudyProgress:
    """A context; call `update` with what `simulate` says. Nothing remains of a bar when it is left."""

    def __init__(
        self,
        what: str,
        num_requests: int,
        *,
        console: Console | None = None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._now_s = now_s
        self._what = what
        self._num_requests = num_requests
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("requests, {task.fields[virtual]}"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
                auto_refresh=False,
            )
            self._task = self._bar.add_task(what, total=num_requests, virtual="")
        self._next_line_s = now_s() + LINE_INTERVAL_S
        self._next_bar_s = -math.inf

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, virtual_s: float, num_ended: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=num_ended, virtual=f"{virtual_s:,.0f} virtual s")
            if (now_s := self._now_s()) >= self._next_bar_s:
                self._next_bar_s = now_s + _BAR_INTERVAL_S
                self._bar.refresh()
        elif self._now_s() >= self._next_line_s:
            self._next_line_s = self._now_s() + LINE_INTERVAL_S
            self._console.print(
                f"{self._what}: {num_ended:,} of {self._num_requests:,} requests, {virtual_s:,.0f} virtual s",
                highlight=False,
                soft_wrap=True,
            )
