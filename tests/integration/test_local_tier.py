"""Processes share a disk tier of checkpoints: one fetches, the others wait for it, whoever is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coldstart.download import Wanted, fetch_checkpoint
from coldstart.format import INDEX_NAME, is_converted, read_index
from coldstart.local_tier import LocalTier
from coldstart.tier_files import LiveTierFiles
from engine.safetensors_files import model_fingerprint
from rpc.clock import LiveBlockingClock
from tests.support.converted_folders import MemoryRemote, converted_folder
from tests.support.layout import ROOT
from tests.support.range_server import Act, range_server
from tests.support.tiny_models import make_tiny_model

if TYPE_CHECKING:
    from collections.abc import Generator

WEIGHTS = "weights-00001-of-00001.tandem"
END_S = 60.0


def _command(url: str, tier: Path, wait_s: float) -> list[str]:
    return [sys.executable, "-m", "tests.support.tier_process", url, str(tier), str(wait_s)]


@contextmanager
def fetching(url: str, tier: Path, wait_s: float) -> Generator[subprocess.Popen[str]]:
    process = subprocess.Popen(_command(url, tier, wait_s), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    watch = threading.Timer(END_S, process.kill)
    watch.start()
    try:
        yield process
    finally:
        watch.cancel()
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def contents_of(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_of_two_processes_one_fetches_and_both_use_it(tmp_path: Path) -> None:
    contents = converted_folder(1, num_chunks=60, chunk_bytes=65536)
    with (
        range_server(contents) as web,
        fetching(web.url, tmp_path, 30.0) as one,
        fetching(web.url, tmp_path, 30.0) as two,
    ):
        folders: list[str] = []
        for process in (one, two):
            told = line(process)
            folders.append(line(process) if told == "begun" else told)
        asked = [bounds for name, bounds in web.asked if name == WEIGHTS]
    assert folders[0] == folders[1]
    assert contents_of(folders[0]) == contents
    assert len(asked) == len(set(asked))


def test_a_disk_without_room_is_told_before_anything_is_fetched(tmp_path: Path) -> None:
    contents = converted_folder(3, num_chunks=60, chunk_bytes=65536)
    mount = f'mount -t tmpfs -o size=1m tandem-test {tmp_path} && exec "$@"'
    # A mount that only this process sees, and that ends with it.
    alone = ["unshare", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*alone, "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no right to mount here")
    with range_server(contents) as web:
        process = subprocess.run(
            [*alone, *_command(web.url, tmp_path, 1.0)], cwd=ROOT, capture_output=True, text=True, timeout=END_S
        )
    assert process.stdout == "no_capacity\n", process.stderr
    assert {name for name, _ in web.asked} == {INDEX_NAME}


def test_when_the_loader_is_killed_the_one_that_waits_goes_on(tmp_path: Path) -> None:
    contents = converted_folder(2, num_chunks=60, chunk_bytes=65536)
    with range_server(contents) as web:
        # The index, the two small files' place in the line, and some of the weights; then the loader hangs.
        web.script += [Act.SERVE] * 20
        web.then = Act.STALL
        with fetching(web.url, tmp_path, 30.0) as loader:
            assert line(loader) == "begun"
            while len(web.asked) < 22:
                assert loader.poll() is None
                time.sleep(0.005)
            with fetching(web.url, tmp_path, 0.5) as impatient:
                web.script += [Act.SERVE]
                assert line(impatient) == "deadline_exceeded"
            web.script += [Act.SERVE]
            with fetching(web.url, tmp_path, 30.0) as waiter:
                loader.send_signal(signal.SIGKILL)
                loader.wait()
                before = {bounds for name, bounds in web.asked[:21] if name == WEIGHTS}
                web.asked.clear()
                web.then = Act.SERVE
                told = line(waiter)
                folder = line(waiter) if told == "begun" else told
        assert contents_of(folder) == contents
        again = [bounds for name, bounds in web.asked if name == WEIGHTS]
    # What the killed one had written was not fetched again, but for what it was about to.
    assert len(before) >= 15
    assert len(set(again) & before) <= 4


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_an_original_becomes_a_converted_checkpoint_of_the_tier(tensor_parallel: int, tmp_path: Path) -> None:
    folder = make_tiny_model("llama-sharded-biased", tmp_path)
    remote = MemoryRemote({path.name: path.read_bytes() for path in folder.iterdir()})
    tier = LocalTier(tmp_path / "tier", capacity_bytes=1 << 30, files=LiveTierFiles(), clock=LiveBlockingClock())
    wanted = Wanted(dtype="bfloat16", tensor_parallel=tensor_parallel)
    with fetch_checkpoint(remote, tier, wanted) as entry:
        assert is_converted(entry.path)
        index = read_index(entry.path)
        assert (index.dtype, index.tensor_parallel) == ("bfloat16", tensor_parallel)
        assert index.model_fingerprint == model_fingerprint(folder)
        assert {path.name for path in entry.path.parent.iterdir()} == {"checkpoint", "tandem-tier.json"}
    # And that one can be served to others, and streamed.
    second = MemoryRemote(contents_of(str(entry.path)))
    other = LocalTier(tmp_path / "other", capacity_bytes=1 << 30, files=LiveTierFiles(), clock=LiveBlockingClock())
    with fetch_checkpoint(second, other) as copy:
        assert contents_of(str(copy.path)) == second.contents
