"""Each fault of a simulated network, on messages and on pulls; that they repeat, combine and end."""

from __future__ import annotations

import asyncio
import statistics
from collections import Counter
from typing import TYPE_CHECKING, TypeVar

import pytest

from contracts.errors import TandemError, WorkerUnavailable
from kvtransfer.memory import PullFate, PullInfo
from rpc.memory import BROKEN_AFTER_S, Fate, Message
from simulator import Program, run
from simulator.faults.network import FaultyNetwork, SoundLink
from simulator.faults.patterns import clog_in_turn, draw_swizzle
from simulator.faults.rules import (
    ANY,
    Between,
    Clog,
    Duplication,
    LatePulls,
    Link,
    Loss,
    Partition,
    Reordering,
    Resets,
    SlowLink,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Coroutine

    from simulator.faults.rules import Rule

T = TypeVar("T")

BASE_S = 0.001
PULL_S = 0.4


def steady(message: Message, rng: random.Random) -> float:
    return BASE_S


def steady_pull(info: PullInfo) -> PullFate:
    return PullFate(duration_s=PULL_S, num_pieces=4)


class Bench:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.network = FaultyNetwork(program, latency_s=steady, fate=steady_pull)
        self._rng = program.rng("network")

    def send(self, source: str = "a", target: str = "b", num_bytes: int = 100) -> Fate:
        message = Message(source=source, target=target, method="test/Echo", kind="request", num_bytes=num_bytes)
        fate = self.network.message_fate(message, self._rng)
        return fate if isinstance(fate, Fate) else Fate(delay_s=fate or 0.0)

    def pull(self, holder: str = "a@1", reader: str = "b@2", num_bytes: int = 100) -> PullFate:
        return self.network.pull_fate(PullInfo(holder=holder, reader=reader, num_bytes=num_bytes))


def on_bench(scenario: Callable[[Bench], Coroutine[None, None, T]], seed: int = 1) -> T:
    async def main(program: Program) -> T:
        return await scenario(Bench(program))

    return run(main, seed=seed)


def test_without_rules_everything_is_as_the_sound_network_says() -> None:
    async def scenario(bench: Bench) -> None:
        assert bench.send() == Fate(delay_s=BASE_S)
        fate = bench.pull()
        assert (fate.duration_s, fate.error, fate.heeds_stop) == (PULL_S, None, True)
        assert fate.obstacle is not None
        assert fate.obstacle() is None

    on_bench(scenario)


def test_what_the_sound_network_loses_or_fails_stays_so() -> None:
    async def main(program: Program) -> None:
        cut = PullFate(duration_s=1.0, error=WorkerUnavailable("cut"))
        network = FaultyNetwork(program, latency_s=lambda message, rng: None, fate=lambda info: cut)
        network.add(SlowLink(Link(ANY, ANY), bytes_per_s=1.0))
        message = Message(source="a", target="b", method="test/Echo", kind="reply", num_bytes=100)
        assert network.message_fate(message, program.rng("network")) is None
        assert network.pull_fate(PullInfo(holder="a", reader="b", num_bytes=100)) == cut

    run(main, seed=1)


@pytest.mark.parametrize(
    ("scope", "hit"),
    [
        (Link("a", "b"), {"ab"}),
        (Between("a", "b"), {"ab", "ba"}),
        (Link("a", ANY), {"ab", "ac"}),
        (Between("a", ANY), {"ab", "ba", "ac", "ca"}),
        (Link(ANY, ANY), {"ab", "ba", "ac", "ca", "bc", "cb"}),
    ],
)
def test_a_rule_is_about_its_scope_and_never_about_one_host_alone(scope: Link | Between, hit: set[str]) -> None:
    async def scenario(bench: Bench) -> set[str]:
        bench.network.add(Partition(scope))
        pairs = [(source, target) for source in "abc" for target in "abc"]
        return {source + target for source, target in pairs if bench.send(source, target).outcome == "lost"}

    assert on_bench(scenario) == hit


def test_a_partition_lasts_until_it_is_removed_and_stops_pulls_for_both_directions() -> None:
    async def scenario(bench: Bench) -> None:
        oneway = Partition(Link("b", "a"))
        before, elsewhere = bench.pull(), bench.pull("a@1", "c@1")
        bench.network.add(oneway)
        assert bench.send("b", "a").outcome == "lost"
        assert bench.send("a", "b").outcome == "arrives"
        for fate in (before, bench.pull()):
            assert fate.obstacle is not None
            assert isinstance(fate.obstacle(), float)
        assert elsewhere.obstacle is not None
        assert elsewhere.obstacle() is None
        bench.network.remove(oneway)
        assert bench.send("b", "a").outcome == "arrives"
        assert before.obstacle is not None
        assert before.obstacle() is None

    on_bench(scenario)


def test_a_pull_bears_a_short_interruption_again_and_again_and_no_long_one() -> None:
    async def scenario(bench: Bench) -> None:
        obstacle = bench.pull().obstacle
        assert obstacle is not None
        partition = Partition(Link("a", "b"))

        def waits_s(at_most_s: float) -> float:
            waited_s = 0.0
            while waited_s < at_most_s and isinstance(step_s := obstacle(), float):
                waited_s += step_s
            return waited_s

        for _ in range(3):
            bench.network.add(partition)
            assert waits_s(BROKEN_AFTER_S - 0.15) == pytest.approx(BROKEN_AFTER_S - 0.1)
            bench.network.remove(partition)
            assert obstacle() is None
        bench.network.add(partition)
        assert waits_s(100.0) == pytest.approx(BROKEN_AFTER_S, abs=0.11)
        assert isinstance(obstacle(), WorkerUnavailable)

    on_bench(scenario)


def test_a_slow_link_lets_one_byte_after_the_other_through() -> None:
    async def scenario(bench: Bench) -> None:
        bench.network.add(SlowLink(Link(ANY, "b"), bytes_per_s=1000.0, added_s=0.1))
        assert bench.send(num_bytes=500).delay_s == pytest.approx(BASE_S + 0.6)
        # A small one waits for the big one before it; another link, and pulls, do not.
        assert bench.send(num_bytes=1).delay_s == pytest.approx(BASE_S + 0.601)
        assert bench.send(source="c", num_bytes=1).delay_s == pytest.approx(BASE_S + 0.101)
        assert bench.pull(num_bytes=2000).duration_s == pytest.approx(PULL_S + 2.1)
        assert bench.pull(num_bytes=1000).duration_s == pytest.approx(PULL_S + 3.1)
        assert bench.send("b", "a", num_bytes=5000).delay_s == BASE_S
        await asyncio.sleep(0.401)
        assert bench.send(num_bytes=100).delay_s == pytest.approx(BASE_S + 0.3)

    on_bench(scenario)


@pytest.mark.parametrize(("rule", "outcome"), [(Loss, "lost"), (Resets, "reset")])
def test_chances_are_what_was_asked_for(rule: Callable[[Link, float], Rule], outcome: str) -> None:
    async def scenario(bench: Bench) -> None:
        bench.network.add(rule(Link("a", "b"), 0.2))
        counts: Counter[str] = Counter(bench.send().outcome for _ in range(2000))
        assert counts.keys() == {"arrives", outcome}
        assert counts[outcome] == pytest.approx(400, abs=80)
        errors = [fate for fate in (bench.pull() for _ in range(2000)) if fate.error is not None]
        assert len(errors) == pytest.approx(400, abs=80)
        assert {fate.num_landed for fate in errors} == {0, 1, 2, 3}
        noticed_s = BROKEN_AFTER_S if outcome == "lost" else 0.0
        assert all(noticed_s <= fate.duration_s <= noticed_s + PULL_S for fate in errors)

    on_bench(scenario)


def test_duplication_repeats_messages_and_reordering_and_lateness_delay() -> None:
    async def scenario(bench: Bench) -> None:
        network = bench.network
        network.add(Duplication(Link("a", "b"), 0.5, within_s=2.0))
        repeats_s = [fate.repeat_after_s for fate in (bench.send() for _ in range(400)) if fate.repeat_after_s]
        assert len(repeats_s) == pytest.approx(200, abs=50)
        assert max(repeats_s) == pytest.approx(2.0, abs=0.1)
        network.heal()

        network.add(Reordering(Link("a", "b"), 0.5, within_s=2.0))
        delays_s = [bench.send().delay_s for _ in range(400)]
        assert delays_s.count(BASE_S) == pytest.approx(200, abs=50)
        assert max(delays_s) == pytest.approx(2.0, abs=0.1)
        assert bench.pull().heeds_stop
        network.heal()

        network.add(LatePulls(Link("a", "b"), 0.5, within_s=2.0))
        pulls = [bench.pull() for _ in range(400)]
        assert sum(not fate.heeds_stop for fate in pulls) == pytest.approx(200, abs=50)
        assert all(fate.heeds_stop == (fate.duration_s == PULL_S) for fate in pulls)
        assert bench.send() == Fate(delay_s=BASE_S)

    on_bench(scenario)


def test_a_clogged_host_holds_messages_back_and_breaks_what_would_wait_too_long() -> None:
    async def scenario(bench: Bench) -> None:
        network = bench.network
        network.clog("b", 5.0)
        assert bench.send("a", "b").outcome == "lost"
        obstacle = bench.pull("b@1", "a@1").obstacle
        assert obstacle is not None
        assert isinstance(obstacle(), float)
        await asyncio.sleep(3.0)
        assert bench.send("a", "b").delay_s == bench.send("b", "a").delay_s == pytest.approx(2.0)
        assert bench.send("a", "c").delay_s == BASE_S
        # Between two clogged hosts it waits for the later, not for both in turn.
        network.clog("a", 1.0)
        assert bench.send("a", "b").delay_s == pytest.approx(2.0)
        await asyncio.sleep(1.9995)
        assert bench.send("a", "b").delay_s == BASE_S, "it arrives when the clog is over"
        await asyncio.sleep(0.0005)
        assert bench.send("a", "b").delay_s == BASE_S
        assert obstacle() is None
        assert network.describe() == []

    on_bench(scenario)


def test_a_clog_can_be_removed_before_its_time() -> None:
    async def scenario(bench: Bench) -> None:
        clog = bench.network.clog("b", 2.0)
        await asyncio.sleep(0.5)
        bench.network.remove(clog)
        assert bench.send().delay_s == BASE_S
        await asyncio.sleep(5.0)

    on_bench(scenario)


def test_rules_combine() -> None:
    async def scenario(bench: Bench) -> None:
        bench.network.add(SlowLink(Link("a", "b"), bytes_per_s=1000.0))
        bench.network.add(Duplication(Link("a", ANY), 1.0, within_s=0.0))
        bench.network.clog("b", 2.0)
        fate = bench.send(num_bytes=500)
        assert (fate.outcome, fate.repeat_after_s) == ("arrives", 0.0)
        assert fate.delay_s == pytest.approx(2.0)
        assert bench.send(num_bytes=2000).delay_s == pytest.approx(BASE_S + 2.5), "the link's queue is the longer wait"
        bench.network.add(Partition(Link("a", "b")))
        assert bench.send().outcome == "lost"

    on_bench(scenario)


def test_one_rule_more_changes_nothing_about_the_draws_of_another() -> None:
    async def scenario(bench: Bench, others: bool) -> list[str]:
        loss = Loss(Link("a", "b"), 0.3)
        if others:
            bench.network.add(Resets(Link("c", "b"), 0.5))
        bench.network.add(loss)
        if others:
            bench.network.add(Reordering(Link("a", "b"), 0.5, within_s=1.0))
            bench.send("c", "b")
        return [bench.send().outcome for _ in range(200)]

    alone = on_bench(lambda bench: scenario(bench, others=False))
    assert alone == on_bench(lambda bench: scenario(bench, others=True))
    assert alone != on_bench(lambda bench: scenario(bench, others=False), seed=2)


def test_the_same_rule_a_second_time_draws_anew() -> None:
    async def scenario(bench: Bench) -> None:
        drawn: list[list[str]] = []
        for _ in range(2):
            bench.network.add(Loss(Link("a", "b"), 0.5))
            drawn.append([bench.send().outcome for _ in range(100)])
            bench.network.heal()
        assert drawn[0] != drawn[1]

    on_bench(scenario)


def test_active_rules_and_changes_can_be_read() -> None:
    async def scenario(bench: Bench) -> None:
        network = bench.network
        rules: list[Rule] = [
            Partition(Between("a", ANY)),
            SlowLink(Link("a", "b"), bytes_per_s=2e6, added_s=0.005),
            Loss(Link(ANY, ANY), 0.02),
            Resets(Link("a", "b"), 0.5),
            Duplication(Link("a", "b"), 0.1, within_s=0.2),
            Reordering(Link("a", "b"), 0.1, within_s=0.2),
            LatePulls(Link("a", "b"), 0.1, within_s=7.0),
            Clog(Between("b", ANY), until_s=12.5),
        ]
        for rule in rules:
            network.add(rule)
        assert network.describe() == [
            "a <-> *: partitioned",
            "a -> b: slow: 2 MB/s and 5 ms more",
            "* -> *: loses 2 %",
            "a -> b: resets 50 %",
            "a -> b: repeats 10 % within 200 ms",
            "a -> b: delays 10 % up to 200 ms",
            "a -> b: 10 % of pulls deaf and up to 7000 ms late",
            "b <-> *: clogged until 12.500000",
        ]
        await asyncio.sleep(1.5)
        network.remove(rules[0])
        network.remove(rules[0])
        assert [line.split(maxsplit=2) for line in bench.program.trace.tail().splitlines()[-2:]] == [
            ["0.000000000", "network", "b <-> *: clogged until 12.500000"],
            ["1.500000000", "network", "over: a <-> *: partitioned"],
        ]

    on_bench(scenario)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Loss(Link("a", "b"), 1.5),
        lambda: Resets(Link("a", "b"), -0.1),
        lambda: Duplication(Link("a", "b"), float("nan"), within_s=1.0),
        lambda: Reordering(Link("a", "b"), 0.5, within_s=-1.0),
        lambda: LatePulls(Link("a", "b"), 0.5, within_s=float("inf")),
        lambda: SlowLink(Link("a", "b"), bytes_per_s=0.0),
    ],
)
def test_impossible_rules_are_refused(make: Callable[[], Rule]) -> None:
    with pytest.raises(ValueError, match=r"chance|within_s|slow link"):
        make()


def test_a_sound_link_has_a_heavy_tail_with_an_end() -> None:
    async def main(program: Program) -> None:
        link, rng = SoundLink(), program.rng("network")
        message = Message(source="a", target="b", method="test/Echo", kind="reply", num_bytes=100)
        delays_s = [link.message_delay_s(message, rng) for _ in range(5000)]
        assert statistics.median(delays_s) == pytest.approx(link.median_s, rel=0.1)
        assert statistics.quantiles(delays_s, n=100)[98] == pytest.approx(4 * link.median_s, rel=0.2)
        assert max(delays_s) <= link.longest_s
        fate = link.pull_fate(PullInfo(holder="a", reader="b", num_bytes=4_000_000_000))
        assert fate.duration_s == pytest.approx(1.0, rel=0.01)
        assert fate.num_pieces == link.pull_pieces

    run(main, seed=1)


@pytest.mark.parametrize("seed", range(10))
def test_swizzle_clogging_stops_hosts_one_by_one_and_frees_them_in_another_order(seed: int) -> None:
    async def scenario(bench: Bench) -> tuple[list[str], list[str]]:
        network = bench.network
        await clog_in_turn(network, draw_swizzle(bench.program.rng("swizzle"), ["a", "b", "c", "d"], over_s=2.0))
        assert network.describe() == []
        lines = [line.split() for line in bench.program.trace.tail().splitlines()]
        clogged = [(float(words[0]), words[2]) for words in lines if words[2] != "over:"]
        freed = [(float(words[0]), words[3]) for words in lines if words[2] == "over:"]
        assert all(time_s <= 2.0 for time_s, _ in clogged)
        assert all(2.0 <= time_s <= 4.0 for time_s, _ in freed)
        return [host for _, host in clogged], [host for _, host in freed]

    clogged, freed = on_bench(scenario, seed)
    assert sorted(clogged) == sorted(freed)
    assert len(set(clogged)) == len(clogged) >= 1


def test_swizzle_clogging_frees_in_orders_of_its_own() -> None:
    async def scenario(bench: Bench) -> bool:
        await clog_in_turn(bench.network, draw_swizzle(bench.program.rng("swizzle"), ["a", "b", "c", "d"], over_s=2.0))
        lines = [line.split() for line in bench.program.trace.tail().splitlines()]
        return [words[2] for words in lines if words[2] != "over:"] == [w[3] for w in lines if w[2] == "over:"]

    same_order = [on_bench(scenario, seed) for seed in range(20)]
    assert True in same_order
    assert False in same_order


def test_the_obstacle_s_error_is_typed() -> None:
    async def scenario(bench: Bench) -> TandemError | None:
        bench.network.add(Resets(Link("a", "b"), 1.0))
        return bench.pull().error

    error = on_bench(scenario)
    assert isinstance(error, WorkerUnavailable)
    assert "pull from a@1" in error.message
