"""Profiles as files: whole or refused, and never one whose fit missed its held-out points."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

import msgspec
import pytest

from contracts.errors import ConfigError
from contracts.latency import StepWork
from contracts.profile import (
    FitErrors,
    LatencyProfile,
    ProfilePoint,
    ProfileRefused,
    ServingOverheads,
    load_profile,
    save_profile,
)
from simulator import Program, run
from simulator.faults.disk import SimulatedDisk
from tests.support.profiles import PROFILE, save_to

if TYPE_CHECKING:
    from pathlib import Path


def test_what_was_stored_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "profile.json"
    save_to(PROFILE, path)
    assert load_profile(path) == PROFILE
    save_to(msgspec.structs.replace(PROFILE, threads=2), path)
    assert load_profile(path).threads == 2
    assert [file.name for file in path.parent.iterdir()] == ["profile.json"]


def test_missing_bytes_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save_to(PROFILE, path)
    whole = path.read_bytes().rstrip(b"\n")
    for length in range(0, len(whole), 53):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"profile\.json: not whole"):
            load_profile(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"[1, 2]", "not a latency profile"),
        (b'{"format": "other"}', "not a latency profile: .*format"),
        (b"\xff\xfe", "not whole, or not JSON"),
        (b"{}", "not a latency profile: .*missing"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, text: bytes, complaint: str) -> None:
    path = tmp_path / "foreign.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=rf"foreign\.json: {complaint}"):
        load_profile(path)


def test_a_profile_of_another_version_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save_to(PROFILE, path)
    path.write_bytes(path.read_bytes().replace(b'"tandem-latency-profile-2"', b'"tandem-latency-profile-1"'))
    with pytest.raises(ConfigError, match=r"profile\.json: of format tandem-latency-profile-1, .*measure again with"):
        load_profile(path)


@pytest.mark.parametrize("seconds", [-0.001, math.inf, math.nan])
@pytest.mark.parametrize("name", ["first_token_s", "step_s", "handoff_s"])
def test_overheads_are_finite_and_not_negative(name: str, seconds: float) -> None:
    figures = {"first_token_s": 0.0, "step_s": 0.0, "handoff_s": 0.0}
    with pytest.raises(ValueError, match="an overhead must be finite and not negative"):
        ServingOverheads(**{**figures, name: seconds})


def test_impossible_coefficients_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save_to(PROFILE, path)
    whole = path.read_bytes()
    for good, bad in ((b'"floor_s": 0.01', b'"floor_s": -0.01'), (b'"handoff_s": 0.003', b'"handoff_s": -1')):
        assert good in whole
        path.write_bytes(whole.replace(good, bad))
        with pytest.raises(ConfigError, match=r"not a latency profile: .*not negative"):
            load_profile(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read: No such file"):
        load_profile(tmp_path / "none.json")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"profile\.json: cannot be written"):
        save_to(PROFILE, tmp_path / "file" / "profile.json")


@pytest.mark.parametrize("fault", ["full", "crash"])
@pytest.mark.parametrize("seed", range(20))
def test_a_disk_that_fails_leaves_the_old_profile_or_the_new_one_whole(fault: str, seed: int) -> None:
    changed = msgspec.structs.replace(PROFILE, threads=2)

    async def main(program: Program) -> None:
        disk = SimulatedDisk(program.rng("disk"))
        await save_profile(PROFILE, disk, "profile.json")
        if fault == "full":
            disk.capacity_bytes = 100
            with pytest.raises(ConfigError, match=r"profile\.json: cannot be written: the disk is full"):
                await save_profile(changed, disk, "profile.json")
        else:
            saving = asyncio.create_task(save_profile(changed, disk, "profile.json"))
            await asyncio.sleep(program.rng("when").uniform(0.0, 0.01))
            disk.crash()
            saving.cancel()
            await asyncio.wait([saving])
        found = msgspec.json.decode(await disk.read("profile.json"), type=LatencyProfile)
        assert found in ((PROFILE,) if fault == "full" else (PROFILE, changed))

    run(main, seed=seed)


@pytest.mark.parametrize("worse", [{"prefill": 0.101}, {"decode": 0.051}])
def test_a_fit_that_misses_its_points_is_not_read(tmp_path: Path, worse: dict[str, float]) -> None:
    path = tmp_path / "profile.json"
    save_to(msgspec.structs.replace(PROFILE, errors=msgspec.structs.replace(PROFILE.errors, **worse)), path)
    with pytest.raises(ProfileRefused, match=r"at most 5%.*at most 10%"):
        load_profile(path)


def test_errors_are_means_over_held_out_points_of_each_kind() -> None:
    works = {
        "prefill": StepWork(16, 136.0, 1),
        "decode": StepWork(0, 0.0, 0, 4, 400),
        "mixed": StepWork(8, 36, 1, 2, 9),
    }
    points = [
        ProfilePoint(work=work, measured_s=1.0, error=error, held_out=held_out)
        for work, scale in ((works["prefill"], 1), (works["decode"], 2), (works["mixed"], 3))
        for error, held_out in ((0.01 * scale, True), (-0.03 * scale, True), (0.9, False))
    ]
    errors = FitErrors.of(points)
    assert (errors.prefill, errors.decode, errors.mixed) == pytest.approx((0.02, 0.04, 0.06))
    assert [points[index].kind for index in (0, 3, 6)] == ["prefill", "decode", "mixed"]
    with pytest.raises(ValueError, match="no mixed point is held out"):
        FitErrors.of(points[:6])
