"""Whether the load test can be believed: how much one client carries, and whether other clients see the same.

    python -m benchmarks.loadtest [--quick] [--aiperf PROGRAM] [--vllm PROGRAM] [--only PART ...] [--on SERVER ...]

- capacity: 2,000 requests/s of 11 chunks each from one client process on one core, against the scripted server on
  another; then more and more, until the client calls its own run invalid.
- agreement: TTFT, TPOT and throughput as `tandem loadtest`, aiperf and `vllm bench serve` see them, on the scripted
  server, on a Tandem cluster (88 M shape, one mixed worker), and on vLLM's CPU build with the same checkpoint. Clients
  take turns on one core, servers have the other; figures are ratios of medians, ours over theirs, and
  `*_vs_other_client` is the one furthest from 1. Programs are also taken from TANDEM_AIPERF and TANDEM_VLLM.

Two cores or more. `--quick` has 8 s of capacity, and one round of agreement on the scripted server.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from pathlib import Path

from benchmarks.loadtest_agreement import SERVERS, Peers, agreement_figures
from benchmarks.loadtest_capacity import capacity_figures
from benchmarks.models import random_88m
from benchmarks.report import finish

PARTS = ("capacity", "agreement")


def program(name: str) -> Path | None:
    """From the environment; None where it is not there."""
    return Path(value) if (value := os.environ.get(f"TANDEM_{name.upper()}")) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 60 s and the time that other clients take")
    parser.add_argument("--aiperf", type=Path, default=program("aiperf"), help="the program aiperf")
    parser.add_argument("--vllm", type=Path, default=program("vllm"), help="the program vllm, with vllm[bench]")
    parser.add_argument(
        "--on", choices=SERVERS, nargs="+", default=SERVERS, help="servers that clients are compared on"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each client on each server")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="these parts alone")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        parser.error("client and server need a core each, and only one is here")
    server_core, client_core = cores[:2]
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as scratch:
        folder = Path(scratch)
        if "capacity" in arguments.only:
            figures |= capacity_figures(server_core, client_core, folder, seconds=8.0 if arguments.quick else 24.0)
        if "agreement" in arguments.only:
            figures |= asyncio.run(
                agreement_figures(
                    random_88m(folder / "88m"),
                    Peers(aiperf=arguments.aiperf, vllm=arguments.vllm),
                    server_core,
                    client_core,
                    folder,
                    rounds=1 if arguments.quick else arguments.rounds,
                    on=("scripted",) if arguments.quick else arguments.on,
                )
            )
    finish("loadtest", figures)


if __name__ == "__main__":
    main()
