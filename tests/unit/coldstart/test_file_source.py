"""A file as a source of bytes: what is read is what is there, or an error names file and offset."""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from coldstart.file_source import FileSource
from contracts.errors import CorruptCheckpoint, LoadError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PAGE = 4096


@pytest.fixture
def data() -> bytes:
    return np.random.default_rng(1).bytes(5 * PAGE + 123)


@pytest.fixture
def path(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(data)
    return path


def _pages(num_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, num_bytes))


def _change_reads(monkeypatch: pytest.MonkeyPatch, read: Callable[[Any, int, Any, int], int]) -> None:
    """`read` gets the real function first."""
    real = os.preadv

    def changed(descriptor: int, views: Any, offset: int) -> int:
        return read(real, descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", changed)


@pytest.mark.parametrize("direct", [True, False])
def test_any_range_is_read(path: Path, data: bytes, direct: bool) -> None:
    source = FileSource(path, direct=direct)
    assert source.num_bytes == len(data)
    assert source.name == str(path)
    for offset, size in [(0, PAGE), (PAGE, 3 * PAGE), (5 * PAGE, 123), (3 * PAGE, 2 * PAGE + 123), (7, 300), (0, 0)]:
        view = _pages(6 * PAGE)[:size]
        source.read_into(offset, view)
        assert bytes(view) == data[offset : offset + size]
    source.close()
    source.close()


def test_a_file_system_without_direct_reads_is_read_through_the_cache(
    path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(name: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    source = FileSource(path)
    assert not source.is_direct
    view = _pages(2 * PAGE)
    source.read_into(PAGE, view)
    assert bytes(view) == data[PAGE : 3 * PAGE]
    source.close()


def test_direct_reads_that_are_refused_later_are_repeated_through_the_cache(
    path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FileSource(path)
    if not source.is_direct:
        pytest.skip("this file system has no direct reads")
    direct = source._direct  # pyright: ignore[reportPrivateUsage]

    def refuse(real: Any, descriptor: int, views: Any, offset: int) -> int:
        if descriptor == direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return int(real(descriptor, views, offset))

    _change_reads(monkeypatch, refuse)
    view = _pages(2 * PAGE)
    source.read_into(0, view)
    assert bytes(view) == data[: 2 * PAGE]
    source.close()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("most", [PAGE, 1000])
def test_short_reads_go_on(path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch, direct: bool, most: int) -> None:
    _change_reads(monkeypatch, lambda real, descriptor, views, offset: real(descriptor, [views[0][:most]], offset))
    source = FileSource(path, direct=direct)
    view = _pages(6 * PAGE)[: len(data)]
    source.read_into(0, view)
    assert bytes(view) == data
    source.close()


@pytest.mark.parametrize("direct", [True, False])
def test_a_broken_disk_is_told_with_its_place(path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    def fail(real: Any, descriptor: int, views: Any, offset: int) -> int:
        if offset >= 2 * PAGE:
            raise OSError(errno.EIO, "Input/output error")
        return int(real(descriptor, [views[0][:PAGE]], offset))

    _change_reads(monkeypatch, fail)
    source = FileSource(path, direct=direct)
    with pytest.raises(LoadError, match=rf"weights: cannot read {3 * PAGE} bytes at {2 * PAGE}: Input/output") as told:
        source.read_into(0, _pages(5 * PAGE))
    assert told.value.retryable
    source.close()


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_that_was_cut_is_told_with_its_place(path: Path, direct: bool) -> None:
    source = FileSource(path, direct=direct)
    os.truncate(path, 2 * PAGE)
    with pytest.raises(CorruptCheckpoint, match=rf"weights: truncated: it ends at or before {2 * PAGE}, {PAGE} bytes"):
        source.read_into(PAGE, _pages(2 * PAGE))
    source.close()


def test_a_file_that_is_not_there_or_not_one(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="nothing: is missing"):
        FileSource(tmp_path / "nothing")
    source = FileSource(tmp_path)
    with pytest.raises(LoadError, match="cannot read"):
        source.read_into(0, _pages(PAGE))
    source.close()
