"""Whether a run measured the server, or the client that measured it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from loadtest.record import Outcome
from workload.figures import LatencySummary

if TYPE_CHECKING:
    from loadtest.metrics import LoadMetrics

#: Requests leave, and answers are noted, at most so late in 99 of 100 cases.
MAX_LAG_MS = 10.0
#: Of one core: a process that needs all of it has begun to queue its own work.
MAX_CPU_SHARE = 0.95
#: Requests were sent at no less than this share of the rate at which they were due.
MIN_SENDING_RATE_RATIO = 0.99


class ClientUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What the client itself needed."""

    #: CPU time of the process over time passed, during the run: 1 is one core.
    cpu_share: float
    #: How late the event loop came to what was due: the error of every arrival time.
    loop_delay: LatencySummary


class Validity(msgspec.Struct, frozen=True, kw_only=True):
    valid: bool
    #: A sentence for each limit that was passed.
    reasons: tuple[str, ...]


def judge(metrics: LoadMetrics, client: ClientUsage, *, max_lag_ms: float = MAX_LAG_MS) -> Validity:
    """A run is invalid when the client was the bottleneck, or when nothing was measured. What the server did, however
    bad, leaves it valid.
    """
    num_limited = sum(error.count for error in metrics.errors if error.kind == Outcome.CLIENT_LIMIT)
    checks = (
        (metrics.num_requests == 0, "no request was measured"),
        (
            metrics.send_lag.p99_ms > max_lag_ms,
            f"the client sent late: p99 of the send lag is {metrics.send_lag.p99_ms:.1f} ms, over {max_lag_ms:g} ms",
        ),
        (
            client.loop_delay.p99_ms > max_lag_ms,
            f"the client noted arrivals late: p99 of its event loop's delay is {client.loop_delay.p99_ms:.1f} ms, over "
            f"{max_lag_ms:g} ms",
        ),
        (
            client.cpu_share > MAX_CPU_SHARE,
            f"the client needed {client.cpu_share:.0%} of a core, over {MAX_CPU_SHARE:.0%}",
        ),
        (
            num_limited > 0,
            f"{num_limited:,} requests failed for want of file descriptors, ports or memory on the client's machine",
        ),
        (
            metrics.sending_rate_ratio < MIN_SENDING_RATE_RATIO,
            f"the client sent at {metrics.sending_rate_ratio:.1%} of the planned rate, under "
            f"{MIN_SENDING_RATE_RATIO:.0%}",
        ),
    )
    reasons = tuple(reason for failed, reason in checks if failed)
    return Validity(valid=not reasons, reasons=reasons)
