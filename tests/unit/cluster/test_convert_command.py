"""What `tandem convert` tells, and that it makes what the library makes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.convert_command import IN_PLACE_INTERVAL_S, LINE_INTERVAL_S, ProgressBar, convert, progress_line
from coldstart.convert import ConvertProgress
from coldstart.loaded import load_checkpoint
from contracts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

DEMO = Path(__file__).parents[3] / "engine" / "demo"


def _at(done: int, total: int = 10) -> ConvertProgress:
    return ConvertProgress(what="written", done_bytes=done * 10**9, total_bytes=total * 10**9)


def test_a_line_tells_share_and_size() -> None:
    assert progress_line(_at(5)) == "written  [############------------]  50%, 5.00 of 10.00 GB"
    assert progress_line(_at(10)) == "written  [########################] 100%, 10.00 of 10.00 GB"
    assert progress_line(_at(0, 0)).endswith("100%, 0.00 of 0.00 GB")


def _bar(times_s: Iterator[float], written: list[str], *, in_place: bool) -> ProgressBar:
    return ProgressBar(in_place=in_place, now_s=lambda: next(times_s), write=written.append)


def test_on_a_terminal_one_line_changes() -> None:
    written: list[str] = []
    step_s = IN_PLACE_INTERVAL_S
    bar = _bar(iter([0.0, 0.5 * step_s, step_s, 1.5 * step_s, 1.6 * step_s]), written, in_place=True)
    for done in (1, 2, 3, 10):
        bar.update(_at(done))
    bar.end()
    assert written == [f"\r{progress_line(_at(2))}", f"\r{progress_line(_at(10))}\n"]


def test_an_end_on_the_way_leaves_the_line_behind() -> None:
    written: list[str] = []
    bar = _bar(iter([0.0, 1.0]), written, in_place=True)
    bar.update(_at(3))
    bar.end()
    bar.end()
    assert written == [f"\r{progress_line(_at(3))}", "\n"]


def test_elsewhere_lines_come_now_and_then_and_at_the_end() -> None:
    written: list[str] = []
    times_s = iter([0.0, 1.0, LINE_INTERVAL_S, LINE_INTERVAL_S + 1.0, LINE_INTERVAL_S + 2.0])
    bar = _bar(times_s, written, in_place=False)
    for done in (1, 2, 3, 10):
        bar.update(_at(done))
    bar.end()
    assert written == [f"{progress_line(_at(2))}\n", f"{progress_line(_at(10))}\n"]


def test_the_command_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    assert convert(DEMO, target, tensor_parallel=2) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("written  [")
    assert told[1].startswith("checked  [")
    assert told[2].startswith("canary   [")
    size = sum(os.path.getsize(path) for path in target.glob("*.tandem"))
    assert told[3] == f"{target}: {size / 1e9:.2f} GB of float32 weights in 2 partitions, checked"
    assert load_checkpoint(target, 1).tensor("final_norm").shape == (192,)


def test_a_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        convert(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"config\.json"):
        convert(tmp_path, tmp_path / "out")
