"""From the nearest tier into memory: whichever it is, the same weights; whatever is wrong, none or the right ones."""

from __future__ import annotations

import mmap
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from coldstart.canary_run import canary_of
from coldstart.convert import ConvertOptions, convert
from coldstart.format import decode_index
from coldstart.loaded import LoadedWeights
from coldstart.loader import Loaded, WeightLoader, folder_identity
from coldstart.local_tier import LocalTier
from coldstart.original import Original
from coldstart.residence import WeightsKey
from coldstart.tier_files import LiveTierFiles
from contracts.errors import ConfigError, CorruptCheckpoint, LoadError
from engine.ops.torch_ops import TorchOps
from engine.runner import EngineOptions, load_runner
from rpc.clock import LiveBlockingClock
from tests.support.checkpoints import fused_original
from tests.support.tiny_models import make_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from coldstart.far import Far
    from coldstart.partition import Span
    from coldstart.remote import RemoteFolder
    from engine.safetensors_files import StoredDtype


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models"))


def tier_at(folder: Path, capacity_bytes: int = 1 << 30) -> LocalTier:
    return LocalTier(folder, capacity_bytes=capacity_bytes, files=LiveTierFiles(), clock=LiveBlockingClock())


class Site:
    def __init__(self, tier: LocalTier | None = None) -> None:
        self.tier = tier
        self.said = list[str]()
        self.seen = list[tuple[str, int, int]]()

    def _open_far(self, far: Far) -> tuple[RemoteFolder, LocalTier]:
        raise AssertionError(f"{far.url} stands nowhere here")

    def _note(self, what: str, done_bytes: int, total_bytes: int) -> None:
        self.seen.append((what, done_bytes, total_bytes))

    def load(self, folder: Path, *, dtype: str = "auto", ranks: int = 1, rank: int = 0) -> tuple[LoadedWeights, Loaded]:
        key = WeightsKey(folder=str(folder), dtype=dtype, tensor_parallel=ranks, rank=rank)
        with WeightLoader(key, self.tier, progress=self._note, log=self.said.append, open_far=self._open_far) as loader:
            memory = mmap.mmap(-1, loader.prepare())
            loaded = loader.fill(memoryview(memory))
            if loader.has_more:
                loader.finish(memory)
        end = loaded.weight_bytes + loaded.index_bytes
        index = decode_index(bytes(memory[loaded.weight_bytes : end]), where="memory")
        return LoadedWeights(memory, index, rank), loaded


def assert_same(weights: LoadedWeights, original: Path, dtype: torch.dtype = torch.float32) -> None:
    expected = fused_original(original)
    assert sorted(weights.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights.tensor(name), tensor.to(dtype)), name


def test_without_a_disk_tier_an_original_is_fused_in_memory(original: Path) -> None:
    site = Site()
    weights, loaded = site.load(original)
    assert loaded.tier == "original"
    assert_same(weights, original)
    assert ("weights", loaded.weight_bytes, loaded.weight_bytes) in site.seen
    assert {what for what, _, _ in site.seen} <= {"weights", "canary"}


def test_what_is_fused_in_memory_has_the_canary_of_its_original(original: Path, tmp_path: Path) -> None:
    weights, _ = Site().load(original)
    assert weights.canary is not None
    assert weights.canary == canary_of(original)
    load_runner(original, EngineOptions(num_blocks=2), TorchOps(), weights=weights)
    shared, _ = Site().load(original, ranks=2, rank=1)
    assert shared.canary == weights.canary


def test_an_original_fused_wrongly_serves_nobody(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Keys where queries belong and the other way round: right bytes with right checksums, in wrong places.
    def swapped(original: Original, span: Span, dtype: StoredDtype, into: memoryview) -> None:
        names = {"q_proj": "o_proj", "o_proj": "q_proj"}
        source = re.sub("[qo]_proj", lambda found: names[found[0]], span.piece.source)
        read(original, replace(span, piece=replace(span.piece, source=source)), dtype, into)

    read = Original.read
    monkeypatch.setattr(Original, "read", swapped)
    weights, _ = Site().load(original)
    with pytest.raises(CorruptCheckpoint, match="canary: after"):
        load_runner(original, EngineOptions(num_blocks=2), TorchOps(), weights=weights)


def test_in_another_dtype_too(original: Path) -> None:
    weights, _ = Site().load(original, dtype="bfloat16")
    assert weights.dtype == "bfloat16"
    assert_same(weights, original, torch.bfloat16)


def test_a_disk_tier_converts_once(original: Path, tmp_path: Path) -> None:
    site = Site(tier_at(tmp_path))
    weights, loaded = site.load(original)
    assert loaded.tier == "ssd"
    assert any(what.startswith("conversion") for what, _, _ in site.seen)
    assert_same(weights, original)
    again = Site(tier_at(tmp_path))
    weights, loaded = again.load(original)
    assert loaded.tier == "ssd"
    assert {what for what, _, _ in again.seen} == {"weights"}
    assert_same(weights, original)


def test_a_model_that_was_written_again_is_another_one(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path / "model")
    before = folder_identity(folder)
    config = folder / "config.json"
    config.write_bytes(config.read_bytes() + b"\n")
    assert folder_identity(folder) != before


def test_a_converted_folder_is_read_as_it_is(original: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "converted")
    weights, loaded = Site(tier_at(tmp_path / "tier")).load(tmp_path / "converted")
    assert loaded.tier == "ssd"
    assert list((tmp_path / "tier" / "entries").iterdir()) == []
    assert_same(weights, original)


def test_ranks_of_a_converted_folder_are_its_own(original: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "two", ConvertOptions(tensor_parallel=2))
    shares = [Site().load(tmp_path / "two", ranks=2, rank=rank)[0] for rank in range(2)]
    fused = [Site().load(original, ranks=2, rank=rank)[0] for rank in range(2)]
    for share, same in zip(shares, fused, strict=True):
        assert all(torch.equal(share.tensor(name), same.tensor(name)) for name in share.names())
    with pytest.raises(ConfigError, match="was converted for tensor_parallel 2, not 1"):
        Site().load(tmp_path / "two")


def test_damage_in_a_converted_folder_is_told(original: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "converted")
    (weights,) = (tmp_path / "converted").glob("*.tandem")
    data = bytearray(weights.read_bytes())
    data[len(data) // 3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(LoadError, match="does not have its checksum"):
        Site().load(tmp_path / "converted")


def test_a_disk_tier_without_room_is_passed_by(original: Path, tmp_path: Path) -> None:
    site = Site(tier_at(tmp_path, capacity_bytes=1000))
    weights, loaded = site.load(original)
    assert loaded.tier == "original"
    assert_same(weights, original)
    assert any("the disk tier of weights is passed by" in line for line in site.said)


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    for site in (Site(), Site(tier_at(tmp_path / "tier"))):
        with pytest.raises(ConfigError, match=r"does not exist|No such file"):
            site.load(tmp_path / "nothing")
