"""Two machines' node agents, one of which has the model in its memory: the start goes there, and says why."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import httpx
import pytest

from contracts.control_messages import (
    OPERATE,
    OPERATIONS,
    OperateRequest,
    OperationsRequest,
    RemoveOperation,
    StartOperation,
)
from contracts.errors import TandemError
from contracts.ids import WorkerId
from contracts.messages import Empty
from contracts.scale_messages import SCALING
from rpc import GrpcNetwork
from tests.support.chaos_processes import scattered
from tests.support.commands import tandem

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from contracts.control_messages import Operation
    from contracts.scale_messages import ScalingReply
    from rpc import Channel

PATIENCE_S = 120.0
pytestmark = pytest.mark.timeout(400)

CONFIG = {
    "model": "demo",
    "dtype": "float32",
    "transport": "shm",
    "transfer": {"probe": False},
    "store": {"dram": None},
    "pools": [
        {
            "name": "all",
            "role": "mixed",
            "workers": {"initial": 0, "min": 0, "max": 2},
            "kv_blocks": 64,
            "scale": {"cooldown_s": 600},
        }
    ],
    "coordinator": {"autoscale": {"interval_s": 0.5}},
}


async def until_scaling(channel: Channel, holds: Callable[[ScalingReply], bool]) -> ScalingReply:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            reply = await channel.call(SCALING, Empty(), timeout_s=5.0)
            if holds(reply):
                return reply
            await asyncio.sleep(0.1)


async def done(channel: Channel, operation: Operation) -> None:
    number = (await channel.call(OPERATE, OperateRequest(operation=operation), timeout_s=5.0)).operation_id
    async with asyncio.timeout(PATIENCE_S):
        while True:
            reply = await channel.call(OPERATIONS, OperationsRequest(), timeout_s=5.0)
            (status,) = [one for one in reply.operations if one.operation_id == number]
            if status.state != "running":
                assert status.state == "done", status
                return
            await asyncio.sleep(0.1)


@pytest.mark.slow
async def test_a_worker_is_started_where_its_weights_are_in_memory(tmp_path: Path) -> None:
    with scattered(CONFIG, tmp_path) as processes:
        coordinator = processes.start_coordinator()
        gateway = processes.start_gateway()
        network = GrpcNetwork(token=processes.token)
        channel = network.channel(coordinator.address)
        for number, node in enumerate(("far", "near")):
            processes.start_agent(node, {"node": node, "first_worker": str(10 * number)})
        try:
            # Nothing is measured, so places are taken in order.
            reply = await until_scaling(channel, lambda one: [bool(node.held) for node in one.nodes] == [True, True])
            assert [(node.node, node.held[0].tier, node.speeds) for node in reply.nodes] == [
                ("far", "remote", ()),
                ("near", "remote", ()),
            ]
            assert reply.pools[0].next_start.startswith("all-0: in order: no node knows where to load demo from")
            # Its weights stay there when the worker goes.
            await done(channel, StartOperation(worker_id=WorkerId("all-10")))
            await done(channel, RemoveOperation(worker_id=WorkerId("all-10"), force=True))
            reply = await until_scaling(
                channel, lambda one: one.pools[0].next_start.startswith("all-10: demo from dram of near in ")
            )
            far, near = reply.nodes
            assert (far.held[0].tier, near.held[0].tier) == ("remote", "dram")
            # What one machine learnt of originals holds for the other, too.
            assert [(one.tier, one.origin, one.num_loads) for one in (*far.speeds, *near.speeds)] == [
                ("remote", "fleet", 1),
                ("remote", "measured", 1),
            ]
            assert 0 < far.speeds[0].bytes_per_s == near.speeds[0].bytes_per_s
            expected_s = reply.pools[0].expected_start_s
            assert expected_s is not None
            assert 0 < expected_s < PATIENCE_S
            # The first request wakes the pool: there, and nowhere else.
            async with httpx.AsyncClient(base_url=gateway.address, timeout=PATIENCE_S) as client:
                body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
                answer = await client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
            told = await asyncio.to_thread(autoscale, coordinator.address, processes.token)
            assert re.search(r"pool all: starts 1 .*; all-10: demo from dram of near in .*; far .* s from remote", told)
            assert re.search(r"near +demo in dram \(.* MiB\); from remote .* GB/s \(measured, 1 loads\)", told), told
            members = await processes.members()
            assert [member.info.worker_id for member in members] == ["all-10"]
        except (TandemError, TimeoutError) as error:
            raise AssertionError(processes.output()) from error
        finally:
            await network.close()


def autoscale(coordinator: str, token: str) -> str:
    with tandem("autoscale", "--coordinator", coordinator, TANDEM_CLUSTER_TOKEN=token) as command:
        status, output = command.wait()
    assert status == 0, output
    return output
