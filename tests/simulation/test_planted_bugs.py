"""The trials find classic bugs: each is planted in the production classes, and shows within a number of seeds.

`python -m tests.support.planted_bugs --bug NAME` tells what it looks like.
"""

from __future__ import annotations

import pytest

from simulator.chaos import try_seed
from tests.support.long_tests import only_long
from tests.support.planted_bugs import BUGS, find, planted, shows

#: Within how many seeds, from the first one on, each is found. What is drawn may change: most are found in far fewer.
FOUND_WITHIN = {
    "skip-generation-check": 120,
    "free-without-quarantine": 60,
    "forget-to-free-on-cancel": 30,
    "commit-twice": 30,
    "reuse-lease-id": 80,
    "lose-heartbeat-timer": 10,
    "announce-block-being-written": 10,
    "name-what-is-scheduled": 30,
    "wait-while-holding": 60,
    "name-before-it-is-read": 40,
    "skip-one-too-many": 30,
    "keep-by-block-id": 40,
    "count-no-starts": 120,
    "forget-who-asked": 60,
}

#: It takes a quarter of a minute until they are.
FOUND_LATE = {"skip-generation-check", "wait-while-holding"}

#: Told where it is done, whether or not anything comes of it in that trial: its log may be that of the sound one.
SEEN_AT_ONCE = {"name-before-it-is-read"}


def test_every_bug_has_a_bound() -> None:
    assert FOUND_WITHIN.keys() == BUGS.keys()


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, marks=only_long) if bug in FOUND_LATE else bug for bug in FOUND_WITHIN]
)
def test_the_bug_is_found_and_the_same_seed_holds_without_it(bug: str) -> None:
    found = find(bug, range(1, FOUND_WITHIN[bug] + 1))
    assert found is not None, f"{bug} goes unnoticed in {FOUND_WITHIN[bug]} seeds: the trials are too tame"
    sound = try_seed(found.seed)
    assert sound.problems == ()
    assert sound.digest != found.digest or bug in SEEN_AT_ONCE


def test_a_planted_bug_is_gone_afterwards() -> None:
    bug = BUGS["wait-while-holding"]
    sound = getattr(bug.module, bug.attribute)
    with planted("wait-while-holding"):
        assert getattr(bug.module, bug.attribute) is bug.instead
    assert getattr(bug.module, bug.attribute) is sound


def test_no_bug_shows_where_none_is_planted() -> None:
    verdict = try_seed(1)
    assert [name for name in BUGS if shows(name, verdict)] == []
