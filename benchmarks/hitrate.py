"""How much of the prompts a KV store has already, by what it gives up when it is full.

    python -m benchmarks.hitrate [--quick] [--trace FILE]

The blocks of a trace (512 tokens, by hash id) go through `kvstore.eviction` as through a store's tier: every prompt is
written on arrival, a hit is an unbroken run from its start, a partial last block takes up a whole one and hits in the
tokens that it has. So LRU gives the published figures of the Mooncake conversation hour: 37.4, 29.1 and 13.8 % of the
prompt tokens without a bound, with 10 and with 3 M tokens.

- trace: every shipped policy, by size of the store; none sees the future, except that `scheduler_aware` is told of
  the 64 requests that come next, as of a queue (without one it is `cost_aware`), and Belady's knows all of it.
- robustness: what the best policy gains elsewhere: on the second half of the trace with what was learned in the first,
  and begun there; on the trace at four times its speed; on synthetic chats, whose turns forget how many there were.

The best policy is the one with most hits at 3 M tokens; `best_10m` is the same one's. With `--quick` there are fewer
sizes, and no look-ahead. The Azure trace has no ids of shared blocks: nothing can be said of it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from benchmarks.hitrate_store import Rates, belady, replay
from benchmarks.report import finish, print_table
from contracts.config import EvictionPolicyName
from workload import LogNormal, Poisson, SharedPrefixes, WorkloadRequest, at_speed, read_trace, synthetic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

TRACE = Path("../shared/traces/mooncake_conversation.jsonl")
POLICIES: tuple[EvictionPolicyName, ...] = get_args(EvictionPolicyName)
SIZES_M = (1, 2, 3, 5, 10)
QUICK_SIZES_M = (3, 10)
#: Requests that wait, for `scheduler_aware`: about 20 s of the trace.
LOOK_AHEAD = 64
BLOCK_TOKENS = 512

#: What is replayed: all of the trace, its second half alone, the trace faster, synthetic chats.
Source = Literal["trace", "second half", "fast trace", "chats"]
ELSEWHERE: tuple[tuple[Source, float], ...] = (
    ("second half", 3),
    ("second half", 10),
    ("fast trace", 3),
    ("fast trace", 10),
    ("chats", 0.3),
    ("chats", 1),
    ("chats", 3),
)


@dataclass(frozen=True, slots=True)
class Job:
    trace: Path
    source: Source
    policy: EvictionPolicyName | Literal["belady"]
    #: None: there is room for all.
    size_m: float | None
    look_ahead: int = 0


def run(job: Job) -> Rates:
    requests = load(job.trace, job.source)
    if job.size_m is None:
        num_blocks = len({hash_id for request in requests for hash_id in request.hash_ids})
    else:
        num_blocks = int(job.size_m * 1e6) // BLOCK_TOKENS
    if job.policy == "belady":
        return belady(requests, num_blocks)
    return replay(requests, job.policy, num_blocks, job.look_ahead)


@cache
def load(trace: Path, source: Source) -> Sequence[WorkloadRequest]:
    if source == "chats":
        return chats()
    requests = read_trace(trace).requests
    if source == "fast trace":
        return list(at_speed(requests, 4.0))
    return requests[len(requests) // 2 :] if source == "second half" else requests


def chats() -> list[WorkloadRequest]:
    """An hour: conversations of 3 turns on average, 2 minutes apart, behind one of 50 system prompts."""
    shape = SharedPrefixes(
        num_system_prompts=50,
        system_prompt_tokens=2 * BLOCK_TOKENS,
        mean_turns=3.0,
        mean_think_s=120.0,
        hash_block_tokens=BLOCK_TOKENS,
    )
    return list(
        synthetic(
            arrivals=Poisson(3.0),
            prompts=LogNormal(1500.0, 1.0),
            outputs=LogNormal(300.0, 0.7),
            seed=1,
            duration_s=3600.0,
            prefixes=shape,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 60 s: fewer sizes, the trace alone, no look-ahead")
    parser.add_argument("--trace", type=Path, default=TRACE, help=f"a trace with hash ids (default {TRACE})")
    arguments = parser.parse_args()
    if not arguments.trace.exists():
        parser.error(f"no trace at {arguments.trace}: give --trace FILE")
    trace: Path = arguments.trace
    if not any(request.hash_ids for request in load(trace, "trace")):
        parser.error(f"{trace} has no ids of shared blocks")
    sizes_m = QUICK_SIZES_M if arguments.quick else SIZES_M
    num_processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        if arguments.quick:
            figures = study(pool, trace, sizes_m, look_ahead=0, elsewhere=())
        else:
            figures = study(pool, trace, sizes_m, LOOK_AHEAD, ELSEWHERE)
    finish("hitrate", figures)


def study(
    pool: ProcessPoolExecutor,
    trace: Path,
    sizes_m: Sequence[float],
    look_ahead: int,
    elsewhere: Sequence[tuple[Source, float]],
) -> dict[str, float]:
    """Figures in per cent of the prompt tokens."""
    unbounded = pool.submit(run, Job(trace, "trace", "lru", None))
    asked: list[tuple[str, EvictionPolicyName | Literal["belady"], int]] = [
        *((policy, policy, 0) for policy in POLICIES if policy != "scheduler_aware"),
        ("Belady", "belady", 0),
    ]
    if look_ahead:
        asked.append((f"scheduler_aware, {look_ahead} wait", "scheduler_aware", look_ahead))
    rows: dict[str, dict[float, Future[Rates]]] = {
        name: {size_m: pool.submit(run, Job(trace, "trace", policy, size_m, look_ahead)) for size_m in sizes_m}
        for name, policy, look_ahead in asked
    }
    print_table(
        f"token hit rates by size of the store, per cent; without a bound {percent(unbounded.result().whole)}",
        ["policy", *(f"{size_m} M" for size_m in sizes_m), "3 M over lru", "2nd half, 3 M", "10 M"],
        [
            [
                name,
                *(percent(found[size_m].result().whole) for size_m in sizes_m),
                f"{found[3].result().whole / rows['lru'][3].result().whole - 1:+.1%}",
                *(percent(found[size_m].result().second_half) for size_m in (3, 10)),
            ]
            for name, found in rows.items()
        ],
    )
    shipped: list[EvictionPolicyName] = [policy for policy in POLICIES if policy in rows]
    best = max(shipped, key=lambda policy: rows[policy][3].result().whole)
    print(f"\nbest without seeing the future: {best}")
    figures = {"lru_unbounded": 100 * unbounded.result().whole}
    for size_m in sizes_m:
        for label, name in (("lru", "lru"), ("best", best), ("belady", "Belady")):
            figures[f"{label}_{size_m}m"] = 100 * rows[name][size_m].result().whole
    figures["best_over_lru_3m"] = figures["best_3m"] / figures["lru_3m"]
    figures["best_over_lru_3m_second_half"] = rows[best][3].result().second_half / rows["lru"][3].result().second_half
    if elsewhere:
        robustness(pool, trace, best, elsewhere)
    return figures


def robustness(
    pool: ProcessPoolExecutor, trace: Path, best: EvictionPolicyName, elsewhere: Sequence[tuple[Source, float]]
) -> None:
    policies: tuple[EvictionPolicyName | Literal["belady"], ...] = ("lru", best, "belady")
    jobs = [[pool.submit(run, Job(trace, source, each, size_m)) for each in policies] for source, size_m in elsewhere]
    found = [[future.result().whole for future in row] for row in jobs]
    print_table(
        "elsewhere: token hit rates, per cent",
        ["requests", "size", "lru", best, "over lru", "Belady"],
        [
            [source, f"{size_m} M", percent(lru), percent(ours), f"{ours / lru - 1:+.1%}", percent(bound)]
            for (source, size_m), (lru, ours, bound) in zip(elsewhere, found, strict=True)
        ],
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


if __name__ == "__main__":
    main()
