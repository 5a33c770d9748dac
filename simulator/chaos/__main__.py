"""`python -m simulator.chaos`: play one seed with its whole log, or many and tell which failed."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time

from simulator.chaos.campaign import explain, play_seeds, run_campaign
from simulator.chaos.trial import Verdict, try_seed

#: So many trials must reach every failpoint and rare path.
ENOUGH_SEEDS = 200


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulator.chaos", description=__doc__)
    parser.add_argument("--seed", type=_positive, help="play this seed alone and print its whole event log")
    parser.add_argument("--seeds", type=_positive, default=200, help="how many seeds (default 200)")
    parser.add_argument("--first", type=_positive, default=1, help="the first of them (default 1)")
    parser.add_argument("--processes", type=_positive, default=os.cpu_count() or 1)
    parser.add_argument("--stride", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        if arguments.child:
            play_seeds(arguments.first, arguments.seeds, arguments.stride)
            return 0
        if arguments.seed is not None:
            return _one(arguments.seed)
        return asyncio.run(_many(arguments.first, arguments.seeds, arguments.processes))
    except KeyboardInterrupt:
        return 130


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {number}")
    return number


def _one(seed: int) -> int:
    verdict = try_seed(seed, sink=print)
    print(f"\nseed {seed}: {verdict.scenario}")
    print(f"digest {verdict.digest}, {verdict.virtual_s:.1f} virtual seconds, requests {verdict.outcomes}")
    for problem in verdict.problems:
        print(f"  ! {problem}")
    print("it held" if not verdict.problems else f"{len(verdict.problems)} problems")
    return 1 if verdict.problems else 0


async def _many(first: int, count: int, num_processes: int) -> int:
    started_s = time.monotonic()
    done = 0

    def tell(verdict: Verdict) -> None:
        nonlocal done
        done += 1
        if verdict.problems:
            print(explain(verdict), flush=True)
        if done % max(1, count // 20) == 0:
            took_s = time.monotonic() - started_s
            print(f"{done:>8d} of {count} trials, {60 * done / took_s:.0f} a minute", file=sys.stderr, flush=True)

    campaign = await run_campaign(first, count, num_processes=num_processes, on_verdict=tell)
    took_s = time.monotonic() - started_s
    print(f"{campaign.num_trials} trials in {took_s:.1f} s, {campaign.virtual_s:.0f} virtual seconds")
    print(f"requests: {dict(sorted(campaign.outcomes.items()))}")
    for name, number in sorted(campaign.counts.items()):
        print(f"{number:>10d}  {name}")
    for name in campaign.never_reached():
        print(f"     never  {name}")
    for sentence in campaign.broken:
        print(f"! {sentence}")
    print("all held" if campaign.held else f"{campaign.num_failed} trials failed")
    too_tame = count >= ENOUGH_SEEDS and campaign.never_reached()
    return 0 if campaign.held and not too_tame else 1


if __name__ == "__main__":
    sys.exit(main())
