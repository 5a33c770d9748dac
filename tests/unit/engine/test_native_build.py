"""Waiting for a library that another process compiles; what else there is to it `test_block_copy` shows."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING

import pytest

from engine.native_build import NativeBuild

if TYPE_CHECKING:
    from pathlib import Path


def build(folder: Path, compiler: str | None = None) -> NativeBuild:
    source = folder / "seven.c"
    source.write_text("int seven(void) { return 7; }\n")
    flags = ("-O1", "-shared", "-fPIC")
    return NativeBuild(source, name="seven", flags=flags, compiler=compiler, cache_dir=folder / "cache")


def test_whoever_waits_finds_the_library(tmp_path: Path) -> None:
    made = build(tmp_path)
    made.start()
    made.wait(60.0)
    assert made.poll()
    if not made.library.exists():
        pytest.skip("no C compiler here")
    assert ctypes.CDLL(str(made.library)).seven() == 7
    again = build(tmp_path)
    assert again.library == made.library
    again.start()
    assert again.poll(), "it is compiled a second time"
    (tmp_path / "seven.c").write_text("int seven(void) { return 8; }\n")
    changed = NativeBuild(tmp_path / "seven.c", name="seven", flags=(), cache_dir=tmp_path / "cache")
    assert changed.library != made.library


def test_a_compiler_that_does_not_end_is_not_waited_for_longer_than_said(tmp_path: Path) -> None:
    made = build(tmp_path, f"{sys.executable} -c 'import time; time.sleep(1000)'")
    made.start()
    made.wait(0.01)
    assert made.poll()
    assert os.listdir(tmp_path / "cache") == []
