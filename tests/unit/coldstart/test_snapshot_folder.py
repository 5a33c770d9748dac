"""The folder of snapshots: whose is taken, and what goes where there are too many."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from coldstart.snapshot.folder import SnapshotFolder

if TYPE_CHECKING:
    from pathlib import Path

MODEL, OTHER = ("folder/a", "auto", "16"), ("folder/b", "auto", "16")


def put(path: Path, num_bytes: int, used_s: float) -> Path:
    path.write_bytes(bytes(num_bytes))
    os.utime(path, (used_s, used_s))
    return path


def test_a_worker_takes_its_own_or_the_latest_of_its_model(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path, 1000)
    assert folder.find(MODEL, "decode-0") is None
    put(folder.path_of(OTHER, "decode-0"), 1, 9.0)
    assert folder.find(MODEL, "decode-0") is None
    put(folder.path_of(MODEL, "decode-1"), 1, 1.0)
    later = put(folder.path_of(MODEL, "prefill-0"), 1, 2.0)
    assert folder.find(MODEL, "decode-0") == later
    own = put(folder.path_of(MODEL, "decode-0"), 1, 0.0)
    assert folder.find(MODEL, "decode-0") == own


def test_what_was_not_used_for_the_longest_time_goes_but_never_the_new_one(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path, 100)
    assert folder.most_bytes == 25
    oldest = put(folder.path_of(MODEL, "a"), 40, 5.0)
    unused = put(folder.path_of(MODEL, "b"), 40, 2.0)
    new = put(folder.path_of(OTHER, "c"), 40, 1.0)
    folder.note_used(oldest)
    assert folder.make_room(new, 0.0) == [unused.name]
    assert sorted(tmp_path.iterdir()) == sorted([oldest, new])
    put(new, 400, 1.0)
    assert folder.make_room(new, 0.0) == [oldest.name]
    assert folder.make_room(new, 0.0) == []


def test_what_killed_processes_left_goes_after_a_while(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path, 100)
    path = folder.path_of(MODEL, "a")
    stale = put(path.with_name(f"{path.name}.17.part"), 10, 0.0)
    fresh = put(path.with_name(f"{path.name}.18.part"), 10, 950.0)
    assert folder.find(MODEL, "a") is None
    folder.make_room(path, 1000.0)
    assert (stale.exists(), fresh.exists()) == (False, True)


def test_it_is_for_this_user_alone(tmp_path: Path) -> None:
    folder = SnapshotFolder(tmp_path / "deep" / "snapshots", 100)
    assert folder.find(MODEL, "a") is None
    folder.prepare()
    folder.prepare()
    assert (tmp_path / "deep" / "snapshots").stat().st_mode & 0o777 == 0o700


def test_a_name_leads_nowhere_else(tmp_path: Path) -> None:
    assert SnapshotFolder(tmp_path, 1).path_of(MODEL, "../../etc/x").parent == tmp_path
