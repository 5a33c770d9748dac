"""The disk tier of checkpoints: what is in it is whole, what is used stays, what is killed leaves nothing wrong."""

from __future__ import annotations

import errno
import os
import random
from functools import partial
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstart.local_tier import LocalTier
from coldstart.tier_handles import Entry, Loading
from coldstart.tier_policy import Resident, plan_room
from coldstart.tier_records import CheckpointKey
from contracts.errors import Cancelled, DeadlineExceeded, LoadError, NoCapacity
from tests.support.tier_faults import FakeClock, Killed, Life, MortalTierFiles, QuickTierFiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstart.tier_files import TierFiles

CAPACITY_BYTES = 100_000


def key(number: int) -> CheckpointKey:
    return CheckpointKey(identity=f"model-{number}", dtype="bfloat16", tensor_parallel=1)


def contents(number: int, num_bytes: int = 20_000) -> dict[str, bytes]:
    rng = random.Random(number)
    return {"config.json": b'{"number": %d}' % number, "weights": rng.randbytes(num_bytes - 100)}


def open_tier(root: Path, files: TierFiles | None = None, *, capacity_bytes: int = CAPACITY_BYTES) -> LocalTier:
    return LocalTier(root, capacity_bytes=capacity_bytes, files=files or QuickTierFiles(), clock=FakeClock())


def claim(tier: LocalTier, number: int, num_bytes: int = 20_000) -> Loading:
    loading = tier.acquire(key(number), num_bytes, wait_s=0.0)
    assert isinstance(loading, Loading)
    return loading


def write(loading: Loading, files: dict[str, bytes]) -> None:
    loading.path.mkdir(exist_ok=True)
    for name, data in files.items():
        (loading.path / name).write_bytes(data)


def put(tier: LocalTier, number: int, num_bytes: int = 20_000) -> Entry:
    got = tier.acquire(key(number), num_bytes, wait_s=0.0)
    if isinstance(got, Entry):
        return got
    write(got, contents(number, num_bytes))
    return got.commit(origin="here")


def held(entry: Entry) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in entry.path.iterdir()}


def here(tier: LocalTier, number: int) -> bool:
    entry = tier.look_up(key(number))
    if entry is not None:
        assert held(entry) == contents(number)
        entry.close()
    return entry is not None


# --- what goes --------------------------------------------------------------------------------------------


def resident(folder: str, num_bytes: int, used_s: float, *, pinned: bool = False, complete: bool = True) -> Resident:
    return Resident(folder=folder, num_bytes=num_bytes, used_s=used_s, is_pinned=pinned, is_complete=complete)


def test_halves_of_dead_loaders_go_first_then_the_least_recently_used() -> None:
    residents = [resident("new", 30, 9.0), resident("old", 30, 1.0), resident("half", 30, 8.0, complete=False)]
    plan = plan_room(residents, needed_bytes=40, capacity_bytes=100)
    assert [victim.folder for victim in plan.victims] == ["half"]
    plan = plan_room(residents, needed_bytes=70, capacity_bytes=100)
    assert [victim.folder for victim in plan.victims] == ["half", "old"]
    assert "dead process" in plan.victims[0].reason
    assert "longest time" in plan.victims[1].reason


def test_nothing_goes_in_vain() -> None:
    residents = [resident("used", 60, 0.0, pinned=True), resident("idle", 30, 1.0)]
    plan = plan_room(residents, needed_bytes=41, capacity_bytes=100)
    assert not plan.fits
    assert plan.victims == ()
    assert plan.reason == "41 bytes do not fit beside 60 in use: there is room for 100"


_residents = st.lists(
    st.builds(
        Resident,
        folder=st.text("abcdef", min_size=1, max_size=6),
        num_bytes=st.integers(0, 50),
        used_s=st.floats(0, 100),
        is_pinned=st.booleans(),
        is_complete=st.booleans(),
    ),
    unique_by=lambda each: each.folder,
)


@given(_residents, st.integers(0, 120), st.integers(0, 200))
def test_a_plan_makes_the_room_it_promises_and_no_more(
    residents: list[Resident], needed_bytes: int, capacity_bytes: int
) -> None:
    plan = plan_room(residents, needed_bytes=needed_bytes, capacity_bytes=capacity_bytes)
    by_name = {each.folder: each for each in residents}
    victims = [by_name[victim.folder] for victim in plan.victims]
    left = sum(each.num_bytes for each in residents) - sum(each.num_bytes for each in victims)
    assert not any(each.is_pinned for each in victims)
    pinned_bytes = sum(each.num_bytes for each in residents if each.is_pinned)
    assert plan.fits == (pinned_bytes + needed_bytes <= capacity_bytes)
    if plan.fits:
        assert left + needed_bytes <= capacity_bytes
    if victims:
        assert left + victims[-1].num_bytes + needed_bytes > capacity_bytes


# --- life of an entry -------------------------------------------------------------------------------------


def test_what_was_committed_is_found_also_by_others(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    assert tier.look_up(key(1)) is None
    with put(tier, 1) as entry:
        assert held(entry) == contents(1)
    other = open_tier(tmp_path)
    assert here(other, 1)
    assert not here(other, 2)
    assert [manifest.key for manifest in other.manifests()] == [key(1)]
    assert other.used_bytes() < 20_000 + 1000


def test_what_is_being_written_is_not_found(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    loading = claim(tier, 1)
    write(loading, contents(1))
    assert not here(tier, 1)
    loading.abandon(keep=True)
    assert not here(tier, 1)
    again = claim(tier, 1)
    assert {path.name for path in again.path.iterdir()} == {"config.json", "weights"}
    again.abandon(keep=False)
    assert not again.folder.exists()


def test_only_the_checkpoint_itself_is_kept(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    loading = claim(tier, 1)
    (loading.folder / "download.journal").write_bytes(b"x" * 5000)
    (loading.folder / "source").mkdir()
    (loading.folder / "source" / "big").write_bytes(b"x" * 5000)
    write(loading, contents(1))
    with loading.commit(origin="here") as entry:
        assert {path.name for path in entry.path.parent.iterdir()} >= {"checkpoint", "tandem-tier.json"}
        assert not {path.name for path in entry.path.parent.iterdir()} & {"download.journal", "source"}


def test_one_loads_and_the_others_wait_and_use_it(tmp_path: Path) -> None:
    tier, other = open_tier(tmp_path), open_tier(tmp_path)
    loading = claim(tier, 1)
    with pytest.raises(DeadlineExceeded, match="another process is still loading model-1"):
        other.acquire(key(1), 20_000, wait_s=3.0)
    with pytest.raises(Cancelled):
        other.acquire(key(1), 20_000, wait_s=3.0, is_cancelled=lambda: True)
    write(loading, contents(1))
    loading.commit(origin="here").close()
    entry = other.acquire(key(1), 20_000, wait_s=3.0)
    assert isinstance(entry, Entry)
    assert held(entry) == contents(1)
    entry.close()


def test_the_least_recently_used_goes_and_what_is_pinned_stays(tmp_path: Path) -> None:
    told: list[str] = []
    tier = LocalTier(tmp_path, capacity_bytes=65_000, files=QuickTierFiles(), clock=FakeClock(), tell=told.append)
    put(tier, 1).close()
    second = put(tier, 2)
    put(tier, 3).close()
    assert here(tier, 1)
    put(tier, 4).close()
    assert [here(tier, number) for number in (1, 2, 3, 4)] == [True, True, False, True]
    assert "not used for the longest time" in told[0]
    second.close()
    put(tier, 5).close()
    # 1 was looked at before 2 and 4 were.
    assert [here(tier, number) for number in (1, 2, 4, 5)] == [False, True, True, True]


def test_what_does_not_fit_is_refused_and_nothing_goes(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, capacity_bytes=65_000)
    put(tier, 1).close()
    with put(tier, 2), pytest.raises(NoCapacity, match="46000 bytes do not fit beside"):
        tier.acquire(key(3), 46_000, wait_s=0.0)
    assert [here(tier, number) for number in (1, 2)] == [True, True]
    assert not (tmp_path / "loading" / key(3).folder).exists()


def test_reservations_count(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    loading = claim(tier, 1, 60_000)
    with pytest.raises(NoCapacity):
        tier.acquire(key(2), 60_000, wait_s=0.0)
    loading.reserve(30_000)
    claim(tier, 2, 60_000).abandon(keep=False)
    with pytest.raises(NoCapacity):
        loading.reserve(CAPACITY_BYTES + 1)
    loading.abandon(keep=False)
    assert tier.used_bytes() == 0


def test_more_than_was_reserved_needs_room_too(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, capacity_bytes=50_000)
    with put(tier, 1):
        loading = claim(tier, 2, 1_000)
        write(loading, contents(2, 40_000))
        with pytest.raises(NoCapacity):
            loading.commit(origin="here")
        loading.abandon(keep=False)
    assert here(tier, 1)


def test_another_programs_files_leave_less_room(tmp_path: Path) -> None:
    class FullFiles(QuickTierFiles):
        def free_bytes(self, path: Path) -> int:
            return 10_000

    tier = open_tier(tmp_path, FullFiles())
    with pytest.raises(NoCapacity, match="there is room for 10000"):
        tier.acquire(key(1), 20_000, wait_s=0.0)


def test_evict_leaves_what_is_used(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    with put(tier, 1):
        assert not tier.evict(key(1))
    assert tier.evict(key(1))
    assert not tier.evict(key(1))
    assert not here(tier, 1)


def test_a_damaged_one_can_be_dropped_while_others_use_it(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    first = put(tier, 1)
    second = tier.look_up(key(1))
    assert second is not None
    with (second.path / "weights").open("rb") as file:
        first.discard("a checksum is wrong")
        assert not here(tier, 1)
        assert file.read() == contents(1)["weights"]
    put(tier, 1).close()
    # Its own, old one is gone; the new one is not its to drop.
    second.discard("a checksum is wrong")
    assert here(tier, 1)


@settings(max_examples=30)
@given(number=st.integers(0, 30_000), bit=st.integers(0, 7), data=st.data())
def test_any_flipped_bit_is_found(
    tmp_path_factory: pytest.TempPathFactory, number: int, bit: int, data: st.DataObject
) -> None:
    tier = open_tier(tmp_path_factory.mktemp("tier"))
    with put(tier, 1) as entry:
        folder = entry.path.parent
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from([path for path in files if path.name != "reserved.json"]))
    damaged = bytearray(path.read_bytes())
    damaged[number % len(damaged)] ^= 1 << bit
    path.write_bytes(damaged)
    assert tier.look_up(key(1)) is None
    assert not folder.exists()
    put(tier, 1).close()
    assert here(tier, 1)


@pytest.mark.parametrize("how", ["truncated", "longer", "missing", "unreadable"])
def test_other_damage_is_found(how: str, tmp_path: Path) -> None:
    class BrokenFiles(QuickTierFiles):
        def read(self, path: Path) -> bytes:
            if path.name == "weights" and how == "unreadable":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(path)

    tier = open_tier(tmp_path)
    with put(tier, 1) as entry:
        weights = entry.path / "weights"
    if how == "missing":
        weights.unlink()
    elif how != "unreadable":
        weights.write_bytes(contents(1)["weights"][:-1] if how == "truncated" else contents(1)["weights"] + b"x")
    assert open_tier(tmp_path, BrokenFiles()).look_up(key(1)) is None
    assert not here(tier, 1)


# --- ends of processes and disks --------------------------------------------------------------------------


def _use(tier: LocalTier) -> None:
    """Something of everything: two that go, one that is loaded again, one that is dropped."""
    for number in (1, 2, 3):
        put(tier, number).close()
    put(tier, 4, 50_000).close()
    begun = tier.acquire(key(5), 20_000, wait_s=0.0)
    if isinstance(begun, Loading):
        begun.abandon(keep=True)
    entry = tier.look_up(key(4))
    assert entry is not None
    entry.discard("for the test")
    put(tier, 5).close()
    tier.evict(key(5))
    put(tier, 6).close()


def _num_steps(root: Path) -> int:
    life = Life()
    _use(open_tier(root, MortalTierFiles(life)))
    assert not life.descriptors
    return life.num_steps


def test_killed_at_any_step_all_that_is_found_is_right_and_all_goes_on(tmp_path: Path) -> None:
    steps = _num_steps(tmp_path / "count")
    assert steps > 40
    for dies_at in range(1, steps + 1):
        root = tmp_path / str(dies_at)
        with pytest.raises(Killed):
            _use(open_tier(root, MortalTierFiles(Life(dies_at=dies_at))))
        tier = open_tier(root)
        assert not any((root / "trash").iterdir())
        for manifest in tier.manifests():
            entry = tier.look_up(manifest.key)
            assert entry is not None
            number = int(manifest.key.identity.removeprefix("model-"))
            assert held(entry) == contents(number, 50_000 if number == 4 else 20_000)
            entry.close()
        assert tier.used_bytes() <= CAPACITY_BYTES
        _use(tier)
        assert here(tier, 6)


def test_a_full_disk_is_said_and_leaves_the_tier_consistent(tmp_path: Path) -> None:
    steps = _num_steps(tmp_path / "count")
    num_failed = 0
    for full_at in range(1, steps + 1, 2):
        root = tmp_path / str(full_at)
        life = Life(full_at=full_at)
        error = _failure(partial(_use_mortal, root, life))
        if error is not None:
            num_failed += 1
            assert "the disk is full" in error.message
            assert error.reason == "disk_full"
        tier = open_tier(root)
        for manifest in tier.manifests():
            entry = tier.look_up(manifest.key)
            assert entry is not None
            entry.close()
        # The process that met it lives on; the locks it holds are of loads that it did not give up.
        for descriptor in life.descriptors:
            os.close(descriptor)
        _use(open_tier(root))
    assert num_failed > 20


def _use_mortal(root: Path, life: Life) -> None:
    _use(open_tier(root, MortalTierFiles(life)))


def _failure(do: Callable[[], None]) -> LoadError | None:
    try:
        do()
    except LoadError as error:
        return error
    return None


def test_old_halves_are_removed_when_a_tier_is_opened(tmp_path: Path) -> None:
    clock = FakeClock()
    tier = LocalTier(tmp_path, capacity_bytes=CAPACITY_BYTES, files=QuickTierFiles(), clock=clock)
    for number in (1, 2):
        loading = claim(tier, number)
        write(loading, contents(number))
        if number == 1:
            loading.abandon(keep=True)
    for path in (tmp_path / "loading").glob("*/reserved.json"):
        os.utime(path, (clock.unix_s - 30 * 86400, clock.unix_s - 30 * 86400))
    LocalTier(tmp_path, capacity_bytes=CAPACITY_BYTES, files=QuickTierFiles(), clock=clock)
    # The second one is still being loaded, however long that takes.
    assert [path.name for path in (tmp_path / "loading").iterdir()] == [key(2).folder]


def test_a_lock_that_is_never_let_go_of_is_an_error(tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    files = QuickTierFiles()
    descriptor = files.open_folder(tmp_path)
    assert files.lock(descriptor, shared=False)
    with pytest.raises(LoadError, match="holds the tier's lock"):
        tier.look_up(key(1))
    files.close(descriptor)
    assert tier.look_up(key(1)) is None


def test_an_unwritable_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LoadError, match="file"):
        open_tier(tmp_path / "file" / "tier")
