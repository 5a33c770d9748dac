"""How many requests were in which state over the time of a run, from the times of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from loadtest.columns import Bools, Floats, RequestColumns

POINTS = 400
_BINS = 60


class InFlight(NamedTuple):
    """Requests that the client had open at these times, warm-up included."""

    at_s: Floats
    #: Due, without a token so far.
    waiting: Floats
    #: From the first token to the end.
    streaming: Floats


class Ended(NamedTuple):
    """Requests a second, in equal parts of the time."""

    edges_s: Floats
    due_rps: Floats
    finished_rps: Floats
    failed_rps: Floats


def in_flight(requests: RequestColumns) -> InFlight:
    """At `POINTS` times from the first due time to the last end; at none where nothing was due."""
    was_due = ~np.isnan(requests.due_s)
    due_s, first_s = requests.due_s[was_due], requests.first_token_s[was_due]
    last_s = requests.last_token_s[was_due]
    # Without an end (an interrupted record may have none) it is over with the last that came of it.
    end_s = np.fmax(np.fmax(requests.end_s[was_due], last_s), due_s)
    if not len(due_s):
        return InFlight(due_s, due_s, due_s)
    at_s: Floats = np.linspace(float(due_s.min()), float(end_s.max()), POINTS)
    streamed = ~np.isnan(first_s)
    return InFlight(
        at_s,
        _open_at(at_s, due_s, np.fmin(first_s, end_s)),
        _open_at(at_s, first_s[streamed], end_s[streamed]),
    )


def ended(requests: RequestColumns, failed: Bools) -> Ended:
    """Counts are by due time for `due_rps`, by end for the others."""
    due_s = requests.due_s[~np.isnan(requests.due_s)]
    if not len(due_s):
        return Ended(due_s, due_s, due_s, due_s)
    first_s, last_s = float(due_s.min()), float(np.nanmax(np.concatenate([due_s, requests.end_s])))
    # All at once, and over at once, are those of one second.
    span_s = last_s - first_s or 1.0
    edges_s: Floats = np.linspace(first_s, first_s + span_s, _BINS + 1)

    def rate(times_s: Floats) -> Floats:
        counts, _ = np.histogram(times_s[~np.isnan(times_s)], edges_s)
        return counts.astype(np.float64) * (_BINS / span_s)

    return Ended(edges_s, rate(due_s), rate(requests.end_s[requests.is_finished]), rate(requests.end_s[failed]))


def _open_at(at_s: Floats, begin_s: Floats, end_s: Floats) -> Floats:
    """Begun so far, less those ended so far."""
    begun = np.searchsorted(np.sort(begin_s), at_s, side="right")
    over = np.searchsorted(np.sort(end_s), at_s, side="right")
    return (begun - over).astype(np.float64)
