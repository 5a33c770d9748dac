"""Five times what a cluster can serve, for a while, its processes each by itself: most are refused at once with a
reason and a time, those accepted keep their targets, and nobody makes it worse by asking again.

The rate is measured here, so that it is too much on any machine; shares of what was in time are bounded with room for
machines that do other things too, and leave out the first seconds: until then the coordinator believes what steps took
on an idle machine, and has to learn from what becomes of those that it accepts. `benchmarks.overload` has all of it in
figures.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import openai
import psutil
import pytest

from tests.support.chaos_asking import clean, prompt, until_audit
from tests.support.chaos_processes import scattered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from contracts.messages import AuditReply
    from tests.support.chaos_processes import Part, Processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MAX_TOKENS = 48
PROMPT_TOKENS = 96
OVERLOAD = 5.0
OVERLOAD_S = 24.0
#: From the beginning on; twice as long as a request may wait, and more.
LEARNING_S = 8.0
#: An idle cluster needs some hundredths of it, on a loaded machine some tenths.
TTFT_S, TPOT_S = 3.0, 0.3
#: Of the accepted, and all that a loaded machine may cost.
LEAST_IN_TIME = 0.8
MAX_GROWTH_BYTES = 150 * 2**20
#: Few, so that the engines' batches are what is full, not the machine.
CONFIG: dict[str, Any] = {
    "model": "demo",
    "transport": "shm",
    "transfer": {"probe": False},
    "engine": {"max_batch_tokens": 96, "max_sequences": 2},
    "slo": {
        "interactive": {"ttft_ms": TTFT_S * 1e3, "tpot_ms": TPOT_S * 1e3},
        # For a crowd, of which some must be refused.
        "hurried": {"ttft_ms": TTFT_S * 1e3 / 10, "tpot_ms": TPOT_S * 1e3},
    },
    "default_slo_class": "interactive",
    "pools": [
        {"name": "prefill", "role": "prefill", "workers": 2, "kv_blocks": 128},
        {"name": "decode", "role": "decode", "workers": 2, "kv_blocks": 128},
    ],
}


@dataclass(frozen=True, slots=True)
class Loaded:
    processes: Processes
    gateway: Part
    workers: list[Part]

    async def audit(self) -> Mapping[str, AuditReply]:
        return await self.processes.audit(self.workers)

    def placed(self) -> float:
        """Requests that this gateway has had placed so far."""
        text = httpx.get(f"{self.gateway.address}/metrics", timeout=60.0).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("tandem_placements_total{"))

    def resident_bytes(self) -> int:
        return int(psutil.Process(self.gateway.process.pid).memory_info().rss)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    with ExitStack() as stack:
        processes = stack.enter_context(scattered(CONFIG, tmp_path_factory.mktemp("overload")))
        processes.start_coordinator()
        pools = [(pool, index) for pool in ("prefill", "decode") for index in range(2)]
        workers = [processes.start_worker(pool, index, wait=False) for pool, index in pools]
        gateway = processes.start_gateway()
        for worker in workers:
            processes.wait_ready(worker)
        processes.wait_serving(gateway)
        yield Loaded(processes, gateway, workers)
        assert "Traceback" not in processes.output()


def body(number: int, **extra: object) -> dict[str, Any]:
    return {
        "model": "demo",
        "prompt": list(prompt(1000 + number, PROMPT_TOKENS)),
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **extra,
    }


@dataclass(slots=True)
class Visit:
    """What one client saw; seconds from when it asked."""

    status: int = 0
    headers_s: float = 0.0
    headers: httpx.Headers | None = None
    error: dict[str, Any] | None = None
    first_s: float | None = None
    last_s: float = 0.0
    num_tokens: int = 0

    @property
    def is_whole(self) -> bool:
        return self.status == 200 and self.num_tokens == MAX_TOKENS and self.error is None

    @property
    def tpot_s(self) -> float:
        return (self.last_s - (self.first_s or 0.0)) / (MAX_TOKENS - 1)

    @property
    def began_in_time(self) -> bool:
        return self.first_s is not None and self.first_s <= TTFT_S

    @property
    def reason(self) -> str:
        return "" if self.headers is None else self.headers.get("x-tandem-reject-reason", "")


async def visit(client: httpx.AsyncClient, number: int) -> Visit:
    seen = Visit()
    asked_s = time.monotonic()
    async with client.stream("POST", "/v1/completions", json=body(number, stream=True)) as response:
        seen.status, seen.headers = response.status_code, response.headers
        if response.status_code != 200:
            await response.aread()
            seen.error = response.json()["error"]
            seen.headers_s = time.monotonic() - asked_s
            return seen
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            seen.error = event.get("error", seen.error)
            tokens = sum(len(choice.get("token_ids") or []) for choice in event.get("choices", []))
            if tokens:
                seen.last_s = time.monotonic() - asked_s
                seen.first_s = seen.last_s if seen.first_s is None else seen.first_s
                seen.num_tokens += tokens
    return seen


async def until_foreseen(client: httpx.AsyncClient) -> None:
    """Asks until the coordinator has learned, from what workers measured, what steps take."""
    until_s = time.monotonic() + 60.0
    rng = random.Random(3)

    async def foreseen(number: int) -> bool:
        tokens = list(prompt(5000 + number, rng.randrange(16, 300)))
        asked = body(number, prompt=tokens, max_tokens=rng.randrange(2, 12), include_timeline=True)
        response = await client.post("/v1/completions", json=asked)
        if response.headers.get("x-tandem-reject-reason") in ("ttft", "tpot"):
            # Somebody foresaw too much of it: so many at once, and answers of two tokens wait for a seat too.
            return True
        assert response.status_code == 200, response.text
        return response.json()["timeline"]["predicted_ttft_ms"] is not None

    number = 0
    while not all(await asyncio.gather(*(foreseen(number + at) for at in range(8)))):
        assert time.monotonic() < until_s, "nothing is predicted"
        number += 8


async def capacity_per_s(client: httpx.AsyncClient) -> float:
    """Answers in a second with every place of the decode workers taken."""

    async def one_after_the_other(first: int) -> None:
        for at in range(6):
            assert (await visit(client, first + at)).is_whole

    started_s = time.monotonic()
    await asyncio.gather(*(one_after_the_other(100 * lane) for lane in range(4)))
    return 4 * 6 / (time.monotonic() - started_s)


async def test_too_many_are_refused_and_the_rest_is_served_in_time(
    cluster: Loaded, record_property: Callable[[str, object], None]
) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    rng = random.Random(5)
    async with httpx.AsyncClient(base_url=cluster.gateway.address, timeout=60.0, limits=limits) as client:
        await until_foreseen(client)
        capacity = await capacity_per_s(client)
        before_bytes = cluster.resident_bytes()
        visits: list[asyncio.Task[Visit]] = []
        num_early = 0
        async with asyncio.TaskGroup() as tasks:
            due_s = began_s = time.monotonic()
            while due_s < began_s + OVERLOAD_S:
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                visits.append(tasks.create_task(visit(client, 1000 + len(visits))))
                num_early += due_s < began_s + LEARNING_S
                due_s += rng.expovariate(OVERLOAD * capacity)
            most_bytes = cluster.resident_bytes()
        seen = [each.result() for each in visits]
        refused = [each for each in seen if each.status in (429, 503)]
        accepted = [each for each in seen if each.status == 200]
        later = [each for each in seen[num_early:] if each.status == 200]
        # How long steps take is the machine's: four engines share its cores with whoever else is there.
        in_time = [each for each in later if each.is_whole and each.began_in_time]
        waits_s = sorted(each.headers_s for each in refused)
        figures = {
            "capacity_per_s": round(capacity, 1),
            "offered": len(seen),
            "refused": len(refused),
            "accepted": len(accepted),
            "accepted_later": len(later),
            "in_time": len(in_time),
            "refusal_p50_ms": round(1e3 * waits_s[len(waits_s) // 2], 1) if waits_s else None,
            "refusal_p99_ms": round(1e3 * waits_s[int(len(waits_s) * 0.99)], 1) if waits_s else None,
            "reasons": dict(Counter(each.reason for each in refused)),
            "late_first": sum(1 for each in accepted if not each.began_in_time),
            "slow": sum(1 for each in accepted if each.tpot_s > TPOT_S),
            "median_tpot_ms": round(1e3 * sorted(each.tpot_s for each in accepted)[len(accepted) // 2], 1),
            "gateway_grew_mib": round((most_bytes - before_bytes) / 2**20, 1),
        }
        print(figures)
        for name, value in figures.items():
            record_property(name, value)
        # Nothing else happens to anybody.
        assert len(refused) + len(accepted) == len(seen), {each.status for each in seen}
        for each in refused:
            check_refusal(each)
        assert refused
        assert accepted
        assert [each for each in accepted if not each.is_whole] == []
        assert later
        assert len(in_time) >= LEAST_IN_TIME * len(later), figures
        # What it can do, it does: refusing everybody would be easy.
        assert len(accepted) >= 0.3 * capacity * OVERLOAD_S, figures
        assert most_bytes - before_bytes < MAX_GROWTH_BYTES
    await until_audit(cluster.audit, clean, "every ledger is clean")


def check_refusal(seen: Visit) -> None:
    assert seen.headers is not None
    assert int(seen.headers["retry-after"]) >= 1
    assert int(seen.headers["retry-after-ms"]) >= 1
    assert seen.headers["x-tandem-reject-reason"]
    assert seen.error is not None
    assert set(seen.error) == {"message", "type", "param", "code"}
    assert seen.error["code"] in ("slo_unattainable", "no_capacity", "not_ready"), seen.error
    if seen.error["code"] == "slo_unattainable":
        # The numbers behind it: the target at least.
        assert any(character.isdigit() for character in seen.error["message"]), seen.error


async def test_the_official_client_waits_as_told(
    cluster: Loaded, record_property: Callable[[str, object], None]
) -> None:
    """With its own retries on: many clients come back when they were told to, and all but a few are served in the end.
    Were they to come at once, requests would be many times what was asked for."""
    num_clients, num_sent, retries = 96, 0, 8
    async with httpx.AsyncClient(base_url=cluster.gateway.address, timeout=60.0) as before:
        await until_foreseen(before)

    async def count(_: object) -> None:
        nonlocal num_sent
        num_sent += 1

    async with openai.AsyncOpenAI(
        base_url=f"{cluster.gateway.address}/v1",
        api_key="none",
        max_retries=retries,
        timeout=60.0,
        http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [count]}),
    ) as client:

        async def ask(number: int) -> bool:
            extra = {"ignore_eos": True, "slo_class": "hurried"}
            tokens = list(prompt(9000 + number, PROMPT_TOKENS))
            try:
                answer = await client.completions.create(
                    model="demo", prompt=tokens, max_tokens=MAX_TOKENS, temperature=0, extra_body=extra
                )
            except (openai.RateLimitError, openai.InternalServerError):
                return False
            return answer.choices[0].finish_reason == "length"

        started_s = time.monotonic()
        served = await asyncio.gather(*(ask(number) for number in range(num_clients)))
        took_s = time.monotonic() - started_s
    record_property("sent_per_client", round(num_sent / num_clients, 2))
    print({"served": sum(served), "sent": num_sent, "took_s": round(took_s, 1)})
    assert num_sent > num_clients, "nobody was refused"
    assert sum(served) >= 0.9 * num_clients
    # As many tries as there are seconds to wait, at most: nobody comes back before a second has passed.
    assert num_sent <= num_clients * (1 + min(retries, took_s))
    await until_audit(cluster.audit, clean, "every ledger is clean")
