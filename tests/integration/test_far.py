"""A folder that stands for a checkpoint in a store: what it holds, what is loaded by it, and what it survives."""

from __future__ import annotations

import mmap
import random
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coldstart.convert import ConvertOptions, convert
from coldstart.download import inspect
from coldstart.far import FAR_NAME, Far, make_far, read_far
from coldstart.format import INDEX_NAME, read_index
from coldstart.loader import WeightLoader
from coldstart.local_tier import LocalTier
from coldstart.object_source import ObjectFolder
from coldstart.residence import WeightsKey
from coldstart.tier_files import LiveTierFiles
from contracts.errors import ConfigError, CorruptCheckpoint, LoadError, TandemError
from rpc.clock import LiveBlockingClock, LiveClock
from tests.support.range_server import Act, RangeServer, Served, range_server
from tests.support.tiny_models import make_tiny_model

if TYPE_CHECKING:
    from collections.abc import Generator

WEIGHTS = "weights-00001-of-00001.tandem"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("models")
    target = folder / "converted"
    convert(make_tiny_model("llama", folder), target, ConvertOptions(chunk_bytes=4096))
    return {path.name: path.read_bytes() for path in target.iterdir()}


@contextmanager
def opened(url: str) -> Generator[ObjectFolder]:
    remote = ObjectFolder(url, clock=LiveClock(), rng=random.Random(0))
    try:
        yield remote
    finally:
        remote.close()


class Site:
    def __init__(self, web: RangeServer, folder: Path) -> None:
        self.far = Far(url=web.url, tier_path=str(folder), tier_bytes=1 << 30)
        self.said = list[str]()

    def tier(self) -> LocalTier:
        return LocalTier(
            Path(self.far.tier_path),
            capacity_bytes=self.far.tier_bytes,
            files=LiveTierFiles(),
            clock=LiveBlockingClock(),
        )

    def make(self) -> Path:
        with opened(self.far.url) as remote:
            return make_far(remote, inspect(remote), self.far)

    def load(self, folder: Path) -> tuple[bytes, str]:
        """The weights, and the tier that they came from."""
        with WeightLoader(
            WeightsKey(folder=str(folder), dtype="auto"),
            None,
            progress=lambda _what, _done, _total: None,
            log=self.said.append,
            open_far=lambda far: (ObjectFolder(far.url, clock=LiveClock(), rng=random.Random(0)), self.tier()),
        ) as loader:
            memory = mmap.mmap(-1, loader.prepare())
            loaded = loader.fill(memoryview(memory))
            if loader.has_more:
                loader.finish(memory)
        return memory[: loaded.weight_bytes], loaded.tier


def test_it_holds_everything_but_the_weights_and_is_made_once(files: dict[str, bytes], tmp_path: Path) -> None:
    with range_server(files) as web:
        site = Site(web, tmp_path)
        folder = site.make()
        assert {path.name for path in folder.iterdir()} == set(files) - {WEIGHTS} | {FAR_NAME}
        assert all((folder / name).read_bytes() == files[name] for name in set(files) - {WEIGHTS})
        assert read_far(folder) == site.far
        assert all(name != WEIGHTS for name, _ in web.asked)
        made = folder.stat()
        assert site.make() == folder
        assert folder.stat().st_ino == made.st_ino
        (folder / "config.json").unlink()
        assert site.make() == folder
        assert (folder / "config.json").is_file()


def test_no_other_folder_is_one(tmp_path: Path) -> None:
    assert read_far(tmp_path) is None
    (tmp_path / FAR_NAME).write_text('{"url": "", "tier_path": "x", "tier_bytes": 1}')
    with pytest.raises(CorruptCheckpoint, match=FAR_NAME):
        read_far(tmp_path)


def test_a_small_file_that_is_not_the_checkpoints_is_refused(files: dict[str, bytes], tmp_path: Path) -> None:
    wrong = bytearray(files["config.json"])
    wrong[3] ^= 1
    with range_server({**files, "config.json": bytes(wrong)}) as web:
        with pytest.raises(CorruptCheckpoint, match=r"config\.json: changed since"):
            Site(web, tmp_path).make()
        assert not any((tmp_path / "far").glob("*"))


def test_the_first_load_comes_from_the_store_and_the_next_from_the_tier(
    files: dict[str, bytes], tmp_path: Path
) -> None:
    with range_server(files) as web:
        site = Site(web, tmp_path)
        folder = site.make()
        assert site.load(folder) == (files[WEIGHTS], "remote")
        asked = [bounds for name, bounds in web.asked if name == WEIGHTS]
        assert asked
        assert len(asked) == len(set(asked))
        before = web.sent_bytes
        assert site.load(folder) == (files[WEIGHTS], "ssd")
        assert web.sent_bytes == before
        assert site.said == []


@pytest.mark.parametrize("act", [Act.TRUNCATE, Act.RESET, Act.STATUS_503, Act.SHORT])
def test_a_store_that_stumbles_is_asked_again(files: dict[str, bytes], tmp_path: Path, act: Act) -> None:
    with range_server(files) as web:
        site = Site(web, tmp_path)
        folder = site.make()
        # The index is looked at once more before the weights.
        web.script += [Act.SERVE, act, Act.SERVE, act]
        assert site.load(folder) == (files[WEIGHTS], "remote")


def test_another_checkpoint_at_the_same_address_is_not_mixed_in(files: dict[str, bytes], tmp_path: Path) -> None:
    other = tmp_path / "other"
    original = make_tiny_model("llama", tmp_path / "models")
    convert(original, other, ConvertOptions(chunk_bytes=8192))
    with range_server(files) as web:
        site = Site(web, tmp_path / "tier")
        folder = site.make()
        for path in other.iterdir():
            web.files[path.name] = Served(path.read_bytes(), '"2"')
        with pytest.raises(ConfigError, match="holds another checkpoint than when this was started"):
            site.load(folder)


def test_wrong_bytes_are_never_weights(files: dict[str, bytes], tmp_path: Path) -> None:
    with range_server(files) as web:
        site = Site(web, tmp_path)
        folder = site.make()
        wrong = bytearray(files[WEIGHTS])
        wrong[5000] ^= 8
        web.files[WEIGHTS] = Served(bytes(wrong))
        with pytest.raises(CorruptCheckpoint, match=r"chunk 1 .*twice"):
            site.load(folder)
        assert site.tier().manifests() == []


def test_a_tier_that_is_too_small_keeps_no_copy_and_the_load_goes_on(files: dict[str, bytes], tmp_path: Path) -> None:
    with range_server(files) as web:
        site = Site(web, tmp_path)
        site.far = Far(url=web.url, tier_path=str(tmp_path), tier_bytes=4096)
        folder = site.make()
        assert site.load(folder) == (files[WEIGHTS], "remote")
        assert any("keeps no copy" in line for line in site.said)


def test_a_store_that_is_gone_is_a_clear_error(files: dict[str, bytes], tmp_path: Path) -> None:
    with range_server(files) as web:
        site = Site(web, tmp_path)
        folder = site.make()
        web.then = Act.STATUS_404
        with pytest.raises(LoadError, match="gone"):
            site.load(folder)
        web.then = Act.SERVE
        assert site.load(folder)[1] == "remote"


def test_it_has_the_index_of_the_store(files: dict[str, bytes], tmp_path: Path) -> None:
    with range_server(files) as web:
        folder = Site(web, tmp_path).make()
        assert (folder / INDEX_NAME).read_bytes() == files[INDEX_NAME]
        assert read_index(folder).partitions[0].num_bytes == len(files[WEIGHTS])
        web.files.pop("config.json")
        with pytest.raises(TandemError, match=r"config\.json"):
            Site(web, tmp_path / "b").make()
