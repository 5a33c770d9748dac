"""Where the public request traces are; tests that need one skip where it is absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.layout import ROOT


def trace_path(name: str) -> Path:
    """The trace file `name` in $TRACES_FOLDER, else in `../shared/traces` beside the checkout; skips without it."""
    folder = Path(os.environ.get("TRACES_FOLDER", ROOT.parent / "shared" / "traces"))
    path = folder / name
    if not path.is_file():
        pytest.skip(f"no trace {name} in {folder}; set TRACES_FOLDER")
    return path
