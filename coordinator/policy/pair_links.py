"""Pairs of workers whose way is notably faster or slower than the one that all are believed to have.

On one machine KV moves through memory, between machines over a network; a fleet has one model of a transfer, and what a
pair measured otherwise is kept as a power of two of its time. So noise changes nothing, and there are few kinds of
pairs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from contracts.ids import WorkerId
    from contracts.transfer_models import LinkTransfer
    from coordinator.policy.fleet_view import FleetView

    Powers = NDArray[np.int8]

#: Transfers of so many bytes are compared: some hundred tokens of a prefix.
COMPARED_BYTES = 1 << 24
#: Further from what all have a pair cannot be.
MAX_POWER = 7
_SHORTEST_S = 1e-9


class PairLinks:
    """By reader and source: the power of two by which a transfer takes longer; 0 where nothing else is known."""

    def __init__(self) -> None:
        #: By reader, then by source; without zeros.
        self._powers: dict[WorkerId, dict[WorkerId, int]] = {}
        #: Columns of one view, by source.
        self._view: FleetView | None = None
        self._columns: dict[WorkerId, Powers] = {}

    def __bool__(self) -> bool:
        """Whether any pair differs."""
        return bool(self._powers)

    def note(self, reader: WorkerId, powers: Mapping[WorkerId, int]) -> None:
        """All that is known of this reader's ways, by source."""
        kept = {source: power for source, power in powers.items() if power}
        if kept == self._powers.get(reader, {}):
            return
        self._powers.pop(reader, None)
        if kept:
            self._powers[reader] = kept
        self._columns.clear()

    def power(self, source: WorkerId, reader: WorkerId) -> int:
        return self._powers.get(reader, {}).get(source, 0)

    def column(self, source: WorkerId, view: FleetView) -> Powers:
        """By row, as readers from this source. Good until the next `note`."""
        if view is not self._view:
            self._view = view
            self._columns.clear()
        column = self._columns.get(source)
        if column is None:
            powers = [self.power(source, info.worker_id) for info in view.infos]
            column = self._columns[source] = np.array(powers, np.int8)
        return column


def power_of(link: LinkTransfer, common: LinkTransfer) -> int:
    """By which power of two a transfer takes longer over this one."""
    own_s, common_s = (max(each.transfer_s(COMPARED_BYTES, 1), _SHORTEST_S) for each in (link, common))
    longer = own_s / common_s
    return max(-MAX_POWER, min(MAX_POWER, round(math.log2(longer))))
