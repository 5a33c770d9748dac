"""Whole clusters under drawn faults: everything holds in every trial, and every rare path is really reached.

`make chaos SEEDS=100000` plays more. A failure names its seed and the command that repeats it, line for line.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from simulator import run
from simulator.chaos import draw, try_seed
from simulator.chaos.campaign import explain, run_campaign
from tests.support.layout import ROOT
from tests.support.long_tests import only_long
from tests.unit.simulator import small_program

NUM_SEEDS = 200


@pytest.mark.timeout(400)
def test_everything_holds_and_every_rare_path_is_reached() -> None:
    campaign = asyncio.run(run_campaign(1, NUM_SEEDS, num_processes=os.cpu_count() or 1))
    assert campaign.held, "\n\n".join([*campaign.broken, *map(explain, campaign.failures)])
    assert campaign.num_trials == NUM_SEEDS
    assert campaign.outcomes["finished"] > campaign.outcomes.total() / 2, campaign.outcomes
    assert campaign.never_reached() == [], "these were never reached: the trials are too tame, or they are dead code"


SEED = 3


def test_a_trial_repeats_exactly_and_another_seed_differs() -> None:
    first = try_seed(SEED)
    assert try_seed(SEED) == first
    assert try_seed(SEED + 1).digest != first.digest


@pytest.mark.parametrize("environment", [{"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2", "PYTHONMALLOC": "malloc"}])
def test_a_trial_is_the_same_in_another_process(environment: dict[str, str]) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "simulator.chaos", "--seed", str(SEED)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert f"digest {try_seed(SEED).digest}," in finished.stdout


@only_long
def test_a_trial_is_the_same_as_the_hundredth_run_of_its_process() -> None:
    first = try_seed(SEED).digest
    kept: list[object] = []
    for number in range(98):
        # Something stays behind each time, so that addresses differ from run to run.
        kept.append([object() for _ in range(number * 7)])
        if number % 10:
            run(small_program.main, seed=1000 + number)
        else:
            try_seed(1000 + number)
    assert try_seed(SEED).digest == first


def test_drawing_is_pure() -> None:
    assert draw(SEED) == draw(SEED)
    assert draw(SEED) != draw(SEED + 1)
