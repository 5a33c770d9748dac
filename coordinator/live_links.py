"""How fast KV moves between workers: as a profile says, or the median of what they measured of the ways they chose; and
which pairs do it notably faster or slower.
"""

from __future__ import annotations

from collections import OrderedDict
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from contracts.transfer_models import LinkTransfer
from coordinator.policy.pair_links import PairLinks, power_of

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
    """One model for all pairs of workers, and the pairs that it does not fit."""

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
        self.pairs = PairLinks()
        self._told: OrderedDict[WorkerId, _Told] = OrderedDict()

    def __len__(self) -> int:
        return len(self._told)

    def hear(self, worker_id: WorkerId, links: tuple[LinkReport, ...]) -> None:
        known = self._told.get(worker_id)
        if known is not None and known.links == links:
            self._told.move_to_end(worker_id)
            return
        sound = _sound(links)
        measured = _median_link(list(sound.values())) if sound else None
        self._told[worker_id] = _Told(links, measured)
        self._told.move_to_end(worker_id)
        if len(self._told) > self._max_workers:
            self.pairs.note(self._told.popitem(last=False)[0], {})
        before = self.model
        if measured is not None:
            self._look()
        for reader in (worker_id,) if self.model is before else self._told:
            self._note_pairs(reader)

    def bandwidth_bytes_s(self, source: WorkerId, reader: WorkerId) -> float | None:
        """As the reader measured it, else as the model says; None: nothing was measured, and no profile tells."""
        told = self._told.get(reader)
        measured = None if told is None else _sound(told.links).get(source)
        if measured is not None:
            return measured[0]
        return None if self.model is UNMEASURED_LINK else self.model.bandwidth_bytes_s * self.model.efficiency

    def forget(self, worker_id: WorkerId) -> None:
        """It is not there any more: its links say nothing of those that are used."""
        told = self._told.pop(worker_id, None)
        self.pairs.note(worker_id, {})
        before = self.model
        if told is not None and told.measured is not None:
            self._look()
        if self.model is not before:
            for reader in self._told:
                self._note_pairs(reader)

    def _note_pairs(self, reader: WorkerId) -> None:
        ways = {
            peer: LinkTransfer(latency_s=latency_s, bandwidth_bytes_s=bandwidth_bytes_s)
            for peer, (bandwidth_bytes_s, latency_s) in _sound(self._told[reader].links).items()
        }
        self.pairs.note(reader, {peer: power_of(way, self.model) for peer, way in ways.items()})

    def _look(self) -> None:
        measured = [told.measured for told in self._told.values() if told.measured is not None]
        if not measured:
            return
        bandwidth_bytes_s, latency_s = _median_link(measured)
        found, present = LinkTransfer(latency_s=latency_s, bandwidth_bytes_s=bandwidth_bytes_s), self.model
        above = self._tolerance if present is self._profiled else self._replace_above
        if present is UNMEASURED_LINK or _differ(found, present, above):
            self.model = found


def _sound(links: Sequence[LinkReport]) -> dict[WorkerId, tuple[float, float]]:
    """Bandwidth and latency of the ways that were chosen, by peer, as far as they can be believed."""
    return {
        link.peer: (link.bandwidth_bytes_per_s, link.latency_s or 0.0)
        for link in links
        if link.chosen
        and link.bandwidth_bytes_per_s is not None
        and _SLOWEST_BYTES_S <= link.bandwidth_bytes_per_s <= _FASTEST_BYTES_S
        and 0 <= (link.latency_s or 0.0) <= _LONGEST_LATENCY_S
    }


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
