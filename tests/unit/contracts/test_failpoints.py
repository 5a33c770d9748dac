"""Failpoints and rare paths: nothing happens unarmed, and an armed run is a function of its seed."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from importlib import import_module
from typing import TYPE_CHECKING

import pytest

from contracts import failpoints
from contracts.failpoints import Failpoint, Failpoints, RarePath, armed, never_reached
from simulator import Program, run
from tests.support.layout import ROOT, source_files

if TYPE_CHECKING:
    from collections.abc import Iterator


#: Before any test replaces the books: what is imported later would be written into those of the test.
import_module("simulator.cluster")


@pytest.fixture(autouse=True)
def _no_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test makes is forgotten after it; production's names are not seen."""
    monkeypatch.setattr(failpoints, "FAILPOINTS", {})
    monkeypatch.setattr(failpoints, "RARE_PATHS", {})
    yield
    with armed(Failpoints(random.Random(0), {})):
        pass  # no test leaves anything armed


def chances(**by_name: float) -> Failpoints:
    return Failpoints(random.Random(7), {f"room.{name}": chance for name, chance in by_name.items()})


def test_nothing_fires_and_nothing_is_counted_unarmed() -> None:
    point, path = Failpoint("room.refuses", "says no"), RarePath("room.waited", "had to wait")
    assert not any(point.fires() for _ in range(100))
    path.reached()
    with armed(chances()) as armed_now:
        assert armed_now.counts == Counter()
    assert not point.fires()


def test_only_what_has_a_chance_fires_and_all_is_counted() -> None:
    always, never, other = (Failpoint(f"room.{name}", "") for name in ("always", "never", "other"))
    path = RarePath("room.waited", "")
    with armed(chances(always=1.0, never=0.0)) as armed_now:
        fired = [point.fires() for _ in range(3) for point in (always, never, other)]
        path.reached()
        path.reached()
    assert fired == [True, False, False] * 3
    assert armed_now.counts == {"room.always": 3, "room.waited": 2}


def test_a_point_fires_about_as_often_as_its_chance_says() -> None:
    point = Failpoint("room.refuses", "")
    with armed(chances(refuses=0.3)):
        fired = sum(point.fires() for _ in range(10_000))
    assert 2_850 < fired < 3_150


def test_a_seed_fires_at_the_same_places_and_another_one_elsewhere() -> None:
    first, second = Failpoint("room.first", ""), Failpoint("room.second", "")

    def firings(seed: int) -> list[bool]:
        with armed(Failpoints(random.Random(seed), {"room.first": 0.5, "room.second": 0.1})):
            return [point.fires() for _ in range(100) for point in (first, second)]

    assert firings(1) == firings(1)
    assert firings(1) != firings(2)


def test_a_point_that_is_not_armed_does_not_move_the_others() -> None:
    """What a new failpoint in the code draws must not change a run that does not arm it."""
    known, new = Failpoint("room.known", ""), Failpoint("room.new", "")

    def firings(*points: Failpoint) -> list[bool]:
        with armed(chances(known=0.5)):
            fired = [[point.fires() for point in points] for _ in range(100)]
        return [of_known for of_known, *_ in fired]

    assert firings(known) == firings(known, new)


def test_a_delay_is_as_long_as_it_says_and_none_unarmed() -> None:
    point = Failpoint("room.late", "")

    async def waits(longest_s: float, times: int) -> list[float]:
        loop = asyncio.get_running_loop()
        waited_s: list[float] = []
        for _ in range(times):
            begun_s = loop.time()
            await point.delay(longest_s)
            waited_s.append(loop.time() - begun_s)
        return waited_s

    async def main(program: Program) -> None:
        assert await waits(2.0, 5) == [0.0] * 5
        with armed(chances(late=1.0)):
            waited_s = await waits(2.0, 200)
        assert all(0.0 <= each <= 2.0 for each in waited_s)
        assert max(waited_s) > 1.9
        assert len(set(waited_s)) == 200

    run(main, seed=1)


@pytest.mark.parametrize(
    ("name", "chance", "message"),
    [
        ("room.refusez", 0.5, "no failpoint is named 'room.refusez'; there are room.refuses"),
        ("room.waited", 0.5, "no failpoint is named 'room.waited'"),
        ("room.refuses", 1.5, r"the chance of room.refuses must be in \[0, 1\], not 1.5"),
        ("room.refuses", -0.1, r"must be in \[0, 1\], not -0.1"),
        ("room.refuses", float("nan"), r"must be in \[0, 1\], not nan"),
    ],
)
def test_unknown_names_and_what_is_no_chance_are_refused(name: str, chance: float, message: str) -> None:
    Failpoint("room.refuses", "")
    RarePath("room.waited", "")
    with pytest.raises(ValueError, match=message):
        Failpoints(random.Random(0), {name: chance})


@pytest.mark.parametrize("first", [Failpoint, RarePath])
@pytest.mark.parametrize("second", [Failpoint, RarePath])
def test_a_name_is_given_once(first: type[Failpoint | RarePath], second: type[Failpoint | RarePath]) -> None:
    first("room.same", "")
    with pytest.raises(ValueError, match=r"two failpoints or rare paths are named room\.same"):
        second("room.same", "")


def test_arming_twice_is_refused_and_an_error_disarms() -> None:
    point = Failpoint("room.refuses", "")
    with (
        armed(chances(refuses=1.0)),
        pytest.raises(RuntimeError, match="armed already"),
        armed(chances(refuses=1.0)),
    ):
        pytest.fail("armed twice")
    with pytest.raises(KeyError), armed(chances(refuses=1.0)):
        raise KeyError
    assert not point.fires()


def test_what_was_never_reached_is_named() -> None:
    Failpoint("room.refuses", "")
    RarePath("room.waited", "")
    RarePath("room.asked", "")
    assert never_reached(Counter({"room.waited": 1})) == ["room.asked", "room.refuses"]
    assert never_reached(Counter({"room.waited": 1}), ["room.waited", "other"]) == ["other"]


@pytest.mark.parametrize("room", ["coordinator", "decode", "gateway", "kvtransfer", "prefill", "worker"])
def test_names_of_production_begin_with_their_room(room: str) -> None:
    files = [path for path in source_files(room) if "contracts.failpoints import" in path.read_text()]
    modules = [import_module(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in files]
    made = [each for module in modules for each in vars(module).values() if isinstance(each, Failpoint | RarePath)]
    assert made
    assert [each for each in made if not each.name.startswith(f"{room}.") or not each.meaning] == []
