"""Files of snapshots: what was written is read, in its order; damage costs what it hit, and nothing that is read is
wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.snapshot.codecs import CodecRegistry, RawCodec
from coldstart.snapshot.format import HEADER_BYTES, MAGIC, BlockEntry, Owner, Table, encode_head, encode_table
from coldstart.snapshot.reading import Prefetch, SnapshotFile
from coldstart.snapshot.writing import Draft, write_snapshot
from contracts.errors import Cancelled, ConfigError, LoadError
from contracts.layout import BlockLayout, KvIdentity
from tests.support.dying_files import DyingFiles, Killed
from tests.support.layout import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from coldstart.snapshot.reading import Loaded
    from tests.support.dying_files import Moment

LAYOUT = BlockLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_tokens=4, dtype="float32")
OWNER = Owner(
    identity=KvIdentity(model_fingerprint="f" * 64, layout=LAYOUT, rope_base=1e4, protocol_version=2), build="1"
)
PATIENCE_S = 20.0


def draft(name: str, data: bytes, codec: str = "raw", blocks: tuple[BlockEntry, ...] = ()) -> Draft:
    return Draft(name=name, kind="kv", codec=codec, data=lambda: memoryview(data), blocks=blocks)


def drafts(*contents: bytes, codec: str = "raw") -> list[Draft]:
    return [draft(f"s{number}", data, codec) for number, data in enumerate(contents)]


def read_all(path: Path, codecs: CodecRegistry | None = None) -> list[bytes]:
    file = SnapshotFile(path, codecs or CodecRegistry())
    try:
        return [bytes(file.read(section)) for section in file.sections]
    finally:
        file.close()


def loaded(prefetch: Prefetch, news: threading.Event) -> list[Loaded]:
    """All that comes, in order."""
    found: list[Loaded] = []
    while True:
        news.clear()
        while (each := prefetch.take()) is not None:
            found.append(each)
        if prefetch.is_over:
            return found
        assert news.wait(PATIENCE_S)


class ReversingCodec:
    """A codec that joined."""

    name = "reversing"

    def encode(self, data: memoryview) -> bytes:
        return bytes(data)[::-1][: data.nbytes // 2]

    def decode(self, data: memoryview, num_bytes: int) -> bytes:
        half = bytes(data)[::-1]
        return half[::-1] + half if len(half) * 2 == num_bytes else b""


@given(
    contents=st.lists(st.tuples(st.binary(max_size=400), st.sampled_from(["raw", "zstd"])), max_size=6),
    build=st.text(min_size=1, max_size=8),
)
def test_what_was_written_is_read_in_its_order(
    tmp_path_factory: pytest.TempPathFactory, contents: list[tuple[bytes, str]], build: str
) -> None:
    path = tmp_path_factory.mktemp("s") / "one.snapshot"
    owner = msgspec.structs.replace(OWNER, build=build)
    written = write_snapshot(
        path, owner, [draft(f"s{number}", *each) for number, each in enumerate(contents)], CodecRegistry()
    )
    file = SnapshotFile(path, CodecRegistry())
    assert file.owner == owner
    assert file.num_bytes == written.num_bytes == path.stat().st_size
    assert [bytes(file.read(section)) for section in file.sections] == [data for data, _ in contents]
    file.close()
    assert os.listdir(path.parent) == [path.name]


@given(data=st.data())
def test_damage_costs_sections_and_never_changes_one(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("s") / "one.snapshot"
    contents = [bytes([number]) * 40 for number in range(4)]
    write_snapshot(path, OWNER, [*drafts(*contents[:2]), *drafts(*contents[2:], codec="zstd")], CodecRegistry())
    whole = path.read_bytes()
    kind = data.draw(st.sampled_from(["flip", "cut", "more", "zeros"]))
    place = data.draw(st.integers(0, len(whole) - 1))
    if kind == "flip":
        damaged = bytearray(whole)
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        damaged = bytearray(whole[:place])
    elif kind == "more":
        damaged = bytearray(whole + whole[:place] + b"x")
    else:
        damaged = bytearray(whole[:place] + bytes(len(whole) - place))
    path.write_bytes(damaged)
    try:
        file = SnapshotFile(path, CodecRegistry())
    except LoadError as error:
        assert str(path) in error.message  # noqa: PT017 - either is right
        return
    lost = 0
    for section, content in zip(file.sections, contents, strict=True):
        try:
            assert bytes(file.read(section)) == content
        except LoadError as error:
            assert section.name in error.message  # noqa: PT017 - either is right
            lost += 1
    file.close()
    # Of the header only the bytes that say nothing may be damaged unseen.
    assert lost or kind != "flip" or 20 <= place < 24 or damaged == whole


def test_a_table_that_lies_with_the_right_checksum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.snapshot"
    entries = tuple(BlockEntry(bytes([number]) * 32, None, 1.0) for number in range(3))
    write_snapshot(path, OWNER, [draft("a", b"123456", blocks=entries)], CodecRegistry())
    file = SnapshotFile(path, CodecRegistry())
    (section,) = file.sections
    file.close()
    body = path.read_bytes()[HEADER_BYTES : HEADER_BYTES + 6]
    for changes, said in (
        ({"offset": section.offset + 1}, "begins at"),
        ({"stored_bytes": 7}, "sections end at"),
        ({"num_bytes": 7}, "7 bytes in 3 blocks"),
        ({"num_bytes": 1 << 40}, "cannot be read"),
    ):
        table = encode_table(Table(owner=OWNER, sections=(msgspec.structs.replace(section, **changes),)))
        path.write_bytes(encode_head(HEADER_BYTES + 6, table) + body + table)
        with pytest.raises(LoadError, match=said):
            SnapshotFile(path, CodecRegistry())


@pytest.mark.parametrize(
    ("begin", "said"),
    [
        (b"", "not a snapshot"),
        (b"x" * 100, "not a snapshot"),
        (bytes(100), "not written to its end"),
        (MAGIC + (7).to_bytes(4, "little") + bytes(60), "version 7 of the format, read here is version 1"),
    ],
)
def test_foreign_and_newer_files_are_refused_by_name(tmp_path: Path, begin: bytes, said: str) -> None:
    path = tmp_path / "one.snapshot"
    path.write_bytes(begin)
    with pytest.raises(LoadError, match=said):
        SnapshotFile(path, CodecRegistry())


def test_owners_that_differ_say_in_what() -> None:
    assert OWNER.mismatch(OWNER) is None
    told = OWNER.mismatch(msgspec.structs.replace(OWNER, build="2"))
    assert told == "build: '1' here, '2' there"
    other = msgspec.structs.replace(OWNER.identity, model_fingerprint="e" * 64)
    told = OWNER.mismatch(msgspec.structs.replace(OWNER, identity=other))
    assert told is not None
    assert "model_fingerprint" in told


def test_another_codec_joins_and_is_named_where_it_is_missing(tmp_path: Path) -> None:
    path, content = tmp_path / "one.snapshot", b"abcdefgh" + b"hgfedcba"
    with_it = CodecRegistry([ReversingCodec()])
    assert with_it.names() == ["raw", "zstd", "reversing"]
    write_snapshot(path, OWNER, drafts(content, codec="reversing"), with_it)
    file = SnapshotFile(path, with_it)
    assert (file.sections[0].codec, file.sections[0].stored_bytes) == ("reversing", 8)
    file.close()
    assert read_all(path, with_it) == [content]
    with pytest.raises(LoadError, match="codec 'reversing' is not known here; known are: raw, zstd"):
        read_all(path)
    with pytest.raises(ConfigError, match="two codecs of snapshots are named 'raw'"):
        with_it.add(RawCodec())
    with pytest.raises(ConfigError, match="there is no codec 'no'"):
        with_it.encode("no", memoryview(b""))


def test_what_a_codec_gains_little_of_is_kept_as_it_is() -> None:
    codecs = CodecRegistry()
    assert codecs.encode("zstd", memoryview(bytes(1000)))[0] == "zstd"
    assert codecs.encode("zstd", memoryview(bytes(range(256))))[0] == "raw"


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_a_writer_that_dies_leaves_the_old_snapshot_or_the_new_one(tmp_path: Path, moment: Moment) -> None:
    path = tmp_path / "one.snapshot"
    write_snapshot(path, OWNER, drafts(b"old"), counted := CodecRegistry())
    rehearsal = DyingFiles()
    write_snapshot(tmp_path / "other", OWNER, drafts(b"new", b"newer"), counted, files=rehearsal)
    for at in range(len(rehearsal.steps)):
        with suppress(Killed):
            write_snapshot(path, OWNER, drafts(b"new", b"newer"), CodecRegistry(), files=DyingFiles(at, moment))
        assert read_all(path) in ([b"old"], [b"new", b"newer"])
        write_snapshot(path, OWNER, drafts(b"old"), CodecRegistry())


def test_a_disk_that_is_full_leaves_the_old_snapshot_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "one.snapshot"
    write_snapshot(path, OWNER, drafts(b"old"), CodecRegistry())
    full = DyingFiles(4, "half", lambda: OSError(errno.ENOSPC, "full"))
    with pytest.raises(LoadError, match="cannot be written: full"):
        write_snapshot(path, OWNER, drafts(b"new", b"newer"), CodecRegistry(), files=full)
    assert full.steps[-2:] == ["write", "remove"]
    assert read_all(path) == [b"old"]
    assert os.listdir(tmp_path) == ["one.snapshot"]


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "one.snapshot"
    write_snapshot(path, OWNER, drafts(b"old"), CodecRegistry())
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from tests.unit.coldstart.test_snapshot_file import OWNER, draft\n"
        "from coldstart.snapshot.codecs import CodecRegistry\n"
        "from coldstart.snapshot.writing import Draft, write_snapshot\n"
        "def wait():\n    print('half', flush=True)\n    sys.stdin.read()\n    return memoryview(b'never')\n"
        "late = Draft(name='late', kind='kv', codec='raw', data=wait)\n"
        "write_snapshot(Path(sys.argv[1]), OWNER, [draft('a', b'new'), late], CodecRegistry())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"half\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait(PATIENCE_S)
    assert read_all(path) == [b"old"]
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".part")] == ["one.snapshot"]


def test_what_is_cancelled_after_its_last_byte_does_not_take_its_place(tmp_path: Path) -> None:
    path, cancelled = tmp_path / "one.snapshot", threading.Event()

    def last() -> memoryview:
        cancelled.set()
        return memoryview(b"late")

    late = Draft(name="late", kind="kv", codec="raw", data=last)
    with pytest.raises(Cancelled):
        write_snapshot(path, OWNER, [draft("a", b"new"), late], CodecRegistry(), is_cancelled=cancelled.is_set)
    assert os.listdir(tmp_path) == []


def test_when_time_is_over_what_is_needed_first_is_kept(tmp_path: Path) -> None:
    path, enough = tmp_path / "one.snapshot", threading.Event()

    def last() -> memoryview:
        enough.set()
        return memoryview(b"second")

    second = Draft(name="second", kind="kv", codec="raw", data=last)
    written = write_snapshot(
        path, OWNER, [draft("a", b"first"), second, draft("c", b"third")], CodecRegistry(), is_enough=enough.is_set
    )
    assert written.num_sections == 2
    assert read_all(path) == [b"first", b"second"]


@pytest.mark.parametrize("ahead_bytes", [1, 10, 1000])
def test_a_reader_runs_ahead_within_its_memory(tmp_path: Path, ahead_bytes: int) -> None:
    path, news, held = tmp_path / "one.snapshot", threading.Event(), threading.Semaphore(0)
    contents = [bytes([number]) * 10 for number in range(8)]
    decoded: list[int] = []

    class Counting(RawCodec):
        name = "counting"

        def encode(self, data: memoryview) -> memoryview:
            return data[:1]

        def decode(self, data: memoryview, num_bytes: int) -> memoryview:
            decoded.append(data[0])
            held.release()
            return memoryview(bytes(data) * num_bytes)

    codecs = CodecRegistry([Counting()])
    write_snapshot(path, OWNER, drafts(*contents, codec="counting"), codecs)
    prefetch = Prefetch(lambda: path, codecs, ahead_bytes=ahead_bytes, on_news=news.set)
    at_once = max(1, min(8, ahead_bytes // 10))
    for _ in range(at_once):
        assert held.acquire(timeout=PATIENCE_S)
    # The next one waits for a place; what cannot be waited for is that nothing comes.
    assert not held.acquire(timeout=0.05)
    assert decoded == list(range(at_once))
    found = loaded(prefetch, news)
    assert [bytes(each.data or b"") for each in found] == contents
    assert prefetch.owner == OWNER


def test_a_reader_tells_what_is_lost_and_goes_on(tmp_path: Path) -> None:
    path, news = tmp_path / "one.snapshot", threading.Event()
    write_snapshot(path, OWNER, drafts(b"first", b"second", b"third"), CodecRegistry())
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 6] ^= 1
    path.write_bytes(data)
    found = loaded(Prefetch(lambda: path, CodecRegistry(), ahead_bytes=100, on_news=news.set), news)
    assert [each.data is None for each in found] == [False, True, False]
    assert "section s1: damaged" in found[1].problem


def test_a_reader_without_a_file_is_over(tmp_path: Path) -> None:
    news = threading.Event()
    nothing = Prefetch(lambda: None, CodecRegistry(), ahead_bytes=1, on_news=news.set)
    assert loaded(nothing, news) == []
    assert (nothing.problem, nothing.owner) == (None, None)
    missing = Prefetch(lambda: tmp_path / "no", CodecRegistry(), ahead_bytes=1, on_news=news.set)
    assert loaded(missing, news) == []
    assert "cannot be read" in str(missing.problem)
