"""What a worker tells about its KV transfers: tallies of pulls, leases by state and end, links."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.messages import TransferReport

if TYPE_CHECKING:
    from kvtransfer import HolderService, ReaderService, TransportSet


def transfer_report(holder: HolderService, reader: ReaderService, transports: TransportSet) -> TransferReport:
    """Totals since the worker's start, as of now."""
    leases = {f"holder.{state}": count for state, count in holder.leases_by_state().items()}
    leases |= {f"reader.{state}": count for state, count in reader.leases_by_state().items()}
    ended = {f"holder.{outcome}": count for outcome, count in holder.counters.outcomes.items()}
    ended |= {f"reader.aborted.{reason}": count for reason, count in reader.counters.aborted.items()}
    ended |= {f"reader.refused.{code}": count for code, count in reader.counters.refused.items()}
    if reader.counters.adopted:
        ended["reader.adopted"] = reader.counters.adopted
    return TransferReport(
        pulls=transports.tallies(),
        leases=leases,
        ended=ended,
        links=transports.links(),
        corrupt_blocks=reader.counters.corrupt_blocks,
        refetched_blocks=reader.counters.refetched_blocks,
        checksum_bytes=holder.counters.checksum_bytes + reader.counters.checksum_bytes,
        checksum_s=holder.counters.checksum_s + reader.counters.checksum_s,
    )
