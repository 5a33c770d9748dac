"""Faults around the coordinator, every process of the cluster by itself: worker and coordinator killed, the coordinator
frozen, ways between any two lost in both directions or one. Streams go on token by token as at peace, new requests are
served, prefixes are found again.

Every answer is compared with that of the cluster at peace, which the reference has checked.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from benchmarks.chaos_client import End
from benchmarks.chaos_reference import Auditor, Reference
from tests.support.chaos_asking import Streams, prompt, question, stopped, until, until_audit
from tests.support.chaos_part import PROGRAM
from tests.support.chaos_processes import scattered
from tests.support.chaos_worker import FOLDER, Brake
from tests.support.choices import Choice, checked_choices, each_alone, same_logprobs
from tests.support.layout import ROOT
from tests.support.long_tests import LONG, only_long
from tests.support.netns import NotPermitted
from tests.support.sites import both_ways, lost, whole_group
from tests.support.split_cluster import BLUE, CONFIG, RED, SplitCluster, places, until_directory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import httpx

    from benchmarks.chaos_client import Question, Try
    from tests.support.chaos_asking import Asker
    from tests.support.sites import Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

#: From a loss to the next token, from asking to the first: hangs are noticed after 3 s, the rest is a loaded machine.
GAP_S = 15.0
#: Longer than what makes a worker count as dead.
SILENCE_S = 3.6
BLOCK_TOKENS = 16


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SplitCluster]:
    auditor = Auditor(Reference(ROOT / "engine" / "demo"))
    with ExitStack() as stack:
        try:
            found = places(stack)
        except NotPermitted:
            found = {}
        folder = tmp_path_factory.mktemp("brakes")
        stack.enter_context(mock.patch.dict(os.environ, {FOLDER: str(folder)}))
        processes = stack.enter_context(scattered(CONFIG, tmp_path_factory.mktemp("split"), PROGRAM))
        yield SplitCluster(processes, found, stack, auditor, Brake(folder))
        assert "Traceback" not in processes.output()


def site(cluster: SplitCluster, name: str) -> Site:
    if not cluster.sites:
        pytest.skip("no network namespaces here")
    return cluster.sites[name]


def longest_gap_s(records: Sequence[Try]) -> float:
    return max(ended_s - began_s for began_s, ended_s in (record.longest_gap for record in records))


async def served_at_once(asker: Asker, questions: Sequence[Question]) -> float:
    """Each is answered at the first try; the longest time without a token, in seconds."""
    records = await asyncio.gather(*(asker.attempt(each) for each in questions))
    assert [(record.end, record.error) for record in records] == [(End.WHOLE, None)] * len(questions)
    gap_s = longest_gap_s(records)
    assert gap_s < GAP_S
    return gap_s


class Visitors:
    """Clients that ask one thing after the other: whatever happens, nobody may be refused or wait."""

    def __init__(self, asker: Asker, questions: Sequence[Question], tasks: asyncio.TaskGroup) -> None:
        self._asker = asker
        self._wanted = True
        self.num_served = 0
        self.gap_s = 0.0
        for each in questions:
            tasks.create_task(self._visit(each))

    async def _visit(self, asked: Question) -> None:
        while self._wanted:
            self.gap_s = max(self.gap_s, await served_at_once(self._asker, [asked]))
            self.num_served += 1

    async def serve(self, num_more: int) -> None:
        """Returns once so many more have been served."""
        aim = self.num_served + num_more
        await until(lambda: self.num_served >= aim, f"{num_more} more are served")

    def leave(self) -> None:
        self._wanted = False


# --- row 1 and 2: a decode worker that dies ----------------------------------------------------------------


async def test_a_killed_decode_worker_costs_no_token(
    cluster: SplitCluster, record_property: Callable[[str, object], None]
) -> None:
    """Greedy, sampled, several answers to one request, log probabilities: all go on as they would have."""
    questions = [question(number, 24, 150, sampled=number % 2 == 1) for number in range(6)]
    several = [question(10 + number, 40, 150, sampled=number == 0) for number in range(2)]
    async with cluster.asker() as asker:
        await asker.learn(*questions, *(alone for asked in several for alone in each_alone(asked, 2)))
        peace = [await checked_choices(asker, asked, 2) for asked in several]
        assert all(choice.record.end is End.WHOLE for choices in peace for choice in choices)
        begun: list[Choice] = []
        cluster.slow_decoding()
        async with asyncio.TaskGroup() as tasks:
            streams = Streams(asker, questions, tasks)
            choosers = [tasks.create_task(checked_choices(asker, asked, 2, begun.extend)) for asked in several]
            await streams.all_writing()
            await until(
                lambda: len(begun) == 4 and all(len(choice.record.token_ids) >= 3 for choice in begun),
                "every choice is being written",
            )
            victim = await cluster.busiest("decode")
            cluster.workers[victim].kill()
            results = await streams.results()
            chosen = [await chooser for chooser in choosers]
        records = [*results, *(choice.record for choices in chosen for choice in choices)]
        assert [record.end for record in records] == [End.WHOLE] * len(records)
        assert sum(record.replays for record in results) > 0
        assert all(
            same_logprobs(ours, right)
            for choices, rights in zip(chosen, peace, strict=True)
            for ours, right in zip(choices, rights, strict=True)
        )
        gap_s = longest_gap_s(records)
        record_property("longest_gap_s", round(gap_s, 2))
        assert gap_s < GAP_S
        await asyncio.to_thread(cluster.revive)


# --- row 10: a coordinator that dies, hangs, or cannot write --------------------------------------------------


async def test_a_killed_coordinator_is_not_missed(
    cluster: SplitCluster, record_property: Callable[[str, object], None]
) -> None:
    """New requests go by what the gateway knows; the next coordinator learns of all workers and of their prefixes."""
    known = [question(20 + number, 20 * BLOCK_TOKENS, 4) for number in range(6)]
    streamed = [question(30 + number, 24, 350, sampled=number == 1) for number in range(3)]
    fresh = [question(40 + number, 40, 12) for number in range(3)]
    async with cluster.asker() as asker:
        await asker.learn(*streamed, *fresh)
        for each in known:
            await asker.learn(each)
        await until_directory(cluster, 20 * len(known))
        cluster.slow_decoding()
        async with asyncio.TaskGroup() as tasks:
            streams = Streams(asker, streamed, tasks)
            await streams.all_writing()
            visitors = Visitors(asker, fresh, tasks)
            cluster.coordinator.kill()
            await visitors.serve(12)
            assert await cluster.members() is None
            killed_s = time.monotonic()
            await asyncio.to_thread(cluster.restart_coordinator)
            record_property("coordinator_start_s", round(time.monotonic() - killed_s, 2))
            up_s = time.monotonic()
            # What was known besides these may have been evicted meanwhile.
            await until_directory(cluster, 20 * len(known))
            record_property("directory_back_s", round(time.monotonic() - up_s, 2))
            await visitors.serve(6)
            visitors.leave()
            results = await streams.results()
        record_property("longest_wait_of_new_ones_s", round(visitors.gap_s, 2))
        assert [(record.end, record.replays) for record in results] == [(End.WHOLE, 0)] * len(streamed)
        await cluster.until_calm()
        # One of two workers has each, and only who knows which finds all of them.
        for each in known:
            record = await asker.attempt(each)
            assert cached_tokens(record) >= 19 * BLOCK_TOKENS, each.name


async def test_a_frozen_coordinator_is_not_missed(
    cluster: SplitCluster, record_property: Callable[[str, object], None]
) -> None:
    streamed = [question(50 + number, 24, 350, sampled=number == 1) for number in range(3)]
    fresh = [question(60 + number, 40, 12) for number in range(3)]
    async with cluster.asker() as asker:
        await asker.learn(*streamed, *fresh)
        cluster.slow_decoding()
        async with asyncio.TaskGroup() as tasks:
            streams = Streams(asker, streamed, tasks)
            await streams.all_writing()
            visitors = Visitors(asker, fresh, tasks)
            with stopped(cluster.coordinator.process.pid):
                # Long enough for every worker to look dead when it wakes.
                await asyncio.sleep(SILENCE_S)
                await visitors.serve(6)
            await visitors.serve(12)
            await until_up(cluster, list(cluster.workers))
            await visitors.serve(6)
            visitors.leave()
            results = await streams.results()
        record_property("longest_wait_of_new_ones_s", round(visitors.gap_s, 2))
        assert [(record.end, record.replays) for record in results] == [(End.WHOLE, 0)] * len(streamed)


async def test_a_full_disk_under_the_decision_log_stops_nothing(cluster: SplitCluster) -> None:
    asked = [question(70 + number, 40, 12) for number in range(6)]
    await asyncio.to_thread(cluster.restart_coordinator, {"coordinator.decision_log": "/dev/full"})
    async with cluster.asker() as asker:
        await asker.learn(*asked)
        await served_at_once(asker, asked)
        said = cluster.coordinator.output.read_text().lower()
        assert "no space left" in said, said
        # Said once or now and then, not for every decision.
        assert said.count("no space left") < len(asked)
    await asyncio.to_thread(cluster.restart_coordinator)
    await cluster.until_calm()


# --- row 11: ways that are lost -----------------------------------------------------------------------------


async def test_a_flapping_way_between_gateway_and_coordinator(
    cluster: SplitCluster, record_property: Callable[[str, object], None]
) -> None:
    ways = both_ways(site(cluster, "gateway"), site(cluster, "coordinator"))
    await flap(cluster, 80, [ways, ways[:1], ways[1:]] if LONG else [ways, ways[:1]], record_property)


@pytest.mark.parametrize("name", ["to", pytest.param("from", marks=only_long)])
async def test_the_coordinator_loses_the_workers(
    cluster: SplitCluster, name: str, record_property: Callable[[str, object], None]
) -> None:
    """One direction only: heartbeats do not arrive, or their answers."""
    coordinator = site(cluster, "coordinator")
    workers = [site(cluster, each) for each in cluster.workers]
    if name == "to":
        await flap(cluster, 90, [[(whole_group(workers[0]), coordinator)]], record_property)
    else:
        await flap(cluster, 100, [[(coordinator, worker) for worker in workers]], record_property)


async def flap(
    cluster: SplitCluster,
    number: int,
    losses: Sequence[Sequence[tuple[Site, Site]]],
    record_property: Callable[[str, object], None],
) -> None:
    """One loss after the other; whoever streams notices nothing, and whoever comes is served."""
    streamed = [question(number + at, 24, 600 if LONG else 350, sampled=at == 1) for at in range(3)]
    fresh = [question(number + 5 + at, 40, 12) for at in range(3)]
    async with cluster.asker() as asker:
        await asker.learn(*streamed, *fresh)
        cluster.slow_decoding()
        async with asyncio.TaskGroup() as tasks:
            streams = Streams(asker, streamed, tasks)
            await streams.all_writing()
            visitors = Visitors(asker, fresh, tasks)
            for ways in losses:
                with lost(*ways):
                    await asyncio.sleep(SILENCE_S)
                    await visitors.serve(3)
                await visitors.serve(6)
            await until_up(cluster, list(cluster.workers))
            await visitors.serve(3)
            visitors.leave()
            results = await streams.results()
        record_property("longest_wait_of_new_ones_s", round(visitors.gap_s, 2))
        assert [(record.end, record.replays) for record in results] == [(End.WHOLE, 0)] * len(streamed)


@pytest.mark.parametrize(
    "direction", ["both", pytest.param("to gateway", marks=only_long), pytest.param("to worker", marks=only_long)]
)
async def test_a_decode_worker_that_its_gateway_loses(
    cluster: SplitCluster, direction: str, record_property: Callable[[str, object], None]
) -> None:
    """It goes on writing what another writes by now: nobody's tokens come twice, and it is told to stop."""
    gateway = site(cluster, "gateway")
    questions = [question(110 + number, 24, 350, sampled=number % 2 == 1) for number in range(4)]
    async with cluster.asker() as asker:
        fresh = [question(120 + number, 24, 8) for number in range(4)]
        await asker.learn(*questions, *fresh)
        cluster.slow_decoding()
        async with asyncio.TaskGroup() as tasks:
            streams = Streams(asker, questions, tasks)
            await streams.all_writing()
            victim = site(cluster, await cluster.busiest("decode"))
            assert not any(task.done() for task in streams.tasks)
            both = both_ways(gateway, victim)
            ways = {"both": both, "to worker": both[:1], "to gateway": both[1:]}[direction]
            with lost(*ways):
                await asyncio.sleep(SILENCE_S)
            # Again, while its old streams are being given up.
            await asyncio.sleep(0.5)
            with lost(*ways):
                await asyncio.sleep(SILENCE_S if LONG else 0.5)
            results = await streams.results()
        assert [record.end for record in results] == [End.WHOLE] * len(questions)
        assert sum(record.replays for record in results) > 0
        record_property("longest_gap_s", round(longest_gap_s(results), 2))
        assert longest_gap_s(results) < GAP_S
        await asyncio.gather(*(asker.whole(each) for each in fresh))


async def until_up(cluster: SplitCluster, names: Sequence[str]) -> None:
    """Until the coordinator calls them up."""
    until_s = time.monotonic() + 60.0
    while True:
        reply = await cluster.members()
        up = {str(one.info.worker_id) for one in (reply.members if reply else ()) if one.state == "up"}
        if up >= set(names):
            return
        assert time.monotonic() < until_s, f"up are {up}"


# --- prefixes -----------------------------------------------------------------------------------------------


def cached_tokens(record: Try) -> int:
    details: Any = (record.usage or {}).get("prompt_tokens_details")
    return int(details["cached_tokens"])


async def test_a_prefix_is_its_tenants_own(cluster: SplitCluster) -> None:
    """Found again, it changes no token; another tenant, or another salt, finds nothing."""
    tokens = list(prompt(200, 40 * BLOCK_TOKENS))

    async def ask(client: httpx.AsyncClient, tail: Sequence[int], **extra: object) -> tuple[list[int], int]:
        body = {"model": "demo", "prompt": [*tokens, *tail], "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        response = await client.post("/v1/completions", json={**body, "return_token_ids": True, **extra})
        assert response.status_code == 200, response.text
        answer = response.json()
        return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    async with cluster.client(RED) as red, cluster.client(BLUE) as blue:
        first, found = await ask(red, [7])
        assert found == 0
        await cluster.until_calm()
        assert await ask(red, [7]) == (first, len(tokens))
        other, found = await ask(red, [9, 11])
        assert found == len(tokens)
        await cluster.until_calm()
        for client, extra in ((blue, {}), (red, {"cache_salt": "mine"}), (blue, {"cache_salt": "red"})):
            assert await ask(client, [9, 11], **extra) == (other, 0), extra


async def test_the_books_of_all_are_clean_in_the_end(cluster: SplitCluster) -> None:
    await cluster.until_calm()
    await until_audit(
        cluster.audit, lambda audits: all(not audit.problems for audit in audits.values()), "no ledger has a problem"
    )
