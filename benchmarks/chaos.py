"""A real cluster under random faults: every token checked, every block counted, every request answered.

    python -m benchmarks.chaos [--requests N] [--seed N] [--quick] [--cluster split|mixed]
                               [--transport auto|shm|ucx|collective] [--checksum] [--allow-slow]

Workers are killed, frozen (some woken, some left to the node agent), all of a role killed at once; clients leave at
random moments; the network goes away for up to two seconds (where this process may have a network namespace of its
own). Meanwhile clients ask the same questions again and again, greedy and sampled, streaming and not. Right answers
are known before: greedy ones from the reference implementation, sampled ones from the same cluster at peace.

What happens is drawn from the seed; what comes of it is not. The run fails when an answer is wrong, a request stays
without an answer or an error within its bound, a block leaks, a process is left over, a log tells of a bug, or a
kind of fault met nothing in flight. Errors that clients were told are counted: none is the goal, one in twenty fails.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import yaml

from benchmarks.chaos_books import close_books, complaints
from benchmarks.chaos_client import End, Leaving, Outcome, Question, Try, ask, attempt
from benchmarks.chaos_faults import ALONE, Kind, Striker, can_drop_links, schedule
from benchmarks.chaos_reference import Auditor, Reference
from benchmarks.report import finish, print_table
from tests.support.cluster import ClusterProcess
from tests.support.layout import ROOT

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from benchmarks.chaos_faults import Tally

#: A try of a request ends, well or not, within its deadline at the gateway and this much more.
BOUND_MARGIN_S = 10.0
#: Share of clients that leave before the end.
SHARE_LEAVING = 0.15
#: After its last fault a cluster gets this long to answer something again.
RECOVERY_BOUND_S = 60.0
STOP_BOUND_S = 30.0
#: Above this share of requests that end with an error the run fails: those that met more faults than replays are few.
MAX_ERROR_SHARE = 0.05
#: After a fault, before the next one may come.
PAUSE_S = (0.5, 2.0)
#: Of the longest gaps, how many are explained, and by the faults of how long before them.
SHOWN_GAPS = 6
SHOWN_BEFORE_S = 6.0

TALE = (
    "once upon a time there was a small dog who lived near the river and every morning he walked to the old mill "
    "where a girl named Anna gave him bread because she knew that the winter had been long and cold for all"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run."""

    seed: int
    num_requests: int
    num_faults: int
    num_questions: int
    #: Requests open at once.
    concurrency: int
    longest_prompt: int
    longest_answer: int
    request_timeout_s: float
    cluster: str
    transport: str
    checksum: bool
    allow_slow: bool

    @property
    def roles(self) -> tuple[str, ...]:
        return ("mixed",) if self.cluster == "mixed" else ("prefill", "decode")

    def config(self, log_dir: Path) -> dict[str, Any]:
        """Pools are small, so that there is never room for all."""
        blocks = {"prefill": 72, "decode": 112, "mixed": 160}
        return {
            "model": "demo",
            "dtype": "float32",
            "transport": self.transport,
            "transfer": {"checksum": self.checksum, "allow_slow": self.allow_slow},
            "pools": [
                {"name": role, "role": role, "workers": 2, "kv_blocks": blocks[role], "max_batch_tokens": 96}
                for role in self.roles
            ],
            "gateway": {"host": "127.0.0.1", "port": 0, "request_timeout_s": self.request_timeout_s},
            # A crash loop is what happens here: waiting for long would only lengthen the run.
            "supervisor": {"restart_delay_max_s": "500ms"},
            "log_dir": str(log_dir),
        }


def questions(rng: random.Random, plan: Plan) -> list[Question]:
    """Prompts of one token to the longest, as text and as tokens; answers short and long; half of them sampled."""
    made: list[Question] = []
    for index in range(plan.num_questions):
        # Evenly over magnitudes: as many of 1 to 20 tokens as of 20 to 400.
        length = min(plan.longest_prompt, round(math.exp(rng.uniform(0, math.log(plan.longest_prompt)))))
        answer = min(plan.longest_answer, round(math.exp(rng.uniform(0, math.log(plan.longest_answer)))) + 1)
        in_words = index % 3 == 0
        made.append(
            Question(
                name=f"question {index}",
                prompt=" ".join(rng.choices(TALE.split(), k=max(1, length // 2)))
                if in_words
                else tuple(rng.randrange(10, 950) for _ in range(length)),
                max_tokens=answer,
                seed=rng.randrange(2**31) if index % 2 else None,
                ignore_eos=index % 5 != 0,
            )
        )
    return made


@dataclass(slots=True, kw_only=True)
class Load:
    """The clients: asks until enough was asked and `enough` is set, never more than `concurrency` at once."""

    client: httpx.AsyncClient
    plan: Plan
    questions: Sequence[Question]
    auditor: Auditor
    rng: random.Random
    outcomes: list[Outcome] = field(default_factory=list[Outcome])
    wrong: list[str] = field(default_factory=list[str])
    #: Tries that are under way.
    open: dict[int, Try] = field(default_factory=dict[int, Try])
    num_asked: int = 0
    #: No more than the wanted number is asked once this is set.
    enough: asyncio.Event = field(default_factory=asyncio.Event)
    #: For the one that waits in `reached`.
    _moved: asyncio.Event = field(default_factory=asyncio.Event)

    def num_writing(self) -> int:
        return sum(record.writing for record in self.open.values())

    async def reached(self, share: float) -> None:
        """Returns once this share of the wanted number was asked."""
        while self.num_asked < share * self.plan.num_requests:
            self._moved.clear()
            await self._moved.wait()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.plan.concurrency):
                tasks.create_task(self._client())

    async def _client(self) -> None:
        while self.num_asked < self.plan.num_requests or not self.enough.is_set():
            number = self.num_asked
            self.num_asked += 1
            self._moved.set()
            await self._ask(number)

    async def _ask(self, number: int) -> None:
        rng = random.Random(f"{self.plan.seed} {number}")
        question = rng.choice(self.questions)
        stream = rng.random() < 0.7
        outcome = await ask(
            self.client,
            question,
            stream=stream,
            bound_s=self.plan.request_timeout_s + BOUND_MARGIN_S,
            patience_s=self.plan.request_timeout_s,
            leaving=_leaving(rng, question, stream) if rng.random() < SHARE_LEAVING else None,
            on_start=lambda record: self.open.__setitem__(number, record),
        )
        del self.open[number]
        self.outcomes.append(outcome)
        for record in outcome.tries:
            # Checking may ask the reference: not on the loop that takes everybody's tokens.
            self.wrong += await asyncio.to_thread(self.auditor.faults, question, record)


def _leaving(rng: random.Random, question: Question, stream: bool) -> Leaving:
    """Half of those who stream leave in mid-answer, the others at any moment from the first on."""
    if stream and rng.random() < 0.5:
        return Leaving(after_tokens=rng.randint(1, question.max_tokens))
    return Leaving(after_s=rng.choice([0.001, rng.uniform(0, 0.1), rng.uniform(0, 1.5)]))


@dataclass(slots=True, kw_only=True)
class Result:
    load: Load
    tally: Tally
    problems: list[str]
    leaked_blocks: int
    idle_s: float | None
    peace_s: float
    chaos_s: float


async def run_chaos(cluster: ClusterProcess, plan: Plan, reference: asyncio.Task[Reference], log_dir: Path) -> Result:
    rng = random.Random(plan.seed)
    asked = questions(rng, plan)
    # A connection for each request: one that is kept may be closed by the server just as the next request is sent,
    # and nobody could tell that from a request that was dropped.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    base_url = cluster.base_url
    async with httpx.AsyncClient(base_url=base_url, limits=limits, timeout=None) as client:
        auditor = Auditor(await reference)
        peace_s = time.monotonic()
        problems = await learn(client, auditor, asked, plan)
        chaos_s = time.monotonic()
        descriptors = cluster.num_descriptors()
        load = Load(client=client, plan=plan, questions=asked, auditor=auditor, rng=rng)
        striker = Striker(cluster, load.num_writing)
        faults = schedule(rng, plan.roles, plan.num_faults, links=can_drop_links())
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(load.run())
                for fault in faults:
                    await load.reached(fault.at)
                    await striker.strike(fault)
                    await asyncio.sleep(rng.uniform(*PAUSE_S))
                load.enough.set()
        finally:
            striker.wake_all()
        ended_s = time.monotonic()
        problems += await _recovers(client, asked[0])
    books = await close_books(cluster, descriptors)
    problems += [*striker.tally.problems, *books.problems, *await asyncio.to_thread(_stop, cluster)]
    problems += complaints(log_dir, cluster.output)
    kinds = {fault.kind for fault in faults}
    problems += [
        f"never in flight: {kind.value}" for kind in Kind if kind in kinds and not striker.tally.in_flight[kind]
    ]
    return Result(
        load=load,
        tally=striker.tally,
        problems=problems,
        leaked_blocks=books.leaked_blocks,
        idle_s=books.idle_s,
        peace_s=chaos_s - peace_s,
        chaos_s=ended_s - chaos_s,
    )


async def learn(client: httpx.AsyncClient, auditor: Auditor, asked: Sequence[Question], plan: Plan) -> list[str]:
    """Asks every question once, a few at a time, of a cluster at peace; says what the reference disagrees with."""
    turns = asyncio.Semaphore(4)

    async def one(question: Question) -> list[str]:
        async with turns:
            record = await attempt(client, question, stream=False, bound_s=plan.request_timeout_s + BOUND_MARGIN_S)
        return await asyncio.to_thread(auditor.learn, question, record)

    return [fault for found in await asyncio.gather(*map(one, asked)) for fault in found]


async def _recovers(client: httpx.AsyncClient, question: Question) -> list[str]:
    """After the last fault, an answer comes."""
    outcome = await ask(client, question, stream=True, bound_s=RECOVERY_BOUND_S, patience_s=RECOVERY_BOUND_S)
    return [] if outcome.last.end is End.WHOLE else [f"no answer after the faults: {outcome.last}"]


def _stop(cluster: ClusterProcess) -> list[str]:
    """Ends the cluster as Ctrl-C does; says what is left of it."""
    processes = cluster.tree()
    status = cluster.stop(STOP_BOUND_S)
    _, alive = psutil.wait_procs(processes, timeout=5)
    return [*([f"it ended with status {status}"] if status else []), *(f"left over: {one}" for one in alive)]


# --- the report ---------------------------------------------------------------------------------------


def report(result: Result, plan: Plan) -> bool:
    """Prints tables and the figures; whether nothing is wrong."""
    load, tally = result.load, result.tally
    ends = Counter(outcome.last.end for outcome in load.outcomes)
    unanswered = ends[End.UNANSWERED] + ends[End.BROKEN]
    errors = _errors(load)
    refusals = Counter(
        record.error[0] if record.error else "no connection" for outcome in load.outcomes for record in outcome.refusals
    )
    whole = [outcome.last for outcome in load.outcomes if outcome.last.end is End.WHOLE]
    replayed = [record for record in whole if record.replays]
    gaps_s = resume_gaps_s(replayed, tally)
    all_gaps_s = sorted(gap_s for gaps in gaps_s.values() for gap_s in gaps)
    print_table("faults", ["kind", "injected", "in flight"], _fault_rows(tally))
    if not can_drop_links():
        print("links were left alone: this process may not have a network namespace of its own")
    print_table("requests", ["end", "number"], [[end.value, ends[end]] for end in End])
    print_table("errors told to clients", ["code", "number"], sorted(errors.items()))
    print_table("refused and asked again", ["code", "number"], sorted(refusals.items()))
    rows: list[list[object]] = [
        ["replays of whole answers", sum(record.replays for record in replayed)],
        ["answers with a replay", len(replayed)],
        ["frozen for good to gone, worst s", max(tally.hang_kill_s, default=0.0)],
        ["tokens checked", load.auditor.num_tokens],
        ["ties with the reference", load.auditor.num_ties],
        ["seconds at peace", result.peace_s],
        ["seconds of faults", result.chaos_s],
        ["idle and clean after s", "never" if result.idle_s is None else result.idle_s],
    ]
    print_table("longest gap of replayed streams, by the fault in it", ["fault", "streams", "p50 s", "p99 s"], [
        [name, len(gaps), _quantile(gaps, 0.5), _quantile(gaps, 0.99)] for name, gaps in gaps_s.items()
    ])  # fmt: skip
    _print_longest(replayed, tally)
    print_table("figures", ["what", "value"], rows)
    broken = [f"{outcome.question.name}: {outcome.last.end.value}: {outcome.last.how}"
              for outcome in load.outcomes if outcome.last.end in (End.UNANSWERED, End.BROKEN)]  # fmt: skip
    num_errors = sum(errors.values())
    too_many = num_errors > MAX_ERROR_SHARE * len(load.outcomes)
    hurt = [f"{num_errors} of {len(load.outcomes)} requests ended with an error"] if too_many else []
    wrong = [*load.wrong, *broken, *hurt, *result.problems]
    for line in wrong[:40]:
        print(f"WRONG {line}")
    for name, count in Counter(message for outcome in load.outcomes if (message := _message(outcome))).most_common(12):
        print(f"error {count} x {name}")
    finish(
        "chaos",
        {
            "requests": len(load.outcomes),
            "leaked_blocks": result.leaked_blocks,
            "unanswered": unanswered,
            "wrong_tokens": len(load.wrong),
            "errors": num_errors,
            "refusals": sum(refusals.values()),
            "replays": sum(record.replays for record in replayed),
            "resume_gap_s_p50": _quantile(all_gaps_s, 0.5),
            "resume_gap_s_p99": _quantile(all_gaps_s, 0.99),
            "resume_gap_after_kill_s_p99": _quantile(gaps_s.get(Kind.KILL.value, []), 0.99),
            "problems": len(result.problems),
            "faults": sum(tally.injected.values()),
            "seed": plan.seed,
        },
    )
    return not wrong


def resume_gaps_s(replayed: Sequence[Try], tally: Tally) -> dict[str, list[float]]:
    """The longest gap of each replayed stream, ascending, by the kind of fault that lies in it."""
    gaps_s: dict[str, list[float]] = {}
    for record in replayed:
        if record.stream:
            began_s, ended_s = record.longest_gap
            strike = tally.cause(began_s, ended_s)
            gaps_s.setdefault("none" if strike is None else strike.kind.value, []).append(ended_s - began_s)
    return {name: sorted(gaps) for name, gaps in sorted(gaps_s.items())}


def _print_longest(replayed: Sequence[Try], tally: Tally) -> None:
    """The longest gaps, with every fault that began in or shortly before them: why they were so long."""
    streams = [record for record in replayed if record.stream]
    start_s = min((strike.began_s for strike in tally.strikes), default=0.0)
    rows: list[list[object]] = []
    for record in sorted(streams, key=lambda each: each.longest_gap[0] - each.longest_gap[1])[:SHOWN_GAPS]:
        began_s, ended_s = record.longest_gap
        faults = [
            f"{strike.began_s - start_s:.1f} {strike.what}"
            for strike in tally.strikes
            if began_s - SHOWN_BEFORE_S < strike.began_s < ended_s
        ]
        rows.append([f"{began_s - start_s:.1f}", ended_s - began_s, record.replays, "; ".join(faults)])
    print_table("longest gaps", ["from s", "long s", "replays", "faults"], rows)


def _errors(load: Load) -> Counter[str]:
    """What ended a request, by code, where it began; refusals to the end count too."""
    return Counter(
        outcome.last.error[0] if outcome.last.error else "no connection"
        for outcome in load.outcomes
        if outcome.last.end in (End.ERROR, End.UNREACHED)
    )


def _message(outcome: Outcome) -> str | None:
    """What a client was told, without the numbers that make each different."""
    error = outcome.last.error
    return None if error is None else re.sub(r"\d+", "#", f"{error[0]}: {error[1]}")


def _fault_rows(tally: Tally) -> list[list[object]]:
    return [[kind.value, tally.injected[kind], tally.in_flight[kind]] for kind in Kind]


def _quantile(ordered: Sequence[float], quantile: float) -> float:
    return ordered[max(0, math.ceil(quantile * len(ordered)) - 1)] if ordered else 0.0


# --- the command --------------------------------------------------------------------------------------


def isolate() -> None:
    """Goes on in a network namespace of its own, where that is permitted: the loopback there is ours to cut."""
    if os.environ.get(ALONE) == "1":
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return
    if subprocess.run(["unshare", "-rn", "ip", "link", "set", "lo", "up"], capture_output=True, check=False).returncode:
        return
    os.environ[ALONE] = "1"
    os.execvp("unshare", ["unshare", "-rn", "--", sys.executable, "-m", "benchmarks.chaos", *sys.argv[1:]])


@contextmanager
def started(plan: Plan, keep_logs: Path | None) -> Generator[tuple[ClusterProcess, Path]]:
    """The cluster, not ready yet, and the folder of its logs."""
    with tempfile.TemporaryDirectory(prefix="tandem-chaos-") as scratch:
        log_dir = keep_logs or Path(scratch) / "logs"
        config = Path(scratch) / "cluster.yaml"
        config.write_text(yaml.safe_dump(plan.config(log_dir)))
        cluster = ClusterProcess.start(["--config", str(config)], {})
        try:
            yield cluster, log_dir
        finally:
            cluster.close()


def main() -> int:
    arguments = parse()
    isolate()
    plan = Plan(
        seed=arguments.seed,
        num_requests=arguments.requests or (130 if arguments.quick else 2000),
        num_faults=arguments.faults or (9 if arguments.quick else 60),
        num_questions=24 if arguments.quick else 96,
        concurrency=12 if arguments.quick else 24,
        longest_prompt=400,
        longest_answer=160 if arguments.quick else 320,
        request_timeout_s=45.0,
        cluster=arguments.cluster,
        transport=arguments.transport,
        checksum=arguments.checksum,
        allow_slow=arguments.allow_slow,
    )

    async def live(cluster: ClusterProcess, log_dir: Path) -> Result:
        reference = asyncio.create_task(asyncio.to_thread(Reference, ROOT / "engine" / "demo"))
        await asyncio.to_thread(cluster.wait_ready)
        return await run_chaos(cluster, plan, reference, log_dir)

    with started(plan, arguments.logs) as (cluster, log_dir):
        result = asyncio.run(live(cluster, log_dir))
    return 0 if report(result, plan) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, help="how many (default 2000)")
    parser.add_argument("--faults", type=int, help="how many (default 60)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument(
        "--cluster", choices=["split", "mixed"], default="split", help="2 prefill + 2 decode, or 2 mixed"
    )
    parser.add_argument("--transport", choices=["auto", "shm", "ucx", "collective"], default="auto")
    parser.add_argument("--checksum", action="store_true", help="checksums on every block")
    parser.add_argument("--allow-slow", action="store_true", help="serve on links that measure slow on a busy machine")
    parser.add_argument("--logs", type=Path, help="keep the cluster's logs in this folder")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
