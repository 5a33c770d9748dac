"""The likeliest meaning of a name that is not known."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def did_you_mean(wanted: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest of `known`, or all of them where none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(wanted[:64], names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(names)}"
