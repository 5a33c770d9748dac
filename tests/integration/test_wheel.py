"""What is installed from a wheel, away from the checkout, is whole."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from hatchling.build import build_wheel

from tests.support.layout import ROOT

if TYPE_CHECKING:
    import pytest


def test_named_workloads_are_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with zipfile.ZipFile(tmp_path / build_wheel(str(tmp_path))) as wheel:
        wheel.extractall(tmp_path / "site")
    program = (
        "import workload.named as named; from workload.flags import WorkloadFlags; "
        "from workload.traffic import build_traffic; "
        "print(named.__file__, *named.workload_names(), build_traffic(WorkloadFlags(workload='chat')).text)"
    )
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    file, *rest = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    names = sorted(path.stem for path in (ROOT / "configs" / "workloads").glob("*.yaml"))
    assert rest[: len(names)] == names
    assert done.stdout.split(" ", 1 + len(names))[-1].startswith("chat: drawn chats: 1,000 requests")
