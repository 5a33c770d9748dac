"""Downloads into the disk tier: right or not there, whatever ends them, and nothing that came is fetched again."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstart.chunk_fetch import FetchSettings
from coldstart.download import DownloadSettings, Wanted, fetch_checkpoint, inspect
from coldstart.durable import DurableFiles
from coldstart.format import INDEX_NAME, checksum, decode_index, encode_index
from coldstart.local_tier import LocalTier
from contracts.errors import Cancelled, ConfigError, CorruptCheckpoint, LoadError, NoCapacity
from rpc.clock import LiveBlockingClock
from tests.support.converted_folders import CHUNK_BYTES, MemoryRemote, converted_folder
from tests.support.tier_faults import FakeClock, Killed, Life, MortalDurableFiles, MortalTierFiles, QuickTierFiles

if TYPE_CHECKING:
    from pathlib import Path

    from coldstart.tier_handles import Entry

WEIGHTS = "weights-00001-of-00001.tandem"
#: Chunks come in the order of the file, one a read.
ONE_BY_ONE = DownloadSettings(fetch=FetchSettings(num_connections=1, span_bytes=CHUNK_BYTES), wait_s=0.0)


def open_tier(root: Path, life: Life | None = None, *, capacity_bytes: int = 1 << 30) -> LocalTier:
    files = QuickTierFiles() if life is None else MortalTierFiles(life)
    return LocalTier(root, capacity_bytes=capacity_bytes, files=files, clock=FakeClock())


def held(entry: Entry) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in entry.path.iterdir()}


@pytest.mark.parametrize("tensor_parallel", [1, 3])
@pytest.mark.parametrize("span_bytes", [1, 3 * CHUNK_BYTES, 1 << 20])
def test_a_checkpoint_comes_whole_and_once(tmp_path: Path, tensor_parallel: int, span_bytes: int) -> None:
    contents = converted_folder(1, num_chunks=7, tensor_parallel=tensor_parallel)
    remote = MemoryRemote(contents)
    told: list[tuple[int, int]] = []
    how = DownloadSettings(fetch=FetchSettings(num_connections=3, span_bytes=span_bytes))
    tier = open_tier(tmp_path)
    with fetch_checkpoint(remote, tier, settings=how, progress=lambda done, of: told.append((done, of))) as entry:
        assert held(entry) == contents
    total = sum(map(len, contents.values()))
    assert remote.read_bytes() == total
    assert told[-1] == (total - len(contents[INDEX_NAME]),) * 2
    assert told == sorted(told)
    with fetch_checkpoint(remote, tier, settings=how) as entry:
        assert held(entry) == contents
    # The second time only the index is looked at.
    assert remote.read_bytes() == total + len(contents[INDEX_NAME])


def test_killed_at_any_step_it_goes_on_and_fetches_only_what_is_missing(tmp_path: Path) -> None:
    contents = converted_folder(2, num_chunks=5)
    counted = Life()
    fetch_checkpoint(
        MemoryRemote(contents),
        open_tier(tmp_path / "count", counted),
        settings=ONE_BY_ONE,
        files=MortalDurableFiles(counted),
    ).close()
    assert counted.num_steps > 25
    for dies_at in range(1, counted.num_steps + 1):
        root, life, remote = tmp_path / str(dies_at), Life(dies_at=dies_at), MemoryRemote(contents)
        with pytest.raises(Killed):
            fetch_checkpoint(remote, open_tier(root, life), settings=ONE_BY_ONE, files=MortalDurableFiles(life))
        again = MemoryRemote(contents)
        with fetch_checkpoint(again, open_tier(root), settings=ONE_BY_ONE) as entry:
            assert held(entry) == contents
        # At most the one chunk that was being written came twice.
        twice = set(remote.reads) & set(again.reads) - {(INDEX_NAME, 0, len(contents[INDEX_NAME]))}
        assert len(twice) <= 1


@settings(max_examples=20)
@given(dies_at=st.integers(12, 22), where=st.integers(0, 5 * CHUNK_BYTES - 1), bit=st.integers(0, 7))
def test_what_a_kill_left_is_believed_only_after_a_look(
    tmp_path_factory: pytest.TempPathFactory, dies_at: int, where: int, bit: int
) -> None:
    root = tmp_path_factory.mktemp("tier")
    contents, life = converted_folder(3, num_chunks=5), Life(dies_at=dies_at)
    with pytest.raises(Killed):
        fetch_checkpoint(
            MemoryRemote(contents), open_tier(root, life), settings=ONE_BY_ONE, files=MortalDurableFiles(life)
        )
    for path in root.glob(f"loading/*/checkpoint/{WEIGHTS}"):
        data = bytearray(path.read_bytes())
        if where < len(data):
            data[where] ^= 1 << bit
        path.write_bytes(data)
    with fetch_checkpoint(MemoryRemote(contents), open_tier(root), settings=ONE_BY_ONE) as entry:
        assert held(entry) == contents


def test_a_chunk_that_was_wrong_once_is_fetched_again(tmp_path: Path) -> None:
    contents = converted_folder(4)
    remote = MemoryRemote(contents, flips=[(WEIGHTS, 2 * CHUNK_BYTES), ("tokenizer.json", 0)])
    with fetch_checkpoint(remote, open_tier(tmp_path), settings=ONE_BY_ONE) as entry:
        assert held(entry) == contents
    assert not remote.flips


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_one_that_is_wrong_twice_ends_it_and_is_named(tmp_path: Path, name: str) -> None:
    contents = converted_folder(5)
    offset = 3 * CHUNK_BYTES if name == WEIGHTS else 0
    remote, tier = MemoryRemote(contents, flips=[(name, offset)] * 2), open_tier(tmp_path)
    with pytest.raises(CorruptCheckpoint, match=f"{name}: chunk {3 if offset else 0} .*twice"):
        fetch_checkpoint(remote, tier, settings=ONE_BY_ONE)
    assert tier.manifests() == []
    assert tier.used_bytes() == 0


def test_other_contents_begin_anew(tmp_path: Path) -> None:
    old, new = converted_folder(6), converted_folder(6)
    # The same model by its index, but for one file.
    new["config.json"] = b'{"seed": 66}'
    index = decode_index(new[INDEX_NAME], where="test")
    config = msgspec.structs.replace(index.files[0], num_bytes=12, checksum=checksum(new["config.json"]))
    new[INDEX_NAME] = encode_index(msgspec.structs.replace(index, files=(config, *index.files[1:])))
    remote = MemoryRemote(old)

    def change(name: str, offset: int, _: int) -> None:
        if (name, offset) == (WEIGHTS, 3 * CHUNK_BYTES):
            remote.contents = {**new, WEIGHTS: bytes(len(new[WEIGHTS]))}

    remote.before_read = change
    tier = open_tier(tmp_path)
    with pytest.raises(LoadError, match="was changed"):
        fetch_checkpoint(remote, tier, settings=ONE_BY_ONE)
    assert tier.used_bytes() == 0
    with fetch_checkpoint(MemoryRemote(new), tier, settings=ONE_BY_ONE) as entry:
        assert held(entry) == new


def test_what_is_left_of_other_contents_is_not_used(tmp_path: Path) -> None:
    old = converted_folder(7)
    life = Life(dies_at=20)
    with pytest.raises(Killed):
        fetch_checkpoint(
            MemoryRemote(old), open_tier(tmp_path, life), settings=ONE_BY_ONE, files=MortalDurableFiles(life)
        )
    (left,) = tmp_path.glob("loading/*/checkpoint")
    (left / "vocab.json").write_bytes(b"of the old one")
    # Another conversion of the same model: the same key.
    new = converted_folder(7, num_chunks=3)
    with fetch_checkpoint(MemoryRemote(new), open_tier(tmp_path), settings=ONE_BY_ONE) as entry:
        assert held(entry) == new


@pytest.mark.parametrize("bytes_left", [0, 100, CHUNK_BYTES + 300, 4 * CHUNK_BYTES, 5 * CHUNK_BYTES + 1100])
def test_a_full_disk_is_an_error_and_leaves_room(tmp_path: Path, bytes_left: int) -> None:
    contents = converted_folder(8)
    tier = open_tier(tmp_path)
    files = MortalDurableFiles(Life(), bytes_left=bytes_left)
    with pytest.raises(LoadError, match="no room") as failed:
        fetch_checkpoint(MemoryRemote(contents), tier, settings=ONE_BY_ONE, files=files)
    assert failed.value.reason == "disk_full" or bytes_left > 5 * CHUNK_BYTES
    assert tier.used_bytes() == 0
    with fetch_checkpoint(MemoryRemote(contents), tier, settings=ONE_BY_ONE) as entry:
        assert held(entry) == contents


def test_what_does_not_fit_into_the_tier_is_not_begun(tmp_path: Path) -> None:
    remote = MemoryRemote(converted_folder(9))
    with pytest.raises(NoCapacity):
        fetch_checkpoint(remote, open_tier(tmp_path, capacity_bytes=CHUNK_BYTES))
    assert remote.read_bytes(WEIGHTS) == 0


def test_two_want_the_same_and_one_fetches(tmp_path: Path) -> None:
    contents = converted_folder(10)
    begun, go_on = threading.Event(), threading.Event()

    def hold(name: str, _: int, __: int) -> None:
        if name == WEIGHTS:
            begun.set()
            assert go_on.wait(30)

    first, second = MemoryRemote(contents, before_read=hold), MemoryRemote(contents)
    tiers = [
        LocalTier(tmp_path, capacity_bytes=1 << 30, files=QuickTierFiles(), clock=LiveBlockingClock()) for _ in range(2)
    ]
    waiting = DownloadSettings(wait_s=30.0)
    with ThreadPoolExecutor(2) as pool:
        loader = pool.submit(fetch_checkpoint, first, tiers[0], settings=waiting)
        assert begun.wait(30)
        waiter = pool.submit(fetch_checkpoint, second, tiers[1], settings=waiting)
        go_on.set()
        entries = [loader.result(30), waiter.result(30)]
    for entry in entries:
        assert held(entry) == contents
        entry.close()
    assert second.read_bytes(WEIGHTS) == 0


def test_it_can_be_cancelled_and_goes_on_later(tmp_path: Path) -> None:
    contents, tier = converted_folder(11), open_tier(tmp_path)
    remote = MemoryRemote(contents)
    with pytest.raises(Cancelled):
        fetch_checkpoint(
            remote, tier, settings=ONE_BY_ONE, is_cancelled=lambda: remote.read_bytes(WEIGHTS) >= 2 * CHUNK_BYTES
        )
    again = MemoryRemote(contents)
    with fetch_checkpoint(again, tier, settings=ONE_BY_ONE) as entry:
        assert held(entry) == contents
    assert again.read_bytes(WEIGHTS) == 3 * CHUNK_BYTES


@pytest.mark.parametrize("name", ["..", "../x", "/etc/passwd", ".hidden", "a\0b", "a/b", ""])
def test_names_lead_nowhere_else(tmp_path: Path, name: str) -> None:
    contents = converted_folder(12)
    index = decode_index(contents[INDEX_NAME], where="test")
    evil = msgspec.structs.replace(index, files=(msgspec.structs.replace(index.files[0], name=name), *index.files[1:]))
    contents[INDEX_NAME] = encode_index(evil)
    contents[name] = contents["config.json"]
    with pytest.raises(CorruptCheckpoint):
        fetch_checkpoint(MemoryRemote(contents), open_tier(tmp_path))


def test_a_folder_that_contradicts_its_index_is_refused(tmp_path: Path) -> None:
    contents = converted_folder(13)
    with pytest.raises(CorruptCheckpoint, match=f"{WEIGHTS}: is missing"):
        inspect(MemoryRemote({name: data for name, data in contents.items() if name != WEIGHTS}))
    with pytest.raises(CorruptCheckpoint, match=f"{WEIGHTS}: 20479 bytes, the index says 20480"):
        inspect(MemoryRemote({**contents, WEIGHTS: contents[WEIGHTS][:-1]}))
    flipped = bytearray(contents[INDEX_NAME])
    flipped[len(flipped) // 2] ^= 1
    with pytest.raises(CorruptCheckpoint, match=INDEX_NAME):
        inspect(MemoryRemote({**contents, INDEX_NAME: bytes(flipped)}))
    with pytest.raises(ConfigError, match="no model"):
        inspect(MemoryRemote({"readme.txt": b"hello"}))
    with pytest.raises(ConfigError, match="no safetensors"):
        inspect(MemoryRemote({"config.json": b"{}", "pytorch_model.bin": b"pickle"}))


def test_another_form_than_the_folder_has_is_refused(tmp_path: Path) -> None:
    remote, tier = MemoryRemote(converted_folder(14)), open_tier(tmp_path)
    with pytest.raises(ConfigError, match="holds bfloat16, wanted is float32"):
        fetch_checkpoint(remote, tier, Wanted(dtype="float32"))
    with pytest.raises(ConfigError, match="made for 1 ranks, wanted are 2"):
        fetch_checkpoint(remote, tier, Wanted(tensor_parallel=2))


# --- originals --------------------------------------------------------------------------------------------

ORIGINAL = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"1" * 9_000_000,
    "model-00002-of-00002.safetensors": b"2" * 70_000,
    "model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"3" * 1000,
    "README.md": b"hello",
}
READ = {name for name in ORIGINAL if name not in ("pytorch_model.bin", "consolidated.safetensors", "README.md")}


class Converter:
    def __init__(self, *, dies: bool = False) -> None:
        self.dies = dies
        self.asked: list[tuple[str, int]] = []

    def __call__(self, source: Path, target: Path, *, dtype: str, tensor_parallel: int) -> None:
        self.asked.append((dtype, tensor_parallel))
        assert {path.name: path.read_bytes() for path in source.iterdir()} == {name: ORIGINAL[name] for name in READ}
        if self.dies:
            raise Killed
        target.mkdir()
        (target / "made").write_bytes(b"of it")


def test_an_original_is_converted_on_its_way_in(tmp_path: Path) -> None:
    remote, tier, convert = MemoryRemote(ORIGINAL), open_tier(tmp_path), Converter()
    wanted = Wanted(dtype="float32", tensor_parallel=2)
    for _ in range(2):
        with fetch_checkpoint(remote, tier, wanted, convert=convert) as entry:
            assert held(entry) == {"made": b"of it"}
            assert not (entry.path.parent / "source").exists()
    assert convert.asked == [("float32", 2)]
    # Another form is another checkpoint.
    fetch_checkpoint(remote, tier, Wanted(), convert=convert).close()
    assert convert.asked == [("float32", 2), ("auto", 1)]
    # So are other contents at the same place.
    changed = MemoryRemote({**ORIGINAL, "tokenizer.json": b"[]"})
    with pytest.raises(AssertionError):
        fetch_checkpoint(changed, open_tier(tmp_path), wanted, convert=convert)


def test_what_was_fetched_outlives_a_converter_that_is_killed(tmp_path: Path) -> None:
    remote, life = MemoryRemote(ORIGINAL), Life()
    with pytest.raises(Killed):
        fetch_checkpoint(remote, open_tier(tmp_path, life), convert=Converter(dies=True))
    again = MemoryRemote(ORIGINAL)
    with fetch_checkpoint(again, open_tier(tmp_path), convert=Converter()) as entry:
        assert held(entry) == {"made": b"of it"}
    # Which files there are is looked up.
    assert {name for name, _, _ in again.reads} == {"model.safetensors.index.json"}


def test_files_that_the_disk_lost_are_fetched_again(tmp_path: Path) -> None:
    remote = MemoryRemote(ORIGINAL)
    with pytest.raises(Killed):
        fetch_checkpoint(remote, open_tier(tmp_path), convert=Converter(dies=True))
    (lost,) = tmp_path.glob("loading/*/source/model-00002-of-00002.safetensors")
    lost.write_bytes(b"2" * 69_999 + b"1")
    with fetch_checkpoint(remote, open_tier(tmp_path), convert=Converter(), files=DurableFiles()) as entry:
        assert held(entry) == {"made": b"of it"}
