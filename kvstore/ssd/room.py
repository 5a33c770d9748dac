"""Segments: made while there is room, given up where there is none."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from contracts.errors import NoCapacity
from kvstore.ssd.format import segment_path
from kvstore.ssd.reclaim import choose_segment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.ssd.catalogue import Segment
    from kvstore.ssd.files import BlockFiles, FileEntry
    from kvstore.ssd.holdings import Holdings
    from kvstore.ssd.settings import SsdSettings

#: Of a new file: others may be there that are not ours.
_MAX_NAMES_TRIED = 8


class Room:
    """One change at a time: the caller awaits each method before it calls the next one."""

    def __init__(
        self, *, files: BlockFiles, holdings: Holdings, identity: bytes, segment_bytes: int, settings: SsdSettings
    ) -> None:
        self._files = files
        self._holdings = holdings
        self._identity = identity
        self._segment_bytes = segment_bytes
        self._settings = settings
        self._next_sequence = 1
        #: Segments of other identities, by path, and what they take; the oldest first.
        self._others: dict[str, int] = {}

    @property
    def others_bytes(self) -> int:
        return sum(self._others.values())

    def recovered(self, next_sequence: int, others: Sequence[FileEntry]) -> None:
        """What was found in the folder."""
        self._next_sequence = next_sequence
        self._others = {each.path: each.num_bytes for each in sorted(others, key=lambda each: each.changed_s)}

    async def delete_given_up(self) -> None:
        """Removes the files of segments that were given up. Raises OSError; what is left is tried again."""
        for path in list(self._holdings.to_delete):
            await self._delete(path)
            self._holdings.to_delete.pop(path, None)

    async def make_segment(self) -> Segment:
        """Raises OSError, and NoCapacity where pinned blocks leave no room."""
        await self.shrink(self._settings.size_bytes - self._segment_bytes)
        sequence = self._next_sequence
        for _ in range(_MAX_NAMES_TRIED):
            # A number that was tried is not tried again: its file may be there.
            sequence, self._next_sequence = self._next_sequence, self._next_sequence + 1
            with suppress(FileExistsError):
                await self._files.make(segment_path(self._identity, sequence), self._segment_bytes)
                return self._holdings.catalogue.open_segment(sequence, self._segment_bytes)
        raise NoCapacity(f"no room on disk: {_MAX_NAMES_TRIED} names of files up to {sequence} are taken")

    async def shrink(self, most_bytes: int) -> None:
        """Gives up what is needed for all files to take at most so much: others' first, then ours without pinned
        blocks. Raises OSError and NoCapacity."""
        await self.delete_given_up()
        while (taken_bytes := self._holdings.taken_bytes + self.others_bytes) > most_bytes:
            if self._others:
                await self._delete_other()
                continue
            segments = self._holdings.catalogue.segments
            loose = [segment for segment in segments if segment.may_go and segment.pinned_bytes == 0]
            victim = choose_segment(self._holdings.catalogue.segment_columns(loose), least_gain=0.0) if loose else None
            if victim is None:
                raise NoCapacity(f"no room on disk: {taken_bytes} bytes are taken, all segments have pinned blocks")
            self._holdings.drop_segment(loose[victim.index], "capacity")
            await self.delete_given_up()

    @property
    def needs_reserve(self) -> bool:
        """The next segment would not find room."""
        return self._holdings.taken_bytes + self.others_bytes + self._segment_bytes > self._settings.size_bytes

    async def give_up_other(self) -> bool:
        """Deletes the oldest segment of another identity; whether there was one. Raises OSError."""
        if self._others:
            await self._delete_other()
            return True
        return False

    def victim(self, active: Segment) -> Segment | None:
        """Which segment is to be given up for the next one to find room."""
        catalogue = self._holdings.catalogue
        segments = [segment for segment in catalogue.segments if segment.may_go and segment is not active]
        if not segments:
            return None
        victim = choose_segment(catalogue.segment_columns(segments), least_gain=self._settings.least_gain)
        return None if victim is None else segments[victim.index]

    async def _delete_other(self) -> None:
        path = next(iter(self._others))
        await self._delete(path)
        del self._others[path]

    async def _delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            await self._files.remove(path)
