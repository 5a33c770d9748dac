"""Tries that are over, remembered for a while, so that a late or repeated message does not start them again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contracts.messages import RequestKey


class RecentTries:
    """The last `limit` tries added. A cancel that overtakes its request finds its way in here first."""

    def __init__(self, limit: int = 4096) -> None:
        self._limit = limit
        self._tries: dict[RequestKey, None] = {}

    def add(self, key: RequestKey) -> None:
        self._tries.pop(key, None)
        self._tries[key] = None
        if len(self._tries) > self._limit:
            del self._tries[next(iter(self._tries))]

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._tries
