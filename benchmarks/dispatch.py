"""How fast the coordinator decides, what its knowledge costs, and how soon it has it again.

    python -m benchmarks.dispatch [--quick] [--only PART ...]

- policy: the conductor alone, on one core: `ttft_min` with predicted admission, prompts of 2,048 to 8,192 tokens in
  blocks of 16 that continue conversations. Decisions a second at 64 workers, beside two heartbeats a second of each,
  in batches of 64 as gateways ask, and one by one; then one by one their 99th percentile at 1,000 workers, and how the
  mean grows from 10 to 1,000. Seconds are those of the core (CPU
  time of the thread), so that other programs on the machine count as little as may be.
- memory: what the process gains for each block of a directory of ten million, of 64 workers.
- rpc: a `tandem coordinator` process, 64 light workers that beat and hold a million blocks, and one client that asks in
  batches of 64 as a gateway does: requests a second, over gRPC, by the wall clock. Then the coordinator is killed, and
  the time taken from when the next one listens to when it knows all workers and all blocks.

`--quick` decides fewer requests and asks for a shorter time; nothing else is smaller.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
from dataclasses import dataclass

from benchmarks.dispatch_policy import Decided, bytes_per_block, decide
from benchmarks.dispatch_rpc import BATCH, serve
from benchmarks.report import finish, print_table, quantile_ms

PARTS = ("policy", "memory", "rpc")
NUM_WORKERS = 64
NUM_BLOCKS = 1_000_000
MEMORY_BLOCKS = 10_000_000
#: Virtual requests a second and worker: what keeps prefill workers of this size about busy.
RATE_PER_WORKER = 3.0

_CHILD = "--memory-child"


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    num_decisions: int
    ask_for_s: float


FULL = Effort(num_decisions=30_000, ask_for_s=20.0)
QUICK = Effort(num_decisions=3_000, ask_for_s=4.0)


def policy_figures(effort: Effort) -> dict[str, float]:
    rows: list[Decided] = []
    for num_workers, batch in ((10, 1), (NUM_WORKERS, 1), (NUM_WORKERS, BATCH), (1000, 1)):
        rate_per_s = RATE_PER_WORKER * num_workers
        rows.append(decide(num_workers, NUM_BLOCKS, effort.num_decisions, rate_per_s, batch=batch))
    print_table(
        "the conductor alone: ttft_min, a directory of a million blocks, seconds of one core",
        [
            "workers",
            "together",
            "decisions",
            "decisions/s",
            "mean us",
            "p50 us",
            "p99 us",
            "words us",
            "beat us",
            "refused",
        ],
        [
            [
                row.num_workers,
                row.batch,
                len(row.took_s),
                row.per_s,
                1e6 * row.mean_s,
                1e6 * row.quantile_s(0.5),
                1e6 * row.quantile_s(0.99),
                1e6 * row.words_s,
                1e6 * row.beat_s,
                row.num_refused,
            ]
            for row in rows
        ],
    )
    few, single, usual, many = rows
    return {
        "decisions_per_s_64": usual.per_s,
        "decisions_per_s_64_single": single.per_s,
        "p99_ms_1000": 1e3 * many.quantile_s(0.99),
        "cost_1000_over_10": many.mean_s / few.mean_s,
    }


def memory_figures() -> dict[str, float]:
    """In a process of its own: what others left behind would be taken again, and count for nothing."""
    command = [sys.executable, "-m", "benchmarks.dispatch", _CHILD]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=os.environ)
    found: float = json.loads(done.stdout)
    print(f"\nmemory: {found:.1f} bytes for each of {MEMORY_BLOCKS:,} blocks")
    return {"bytes_per_block": found}


def rpc_figures(effort: Effort) -> dict[str, float]:
    served = asyncio.run(serve(NUM_WORKERS, NUM_BLOCKS, effort.ask_for_s))
    print_table(
        "a coordinator process over rpc, in batches of 64",
        [
            "workers",
            "blocks",
            "requests/s",
            "call p50 ms",
            "call p99 ms",
            "cpu us",
            "decision us",
            "hits",
            "recovery s",
        ],
        [
            [
                served.num_workers,
                served.num_blocks,
                served.requests_per_s,
                quantile_ms(served.call_s, 0.5),
                quantile_ms(served.call_s, 0.99),
                1e6 * served.cpu_s,
                1e6 * served.decision_s,
                f"{served.hit_share:.0%}",
                served.recovery_s,
            ]
        ],
    )
    print(f"outcomes: {', '.join(f'{count} {outcome}' for outcome, count in served.outcomes.most_common())}")
    return {"rpc_requests_per_s": served.requests_per_s, "recovery_s_64": served.recovery_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument(_CHILD, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_child:
        print(json.dumps(bytes_per_block(MEMORY_BLOCKS, NUM_WORKERS)))
        return
    effort = QUICK if options.quick else FULL
    figures: dict[str, float] = {}
    if "policy" in options.only:
        figures |= policy_figures(effort)
    if "memory" in options.only:
        figures |= memory_figures()
    if "rpc" in options.only:
        figures |= rpc_figures(effort)
    finish("dispatch", figures)


if __name__ == "__main__":
    main()
