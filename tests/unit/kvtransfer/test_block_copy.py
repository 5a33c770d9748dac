"""The copy of a pull's blocks: compiled and in Python, the same bytes, bounds and stops."""

from __future__ import annotations

import itertools
import os
import random
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

from contracts.errors import BadRequest
from contracts.ids import BlockId
from kvtransfer.block_copy import BlockCopy, CopyBuild, NativeCopy, StopFlag, copy_in_python

if TYPE_CHECKING:
    from pathlib import Path

    from kvtransfer import BlockPair

BLOCK_BYTES = 24
NUM_BLOCKS = 40
BUILD_TIMEOUT_S = 100.0


@dataclass
class Blocks:
    """Blocks of an array."""

    content: np.ndarray[tuple[int, int], np.dtype[np.uint8]]

    @property
    def address(self) -> int:
        return int(self.content.ctypes.data)

    @property
    def num_blocks(self) -> int:
        return len(self.content)


def random_blocks(seed: int, num_blocks: int = NUM_BLOCKS) -> Blocks:
    rng = np.random.default_rng(seed)
    return Blocks(rng.integers(0, 256, (num_blocks, BLOCK_BYTES), np.uint8))


def built(cache_dir: Path, compiler: str | None = None) -> BlockCopy:
    build = CopyBuild(compiler=compiler, cache_dir=cache_dir)
    build.start()
    give_up_s = time.monotonic() + BUILD_TIMEOUT_S
    while not build.poll():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)
    return build.take()


@pytest.fixture(params=["native", "python"])
def copy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BlockCopy:
    if request.param == "python":
        return copy_in_python
    native = built(tmp_path_factory.getbasetemp() / "copy")
    if not isinstance(native, NativeCopy):
        pytest.skip("no C compiler here")
    return native


def pair(source: int, target: int) -> BlockPair:
    return (BlockId(source), BlockId(target))


def test_blocks_arrive_where_they_belong_and_nowhere_else(copy: BlockCopy) -> None:
    rng = random.Random(1)
    for count in (0, 1, 7, NUM_BLOCKS):
        source, target = random_blocks(1), random_blocks(2)
        sources, targets = rng.sample(range(NUM_BLOCKS), count), rng.sample(range(NUM_BLOCKS), count)
        expected = target.content.copy()
        expected[targets] = source.content[sources]
        pairs = [pair(*each) for each in zip(sources, targets, strict=True)]
        assert copy(source, target, BLOCK_BYTES, pairs, StopFlag()) == count * BLOCK_BYTES
        assert (target.content == expected).all()


def test_neighbours_and_near_neighbours(copy: BlockCopy) -> None:
    # Runs on both sides, on one only, backwards, and repeated.
    shapes = [((0, 3), (1, 4), (2, 5)), ((0, 3), (1, 5), (2, 7)), ((5, 1), (4, 2)), ((6, 6), (6, 7), (7, 8))]
    for pairs in itertools.chain(shapes, [tuple(itertools.chain.from_iterable(shapes))]):
        source, target = random_blocks(3), random_blocks(4)
        expected = target.content.copy()
        for one, other in pairs:
            expected[other] = source.content[one]
        copy(source, target, BLOCK_BYTES, [pair(*each) for each in pairs], StopFlag())
        assert (target.content == expected).all()


def test_more_pairs_than_are_looked_at_in_one_go(copy: BlockCopy) -> None:
    num_blocks = 20_000
    source, target = random_blocks(5, num_blocks), random_blocks(6, num_blocks)
    order = random.Random(5).sample(range(num_blocks), num_blocks)
    copied = copy(source, target, BLOCK_BYTES, [pair(n, order[n]) for n in range(num_blocks)], StopFlag())
    assert copied == num_blocks * BLOCK_BYTES
    assert (target.content[order] == source.content).all()


@pytest.mark.parametrize("wrong", [(NUM_BLOCKS, 0), (0, NUM_BLOCKS), (-1, 0), (0, -1), (1 << 62, 0)])
def test_wrong_blocks_are_refused_before_a_byte_is_copied(copy: BlockCopy, wrong: tuple[int, int]) -> None:
    source, target = random_blocks(1), random_blocks(2)
    before = target.content.copy()
    with pytest.raises(BadRequest, match=r"block -?\d+ of"):
        copy(source, target, BLOCK_BYTES, [pair(0, 0), pair(1, 1), pair(*wrong)], StopFlag())
    assert (target.content == before).all()


def test_stopped_before_it_began(copy: BlockCopy) -> None:
    source, target, stop = random_blocks(1), random_blocks(2), StopFlag()
    before = target.content.copy()
    assert not stop
    stop.set()
    assert stop
    assert copy(source, target, BLOCK_BYTES, [pair(0, 0)], stop) == 0
    assert (target.content == before).all()


def test_library_is_compiled_once_and_kept(tmp_path: Path) -> None:
    if not isinstance(built(tmp_path), NativeCopy):
        pytest.skip("no C compiler here")
    (kept,) = tmp_path.iterdir()
    written_ns = kept.stat().st_mtime_ns
    assert isinstance(built(tmp_path), NativeCopy)
    assert [each.stat().st_mtime_ns for each in tmp_path.iterdir()] == [written_ns]


def test_without_a_compiler_python_copies(tmp_path: Path) -> None:
    assert built(tmp_path, "no-such-compiler --at-all") is copy_in_python
    # One that fails, and one that says it worked.
    assert built(tmp_path, f"{sys.executable} -c 'raise SystemExit(1)'") is copy_in_python
    assert built(tmp_path, f"{sys.executable} -c 'pass'") is copy_in_python
    unwritable = tmp_path / "file"
    unwritable.write_text("not a folder")
    assert built(unwritable / "cache") is copy_in_python


def test_compiler_that_still_runs_is_ended(tmp_path: Path) -> None:
    build = CopyBuild(compiler=f"{sys.executable} -c 'import time; time.sleep(1000)'", cache_dir=tmp_path)
    build.start()
    assert not build.poll()
    build.close()
    assert build.poll()
    assert os.listdir(tmp_path) == []
    assert build.take() is copy_in_python
