"""How fast KV moves between workers: as a profile says, or the median of what they measured of the ways they chose."""

from __future__ import annotations

import math
from collections import OrderedDict
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from contracts.transfer_models import LinkTransfer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.ids import WorkerId
    from contracts.messages import LinkReport

#: Until a link was measured: a tenth of what shared memory and fast fabrics do, about what 10 Gbit/s Ethernet does.
UNMEASURED_LINK = LinkTransfer(latency_s=0.002, bandwidth_bytes_s=1e9)


class _Told(NamedTuple):
    links: tuple[LinkReport, ...]
    #: Bandwidth and latency of the ways it chose; None: it measured none.
    measured: tuple[float, float] | None


class LiveLinks:
    """One model for all pairs of workers."""

    def __init__(
        self, profiled: LinkTransfer | None, *, tolerance: float, replace_above: float, max_workers: int
    ) -> None:
        """A profile's link stands while what is measured is within `tolerance` of it, relative. A measured one is
        replaced where that changed by more than `replace_above`. The latest `max_workers` count."""
        self._profiled = profiled
        self._tolerance = tolerance
        self._replace_above = replace_above
        self._max_workers = max_workers
        self.model = profiled or UNMEASURED_LINK
        self._told: OrderedDict[WorkerId, _Told] = OrderedDict()

    def __len__(self) -> int:
        return len(self._told)

    def hear(self, worker_id: WorkerId, links: tuple[LinkReport, ...]) -> None:
        known = self._told.get(worker_id)
        if known is not None and known.links == links:
            self._told.move_to_end(worker_id)
            return
        chosen = [
            (link.bandwidth_bytes_per_s, link.latency_s or 0.0)
            for link in links
            if link.chosen and link.bandwidth_bytes_per_s is not None
        ]
        sound = [each for each in chosen if 0 < each[0] < math.inf and 0 <= each[1] < math.inf]
        measured = _median_link(sound) if sound else None
        self._told[worker_id] = _Told(links, measured)
        self._told.move_to_end(worker_id)
        if len(self._told) > self._max_workers:
            self._told.popitem(last=False)
        if measured is not None:
            self._look()

    def _look(self) -> None:
        found = _median_link([told.measured for told in self._told.values() if told.measured is not None])
        present = self.model
        is_profiled = present is self._profiled
        above = self._tolerance if is_profiled else self._replace_above
        ratio = found[0] / (present.bandwidth_bytes_s * present.efficiency)
        if max(ratio, 1 / ratio) > 1 + above or present is UNMEASURED_LINK:
            self.model = LinkTransfer(latency_s=found[1], bandwidth_bytes_s=found[0])


def _median_link(links: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Bandwidth and latency, each on its own."""
    return median(bandwidth for bandwidth, _ in links), median(latency_s for _, latency_s in links)
