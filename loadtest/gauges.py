"""A server's own count of its requests, read from its `/metrics` while a run goes on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PATH = "/metrics"
INTERVAL_S = 1.0
IDLE_INTERVAL_S = 0.2
#: After so many in a row nobody asks any more.
MAX_FAILURES = 3

#: Names of the gauges of running and of waiting requests; the first pair that is there counts.
NAMES = (
    (b"vllm:num_requests_running", b"vllm:num_requests_waiting"),
    (b"sglang:num_running_reqs", b"sglang:num_queue_reqs"),
    (b"tandem_worker_num_requests_running", b"tandem_num_requests_waiting"),
)


class GaugePoint(NamedTuple):
    """Over all engines of a server."""

    #: On the clock of the run.
    at_s: float
    running: float
    waiting: float


class Getter(Protocol):
    """What is needed of `http.HttpClient`."""

    async def get(self, path: str) -> tuple[int, Mapping[str, str], bytes]: ...


class GaugeWatch:
    """`points` grow while `run` is under way."""

    def __init__(self, client: Getter, now_s: Callable[[], float]) -> None:
        self._client = client
        self._now_s = now_s
        self._num_failures = 0
        self.points: list[GaugePoint] = []
        #: Why nobody asks any more; None: as long as it goes well.
        self.stopped_because: str | None = None

    async def run(self) -> None:
        """Asks every second until it is cancelled, or until the server has failed too often. May be run again."""
        while self.stopped_because is None:
            await self._ask()
            await asyncio.sleep(INTERVAL_S)

    async def wait_until_idle(self, limit_s: float) -> None:
        """Until the server says that it has no request, at most so long; at once where it does not say."""
        end_s = self._now_s() + limit_s
        while self.stopped_because is None and self._now_s() < end_s:
            self.points.clear()
            await self._ask()
            if not self.points or self.points[0].running + self.points[0].waiting == 0:
                return
            await asyncio.sleep(IDLE_INTERVAL_S)

    async def _ask(self) -> None:
        try:
            status, _, body = await self._client.get(PATH)
        except OSError as error:
            self._note_failure(str(error))
            return
        counts = requests_in(body) if status == 200 else None
        if counts is None:
            self._note_failure("no counts of requests in it" if status == 200 else f"status {status}")
            return
        self._num_failures = 0
        self.points.append(GaugePoint(self._now_s(), *counts))

    def _note_failure(self, why: str) -> None:
        self._num_failures += 1
        if self._num_failures >= MAX_FAILURES:
            self.stopped_because = f"GET {PATH}: {why}"


def requests_in(exposition: bytes) -> tuple[float, float] | None:
    """Running and waiting requests, each summed over all labels; None where no known gauges are.

    Looks for the few lines that count and reads no others: expositions are long, and a run is under way.
    """
    for running_name, waiting_name in NAMES:
        running, waiting = _sum_of(exposition, running_name), _sum_of(exposition, waiting_name)
        if running is not None and waiting is not None:
            return running, waiting
    return None


def _sum_of(exposition: bytes, name: bytes) -> float | None:
    total: float | None = None
    at = exposition.find(name)
    while at >= 0:
        end = exposition.find(b"\n", at)
        line = exposition[at : end if end >= 0 else len(exposition)]
        value = _value(line[len(name) :]) if at == 0 or exposition[at - 1 : at] == b"\n" else None
        if value is not None:
            total = value + (total or 0.0)
        at = exposition.find(name, at + len(line))
    return total


def _value(rest: bytes) -> float | None:
    """Of what follows a name on its line: labels, value, and maybe a time. None: it is another name, or no number."""
    if rest.startswith(b"{"):
        # Values of labels may have braces in them; numbers do not.
        rest = rest[rest.rfind(b"}") + 1 :]
    elif not rest.startswith((b" ", b"\t")):
        return None
    fields = rest.split()
    try:
        return float(fields[0]) if fields else None
    except ValueError:
        return None
