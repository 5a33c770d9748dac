"""The disk tier of checkpoints: a folder of them, of bounded size, that all processes of a machine share.

    entries/<key>/    tandem-tier.json (its files' sizes), checkpoint/ (a whole model folder)
    loading/<key>/    reserved.json (its size to be), checkpoint/ as far as it came, and what the loader keeps there
    trash/            what is being removed

Locks are flocks, which end with their process however that ends. The tier's own, on the root, is held for moments: for
every look-up, claim, commit and removal. A folder's own tells who needs it: shared by those who use an entry (a pin),
exclusive for who loads one. A commit renames the loader's folder into `entries/`, and its lock, turned into a shared
one, is the first pin. So nothing half-written ever has a name that a look-up finds, and what a killed process leaves is
either resumed by the next loader of the same key or removed when room is needed. (ServerlessLLM, OSDI'24, section 4.2,
keeps checkpoints on local SSDs, LRU; how it survives crashes is not told.)
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import xxhash

from coldstart.tier_files import disk_error
from coldstart.tier_handles import CHECKPOINT, Entry, Loading
from coldstart.tier_policy import Resident, plan_room
from coldstart.tier_records import (
    MAX_CHECKED_BYTES,
    VERSION,
    KeptFile,
    Manifest,
    Reservation,
    decode_manifest,
    decode_reservation,
    encode_record,
)
from contracts.errors import Cancelled, CorruptCheckpoint, DeadlineExceeded, LoadError, NoCapacity

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

    from coldstart.blocking_clock import BlockingClock
    from coldstart.tier_files import TierFiles
    from coldstart.tier_records import CheckpointKey

MANIFEST = "tandem-tier.json"
RESERVATION = "reserved.json"

#: How often somebody who waits for another process looks again.
_POLL_S = 0.05
#: The tier's lock is held for moments; longer is a hung process.
_LOCK_WAIT_S = 30.0
#: A load that nobody went on with for this long is removed when a tier is opened.
_STALE_S = 7 * 86400.0


class LocalTier:
    """Thread-safe; any number of them, in any number of processes, may have one root.

    Raises LoadError for what the disk does, NoCapacity where a checkpoint does not fit.
    """

    def __init__(
        self,
        root: Path,
        *,
        capacity_bytes: int,
        files: TierFiles,
        clock: BlockingClock,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Makes the folders and removes what dead processes left to be removed. `tell` hears what is removed and
        why."""
        self._root = root
        self._capacity_bytes = capacity_bytes
        self._files = files
        self._clock = clock
        self._tell = tell
        self._entries, self._loading, self._trash = root / "entries", root / "loading", root / "trash"
        with self._disk():
            for folder in (root, self._entries, self._loading, self._trash):
                files.make_folder(folder)
            with self._locked():
                self._drop_stale()
            self._empty_trash()

    @property
    def root(self) -> Path:
        return self._root

    def look_up(self, key: CheckpointKey) -> Entry | None:
        """The checkpoint, pinned, if it is here and as it was written; a damaged one is dropped."""
        path = self._entries / key.folder
        with self._disk():
            with self._locked():
                if not self._files.names(path):
                    return None
                descriptor = self._files.open_folder(path)
                if not self._files.lock(descriptor, shared=True):
                    # Nobody locks an entry alone but under the tier's lock, or a foreign program.
                    self._files.close(descriptor)
                    return None
            # It is pinned: the check need not hold up others.
            with self._closed_on_error(descriptor):
                return self._checked(key, descriptor)

    def acquire(
        self,
        key: CheckpointKey,
        num_bytes: int,
        *,
        wait_s: float,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Entry | Loading:
        """The checkpoint, or the right to load it, with `num_bytes` reserved.

        While another process or thread loads it, waits for that, and takes over if it dies. Raises DeadlineExceeded
        after `wait_s`, Cancelled, NoCapacity when no room can be made, and LoadError.
        """
        until_s = self._clock.now_s() + wait_s
        while True:
            entry = self.look_up(key)
            if entry is not None:
                return entry
            with self._disk():
                loading = self._claim(key, num_bytes)
                self._empty_trash()
            if loading is not None:
                return loading.enter() if loading.is_finished() else loading
            if is_cancelled():
                raise Cancelled(f"no longer waiting for {key.identity}")
            if self._clock.now_s() >= until_s:
                raise DeadlineExceeded(f"{self._root}: another process is still loading {key.identity} ({wait_s:g} s)")
            self._clock.sleep(_POLL_S)

    def manifests(self) -> list[Manifest]:
        """Of all whole checkpoints, the last used one first."""
        with self._disk(), self._locked():
            found = [(name, self._manifest(self._entries / name)) for name in self._files.names(self._entries)]
            used = {name: self._used_s(self._entries / name) for name, _ in found}
        found.sort(key=lambda each: -used[each[0]])
        return [manifest for _, manifest in found if manifest is not None]

    def evict(self, key: CheckpointKey) -> bool:
        """Removes it unless it is used or not here."""
        with self._disk():
            with self._locked():
                is_out = self._take_out(self._entries / key.folder)
            self._empty_trash()
        return is_out

    def used_bytes(self) -> int:
        """Whole checkpoints and reservations."""
        with self._disk(), self._locked():
            return sum(resident.num_bytes for resident in self._residents(None))

    # --- for Entry and Loading ----------------------------------------------------------------------------

    def discard(self, entry: Entry, reason: str) -> None:
        with self._disk():
            path = self._entries / entry.key.folder
            with self._locked():
                # Somebody else may have dropped it, and there may be a new one.
                if self._files.is_same(entry.descriptor, path):
                    self._throw_away(path)
                    self._tell(f"{path} is dropped: {reason}")
            self._empty_trash()

    def reserve(self, loading: Loading, num_bytes: int) -> None:
        with self._disk():
            with self._locked():
                self._make_room(num_bytes, loading.folder)
                self._write_reservation(loading.key, num_bytes, loading.folder)
            self._empty_trash()

    def prepare(self, loading: Loading, origin: str) -> None:
        """All of a commit but the renaming."""
        with self._disk():
            kept = self._synced(loading.folder / CHECKPOINT)
            if not kept:
                raise LoadError(f"{loading.folder}: nothing was loaded")
            manifest = Manifest(version=VERSION, key=loading.key, origin=origin, files=kept)
            with self._locked():
                self._make_room(manifest.num_bytes, loading.folder)
                self._files.replace(loading.folder / MANIFEST, encode_record(manifest))
            self._empty_trash()

    def enter(self, loading: Loading) -> Entry:
        """From `loading/` to `entries/`: from here on it is found."""
        path = self._entries / loading.key.folder
        with self._disk(), self._closed_on_error(loading.descriptor):
            # Not before the manifest stood: a loader that is killed until then goes on from these.
            for name in self._files.names(loading.folder):
                if name not in (CHECKPOINT, MANIFEST):
                    self._files.remove(loading.folder / name)
            with self._locked():
                self._files.set_used(loading.folder / MANIFEST, self._clock.wall_s())
                self._files.rename(loading.folder, path)
                self._files.lock(loading.descriptor, shared=True)
            entry = self._checked(loading.key, loading.descriptor)
        if entry is None:
            raise LoadError(f"{path}: was damaged while it was written")
        return entry

    def close_descriptor(self, descriptor: int) -> None:
        self._files.close(descriptor)

    def remove_loading(self, loading: Loading) -> None:
        with self._disk():
            with self._locked():
                if self._files.is_same(loading.descriptor, loading.folder):
                    self._throw_away(loading.folder)
            self._empty_trash()

    def is_finished(self, loading: Loading) -> bool:
        manifest = self._manifest(loading.folder)
        return manifest is not None and self._problem(loading.folder, loading.key) is None

    # --- one step -----------------------------------------------------------------------------------------

    def _claim(self, key: CheckpointKey, num_bytes: int) -> Loading | None:
        """None: somebody else has it, or it is here by now."""
        folder = self._loading / key.folder
        with self._locked():
            if self._files.names(self._entries / key.folder):
                return None
            self._files.make_folder(folder)
            descriptor = self._files.open_folder(folder)
            try:
                if not self._files.lock(descriptor, shared=False):
                    self._files.close(descriptor)
                    return None
                self._make_room(num_bytes, folder)
                self._write_reservation(key, num_bytes, folder)
            except (OSError, NoCapacity):
                if not self._files.sizes(folder):
                    self._files.remove(folder)
                self._files.close(descriptor)
                raise
        return Loading(self, key, folder, descriptor, num_bytes)

    def _checked(self, key: CheckpointKey, descriptor: int) -> Entry | None:
        path = self._entries / key.folder
        entry = Entry(self, key, path / CHECKPOINT, descriptor)
        problem = self._problem(path, key)
        if problem is not None:
            entry.discard(problem)
            return None
        self._files.set_used(path / MANIFEST, self._clock.wall_s())
        return entry

    def _problem(self, path: Path, key: CheckpointKey) -> str | None:
        """What is wrong with a whole checkpoint, as far as can be told without reading its weights."""
        manifest = self._manifest(path)
        if manifest is None:
            return f"{path}: {MANIFEST} is missing or damaged"
        if manifest.key != key:
            return f"{path}: of another key"
        if self._files.sizes(path / CHECKPOINT) != {file.name: file.num_bytes for file in manifest.files}:
            return f"{path}: files are missing, or of another size"
        for file in manifest.files:
            if file.checksum is None:
                continue
            try:
                found = self._hash(path / CHECKPOINT / file.name)
            except OSError as error:
                return f"{path}: {file.name} cannot be read ({error.strerror})"
            if found != file.checksum:
                return f"{path}: {file.name} is damaged"
        return None

    def _synced(self, folder: Path) -> tuple[KeptFile, ...]:
        kept: list[KeptFile] = []
        for name, num_bytes in self._files.sizes(folder).items():
            self._files.sync(folder / name)
            checked = num_bytes <= MAX_CHECKED_BYTES
            kept.append(
                KeptFile(name=name, num_bytes=num_bytes, checksum=self._hash(folder / name) if checked else None)
            )
        if kept:
            self._files.sync(folder)
        return tuple(kept)

    def _make_room(self, needed_bytes: int, own: Path) -> None:
        """Under the tier's lock. `own` is the folder that the room is for."""
        while True:
            residents = self._residents(own)
            plan = plan_room(residents, needed_bytes=needed_bytes, capacity_bytes=self._capacity(own, residents))
            if not plan.fits:
                raise NoCapacity(f"{self._root}: {plan.reason}", reason="tier_full")
            for victim in plan.victims:
                if not self._take_out(self._root / victim.folder):
                    # Taken by a foreign program; pinned in the next plan.
                    break
                self._tell(f"{self._root / victim.folder} is removed: {victim.reason}")
            else:
                return

    def _capacity(self, own: Path, residents: Sequence[Resident]) -> int:
        """Others fill the disk, too."""
        written = sum(resident.num_bytes for resident in residents if resident.is_complete)
        written += sum(
            sum(self._files.sizes(self._loading / name).values()) for name in self._files.names(self._loading)
        )
        return min(self._capacity_bytes, written + self._files.free_bytes(self._root))

    def _residents(self, own: Path | None) -> list[Resident]:
        return [
            self._resident(parent / name)
            for parent in (self._loading, self._entries)
            for name in self._files.names(parent)
            if parent / name != own
        ]

    def _resident(self, path: Path) -> Resident:
        is_complete = path.parent == self._entries
        num_bytes = sum(self._files.sizes(path).values())
        if not is_complete:
            num_bytes = max(num_bytes, self._reserved_bytes(path))
        return Resident(
            folder=f"{path.parent.name}/{path.name}",
            num_bytes=num_bytes,
            used_s=self._used_s(path),
            is_pinned=not self._is_free(path),
            is_complete=is_complete,
        )

    def _is_free(self, path: Path) -> bool:
        descriptor = self._files.open_folder(path)
        try:
            return self._files.lock(descriptor, shared=False)
        finally:
            self._files.close(descriptor)

    def _take_out(self, path: Path) -> bool:
        """Into the trash, unless it is used or gone."""
        if path.name not in self._files.names(path.parent) or not self._is_free(path):
            return False
        self._throw_away(path)
        return True

    def _throw_away(self, path: Path) -> None:
        taken = set(self._files.names(self._trash))
        number = 0
        while f"{path.name}-{number}" in taken:
            number += 1
        self._files.rename(path, self._trash / f"{path.name}-{number}")

    def _empty_trash(self) -> None:
        """Large files take a while to go: never under the tier's lock."""
        for name in self._files.names(self._trash):
            self._files.remove(self._trash / name)

    def _drop_stale(self) -> None:
        for name in self._files.names(self._loading):
            path = self._loading / name
            if self._clock.wall_s() - self._used_s(path) > _STALE_S:
                self._take_out(path)

    def _write_reservation(self, key: CheckpointKey, num_bytes: int, folder: Path) -> None:
        self._files.replace(
            folder / RESERVATION, encode_record(Reservation(version=VERSION, key=key, num_bytes=num_bytes))
        )

    def _reserved_bytes(self, path: Path) -> int:
        try:
            return decode_reservation(self._files.read(path / RESERVATION), where=str(path)).num_bytes
        except (OSError, CorruptCheckpoint):
            return 0

    def _manifest(self, path: Path) -> Manifest | None:
        try:
            return decode_manifest(self._files.read(path / MANIFEST), where=str(path / MANIFEST))
        except (FileNotFoundError, NotADirectoryError, CorruptCheckpoint):
            return None

    def _used_s(self, path: Path) -> float:
        """When it was last used, or its load last begun."""
        for name in (MANIFEST, RESERVATION):
            with suppress(FileNotFoundError):
                return self._files.used_s(path / name)
        return self._files.used_s(path)

    def _hash(self, path: Path) -> int:
        return xxhash.xxh3_64_intdigest(self._files.read(path))

    @contextmanager
    def _locked(self) -> Generator[None]:
        """The tier's lock."""
        descriptor = self._files.open_folder(self._root)
        try:
            until_s = self._clock.now_s() + _LOCK_WAIT_S
            while not self._files.lock(descriptor, shared=False):
                if self._clock.now_s() >= until_s:
                    raise LoadError(f"{self._root}: another process holds the tier's lock for {_LOCK_WAIT_S:g} s")
                self._clock.sleep(_POLL_S / 10)
            yield
        finally:
            self._files.close(descriptor)

    @contextmanager
    def _closed_on_error(self, descriptor: int) -> Generator[None]:
        try:
            yield
        except BaseException:
            self._files.close(descriptor)
            raise

    @contextmanager
    def _disk(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise disk_error(self._root, error) from error
