"""Which kind of failure an error of the system is."""

from __future__ import annotations

import errno

from loadtest.record import Outcome

#: This machine has no more of something that every connection needs.
_CLIENT_LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM})


class RequestFailed(OSError):
    """A request outside of the measured ones got no response, or none that could be read."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(f"{outcome}: {detail}" if detail else str(outcome))
        self.outcome = outcome
        self.detail = detail


def outcome_of_connecting(error: OSError) -> Outcome:
    """Of one that ended an attempt to connect."""
    if error.errno in _CLIENT_LIMITS:
        return Outcome.CLIENT_LIMIT
    if isinstance(error, ConnectionRefusedError):
        return Outcome.REFUSED
    if isinstance(error, TimeoutError):
        return Outcome.CONNECT_TIMEOUT
    return Outcome.CONNECT_FAILED
