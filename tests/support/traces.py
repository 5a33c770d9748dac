"""Where the public request traces are; tests that need one skip where it is absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.layout import ROOT


def trace_path(name: str) -> Path:
    """The trace file `name` in $TANDEM_TRACES, else in `../shared/traces` beside the checkout; skips without it."""
    folder = Path(os.environ.get("TANDEM_TRACES", ROOT.parent / "shared" / "traces"))
    path = folder / name
    if not path.is_file():
        pytest.skip(f"no trace {name} in {folder}; set TANDEM_TRACES")
    return path
