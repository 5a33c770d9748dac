"""Logs of bounded size that never raise."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from cluster.parent_log import structured
from cluster.process_log import MAX_LINE_BYTES, TAIL_LINES, LineSplitter, ProcessLog, StreamLog

if TYPE_CHECKING:
    from pathlib import Path


@given(st.lists(st.binary(max_size=60), max_size=20))
def test_lines_are_the_same_however_the_stream_is_cut(pieces: list[bytes]) -> None:
    splitter = LineSplitter()
    lines = [line for piece in pieces for line in splitter.feed(piece)] + splitter.finish()
    whole = b"".join(pieces).split(b"\n")
    assert lines == (whole if whole[-1] else whole[:-1])


@given(st.integers(1, 4 * MAX_LINE_BYTES), st.integers(1, MAX_LINE_BYTES))
def test_a_line_without_end_is_cut_and_complete(size: int, step: int) -> None:
    splitter = LineSplitter()
    data = b"x" * size
    lines = [line for at in range(0, size, step) for line in splitter.feed(data[at : at + step])]
    lines += splitter.finish()
    assert b"".join(lines) == data
    assert max(map(len, lines)) <= MAX_LINE_BYTES


def test_the_file_rotates_and_the_tail_stays(tmp_path: Path) -> None:
    log = ProcessLog(tmp_path / "w.log", print, max_bytes=100)
    for number in range(60):
        log.write(f"line {number:03}".encode())
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["w.log", "w.log.1"]
    assert all(file.stat().st_size <= 100 for file in files)
    kept = (files[1].read_text() + files[0].read_text()).splitlines()
    assert kept == [f"line {number:03}" for number in range(60 - len(kept), 60)]
    assert log.tail() == [f"line {number:03}" for number in range(60 - TAIL_LINES, 60)]
    assert log.tail(2) == ["line 058", "line 059"]


def test_a_full_disk_is_said_once_and_over_when_it_is_over(tmp_path: Path) -> None:
    """A folder in the file's place fails every write, as a full disk does."""
    said: list[str] = []
    log = ProcessLog(tmp_path / "w.log", said.append)
    log.path.mkdir()
    log.write(b"lost")
    log.write(b"lost too")
    log.path.rmdir()
    log.write(b"written")
    assert said == [f"cannot write {log.path}: Is a directory; logging in memory only"]
    assert log.path.read_text() == "written\n"
    assert log.tail() == ["lost", "lost too", "written"]


def test_a_device_without_space_costs_lines_only() -> None:
    from pathlib import Path

    said: list[str] = []
    log = ProcessLog(Path("/dev/full"), said.append)
    log.write(b"x")
    assert said == ["cannot write /dev/full: No space left on device; logging in memory only"]


def test_structured_events_are_lines_and_warnings_are_also_said() -> None:
    stream, said = io.StringIO(), list[str]()
    logger = structured(StreamLog(stream), said.append)
    logger.debug("unseen")
    logger.info("opened", worker="w-0")
    logger.warning("slow", ms=12)
    lines = stream.getvalue().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        "level='info' event='opened' worker='w-0'",
        "level='warning' event='slow' ms=12",
    ]
    assert said == lines[1:]


class GoneStream(io.StringIO):
    def write(self, text: str, /) -> int:
        raise BrokenPipeError(f"nobody reads {text!r}")


def test_a_stream_that_is_gone_is_no_trouble() -> None:
    StreamLog(GoneStream()).write(b"x")
