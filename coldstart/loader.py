"""What a loader does for one key: find its bytes in the nearest tier, say how many they are, fill memory with them.

The tiers, nearest first: the folder itself, where it is converted; the disk tier's copy of it; the original, converted
into the disk tier on its first use, or, where there is no disk tier or it fails, fused straight into memory. Of a
folder that stands for one in an object store (`coldstart.far`): its disk tier, else the store, while the tier fills.

Torch is not imported.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from coldstart.download_plan import converted_key
from coldstart.far import read_far
from coldstart.format import INDEX_NAME, check_folder, encode_index, is_converted, read_index
from coldstart.pipeline import MemoryDestination, PartitionLoad
from coldstart.reading import load_partition, partition_of
from coldstart.tier_handles import Entry, Loading
from coldstart.tier_records import CheckpointKey
from contracts.errors import ConfigError, LoadError, TandemError

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from coldstart.far import Far
    from coldstart.format import Index
    from coldstart.fuse import Fuser
    from coldstart.local_tier import LocalTier
    from coldstart.remote import RemoteFolder
    from coldstart.residence import WeightsKey
    from coldstart.through import Through
    from engine.compute_dtype import DtypeChoice

#: Somebody else may be converting the same model.
_WAIT_FOR_OTHERS_S = 600.0
#: Chunks of a store that are asked for side by side.
_NUM_FETCHES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What lies in the memory: the partition, and its index right behind it."""

    weight_bytes: int
    index_bytes: int
    tier: str
    #: Whether it was read past the page cache.
    is_direct: bool = False


class WeightLoader:
    """`prepare`, `fill`, and `finish` where that leaves something to do; all block. Use as a context manager."""

    def __init__(
        self,
        key: WeightsKey,
        tier: LocalTier | None,
        *,
        progress: Callable[[str, int, int], None],
        log: Callable[[str], None],
        open_far: Callable[[Far], tuple[RemoteFolder, LocalTier]],
    ) -> None:
        """`progress(what, bytes done, bytes in all)` is called often, from several threads. `open_far` gives the store
        and the tier that a folder stands for; the loader closes the store."""
        self._key = key
        self._tier = tier
        self._progress = progress
        self._log = log
        self._open_far = open_far
        self._stack = ExitStack()
        #: One of the two, once prepared.
        self._folder: tuple[Path, Index, str, Entry | None] | None = None
        self._fuser: Fuser | None = None
        #: Beside the folder that stands for it: what comes from a store.
        self._through: Through | None = None
        #: Whether `prepare` converted the original.
        self.has_converted = False

    def __enter__(self) -> WeightLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def prepare(self) -> int:
        """Bytes of memory that `fill` needs. Raises ConfigError, LoadError."""
        model_dir = Path(self._key.folder)
        far = read_far(model_dir)
        if far is not None:
            self._take_far(model_dir, far)
        elif is_converted(model_dir):
            self._take_folder(model_dir, "ssd", None)
        elif self._tier is None or not self._take_from_tier(self._tier, model_dir):
            self._take_original(model_dir)
        if self._fuser is not None:
            return self._fuser.num_bytes + len(encode_index(self._fuser.longest_index()))
        assert self._folder is not None
        index = self._folder[1]
        return index.partitions[self._key.rank].num_bytes + len(encode_index(index))

    def fill(self, memory: memoryview) -> Loaded:
        """`memory`: zeroed, page-aligned, as long as `prepare` said. Raises ConfigError and LoadError: nothing in it is
        worth anything then."""
        is_direct = False
        if self._fuser is not None:
            index, tier = self._fuser.fill(memory[: self._fuser.num_bytes], self._progress), "original"
        else:
            assert self._folder is not None
            folder, index, tier, entry = self._folder
            is_direct = self._load(folder, index, entry, memory)
        weight_bytes = index.partitions[self._key.rank].num_bytes
        data = encode_index(index)
        memory[weight_bytes : weight_bytes + len(data)] = data
        return Loaded(weight_bytes=weight_bytes, index_bytes=len(data), tier=tier, is_direct=is_direct)

    @property
    def has_more(self) -> bool:
        """Whether `finish` has something to do."""
        return self._through is not None

    def finish(self, memory: Buffer) -> None:
        """After `fill`: completes the disk tier's copy of what came from a store. `memory` holds what was filled, and
        may be read-only. The weights do not depend on it: what goes wrong is only told."""
        assert self._through is not None, "nothing is left to do"
        assert self._folder is not None
        num_bytes = self._folder[1].partitions[self._key.rank].num_bytes
        try:
            entry = self._through.finish({self._key.rank: memoryview(memory)[:num_bytes]})
        except TandemError as error:
            self._log(f"the disk tier keeps no copy of {self._key.folder}: {error.message}")
            return
        if entry is None:
            self._log(f"the disk tier keeps no copy of {self._key.folder}: {self._through.problem}")
        else:
            entry.close()

    # --- where it is ------------------------------------------------------------------------------------

    def _take_far(self, folder: Path, far: Far) -> None:
        """From the disk tier, or as it comes. Raises ConfigError where the store holds another checkpoint by now."""
        from coldstart.through import open_through

        remote, tier = self._open_far(far)
        self._stack.callback(remote.close)
        index = read_index(folder)
        key = converted_key(index)
        entry = tier.look_up(key)
        if entry is None:
            got = open_through(remote, tier, wait_s=_WAIT_FOR_OTHERS_S)
            if not isinstance(got, Entry):
                self._stack.callback(got.close)
                if got.index != index:
                    raise ConfigError(f"{far.url}: holds another checkpoint than when this was started; start it again")
                self._check_ranks(folder, index)
                self._folder, self._through = (folder, index, "remote", None), got
                if got.problem:
                    self._log(f"the disk tier keeps no copy of {far.url}: {got.problem}")
                return
            entry = got
        self._stack.callback(entry.close)
        self._take_folder(entry.path, "ssd", entry)

    def _take_folder(self, folder: Path, tier: str, entry: Entry | None) -> None:
        index = read_index(folder)
        check_folder(folder, index)
        self._check_ranks(folder, index)
        self._folder = (folder, index, tier, entry)

    def _check_ranks(self, folder: Path, index: Index) -> None:
        key = self._key
        if index.tensor_parallel != key.tensor_parallel:
            raise ConfigError(
                f"{folder}: was converted for tensor_parallel {index.tensor_parallel}, not {key.tensor_parallel}"
            )

    def _take_from_tier(self, tier: LocalTier, model_dir: Path) -> bool:
        """False where the disk tier cannot help: that is no reason not to serve."""
        key = CheckpointKey(
            identity=folder_identity(model_dir), dtype=self._key.dtype, tensor_parallel=self._key.tensor_parallel
        )
        try:
            entry = tier.look_up(key)
            if entry is None:
                entry = self._convert(tier, key, model_dir)
            self._stack.callback(entry.close)
            self._take_folder(entry.path, "ssd", entry)
        except ConfigError:
            raise
        except TandemError as error:
            self._log(f"the disk tier of weights is passed by: {error.message}")
            return False
        return True

    def _convert(self, tier: LocalTier, key: CheckpointKey, model_dir: Path) -> Entry:
        from coldstart.convert import ConvertOptions, ConvertProgress, convert
        from coldstart.fuse import engine_dtype

        dtype = engine_dtype(model_dir, cast("DtypeChoice", self._key.dtype))
        num_bytes = sum(path.stat().st_size for path in model_dir.iterdir() if path.is_file())
        got = tier.acquire(key, num_bytes, wait_s=_WAIT_FOR_OTHERS_S)
        if not isinstance(got, Loading):
            return got

        def report(at: ConvertProgress) -> None:
            # Known only now: a wider dtype takes more than the original does.
            if at.total_bytes > got.num_bytes:
                got.reserve(at.total_bytes + num_bytes // 16)
            self._progress(f"conversion: {at.what}", at.done_bytes, at.total_bytes)

        try:
            convert(
                model_dir,
                got.path,
                ConvertOptions(dtype=cast("DtypeChoice", dtype), tensor_parallel=self._key.tensor_parallel),
                progress=report,
            )
            entry = got.commit(origin=str(model_dir))
            self.has_converted = True
            return entry
        except BaseException:
            # What is done is kept for the next one: a conversion goes on where it was ended.
            got.abandon(keep=True)
            raise

    def _take_original(self, model_dir: Path) -> None:
        from coldstart.fuse import Fuser, engine_dtype

        dtype = engine_dtype(model_dir, cast("DtypeChoice", self._key.dtype))
        self._fuser = Fuser(model_dir, dtype, rank=self._key.rank, tensor_parallel=self._key.tensor_parallel)
        self._stack.callback(self._fuser.close)

    # --- filling ----------------------------------------------------------------------------------------

    def _load(self, folder: Path, index: Index, entry: Entry | None, memory: memoryview) -> bool:
        """Whether it was read past the page cache."""
        rank = self._key.rank
        destination = MemoryDestination(memory[: index.partitions[rank].num_bytes], index.chunk_bytes)
        if self._through is not None:
            source = self._through.sources[rank]
            try:
                PartitionLoad(
                    source,
                    partition_of(index, rank),
                    index.chunk_bytes,
                    destination,
                    num_threads=_NUM_FETCHES,
                    progress=lambda at: self._report(at.verified_bytes, at.total_bytes),
                ).run()
            finally:
                destination.stop()
            return False
        try:
            report = load_partition(
                folder,
                index,
                rank,
                destination,
                progress=lambda at: self._report(at.verified_bytes, at.total_bytes),
            )
            return report.is_direct
        except LoadError as error:
            if entry is not None:
                # The next one converts it anew.
                entry.discard(error.message)
            raise

    def _report(self, done_bytes: int, total_bytes: int) -> None:
        self._progress("weights", done_bytes, total_bytes)


def folder_identity(model_dir: Path) -> str:
    """Tells a model folder apart from others and from what it was before: by its config and its files' names, sizes
    and times, without reading weights. Raises ConfigError when there is no such folder or it cannot be read."""
    try:
        digest = hashlib.sha256((model_dir / "config.json").read_bytes())
        for path in sorted(model_dir.iterdir()):
            if path.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt") and path.name != INDEX_NAME:
                status = path.stat()
                digest.update(f"\0{path.name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    except OSError as error:
        raise ConfigError(f"model folder {model_dir}: {error.strerror}") from error
    return f"folder-{digest.hexdigest()}"
