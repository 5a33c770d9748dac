"""How far a run is: a bar on a terminal, a line every ten seconds elsewhere. Both go to stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

LINE_INTERVAL_S = 10.0
#: How often a bar is drawn: drawing costs a millisecond or two, which requests wait for.
BAR_INTERVAL_S = 0.5


class Counts(Protocol):
    """What a `Player` counts."""

    num_ended: int
    num_failed: int

    @property
    def num_open(self) -> int: ...


class RunProgress:
    """Of a part of a run. A context; call `update` every `BAR_INTERVAL_S`. Nothing remains of a bar when it is left."""

    def __init__(
        self,
        what: str,
        num_requests: int,
        num_ended_before: int,
        now_s: Callable[[], float],
        *,
        console: Console | None = None,
    ) -> None:
        self._what = what
        self._num_ended_before = num_ended_before
        self._num_requests = num_requests
        self._now_s = now_s
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[told]}"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
                # No thread of its own: it would take the interpreter from the run at times of its choosing.
                auto_refresh=False,
            )
            self._task = self._bar.add_task(what, total=num_requests, told="")
        self._next_line_s = now_s() + LINE_INTERVAL_S

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, counts: Counts) -> None:
        num_ended = counts.num_ended - self._num_ended_before
        failed = f", {counts.num_failed:,} failed" if counts.num_failed else ""
        told = f"ended, {counts.num_open:,} open{failed}"
        if self._bar is not None:
            self._bar.update(self._task, completed=num_ended, told=told)
            self._bar.refresh()
        elif self._now_s() >= self._next_line_s:
            self._next_line_s = self._now_s() + LINE_INTERVAL_S
            self._console.print(
                f"{self._what}: {num_ended:,} of {self._num_requests:,} requests {told}",
                highlight=False,
                soft_wrap=True,
            )
