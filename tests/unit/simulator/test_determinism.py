"""One seed gives one trace, wherever and after whatever it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulator import run
from tests.unit.simulator.small_program import main

ROOT = Path(__file__).parents[3]

SEED = 20


@pytest.fixture(scope="module")
def digest_here() -> str:
    return run(main, seed=SEED)


@pytest.mark.parametrize("environment", [{"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2", "PYTHONMALLOC": "malloc"}])
def test_alone_in_another_process(digest_here: str, environment: dict[str, str]) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "tests.unit.simulator.small_program", str(SEED)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert finished.stdout.strip() == digest_here


def test_as_the_hundredth_run_of_a_process(digest_here: str) -> None:
    kept: list[object] = []
    others: set[str] = set()
    for number in range(98):
        # Something stays behind each time, so that addresses differ from run to run.
        kept.append([object() for _ in range(number * 7)])
        others.add(run(main, seed=1000 + number))
    assert run(main, seed=SEED) == digest_here
    assert len(others) == 98, "each other seed gives another trace"
    assert digest_here not in others
