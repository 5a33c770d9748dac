"""The file of a decision log: what stands in it after restarts, rotation, and disks that take nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from typing import TYPE_CHECKING

import msgspec
import pytest

import cluster.decision_file
from cluster.decision_file import MAX_WAITING_BYTES, DecisionFile
from contracts.errors import ConfigError
from coordinator.conductor import ConductorSettings
from coordinator.decision_records import Decision, Header, LinkCosts, Lost, Surroundings, line_of, record_of

if TYPE_CHECKING:
    from pathlib import Path

HEADER = line_of(
    Header(
        format="tandem-decisions-1",
        version="test",
        started_at=0.0,
        at_s=0.0,
        settings=ConductorSettings(),
        slos={},
        default_slo=None,
        surroundings=Surroundings(),
        link=LinkCosts(latency_s=0.0, bandwidth_bytes_s=1.0, efficiency=1.0, kv_token_bytes=1),
    )
)
DECISION = Decision(at_s=0.0, request="", prompt_tokens=1, max_tokens=1, outcome="full")


def line(number: int) -> bytes:
    return line_of(msgspec.structs.replace(DECISION, request=str(number)))


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """However loaded the machine is, everything is written."""
    monkeypatch.setattr(cluster.decision_file, "CLOSE_TIMEOUT_S", 60.0)


class Writer:
    """Writes decisions with ascending numbers."""

    def __init__(self, path: Path, max_bytes: int = 1 << 20) -> None:
        self.said: list[str] = []
        self.file = DecisionFile(path, max_bytes=max_bytes, log=self.said.append)
        self.num_written = 0

    def write(self, count: int = 1) -> None:
        for _ in range(count):
            self.file.write(line(self.num_written), lambda: HEADER)
            self.num_written += 1

    async def write_until_said(self, what: str) -> None:
        deadline_s = time.monotonic() + 60
        while not any(what in said for said in self.said):
            assert time.monotonic() < deadline_s, self.said
            self.write()
            await asyncio.sleep(0)

    async def write_until_there(self, path: Path) -> None:
        """A file, with something in it."""
        deadline_s = time.monotonic() + 60
        while not path.exists() or not path.stat().st_size:  # noqa: ASYNC240 - nothing else waits
            assert time.monotonic() < deadline_s, self.said
            self.write()
            await asyncio.sleep(0)


def told(path: Path) -> list[str]:
    """The file in short: H for a header, ?n for n lost ones, else the decision's number."""
    short: list[str] = []
    for each in path.read_bytes().splitlines(keepends=True):
        assert each.endswith(b"\n")
        match record_of(each):
            case Header():
                short.append("H")
            case Lost(decisions=count):
                short.append(f"?{count}")
            case Decision(request=number):
                short.append(number)
            case other:
                raise AssertionError(f"{each!r}: {other}")
    return short


async def test_a_restart_goes_on_in_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for _ in range(2):
        writer = Writer(path)
        async with writer.file:
            writer.write(2)
        assert writer.said == []
    assert told(path) == ["H", "0", "1"] * 2


async def test_behind_a_cut_line_a_new_one_begins(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(HEADER + line(7)[:-5])
    writer = Writer(path)
    async with writer.file:
        writer.write()
    lines = path.read_bytes().splitlines(keepends=True)
    assert lines == [HEADER, line(7)[:-5] + b"\n", HEADER, line(0)]


async def test_every_file_begins_with_a_header_and_the_one_before_stays(tmp_path: Path) -> None:
    path = tmp_path / "log"
    limit = len(HEADER) + 10 * len(line(100))
    writer = Writer(path, max_bytes=limit)
    async with writer.file:
        writer.write(1000)
    present, before = told(path), told(tmp_path / "log.1")
    assert (present[0], before[0]) == ("H", "H")
    numbers = [int(each) for each in (*before[1:], *present[1:])]
    assert numbers == list(range(numbers[0], 1000))
    assert path.stat().st_size <= limit
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1"]


async def test_a_header_larger_than_the_limit_does_not_rotate_each_time(tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer = Writer(path, max_bytes=1)
    async with writer.file:
        writer.write(5)
    assert told(path) == ["H", "0", "1", "2", "3", "4"]


async def test_a_full_disk_costs_lines_and_the_log_says_how_many(tmp_path: Path) -> None:
    path, full = tmp_path / "log", tmp_path / "full"
    writer = Writer(path)
    os.symlink("/dev/full", full)
    async with writer.file:
        writer.write()
        full.replace(path)
        await writer.write_until_said("No space left on device")
        writer.write(5000)
        path.unlink()
        await writer.write_until_said("goes on")
        # A file that is new again gets its header with the first decision after it was found to be so.
        await writer.write_until_there(path)
        writer.write()
    assert len(writer.said) == 2, "it is said once"
    short = told(path)
    assert short[0] == "H"
    lost = sum(int(each[1:]) for each in short if each.startswith("?"))
    numbers = [int(each) for each in short if each.isdigit()]
    # The first one may have come in time to be in the file that was replaced.
    assert lost + len(numbers) in (writer.num_written, writer.num_written - 1)
    assert numbers == sorted(numbers)
    assert numbers[-1] == writer.num_written - 1


async def test_a_file_that_goes_away_is_made_anew_with_a_header(tmp_path: Path) -> None:
    path = tmp_path / "log"
    writer = Writer(path)
    deadline_s = time.monotonic() + 60
    async with writer.file:
        writer.write()
        while not path.stat().st_size:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0)
        path.unlink()
        while not path.exists() or not path.stat().st_size:
            assert time.monotonic() < deadline_s
            writer.write()
            await asyncio.sleep(0)
        writer.write()
    short = told(path)
    assert short[0] == "H"
    assert short[1].startswith("?")
    assert int(short[-1]) == writer.num_written - 1


async def test_a_disk_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.decision_file, "CLOSE_TIMEOUT_S", 0.01)
    path, pipe = tmp_path / "log", tmp_path / "pipe"
    writer = Writer(path, max_bytes=1 << 30)
    os.mkfifo(pipe)
    pipe.replace(path)
    large = line_of(msgspec.structs.replace(DECISION, hints="0" * 100_000))
    asked = 0

    def opening() -> bytes:
        nonlocal asked
        asked += 1
        return HEADER

    async with writer.file:
        for _ in range(4 * MAX_WAITING_BYTES // len(large)):
            writer.file.write(large, opening)
    assert asked == 1
    assert writer.said == [f"decision log {path}: the disk is too slow; its end is missing"]
    # Lets the thread go: it writes to nobody.
    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))


def test_another_file_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("mine\n")
    with pytest.raises(ConfigError, match=r"^coordinator\.decision_log .*notes: there is a file that is no decision"):
        Writer(path)
    assert path.read_text() == "mine\n"


def test_a_path_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none/log: cannot be written: No such file or directory$"):
        Writer(tmp_path / "none" / "log")


def test_a_disk_that_is_full_at_the_start_is_no_reason_not_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    assert Writer(tmp_path / "log").said == []
