"""What a node agent tells of its weights."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import msgspec
import pytest

from cluster.remote_model import open_far
from cluster.weights_book import LoadSeen, WeightsBook
from coldstart.download_plan import converted_key
from coldstart.far import FAR_NAME, Far
from coldstart.format import read_index
from coldstart.residence import Copy, CopyState, WeightsKey
from coldstart.whereabouts import Whereabouts, whereabouts
from contracts.errors import ConfigError
from contracts.weight_messages import MAX_IN_LINE, MAX_MEASURED, HeldWeights, WeightsInLine
from tests.support.converted_folders import CHUNK_BYTES, converted_folder
from tests.support.layout import ROOT

if TYPE_CHECKING:
    from pathlib import Path

NOBODY: frozenset[str] = frozenset()
REACH = partial(open_far, say=lambda _: None)
KEY, OTHER = WeightsKey(folder="/a", dtype="auto"), WeightsKey(folder="/b", dtype="auto")
SSD = LoadSeen(num_bytes=100, tier="ssd", seconds=2.0, is_direct=True, converted_s=0.0)


def book() -> WeightsBook:
    made = WeightsBook()
    made.needs(KEY, "one")
    made.needs(KEY, "two")
    made.needs(KEY, "two")
    made.needs(OTHER, "three")
    return made


def copy(key: WeightsKey, state: CopyState, num_bytes: int = 0) -> Copy:
    return Copy(key=key, state=state, asked_s=0.0, used_s=0.0, num_bytes=num_bytes)


def test_the_nearest_tier_is_told_of_each_model_that_the_coordinator_has() -> None:
    made = book()
    made.found(KEY, Whereabouts("ssd", 100))
    made.found(OTHER, Whereabouts("remote", 70))
    told = made.report([copy(KEY, CopyState.RESIDENT, 104)], 0, {"one", "three"}, 0)
    assert told.held == (
        HeldWeights(model="one", tier="dram", num_bytes=104),
        HeldWeights(model="three", tier="remote", num_bytes=70),
    )
    coming = made.report([copy(KEY, CopyState.FILLING, 104)], 0, {"two"}, 0)
    assert coming.held == (HeldWeights(model="two", tier="ssd", num_bytes=100),)
    # It has to be decoded: that takes no longer than the next tier.
    packed = made.report([copy(KEY, CopyState.COMPRESSED)], 0, {"two"}, 0)
    assert (packed.held, packed.in_line) == (coming.held, ())
    both = made.report([copy(KEY, CopyState.COMPRESSING, 104)], 0, {"two"}, 0)
    assert both.held == (HeldWeights(model="two", tier="dram", num_bytes=104),)
    made.found(KEY, None)
    assert made.report([], 0, {"one"}, 0).held == ()


def test_the_line_is_told_in_its_order_with_what_is_done_of_the_load_under_way() -> None:
    made = book()
    made.found(KEY, Whereabouts("ssd", 100))
    made.found(OTHER, Whereabouts("remote", 70))
    copies = [copy(OTHER, CopyState.FILLING, 140), copy(KEY, CopyState.QUEUED)]
    assert made.report(copies, 60, {"one"}, 0).in_line == (
        WeightsInLine(models=("three",), tier="remote", num_bytes=70, done_bytes=60),
        WeightsInLine(models=("one", "two"), tier="ssd", num_bytes=100),
    )
    assert made.report(copies, 130, NOBODY, 0).in_line[0].done_bytes == 70
    many = [copy(WeightsKey(folder=f"/{n}", dtype="auto"), CopyState.QUEUED) for n in range(MAX_IN_LINE + 5)]
    assert len(made.report(many, 0, NOBODY, 0).in_line) == MAX_IN_LINE


def test_loads_are_numbered_and_told_until_they_are_known() -> None:
    made = book()
    made.loaded(KEY, SSD)
    made.loaded(KEY, SSD)
    assert [one.number for one in made.report([], 0, NOBODY, 0).measured] == [1, 2]
    (last,) = made.report([], 0, NOBODY, 1).measured
    assert (last.tier, last.num_bytes, last.seconds, last.is_direct) == ("ssd", 100, 2.0, True)
    assert made.report([], 0, NOBODY, 2).measured == ()
    for _ in range(MAX_MEASURED):
        made.loaded(KEY, SSD)
    assert [one.number for one in made.report([], 0, NOBODY, 0).measured] == list(range(3, MAX_MEASURED + 3))


def test_an_original_is_measured_by_its_own_bytes_and_with_its_conversion() -> None:
    made = book()
    made.found(KEY, Whereabouts("remote", 50))
    made.loaded(KEY, LoadSeen(num_bytes=100, tier="original", seconds=5.0, is_direct=False, converted_s=0.0))
    made.loaded(KEY, LoadSeen(num_bytes=100, tier="ssd", seconds=2.0, is_direct=True, converted_s=8.0))
    told = made.report([], 0, NOBODY, 0).measured
    assert [(one.tier, one.num_bytes, one.seconds, one.is_direct) for one in told] == [
        ("remote", 50, 5.0, False),
        ("remote", 50, 10.0, False),
        ("ssd", 100, 2.0, True),
    ]


def test_what_took_no_time_or_came_from_elsewhere_is_no_measurement() -> None:
    made = book()
    made.loaded(KEY, LoadSeen(num_bytes=100, tier="ssd", seconds=0.0, is_direct=True, converted_s=0.0))
    made.loaded(KEY, LoadSeen(num_bytes=100, tier="elsewhere", seconds=1.0, is_direct=True, converted_s=0.0))
    assert made.report([], 0, NOBODY, 0).measured == ()


# --- on the disk ------------------------------------------------------------------------------------------


def test_an_original_is_remote_until_the_disk_tier_has_it(tmp_path: Path) -> None:
    from coldstart.loader import WeightLoader
    from coldstart.local_tier import LocalTier
    from coldstart.tier_files import LiveTierFiles
    from rpc.clock import LiveBlockingClock

    demo = ROOT / "engine" / "demo"
    key = WeightsKey(folder=str(demo), dtype="float32")
    original_bytes = sum(file.stat().st_size for file in demo.glob("*.safetensors"))
    assert whereabouts(key, None) == whereabouts(key, tmp_path) == Whereabouts("remote", original_bytes)
    tier = LocalTier(tmp_path, capacity_bytes=1 << 30, files=LiveTierFiles(), clock=LiveBlockingClock())
    with WeightLoader(key, tier, progress=lambda what, done, total: None, log=lambda _: None, open_far=REACH) as loader:
        loader.prepare()
        assert loader.has_converted
    found = whereabouts(key, tmp_path)
    (weights,) = tmp_path.glob("entries/*/checkpoint/*.tandem")
    assert found == Whereabouts("ssd", weights.stat().st_size)
    # A folder in Tandem's format is what it is, wherever it is.
    assert whereabouts(WeightsKey(folder=str(weights.parent), dtype="auto"), None) == found
    with WeightLoader(key, tier, progress=lambda what, done, total: None, log=lambda _: None, open_far=REACH) as again:
        again.prepare()
        assert not again.has_converted


def test_a_checkpoint_in_a_store_is_remote_until_its_tier_has_it(tmp_path: Path) -> None:
    folder, tier = tmp_path / "far", tmp_path / "tier"
    folder.mkdir()
    files = converted_folder(3)
    for name, data in files.items():
        if not name.endswith(".tandem"):
            (folder / name).write_bytes(data)
    far = Far(url="s3://bucket/model", tier_path=str(tier), tier_bytes=1 << 30)
    (folder / FAR_NAME).write_bytes(msgspec.json.encode(far))
    key = WeightsKey(folder=str(folder), dtype="auto")
    assert whereabouts(key, None) == Whereabouts("remote", 5 * CHUNK_BYTES)
    entry = tier / "entries" / converted_key(read_index(folder)).folder / "checkpoint"
    entry.mkdir(parents=True)
    for name, data in files.items():
        (entry / name).write_bytes(data)
    assert whereabouts(key, None) == Whereabouts("ssd", 5 * CHUNK_BYTES)
    with pytest.raises(ConfigError, match="no rank 1 of 1"):
        whereabouts(WeightsKey(folder=str(folder), dtype="auto", rank=1), None)


def test_a_folder_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model folder"):
        whereabouts(WeightsKey(folder=str(tmp_path / "nothing"), dtype="auto"), tmp_path)
