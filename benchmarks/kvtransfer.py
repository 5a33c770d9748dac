"""How fast KV blocks move between two processes, beside what the same machine does without Tandem.

    python -m benchmarks.kvtransfer [--quick]

Per transport, for blocks of 16 KiB to 4 MiB and pulls of 1 to 256 MiB, scattered on both sides: GB/s, latency,
processor time, and for how long the event loop stalls. In the same run, taking turns with it between the same two
processes:

- shm beside memcpy over the same two mappings (`ctypes.memmove` or numpy, piece by piece: the better of the two);
- ucx beside NIXL's own Python interface (one READ of prepared descriptors, polled);
- collective beside gloo's send and receive (contiguous, the sender already waiting).

Nothing meets a page for the first time, except where that is the question. A ratio is the median over its cells of
Tandem's GB/s by that of the other side. Then: one block handed off between two workers' lease services over gRPC, from
the offer to its adoption; the cost of checksums; and Mooncake's transfer engine over TCP, where it installs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict
from statistics import median
from typing import Any

from benchmarks.kvtransfer_reader import Cell, Duel
from benchmarks.mooncake_run import NotRun, measure_mooncake
from benchmarks.report import finish, print_table, quantile_ms

KIB, MIB = 1 << 10, 1 << 20

QUICK_CELLS = tuple((block, total) for block in (16 * KIB, MIB) for total in (MIB, 16 * MIB, 64 * MIB))
FULL_CELLS = tuple(
    (block, total)
    for block in (16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB)
    for total in (MIB, 16 * MIB, 64 * MIB, 256 * MIB)
    if block <= total
)
#: Small pieces take it seconds each time.
MOONCAKE_CELLS = ((16 * KIB, MIB), (16 * KIB, 16 * MIB), (MIB, 16 * MIB), (MIB, 64 * MIB), (4 * MIB, 64 * MIB))
STALL_CELL = (16 * KIB, 256 * MIB)
COUNTS = (10, 100, 1000, 10_000)

#: Tandem's transport, what lies beneath it, and the figure of the two.
DUELS = (
    ("shm", ("memcpy-ctypes", "memcpy-numpy"), "shm_over_memcpy"),
    ("ucx", ("nixl",), "ucx_over_nixl"),
    ("collective", ("gloo",), "collective_over_gloo"),
)

#: What a duel needs besides Tandem.
NEEDS = {"ucx": "nixl_cu12"}

DUEL_TIMEOUT_S = 240.0


def run_duel(duel: Duel) -> dict[str, Any]:
    # gRPC would otherwise remark on every process that is started.
    environment = os.environ | {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "ERROR", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kvtransfer_reader"],
        input=json.dumps(asdict(duel)),
        stdout=subprocess.PIPE,
        text=True,
        timeout=DUEL_TIMEOUT_S,
        check=True,
        env=environment,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def cells_of(rows: list[dict[str, Any]]) -> list[Cell]:
    return [Cell(**row) for row in rows]


def rate(cell: Cell) -> float:
    """GB/s of the median pull."""
    return cell.total_bytes / median(cell.seconds) / 1e9


def ratios(cells: list[Cell], ours: str) -> dict[tuple[int, int], float]:
    """Ours by the best of the others, by block and total bytes."""
    found: dict[tuple[int, int], float] = {}
    for cell in cells:
        if cell.lane == ours:
            key = (cell.block_bytes, cell.num_blocks)
            others = [each for each in cells if each.lane != ours and (each.block_bytes, each.num_blocks) == key]
            found[cell.block_bytes, cell.total_bytes] = rate(cell) / max(map(rate, others))
    return found


def print_cells(cells: list[Cell], ratio: dict[tuple[int, int], float], ours: str) -> None:
    rows = [
        [
            cell.lane,
            f"{cell.block_bytes // KIB} KiB",
            f"{cell.total_bytes // MIB} MiB",
            rate(cell),
            quantile_ms(cell.seconds, 0.5, digits=3),
            quantile_ms(cell.seconds, 0.99, digits=3),
            len(cell.seconds),
            cell.reader_cpu_s / len(cell.seconds) / cell.total_bytes * 1e9,
            cell.holder_cpu_s / len(cell.seconds) / cell.total_bytes * 1e9,
            ratio[cell.block_bytes, cell.total_bytes] if cell.lane == ours else "",
        ]
        for cell in cells
    ]
    columns = ["lane", "block", "total", "GB/s", "p50 ms", "p99 ms", "n", "reader CPU s/GB", "holder", "ratio"]
    print_table(f"{ours}, pulls of scattered blocks", columns, rows)


def cost_per_block(rows: list[dict[str, Any]], ours: str) -> float:
    """Of the longest pull by that of the shortest."""
    cells = cells_of(rows)
    columns = ["microseconds per block", *(f"{count} blocks" for count in COUNTS)]
    by_lane: dict[str, list[float]] = {}
    for cell in cells:
        by_lane.setdefault(cell.lane, []).append(median(cell.seconds) / cell.num_blocks * 1e6)
    print_table("cost of a 16 KiB block", columns, [[lane, *values] for lane, values in by_lane.items()])
    return by_lane[ours][-1] / by_lane[ours][0]


def print_stalls(stalls: list[dict[str, Any]], ours: str) -> float:
    """The longest, in milliseconds."""
    longest_ms = 0.0
    for row in stalls:
        *during, idle = row["seconds"]
        longest_ms = max(longest_ms, max(during) * 1e3)
        print(
            f"  {ours}: the event loop came late by {median(during) * 1e3:.2f} ms at most during a pull of "
            f"{row['total_bytes'] // MIB} MiB (median of {len(during)}; longest {max(during) * 1e3:.2f}; "
            f"without a pull {idle * 1e3:.2f})"
        )
    return longest_ms


def print_checksums(rates: dict[str, float], cells: list[Cell]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for block_bytes, checksum_rate in sorted((int(block), rate) for block, rate in rates.items()):
        pulls = [rate(cell) for cell in cells if cell.lane == "shm" and cell.block_bytes == block_bytes]
        share = median(pulls) / checksum_rate
        print(
            f"  xxh3 of {block_bytes // KIB} KiB blocks: {checksum_rate:.1f} GB/s on either side, each "
            f"{100 * share:.0f} % of the time of a pull over shm"
        )
        figures[f"checksum_gbps_{block_bytes // KIB}k"] = checksum_rate
        figures[f"checksum_share_{block_bytes // KIB}k"] = share
    return figures


def shm_figures(found: dict[str, Any], cells: list[Cell], ratio: dict[tuple[int, int], float]) -> dict[str, float]:
    figures = {
        "shm_over_memcpy": median(value for (block, _), value in ratio.items() if block >= MIB),
        "shm_16k_over_memcpy": median(value for (block, _), value in ratio.items() if block == 16 * KIB),
        "cost_per_block_10000_over_10": cost_per_block(found["counts"], "shm"),
    }
    print()
    figures |= print_checksums(found["checksums"], cells)
    touch = found["first_touch"]
    figures["shm_first_pull_gbps"] = touch["populated"]
    print(
        f"  first pull into a pool, 128 MiB: {touch['untouched']:.2f} GB/s where it makes the pages, "
        f"{touch['populated']:.2f} where they were made before"
    )
    adopted_s, released_s, call_s = (found["handoffs"][key] for key in ("adopted_s", "released_s", "call_s"))
    print(
        f"  one block, offer to adopted: p50 {quantile_ms(adopted_s, 0.5, digits=2)} ms, "
        f"p99 {quantile_ms(adopted_s, 0.99, digits=2)} (n={len(adopted_s)}); "
        f"until the holder's block is free again: p50 {quantile_ms(released_s, 0.5, digits=2)} ms; "
        f"one call alone: p50 {quantile_ms(call_s, 0.5, digits=2)} ms"
    )
    return figures | {"one_block_ms_p50": 1e3 * median(adopted_s)}


def measure(cells: tuple[tuple[int, int], ...], cell_s: float, chosen: list[str], handoffs: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    stalls_ms: list[float] = []
    for ours, others, figure in DUELS:
        if ours not in chosen:
            continue
        if ours in NEEDS and importlib.util.find_spec(NEEDS[ours]) is None:
            print(f"\n{ours}: not run, {NEEDS[ours]} is not installed")
            continue
        is_shm = ours == "shm"
        duel = Duel(
            lanes=(ours, *others),
            cells=cells,
            cell_s=cell_s,
            counts=COUNTS if is_shm else (),
            stall_cells=(STALL_CELL,),
            checksums=is_shm,
            handoffs=handoffs if is_shm else 0,
        )
        found = run_duel(duel)
        measured = cells_of(found["cells"])
        ratio = ratios(measured, ours)
        print_cells(measured, ratio, ours)
        stalls_ms.append(print_stalls(found["stalls"], ours))
        if is_shm:
            figures |= shm_figures(found, measured, ratio)
        else:
            figures[figure] = median(ratio.values())
    if stalls_ms:
        figures["loop_stall_ms"] = max(stalls_ms)
    return figures


def mooncake_figures(cells: tuple[tuple[int, int], ...], cell_s: float, *, install: bool) -> dict[str, float]:
    try:
        found = measure_mooncake(cells, cell_s, install=install)
    except NotRun as reason:
        print(f"\nMooncake over TCP: not run: {reason}")
        return {}
    measured = [Cell(lane="mooncake-tcp", **row) for row in found]
    rows = [
        [
            cell.lane,
            f"{cell.block_bytes // KIB} KiB",
            f"{cell.total_bytes // MIB} MiB",
            rate(cell),
            quantile_ms(cell.seconds, 0.5, digits=3),
            quantile_ms(cell.seconds, 0.99, digits=3),
            len(cell.seconds),
        ]
        for cell in measured
    ]
    print_table(
        "Mooncake's transfer engine over TCP", ["lane", "block", "total", "GB/s", "p50 ms", "p99 ms", "n"], rows
    )
    return {"mooncake_tcp_gbps": max(map(rate, measured))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 60 s; fewer sizes")
    parser.add_argument("--only", nargs="+", choices=[each[0] for each in DUELS], help="these transports alone")
    arguments = parser.parse_args()
    chosen = arguments.only or [each[0] for each in DUELS]
    cells, cell_s, handoffs = (QUICK_CELLS, 0.3, 200) if arguments.quick else (FULL_CELLS, 1.0, 1000)
    figures = measure(cells, cell_s, chosen, handoffs)
    if arguments.only is None:
        figures |= mooncake_figures(MOONCAKE_CELLS, cell_s, install=not arguments.quick)
    finish("kvtransfer", figures)


if __name__ == "__main__":
    main()
