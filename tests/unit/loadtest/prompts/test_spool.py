"""Bodies come back as they went in, from memory and from the file; what does not fit says so."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import ConfigError
from loadtest.prompts.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def unheard(num_bodies: int) -> None: ...


@given(bodies=st.lists(st.binary(max_size=50)), max_memory_bytes=st.integers(0, 400))
def test_every_body_comes_back(bodies: list[bytes], max_memory_bytes: int) -> None:
    with Spool(bodies, on_progress=unheard, max_memory_bytes=max_memory_bytes) as spool:
        assert len(spool) == len(bodies)
        assert [spool[number] for number in range(len(spool))] == bodies


def test_the_file_leaves_nothing_behind(tmp_path: Path) -> None:
    with Spool([b"abc"] * 9, on_progress=unheard, folder=tmp_path, max_memory_bytes=6) as spool:
        assert list(tmp_path.iterdir()) == []
        assert spool[8] == b"abc"
    assert len(spool) == 0
    spool.close()


def test_progress_is_told_now_and_then_and_at_the_end() -> None:
    heard: list[int] = []
    Spool([b"abc"] * 200, on_progress=heard.append).close()
    assert heard == [64, 128, 192, 200]


@pytest.mark.parametrize("number", [-1, 2])
def test_there_are_no_others(number: int) -> None:
    with Spool([b"a", b"b"], on_progress=unheard) as spool, pytest.raises(IndexError, match=f"body {number} of 2"):
        spool[number]


def test_more_than_the_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"take more than 9\.54e-07 GiB \(so far 12 requests\): shorten the workload"):
        Spool([b"a" * 100] * 20, on_progress=unheard, max_memory_bytes=200, max_file_bytes=1024)


@pytest.mark.parametrize("size", [100, 100_000], ids=["at-the-end", "while-writing"])
def test_a_full_disk_is_named(tmp_path: Path, size: int) -> None:
    """A limit on the size of files stands for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        with pytest.raises(ConfigError, match=f"cannot be written to {tmp_path}: File too large .*; TMPDIR names"):
            Spool([b"a" * size] * 3, on_progress=unheard, folder=tmp_path, max_memory_bytes=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"cannot be written to {tmp_path / 'no'}: No such file or directory"):
        Spool([b"abc"], on_progress=unheard, folder=tmp_path / "no", max_memory_bytes=0)


def test_what_goes_wrong_in_making_bodies_comes_through(tmp_path: Path) -> None:
    def bodies() -> Iterator[bytes]:
        yield b"abc"
        raise ValueError("no such block")

    with pytest.raises(ValueError, match="no such block"):
        Spool(bodies(), on_progress=unheard, folder=tmp_path, max_memory_bytes=0)
