"""The lease machines in every interleaving within bounds, and machines with a bug, which must not pass.

What is searched and what is audited: `tests/support/lease_model.py` and docs/lease.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from kvtransfer.holder_events import LeaseOutcome
from kvtransfer.reader_events import AbortReason
from tests.support import lease_mutants as mutants
from tests.support.lease_deviations import deviations
from tests.support.lease_model import Found, explore
from tests.support.lease_nodes import DEVIATIONS, Scenario, Script, Violation
from tests.support.lease_world import World
from tests.support.long_tests import only_long

if TYPE_CHECKING:
    from collections.abc import Callable

#: One request of one block, of two blocks in two announcements, and the same with checksums.
ONE = Scenario(1, 1, (Script(0, 1, 1),))
DUEL = Scenario(1, 1, (Script(0, 1, 2, (1,)),))
#: Two blocks that stood before their lease: the offer carries them and the seal.
AT_ONCE = Scenario(1, 1, (Script(0, 1, 2, sealed=True),))
CHECKED = replace(DUEL, checksums=True)
#: The reader has the first of two blocks, which become final one after the other; or both of them.
HALF = Scenario(1, 1, (Script(0, 1, 2, (1,), have=1),), reader_blocks=1)
WHOLE = Scenario(1, 1, (Script(0, 1, 2, (1,), have=2),), reader_blocks=1)
#: It has the first, and the offer carries both.
HALF_AT_ONCE = Scenario(1, 1, (Script(0, 1, 2, sealed=True, have=1),), reader_blocks=1)
#: Sealed before the end of the lease; before the end of what the reader has.
SHORT = Scenario(1, 1, (Script(0, 1, 2, seal_at=1),))
SHORTER = Scenario(1, 1, (Script(0, 1, 2, seal_at=1, have=2),), reader_blocks=1)
#: Two such leases, and room for the rest of one of them.
HALVES = Scenario(2, 1, (Script(0, 2, 2, have=1), Script(1, 2, 2, (1,), have=1)), reader_blocks=1)
#: Two holders and two readers. The first reader has room for one of the two leases that come to it, the first
#: holder for one and a half of its own.
SQUARE = Scenario(2, 2, (Script(0, 2, 2, (1,)), Script(1, 2, 2), Script(0, 3, 1)))
#: Nobody may wait: whoever finds no room is refused and comes again.
CROWDED = Scenario(2, 1, (Script(0, 2, 2), Script(1, 2, 2)), max_waiting=0)


@pytest.fixture(autouse=True)
def coarse_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries far apart: they are harmless, and each is one more state in every path."""
    monkeypatch.setattr("kvtransfer.timers.FIRST_RETRY_S", 2.0)
    monkeypatch.setattr("kvtransfer.timers.LONGEST_RETRY_S", 2.0)


def search(scenario: Scenario, *, max_deviations: int, max_states: int) -> Found:
    found = explore(scenario, max_deviations=max_deviations, max_states=max_states)
    print(
        f"{found.states} states, {found.steps} steps, complete up to {found.complete_deviations} deviations, "
        f"depth {found.depth}, {found.runs_to_rest} runs to rest, ends {sorted(found.ends)}"
    )
    return found


# --- the machines as they are ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "reached"),
    [
        (DUEL, {AbortReason.HOLDER_GONE, AbortReason.PULL_FAILED, LeaseOutcome.WITHDRAWN, LeaseOutcome.EXPIRED}),
        (CHECKED, {AbortReason.HOLDER_GONE, AbortReason.PULL_FAILED, LeaseOutcome.REFUSED}),
        (AT_ONCE, {AbortReason.HOLDER_GONE, AbortReason.PULL_FAILED, LeaseOutcome.WITHDRAWN, LeaseOutcome.EXPIRED}),
        (CROWDED, {LeaseOutcome.EXPIRED}),
        (HALF, {AbortReason.HOLDER_GONE, LeaseOutcome.EXPIRED, LeaseOutcome.REFUSED}),
        (replace(HALF, checksums=True), {AbortReason.PULL_FAILED, LeaseOutcome.WITHDRAWN, LeaseOutcome.REFUSED}),
        (HALF_AT_ONCE, {AbortReason.HOLDER_GONE, AbortReason.PULL_FAILED, LeaseOutcome.WITHDRAWN}),
        (WHOLE, {AbortReason.HOLDER_GONE, LeaseOutcome.EXPIRED, LeaseOutcome.REFUSED}),
        (SHORT, {AbortReason.HOLDER_GONE, AbortReason.PULL_FAILED, LeaseOutcome.WITHDRAWN}),
        (SHORTER, {AbortReason.HOLDER_GONE, LeaseOutcome.EXPIRED, LeaseOutcome.WITHDRAWN}),
        # Offers as late as may be: the reader's lease may outlive the holder's, and no wrong byte is adopted.
        (replace(DUEL, offers_in_time=False), {LeaseOutcome.EXPIRED}),
    ],
    ids=[
        "duel",
        "checked",
        "at once",
        "crowded",
        "half here",
        "half here, checked",
        "half here, at once",
        "all here",
        "sealed early",
        "sealed before what is here",
        "late offers",
    ],
)
def test_every_path_with_one_deviation(scenario: Scenario, reached: set[str]) -> None:
    found = search(scenario, max_deviations=1, max_states=30_000)
    assert found.complete_deviations == 1
    assert found.states > 1_000
    assert found.ends >= {"adopted", LeaseOutcome.RELEASED, *reached}


def test_two_holders_and_two_readers() -> None:
    found = search(SQUARE, max_deviations=1, max_states=5_000)
    assert found.complete_deviations == 0
    assert found.states == 5_000
    assert found.runs_to_rest == 100


@only_long
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("scenario", "max_deviations", "max_states", "complete"),
    [
        (replace(ONE, deviations=DEVIATIONS - {"freeze", "cut"}), 2, 60_000, 2),
        (DUEL, 2, 50_000, 1),
        (CHECKED, 2, 40_000, 1),
        (replace(ONE, offers_in_time=False, deviations=DEVIATIONS - {"freeze", "cut"}), 2, 60_000, 2),
        (AT_ONCE, 2, 40_000, 1),
        (SQUARE, 2, 32_000, 1),
        (replace(HALF, deviations=DEVIATIONS - {"freeze", "cut"}), 2, 60_000, 2),
        (replace(WHOLE, deviations=DEVIATIONS - {"freeze", "cut"}), 2, 60_000, 2),
        (HALVES, 1, 32_000, 1),
    ],
    ids=[
        "one twice",
        "duel twice",
        "checked twice",
        "late offers twice",
        "at once twice",
        "square twice",
        "half here twice",
        "all here twice",
        "two of whom half is here",
    ],
)
def test_deep(scenario: Scenario, max_deviations: int, max_states: int, complete: int) -> None:
    found = search(scenario, max_deviations=max_deviations, max_states=max_states)
    assert found.complete_deviations >= complete


def test_all_kinds_of_deviations_happen() -> None:
    """The search would find nothing if it tried nothing."""
    tried: set[str] = set()
    for scenario in (DUEL, CHECKED):
        world = World(scenario)
        while world.natural() is not None:
            tried |= {name for name, _ in deviations(world)}
    assert tried == DEVIATIONS


# --- machines with a bug --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scenario", "max_deviations", "says"),
    [
        (replace(DUEL, make_reader=mutants.AdoptsWithoutAsking), 1, "never confirmed"),
        (replace(CHECKED, make_reader=mutants.AdoptsCorruptBlocks), 1, "adopted with .*spoilt"),
        (replace(ONE, make_reader=mutants.CountsTheWholeOffer), 1, "ends at .* at its reader"),
        (
            replace(DUEL, make_reader=mutants.CountsFromTheAnswer, deviations=frozenset({"delay"})),
            2,
            "ends at .* at its reader",
        ),
        (replace(ONE, make_reader=mutants.TakesOldLives), 2, "holds leases of lives"),
        (replace(DUEL, make_reader=mutants.TakesRepeatsForNews), 1, "adopted with"),
        (replace(HALF_AT_ONCE, make_reader=mutants.SkipsNothing), 0, "adopted with"),
        (replace(HALF, make_reader=mutants.AdoptsWhatItNeverPulled), 0, "adopted with .*freed"),
        (replace(SHORT, make_reader=mutants.AdoptsPastTheSeal), 0, "adopted with .*freed"),
        (replace(DUEL, make_ledger=mutants.FreesWhilePulling), 1, "not its own"),
        (replace(DUEL, make_ledger=mutants.ForgetsToUnpin), 0, "pins stand for"),
        (replace(DUEL, make_ledger=mutants.HandsOutReserved), 0, "free list"),
        (
            replace(DUEL, make_holder=mutants.ConfirmsEverything, deviations=frozenset({"delay", "withdraw"})),
            2,
            "adopted",
        ),
        (replace(DUEL, make_holder=mutants.UnpinsWhenSealed), 1, "1 sealed"),
        (replace(ONE, make_holder=mutants.AnswersForOtherLives), 2, "answers what was meant for"),
        (replace(CHECKED, make_holder=mutants.UnpinsWhilePreparing), 2, "are read for it"),
        (replace(ONE, make_holder=mutants.EndsTwice), 1, "ended twice"),
        (replace(ONE, make_holder=mutants.WaitsForever), 1, "at rest"),
    ],
    ids=lambda value: _mutant(value) if isinstance(value, Scenario) else "",
)
def test_a_bug_is_found(scenario: Scenario, max_deviations: int, says: str) -> None:
    with pytest.raises(Violation, match=says) as caught:
        explore(scenario, max_deviations=max_deviations, max_states=40_000, rest_every=5)
    assert "<-- here" in str(caught.value) or "at rest" in str(caught.value)


def _mutant(scenario: Scenario) -> str:
    makers: tuple[Callable[..., object], ...] = (scenario.make_reader, scenario.make_ledger, scenario.make_holder)
    return next(maker.__name__ for maker in makers if maker.__module__ == mutants.__name__)
