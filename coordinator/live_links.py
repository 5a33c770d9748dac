"""How fast KV moves between workers: as a profile says, or the median of what they measured of the ways they chose."""

from __future__ import annotations

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

#: What no link does: such figures are not believed.
_SLOWEST_BYTES_S, _FASTEST_BYTES_S = 1.0, 1e15
_LONGEST_LATENCY_S = 1e3
#: Two links are the same where transfers of these sizes are: a few blocks, for which latency counts, and a long prompt.
_COMPARED_BYTES = (1 << 20, 1 << 26)


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
        sound = [
            each
            for each in chosen
            if _SLOWEST_BYTES_S <= each[0] <= _FASTEST_BYTES_S and 0 <= each[1] <= _LONGEST_LATENCY_S
        ]
        measured = _median_link(sound) if sound else None
        self._told[worker_id] = _Told(links, measured)
        self._told.move_to_end(worker_id)
        if len(self._told) > self._max_workers:
            self._told.popitem(last=False)
        if measured is not None:
            self._look()

    def forget(self, worker_id: WorkerId) -> None:
        """It is not there any more: its links say nothing of those that are used."""
        told = self._told.pop(worker_id, None)
        if told is not None and told.measured is not None:
            self._look()

    def _look(self) -> None:
        measured = [told.measured for told in self._told.values() if told.measured is not None]
        if not measured:
            return
        bandwidth_bytes_s, latency_s = _median_link(measured)
        found, present = LinkTransfer(latency_s=latency_s, bandwidth_bytes_s=bandwidth_bytes_s), self.model
        above = self._tolerance if present is self._profiled else self._replace_above
        if present is UNMEASURED_LINK or _differ(found, present, above):
            self.model = found


def _differ(link: LinkTransfer, other: LinkTransfer, above: float) -> bool:
    """Whether some transfer takes longer over one of them by more than that part."""
    for num_bytes in _COMPARED_BYTES:
        one_s, other_s = link.transfer_s(num_bytes, 1), other.transfer_s(num_bytes, 1)
        if max(one_s, other_s) > (1 + above) * min(one_s, other_s):
            return True
    return False


def _median_link(links: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Bandwidth and latency, each on its own."""
    return median(bandwidth for bandwidth, _ in links), median(latency_s for _, latency_s in links)
