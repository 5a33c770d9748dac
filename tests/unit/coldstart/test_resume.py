"""Conversions that end at any step: the target is whole or not there, and the next run goes on."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coldstart.convert import JOURNAL_NAME, ConvertOptions, ConvertProgress, convert, partial_folder
from coldstart.durable import DurableFiles
from coldstart.format import INDEX_NAME, num_chunks
from coldstart.journal import Journal
from coldstart.loaded import load_checkpoint
from contracts.errors import ConfigError, CorruptCheckpoint, LoadError
from engine.model_config import load_model_config
from tests.support.checkpoints import fused_original, put_together, same_bits
from tests.support.dying_files import DyingFiles, Killed
from tests.support.tiny_models import make_tiny_model

if TYPE_CHECKING:
    from torch import Tensor

    from tests.support.dying_files import Moment

#: Some chunks in each of two partitions.
OPTIONS = ConvertOptions(tensor_parallel=2, chunk_bytes=1 << 16)
REPO = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen2", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def wanted(original: Path) -> dict[str, Tensor]:
    return fused_original(original)


@pytest.fixture(scope="module")
def num_steps(original: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    files = DyingFiles()
    convert(original, tmp_path_factory.mktemp("counted") / "out", OPTIONS, files=files)
    return len(files.steps)


def _is_right(target: Path, original: Path, wanted: dict[str, Tensor]) -> None:
    loaded = [load_checkpoint(target, rank) for rank in range(2)]
    same_bits(put_together(loaded, load_model_config(original)), wanted)
    assert not partial_folder(target).exists()
    assert not (target / JOURNAL_NAME).exists()


@pytest.mark.parametrize("moment", ["before", "half", "after"])
def test_one_that_is_killed_at_any_step_goes_on(
    original: Path, wanted: dict[str, Tensor], num_steps: int, tmp_path: Path, moment: Moment
) -> None:
    for step in range(num_steps):
        target = tmp_path / f"out-{step}"
        with pytest.raises(Killed):
            convert(original, target, OPTIONS, files=DyingFiles(step, moment))
        if target.exists():
            assert step >= num_steps - 2, "the last steps put it into its place"
            _is_right(target, original, wanted)
        convert(original, target, OPTIONS, files=DyingFiles())
        _is_right(target, original, wanted)
        shutil.rmtree(target)


def test_one_that_is_killed_again_and_again_gets_done(
    original: Path, wanted: dict[str, Tensor], tmp_path: Path
) -> None:
    """Each life gets a little further, because what was done counts."""
    target, num_lives = tmp_path / "out", 0
    options = ConvertOptions(tensor_parallel=2, chunk_bytes=1 << 14)
    while not target.exists():
        num_lives += 1
        assert num_lives < 100
        # Enough for the end, which is not shared out to several lives.
        with suppress(Killed):
            convert(original, target, options, files=DyingFiles(32, "half"))
    assert num_lives > 2
    _is_right(target, original, wanted)


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, LoadError), (errno.EIO, LoadError)])
def test_a_full_or_broken_disk_at_any_step_is_told_and_may_be_repaired(
    original: Path, wanted: dict[str, Tensor], num_steps: int, tmp_path: Path, code: int, error: type[Exception]
) -> None:
    for step in range(num_steps - 1):
        target = tmp_path / f"out-{step}"
        with pytest.raises(error, match=f"out-{step}: (no room: [0-9]+ bytes are needed, |cannot be written: )"):
            convert(original, target, OPTIONS, files=DyingFiles(step, "half", lambda: OSError(code, os.strerror(code))))
        if not target.exists():
            convert(original, target, OPTIONS, files=DyingFiles())
        _is_right(target, original, wanted)
        shutil.rmtree(target)


def test_a_disk_full_from_the_start_leaves_nothing(original: Path, tmp_path: Path) -> None:
    class FullFiles(DurableFiles):
        def allocate(self, descriptor: int, num_bytes: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(LoadError, match=r"out: no room: [0-9]+ bytes are needed, [0-9]+ are free$"):
        convert(original, tmp_path / "out", OPTIONS, files=FullFiles())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_place_that_cannot_be_written_is_told(original: Path, tmp_path: Path, code: int) -> None:
    files = DyingFiles(0, "before", lambda: OSError(code, os.strerror(code)))
    with pytest.raises(ConfigError, match=f"out: cannot be written: {os.strerror(code)}"):
        convert(original, tmp_path / "out", OPTIONS, files=files)


def test_a_target_within_a_file_is_told(original: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        convert(original, tmp_path / "file" / "out", OPTIONS)


def _stopped_halfway(original: Path, target: Path) -> tuple[int, int]:
    """(chunks done, chunks in all)."""
    done: list[int] = []

    def stop(state: ConvertProgress) -> None:
        done.append(state.done_bytes)
        if state.done_bytes * 2 >= state.total_bytes:
            raise Killed

    with pytest.raises(Killed):
        convert(original, target, OPTIONS, progress=stop)
    sizes = [path.stat().st_size for path in partial_folder(target).glob("*.tandem")]
    return len(done), sum(num_chunks(size, OPTIONS.chunk_bytes) for size in sizes)


def _num_chunk_writes(files: DyingFiles, original: Path, target: Path, options: ConvertOptions = OPTIONS) -> int:
    """Chunks that a run wrote: each is a write, followed by its line in the journal."""
    convert(original, target, options, files=files)
    num_syncs = files.steps.index("sync")
    return files.steps[:num_syncs].count("write") // 2


def test_what_is_done_is_not_done_again(original: Path, tmp_path: Path) -> None:
    done, total = _stopped_halfway(original, tmp_path / "out")
    assert 0 < done < total
    assert _num_chunk_writes(DyingFiles(), original, tmp_path / "out") == total - done


@pytest.mark.parametrize("other", ["options", "original"])
def test_another_original_or_other_options_start_anew(
    original: Path, wanted: dict[str, Tensor], tmp_path: Path, other: str
) -> None:
    copy, target = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(original, copy)
    _, total = _stopped_halfway(copy, target)
    if other == "original":
        # Same bytes, but written again: who knows.
        os.utime(copy / "model.safetensors", ns=(5, 5))
        assert _num_chunk_writes(DyingFiles(), copy, target) == total
        _is_right(target, copy, wanted)
    else:
        convert(copy, target, ConvertOptions(chunk_bytes=1 << 16))
        same_bits(put_together([load_checkpoint(target)], load_model_config(copy)), wanted)
        assert not any("of-00002" in path.name for path in target.iterdir())


def test_bytes_that_a_crash_lost_are_written_again(original: Path, wanted: dict[str, Tensor], tmp_path: Path) -> None:
    """The journal's lines came to the disk, some of the chunks that they tell of did not."""
    target = tmp_path / "out"
    _stopped_halfway(original, target)
    with (partial_folder(target) / "weights-00001-of-00002.tandem").open("r+b") as file:
        file.seek(70_000)
        file.write(bytes(100))
    convert(original, target, OPTIONS)
    _is_right(target, original, wanted)


def test_a_disk_that_does_not_keep_what_is_written_is_told(original: Path, tmp_path: Path) -> None:
    class ForgetfulFiles(DurableFiles):
        def write(self, descriptor: int, data: object, offset: int) -> None:
            view = memoryview(data)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
            if len(view) < OPTIONS.chunk_bytes:
                super().write(descriptor, view, offset)

    with pytest.raises(CorruptCheckpoint, match=r"weights-00001-of-00002.tandem: chunk 0 reads otherwise than written"):
        convert(original, tmp_path / "out", OPTIONS, files=ForgetfulFiles())
    assert not (tmp_path / "out").exists()


def test_two_at_once_do_not_meet(original: Path, wanted: dict[str, Tensor], tmp_path: Path) -> None:
    target = tmp_path / "out"
    folder = partial_folder(target)
    folder.mkdir()
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="out: another process is converting to it"):
        convert(original, target, OPTIONS)
    os.close(other)
    convert(original, target, OPTIONS)
    _is_right(target, original, wanted)


def test_a_half_written_folder_is_no_checkpoint(original: Path, tmp_path: Path) -> None:
    _stopped_halfway(original, tmp_path / "out")
    with pytest.raises(CorruptCheckpoint, match=f"it has no {INDEX_NAME}"):
        load_checkpoint(partial_folder(tmp_path / "out"))


def test_a_killed_process_is_gone_on_with(original: Path, wanted: dict[str, Tensor], tmp_path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from coldstart.convert import ConvertOptions, convert

def progress(state):
    if state.what == "written" and state.done_bytes * 2 > state.total_bytes:
        os.kill(os.getpid(), signal.SIGKILL)

convert(Path(sys.argv[1]), Path(sys.argv[2]), ConvertOptions(tensor_parallel=2, chunk_bytes=1 << 16), progress=progress)
"""
    target = tmp_path / "out"
    command = (sys.executable, "-c", program, str(original), str(target))
    assert subprocess.run(command, cwd=REPO, timeout=100, check=False).returncode == -signal.SIGKILL
    assert not target.exists()
    sizes = [path.stat().st_size for path in partial_folder(target).glob("*.tandem")]
    total = sum(num_chunks(size, OPTIONS.chunk_bytes) for size in sizes)
    assert 0 < _num_chunk_writes(DyingFiles(), original, target) <= total // 2 + 1
    _is_right(target, original, wanted)


# --- the journal by itself ------------------------------------------------------------------------------


def test_a_journal_drops_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, DurableFiles())
    assert journal.resume(b"me") is None
    journal.begin(b"me")
    journal.tell(0, 7, 2**64 - 1)
    journal.tell(1, 8, 5)
    journal.close()
    whole = path.read_bytes()
    end_of_first = whole.index(b"\n", 3) + 1
    for length in range(end_of_first, len(whole)):
        path.write_bytes(whole[:length])
        journal = Journal(path, DurableFiles())
        assert journal.resume(b"me") == {(0, 7): 2**64 - 1}
        journal.tell(3, 4, 6)
        journal.close()
        journal = Journal(path, DurableFiles())
        assert journal.resume(b"me") == {(0, 7): 2**64 - 1, (3, 4): 6}
        assert journal.resume(b"me and more") is None
        journal.close()


def test_the_later_line_about_a_chunk_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", DurableFiles())
    journal.begin(b"me")
    journal.tell(0, 1, 2)
    journal.tell(0, 1, 3)
    assert journal.resume(b"me") == {(0, 1): 3}
    journal.close()
