"""One load test from its flags to its files: the body of `tandem loadtest`."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import uvloop

from contracts.errors import ConfigError
from loadtest import machine, servers
from loadtest.files import ReportFolder
from loadtest.plan import Plan, warmup_items
from loadtest.points import Points
from loadtest.prepare import Wanted, prepare
from loadtest.prompts.tokens import Vocabulary
from loadtest.report.beside import read_beside
from loadtest.report.compare import compare_reports, compare_runs
from loadtest.report.document import LoadReport, read_report
from loadtest.report.table import comparison_text, report_text
from workload.chats import Chat
from workload.traffic import build_traffic

if TYPE_CHECKING:
    from pathlib import Path

    from loadtest.flags import ReportFlags, RunFlags, ServerFlags
    from loadtest.prepare import Server
    from loadtest.report.document import ServerRun
    from workload.flags import WorkloadFlags
    from workload.request import WorkloadRequest
    from workload.traffic import Traffic

#: Exit statuses.
MEASURED = 0
#: Of no server did a single request finish.
FAILED = 1
#: The client was the bottleneck, or nothing was measured.
INVALID = 3
INTERRUPTED = 130

#: In one run, as many records are held in memory.
MAX_REQUESTS = 2_000_000


def run_loadtest(
    url: str | None, server: ServerFlags, workload: WorkloadFlags, run: RunFlags, report: ReportFlags, *, command: str
) -> int:
    """Measures, prints the report, writes the files; returns the exit status. Raises ConfigError before it starts, or
    where a server does not answer at all."""
    if report.compare is not None:
        if url is not None or server.servers is not None:
            raise ConfigError("--compare: compares two reports, and asks no server")
        return _compare(*report.compare)
    urls = servers.server_urls(url, server.servers)
    _check(run, num_servers=len(urls))
    vocabulary = None if server.tokenizer is None else Vocabulary.from_file(server.tokenizer)
    traffic = build_traffic(workload, None if vocabulary is None else vocabulary.count)
    points = Points(traffic, workload.seed, run)
    items = tuple(traffic.items())
    plan = _plan(items, traffic, run)
    beside = tuple(each for path in report.beside for each in read_beside(path))
    wanted = Wanted(
        flags=server,
        headers=servers.request_headers(server, os.environ),
        extra_body=servers.extra_body(server),
        limits=servers.limits(run),
        vocabulary=vocabulary,
        has_chats=traffic.totals.num_chats > 0,
        has_text=any(isinstance(item, Chat) and item.turns[0].text is not None for item in items),
        longest_tokens=max(map(_longest_tokens, items)),
    )
    with ReportFolder(report) as folder:
        started_at, hardware, versions = machine.started_at(), machine.describe(), machine.versions()
        machine.raise_file_limit()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            ready = runner.run(_prepare_all(urls, wanted))
            try:
                _tell(ready, traffic)
                runs = points.run(runner, ready, plan)
            finally:
                runner.run(_close_all(ready))
        document = LoadReport(
            loadtest={
                "command": command,
                "started_at": started_at,
                "workload": traffic.facts,
                "settings": {
                    "concurrency": run.concurrency,
                    "warmup": run.warmup,
                    "retries": run.retries,
                    "limits": asdict(wanted.limits),
                    "rounds": points.num_rounds(len(urls)),
                    "prompts_as": {each.known.target.name: each.known.found.form for each in ready},
                    "vocabulary": {each.known.target.name: each.known.vocabulary.source for each in ready},
                    # Names alone: values may be keys.
                    "extra_body": sorted(wanted.extra_body),
                },
                "machine": hardware,
                "versions": versions,
            },
            workload=traffic.text,
            workload_digest=_digest(items, plan, workload.seed),
            slos=traffic.slos,
            runs=runs,
            comparisons=compare_runs(runs, traffic.slos) if len(runs) > 1 and points.can_be_paired else (),
            beside=beside,
            warnings=(*traffic.warnings, *_same_url(urls), *points.warnings),
        )
        print(report_text(document), end="")
        print(f"wrote {folder.write(document)}")
    return _status(runs, points)


def _status(runs: tuple[ServerRun, ...], points: Points) -> int:
    if points.was_stopped:
        return INTERRUPTED
    if not any(run.metrics.num_finished for run in runs):
        return FAILED
    return MEASURED if all(run.validity.valid for run in runs) and not points.client_was_limit else INVALID


def _compare(a: Path, b: Path) -> int:
    """Raises ConfigError when the two have nothing to compare."""
    comparisons = compare_reports(read_report(a), read_report(b))
    if not comparisons:
        raise ConfigError(f"--compare: {a} and {b} have no server of the same name")
    for comparison in comparisons:
        print(comparison_text(comparison), end="")
    return MEASURED


def _check(run: RunFlags, *, num_servers: int) -> None:
    if run.concurrency is not None:
        if not 1 <= run.concurrency <= MAX_REQUESTS:
            raise ConfigError(f"--concurrency {run.concurrency}: must be between 1 and {MAX_REQUESTS:,}")
        if run.find_goodput or run.rates is not None:
            raise ConfigError("--concurrency: a closed loop has no rate to vary")
    if run.find_goodput and run.rates is not None:
        raise ConfigError("--find-goodput and --rates: give one of them")
    if run.rounds is not None and num_servers < 2:
        raise ConfigError("--rounds: needs several --servers")
    if not 0 < run.target_attainment <= 1:
        raise ConfigError(f"--target-attainment {run.target_attainment:g}: must be above 0, at most 1")
    if not 0 < run.tolerance < 1:
        raise ConfigError(f"--tolerance {run.tolerance:g}: must be above 0 and below 1")
    if not 0 < run.max_send_lag_ms < float("inf"):
        raise ConfigError(f"--max-send-lag-ms {run.max_send_lag_ms:g}: must be above 0")


def _plan(items: tuple[WorkloadRequest | Chat, ...], traffic: Traffic, run: RunFlags) -> Plan:
    if traffic.totals.num_requests > MAX_REQUESTS:
        raise ConfigError(f"{traffic.totals.num_requests:,} requests: at most {MAX_REQUESTS:,} in one run; --requests")
    first = until_s = None
    if run.warmup is not None:
        if run.warmup.strip().isdecimal():
            first = int(run.warmup)
        else:
            until_s = servers.duration_s("--warmup", run.warmup)
            if run.concurrency is not None:
                raise ConfigError(f"--warmup {run.warmup}: a closed loop heeds no arrival times; give a number")
    try:
        plan = Plan.of(items, num_warmup_items=warmup_items(items, first=first, until_s=until_s))
    except ValueError as error:
        raise ConfigError(f"--warmup {run.warmup}: {error}") from error
    return plan if traffic.cancel is None else plan.with_cancels(traffic.cancel.after_tokens)


async def _prepare_all(urls: dict[str, str], wanted: Wanted) -> tuple[Server, ...]:
    ready: list[Server] = []
    try:
        for name, base_url in urls.items():
            ready.append(await prepare(name, base_url, wanted, machine.now_s))
    except BaseException:
        await _close_all(tuple(ready))
        raise
    return tuple(ready)


async def _close_all(ready: tuple[Server, ...]) -> None:
    for server in ready:
        await server.client.close()


def _tell(ready: tuple[Server, ...], traffic: Traffic) -> None:
    """Before a run that may take long: whether it is the right one."""
    print(f"workload: {traffic.text}", file=sys.stderr)
    for server in ready:
        target, known = server.known.target, server.known
        form = "token ids" if known.found.form == "ids" else "text"
        print(
            f"{target.name}: {target.model} at {target.base_url}, {target.endpoint}, prompts as {form} "
            f"({known.vocabulary.source})",
            file=sys.stderr,
        )
        for note in known.notes:
            print(f"{target.name}: {note}", file=sys.stderr)


def _same_url(urls: dict[str, str]) -> tuple[str, ...]:
    if len(set(urls.values())) == len(urls):
        return ()
    return ("servers of one address are asked the same prompts: the later one may find them in the cache",)


def _longest_tokens(item: WorkloadRequest | Chat) -> int:
    if isinstance(item, Chat):
        return item.prompt_tokens()[-1] + item.turns[-1].output_tokens
    return item.prompt_tokens + item.output_tokens


def _digest(items: tuple[WorkloadRequest | Chat, ...], plan: Plan, seed: int) -> str:
    """Of what is asked, whenever: lengths, shared prefixes, classes and cancellations."""
    digest = hashlib.sha256(f"{seed} {plan.num_warmup_items}".encode())
    for index, item in enumerate(items):
        digest.update(repr(item._replace(arrival_s=0.0)).encode())
        digest.update(repr(plan.record(index, 0).cancel_after_tokens).encode())
    return digest.hexdigest()
