"""Stop strings in text that arrives in pieces: nothing that may belong to one is given out too early."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Released:
    """Text that may go to the client now; `matched` is the stop string that ended it, if one did."""

    text: str
    matched: str | None = None


class StopMatcher:
    """Finds the stop string that is complete first (of several that end together, the longest), so that the
    result does not depend on how the text was cut.

    After a match, or after `flush`, it takes no more text.
    """

    def __init__(self, stops: tuple[str, ...], *, include_match: bool = False) -> None:
        assert all(stops), "an empty stop string would match everywhere"
        self._stops = stops
        self._include_match = include_match
        #: A suffix of what was fed that begins some stop string, and nothing longer; never a whole one.
        self._held = ""

    def feed(self, piece: str) -> Released:
        if not self._stops:
            return Released(piece)
        text = self._held + piece
        found = min((match for stop in self._stops if (match := _find(text, stop))), default=None)
        if found is not None:
            self._held = ""
            end, start, stop = found
            return Released(text[: end if self._include_match else start], stop)
        keep = self._num_held(text)
        self._held = text[len(text) - keep :]
        return Released(text[: len(text) - keep])

    def flush(self) -> str:
        """The held text, when no more follows."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            suffix = text[-length:]
            if any(stop.startswith(suffix) for stop in self._stops):
                return length
        return 0


def _find(text: str, stop: str) -> tuple[int, int, str] | None:
    """(end, start, stop) of the first occurrence."""
    start = text.find(stop)
    return None if start < 0 else (start + len(stop), start, stop)
