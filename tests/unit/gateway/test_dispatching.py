"""A gateway without its coordinator, against a scripted cluster over real (in-memory) rpc."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from contracts.errors import NoCapacity, NotReady
from contracts.requests import SamplingParams
from gateway.core import GatewayCore, Submission
from gateway.server import GatewaySettings
from tests.unit.gateway.conftest import REPLAYING, run_core

if TYPE_CHECKING:
    import httpx

    from contracts.messages import Role
    from gateway.limits import GatewayLimits
    from gateway.stream import RequestStream
    from rpc import MemoryNetwork
    from tests.support.fake_backend import FakeCluster, Script

FOUR: dict[str, Role] = {"prefill-0": "prefill", "prefill-1": "prefill", "decode-0": "decode", "decode-1": "decode"}
TEN = list(range(10))
#: Looked at once, at the beginning: the tests say when the snapshot hears anything.
LIMITS = replace(REPLAYING, members_interval_s=1000.0, dispatch_timeout_with_snapshot_s=0.05, probe_interval_s=0.01)
NO_PROBES = replace(LIMITS, probe_interval_s=1000.0)


@pytest.fixture
def roles() -> dict[str, Role]:
    return FOUR


@pytest.fixture
def limits() -> GatewayLimits:
    return LIMITS


@pytest.fixture(autouse=True)
async def told(core: GatewayCore) -> None:
    core.snapshot.told(await core.members(), core.clock.now_s())


def submission(max_tokens: int = 10) -> Submission:
    return Submission(token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=max_tokens), deadline_s=60.0)


async def tokens_of(stream: RequestStream) -> list[int]:
    return [token_id async for delta in stream for token_id in delta.token_ids]


def num_asked(cluster: FakeCluster) -> int:
    return sum(len(ask.items) for ask in cluster.dispatches)


def names_of(core: GatewayCore) -> set[str]:
    return {member.info.worker_id for member in core.snapshot.members}


async def ask_until_it_knows(core: GatewayCore, worker_id: str) -> None:
    async with asyncio.timeout(30):
        while worker_id not in names_of(core):
            assert await tokens_of(core.submit(submission(max_tokens=1))) == TEN[:1]


@pytest.mark.parametrize("limits", [NO_PROBES])
async def test_an_answer_from_who_knows_others_is_a_reason_to_ask_who(
    core: GatewayCore, cluster: FakeCluster, script: Script
) -> None:
    await cluster.start_worker("decode-2", "decode")
    for _ in range(3):
        assert await tokens_of(core.submit(submission())) == TEN
    assert names_of(core) == set(FOUR), "nothing was said of another worker"
    script.members_mark = 2**64 - 1
    await ask_until_it_knows(core, "decode-2")
    # And again with each change.
    await cluster.start_worker("decode-3", "decode")
    script.members_mark = 5
    await ask_until_it_knows(core, "decode-3")
    cluster.kill_coordinator()
    assert await tokens_of(core.submit(submission())) == TEN


async def test_whoever_asks_for_the_members_the_snapshot_hears_the_answer(
    core: GatewayCore, cluster: FakeCluster
) -> None:
    await cluster.start_worker("prefill-2", "prefill")
    assert names_of(core) == set(FOUR)
    await core.members()
    assert names_of(core) == {*FOUR, "prefill-2"}


@pytest.mark.parametrize("limits", [NO_PROBES])
async def test_requests_go_on_without_a_coordinator(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.kill_coordinator()
    streams = [core.submit(submission()) for _ in range(20)]
    for stream in streams:
        assert await tokens_of(stream) == TEN
    assert core.stats.placements == {"snapshot": 20}
    assert core.stats.coordinator_outages == 1
    used = {name: len(cluster.workers[name].accepted) for name in FOUR}
    assert used["prefill-0"] == used["prefill-1"] == 10


async def test_running_streams_do_not_notice(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close(4)
    stream = core.submit(submission())
    await cluster.gates.reached(4)
    cluster.kill_coordinator()
    assert await tokens_of(core.submit(submission(max_tokens=3))) == TEN[:3]
    cluster.gates.open(4)
    assert await tokens_of(stream) == TEN
    assert stream.timeline is not None
    assert stream.timeline.num_replays == 0


@pytest.mark.parametrize("limits", [NO_PROBES])
async def test_a_frozen_coordinator_delays_only_the_first(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close("dispatch")
    assert await tokens_of(core.submit(submission())) == TEN
    assert num_asked(cluster) == 1
    for _ in range(5):
        assert await tokens_of(core.submit(submission())) == TEN
    assert num_asked(cluster) == 1, "it was asked again for requests that could do without it"
    assert core.stats.placements == {"snapshot": 6}


async def test_a_coordinator_that_answers_again_is_asked_again(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.gates.close("dispatch")
    assert await tokens_of(core.submit(submission())) == TEN
    cluster.gates.open("dispatch")
    async with asyncio.timeout(30):
        while "coordinator" not in core.stats.placements:
            assert await tokens_of(core.submit(submission())) == TEN
    assert core.stats.coordinator_outages >= 1
    assert num_asked(cluster) >= 2


@pytest.mark.parametrize("limits", [replace(NO_PROBES, snapshot_ttl_s=5.0)])
async def test_a_snapshot_that_is_too_old_is_not_used(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.kill_coordinator()
    assert await tokens_of(core.submit(submission())) == TEN
    core.snapshot.told(core.snapshot.members, core.clock.now_s() - 6.0)
    with pytest.raises(NotReady, match=r"no coordinator has answered for 6 s; .* for 5 s") as caught:
        await core.submit(submission()).accepted()
    assert caught.value.reason == "no_coordinator"
    assert caught.value.retry_after_s is not None


@pytest.mark.parametrize("limits", [NO_PROBES])
async def test_workers_whose_streams_are_lost_are_left_out(core: GatewayCore, cluster: FakeCluster) -> None:
    for _ in range(2):
        assert await tokens_of(core.submit(submission())) == TEN
    cluster.kill_coordinator()
    stream = core.submit(submission())
    cluster.workers["prefill-0"].kill()
    assert await tokens_of(stream) == TEN
    replays = core.stats.replays
    for _ in range(4):
        assert await tokens_of(core.submit(submission())) == TEN
    assert core.stats.replays == replays
    assert len(cluster.workers["prefill-1"].accepted) >= 4


async def test_a_coordinator_that_knows_nobody_yet_is_helped_out(
    core: GatewayCore, cluster: FakeCluster, script: Script
) -> None:
    script.is_ignorant = True
    assert await tokens_of(core.submit(submission())) == TEN
    assert core.stats.placements == {"snapshot": 1}
    assert core.stats.coordinator_outages == 0
    script.is_ignorant = False
    core.snapshot.told(await core.members(), core.clock.now_s())
    assert await tokens_of(core.submit(submission())) == TEN
    assert core.stats.placements == {"snapshot": 1, "coordinator": 1}


async def ask_on(core: GatewayCore) -> None:
    while True:
        await core.submit(submission()).accepted()


async def go_deaf(core: GatewayCore, script: Script) -> None:
    """The coordinator: it calls all workers silent, then names none of them."""
    script.heartbeat_age_s = 2.9
    core.snapshot.told(await core.members(), core.clock.now_s())
    script.is_ignorant = True


async def test_a_coordinator_that_hears_nobody_is_helped_out(
    core: GatewayCore, cluster: FakeCluster, script: Script
) -> None:
    for _ in range(2):
        assert await tokens_of(core.submit(submission())) == TEN
    await go_deaf(core, script)
    for _ in range(4):
        assert await tokens_of(core.submit(submission())) == TEN
    assert core.stats.placements == {"coordinator": 2, "snapshot": 4}
    assert core.stats.replays == {}


async def test_of_workers_that_no_coordinator_hears_the_dead_get_nothing(
    core: GatewayCore, cluster: FakeCluster, script: Script
) -> None:
    await go_deaf(core, script)
    # Asking opens the streams of all of them.
    assert await tokens_of(core.submit(submission())) == TEN
    cluster.workers["prefill-0"].kill()
    cluster.workers["decode-1"].kill()
    async with asyncio.timeout(30):
        while core.stats.lost_streams < 2:
            assert await tokens_of(core.submit(submission())) == TEN
    replays = core.stats.replays.copy()
    for _ in range(6):
        assert await tokens_of(core.submit(submission())) == TEN
    assert core.stats.replays == replays
    cluster.workers["prefill-1"].kill()
    with pytest.raises(NotReady, match="nobody is up"):
        await asyncio.wait_for(ask_on(core), 30)


async def test_a_coordinator_that_knows_its_workers_is_believed(core: GatewayCore, script: Script) -> None:
    script.rejection = ("not_ready", "none of them can take it", 1.0)
    with pytest.raises(NotReady, match="none of them can take it"):
        await core.submit(submission()).accepted()
    assert not core.stats.placements


async def test_a_coordinator_that_got_to_know_its_workers_meanwhile_is_asked_once_more(
    core: GatewayCore, cluster: FakeCluster, script: Script
) -> None:
    script.rejection, script.rejections_left = ("not_ready", "none of them can take it", 1.0), 1
    assert await tokens_of(core.submit(submission())) == TEN
    assert num_asked(cluster) == 2
    assert core.stats.placements == {"coordinator": 1}


@pytest.mark.parametrize("limits", [replace(NO_PROBES, max_waiting_dispatch=3)])
async def test_an_outage_does_not_lift_limits(core: GatewayCore, cluster: FakeCluster) -> None:
    cluster.kill_coordinator()
    streams = [core.submit(submission()) for _ in range(3)]
    with pytest.raises(NoCapacity) as caught:
        core.submit(submission())
    assert caught.value.reason == "gateway_full"
    for stream in streams:
        assert await tokens_of(stream) == TEN


async def test_several_gateways_go_on_by_themselves(
    core: GatewayCore, cluster: FakeCluster, network: MemoryNetwork
) -> None:
    async with run_core(network, cluster, NO_PROBES, "gw-2") as other:
        other.snapshot.told(await other.members(), other.clock.now_s())
        cluster.kill_coordinator()
        streams = [one.submit(submission()) for one in (core, other) for _ in range(4)]
        for stream in streams:
            assert await tokens_of(stream) == TEN
        assert (core.stats.placements, other.stats.placements) == ({"snapshot": 4}, {"snapshot": 4})


@pytest.mark.parametrize("settings", [GatewaySettings(served_model_names=("m",), max_model_len=99, health_cache_s=0)])
async def test_a_gateway_that_can_go_on_is_healthy(
    client: httpx.AsyncClient, core: GatewayCore, cluster: FakeCluster
) -> None:
    cluster.kill_coordinator()
    response = await client.get("/health")
    assert response.status_code == 200
    assert response.json()["reason"] == "serving; the coordinator did not answer (worker_unavailable)"
    core.snapshot.told(core.snapshot.members, core.clock.now_s() - 100.0)
    assert (await client.get("/health")).status_code == 503
