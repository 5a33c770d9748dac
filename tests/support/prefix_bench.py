"""A simulated cluster whose requests the test itself places: who reads, who writes, and where a prefix comes from."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

from contracts.ids import WorkerId
from contracts.messages import Peer, PrefixPlan
from contracts.requests import SamplingParams
from kvtransfer.memory import PullFate
from rpc.memory import loopback_latency
from simulator import expected_tokens, run
from simulator.cluster import ClusterSpec, SimulatedCluster
from simulator.engine import modelled_identity
from tests.support.direct_client import DirectAnswer, DirectClient
from worker import WorkerShell

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Coroutine

    from contracts.errors import TandemError
    from contracts.messages import Role
    from kvtransfer.memory import PullInfo
    from rpc import Network
    from rpc.memory import Message
    from simulator import Program

#: A term of a lease, and slack: everything is given back within this much virtual time after the last answer.
SETTLE_S = 30.0
MAX_TOKENS = 6
#: All ways are measured within this much virtual time.
PROBED_S = 5.0


class PrefixBench(SimulatedCluster):
    """The test hears of every message and pull, and says what becomes of pulls."""

    def __init__(self, program: Program, roles: dict[str, Role], **options: Any) -> None:
        super().__init__(program, ClusterSpec(roles=roles, latency_s=self._latency, fate=self._fate, **options))
        #: Told before a message ("Fetch call", "Confirm reply", ...) or a pull ("pull") between two workers sets out.
        self.on_step: Callable[[str, str, str], None] = lambda step, source, target: None
        #: Pulls by (reader, holder) and by message "Keep call" etc. since `begin`.
        self.count: Counter[tuple[str, str, str]] = Counter()
        #: How long a pull takes and how it fails, by (reader, holder); 2 ms and not where nothing is said.
        self.pull_s: dict[tuple[str, str], float] = {}
        self.pull_error: dict[tuple[str, str], TandemError] = {}
        self.outside: Network = self._network
        self.client = DirectClient(self.outside)

    async def begin(self) -> None:
        await self.client.open(*(self.peer(worker_id) for worker_id in self.up() if worker_id not in self._spec.stores))
        # The ways between the workers are measured by pulls, too.
        await asyncio.sleep(PROBED_S)
        self.count.clear()

    def _latency(self, message: Message, rng: random.Random) -> float:
        method, kind = message.method.rpartition("/")[2], str(message.kind)
        if kind in ("request", "reply"):
            self._step(f"{method} {'call' if kind == 'request' else 'reply'}", message.source, message.target)
        return loopback_latency(message, rng)

    def _fate(self, info: PullInfo) -> PullFate:
        way = (info.reader.partition("@")[0], info.holder.partition("@")[0])
        self._step("pull", *way)
        return PullFate(duration_s=self.pull_s.get(way, 0.002), error=self.pull_error.get(way))

    def _step(self, step: str, source: str, target: str) -> None:
        self.count[step, source, target] += 1
        self.on_step(step, source, target)

    def shell(self, worker_id: str) -> WorkerShell:
        return self.worker(worker_id)

    def peer(self, worker_id: str) -> Peer:
        life = self._lives[worker_id]
        return Peer(worker_id=WorkerId(worker_id), incarnation=life.incarnation, address=f"{worker_id}:1")

    def plan(self, source_blocks: int, worker_id: str, local_blocks: int = 0) -> PrefixPlan:
        return PrefixPlan(source=self.peer(worker_id), source_blocks=source_blocks, local_blocks=local_blocks)

    @property
    def block_bytes(self) -> int:
        return modelled_identity(block_tokens=self._spec.block_tokens).layout.block_bytes

    async def ask(
        self, reads: str, writes: str, tokens: tuple[int, ...], *, max_tokens: int = MAX_TOKENS, **options: Any
    ) -> DirectAnswer:
        """To its end; it is right."""
        answer = await self.client.ask(
            tokens, max_tokens=max_tokens, prefill=self.peer(reads), decode=self.peer(writes), **options
        )
        check_answer(answer, max_tokens)
        return answer

    def held(self, worker_id: str, tokens: tuple[int, ...]) -> int:
        """Leading blocks of these tokens that stand there: in a worker's pool, or in a store's memory or disk."""
        prefixes = next(life.shell.prefixes for life in self._lives.values() if isinstance(life.shell, WorkerShell))
        keys = prefixes.chain(tokens, "").part(0, len(tokens) // self._spec.block_tokens)
        if worker_id in self._spec.stores:
            return self.store(worker_id).machine.num_standing(keys)
        return len(self.shell(worker_id).prefixes.match(keys))

    async def check_clean(self) -> None:
        """Nothing is held, pinned or under way any more, anywhere."""
        await asyncio.sleep(SETTLE_S)
        for worker_id, audit in (await self.audits()).items():
            assert audit.problems == (), worker_id
            assert audit.load.available_blocks == audit.total_blocks, (worker_id, audit)
            assert (audit.open_requests, audit.holder_leases, audit.reader_leases) == (0, 0, 0), (worker_id, audit)
            shell = self._lives[worker_id].shell
            if isinstance(shell, WorkerShell):
                open_counts = (shell.fetches.num_open, shell.fetch_answers.num_open, shell.store_offers.num_open)
                assert open_counts == (0, 0, 0), worker_id
                assert shell.store_offers.num_waiting == 0, worker_id


def check_answer(answer: DirectAnswer, max_tokens: int = MAX_TOKENS) -> None:
    """Greedy choice over a model whose tokens depend on every slot of the KV."""
    assert answer.error is None, answer.error
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    assert answer.token_ids == expected_tokens(answer.request.token_ids, sampling, max_tokens)


def on_bench(
    test: Callable[[PrefixBench], Coroutine[Any, Any, None]], roles: dict[str, Role], *, seed: int = 0, **options: Any
) -> None:
    async def main(program: Program) -> None:
        async with PrefixBench(program, roles, **options) as bench, bench.client:
            await bench.begin()
            await test(bench)

    run(main, seed=seed)
