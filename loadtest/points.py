"""What a load test consists of: one run, a run at each of several rates, or a search for the highest good one."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from contracts.errors import ConfigError
from loadtest.conduct import Conductor, Played, Side
from loadtest.plan import Plan
from loadtest.report.document import RateResult, ServerGauges, ServerRun
from loadtest.validity import ClientUsage
from workload.figures import summarise
from workload.goodput import search

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

    from loadtest.flags import RunFlags
    from loadtest.prepare import Server
    from workload.goodput import GoodputSearch
    from workload.traffic import Traffic

DEFAULT_ROUNDS = 4
MAX_RATES = 100
#: A search stays within so many times the workload's own rate, up and down, and within so many runs.
SEARCH_FACTOR = 64.0
SEARCH_RUNS = 16
#: Seeds of the prompts of one run after another.
_SEED_STEP = 1_000_003


class Stopped(Exception):
    """A search cannot go on; says why."""


@dataclass(slots=True, kw_only=True)
class _Tried:
    """One server's runs at several rates: the points of all, and the whole of the one that is reported in full."""

    rates: list[RateResult]
    best: ServerRun | None = None


class Points:
    """Carries out what the flags ask for. Raises ConfigError at once for rates that cannot be."""

    def __init__(self, traffic: Traffic, seed: int, flags: RunFlags) -> None:
        self._traffic = traffic
        self._seed = seed
        self._flags = flags
        self._rates_rps = _rates(flags.rates)
        self._base_rps = traffic.totals.rate_rps
        if (flags.find_goodput or self._rates_rps) and self._base_rps is None:
            raise ConfigError("all requests of the workload come at once: it has no rate to vary")
        self._conductor = Conductor(concurrency=flags.concurrency)
        self._num_runs = 0
        #: What a reader must know before trusting a figure.
        self.warnings: list[str] = []
        #: A search ended where the client failed, not the server.
        self.client_was_limit = False
        self._lengthened: set[str] = set()

    @property
    def can_be_paired(self) -> bool:
        """Whether all servers were asked the same at the same rate."""
        return not (self._flags.find_goodput or self._rates_rps)

    @property
    def was_stopped(self) -> bool:
        return self._conductor.was_stopped

    def num_rounds(self, num_servers: int) -> int:
        return 1 if num_servers == 1 else self._flags.rounds or DEFAULT_ROUNDS

    def run(self, runner: asyncio.Runner, servers: Sequence[Server], plan: Plan) -> tuple[ServerRun, ...]:
        """One for each server. Raises ConfigError for rounds that the workload is too short for."""
        try:
            plan.rounds(self.num_rounds(len(servers)))
        except ValueError as error:
            raise ConfigError(f"--rounds: {error}") from error
        if self._flags.find_goodput:
            return tuple(self._search(runner, server, plan) for server in servers)
        if self._rates_rps:
            return self._sweep(runner, servers, plan)
        return self._play(runner, servers, plan, what="sending")

    # --- one run ------------------------------------------------------------------------------------

    def _play(
        self, runner: asyncio.Runner, servers: Sequence[Server], plan: Plan, *, what: str, decide: bool = False
    ) -> tuple[ServerRun, ...]:
        """Prompts are others in each run: what a server's cache kept of one would make the next one faster."""
        seed = self._seed + _SEED_STEP * self._num_runs
        self._num_runs += 1
        with ExitStack() as stack:
            sides = [
                Side(
                    target=server.known.target,
                    client=server.client,
                    bodies=stack.enter_context(server.bodies(plan, seed)),
                    limits=server.limits,
                )
                for server in servers
            ]
            if self._num_runs > 1:
                for side in sides:
                    runner.run(self._conductor.settle(side))
            played = runner.run(
                self._conductor.play(
                    sides,
                    plan,
                    what=what,
                    num_rounds=self.num_rounds(len(sides)),
                    decide=self._traffic.slos if decide else None,
                )
            )
        for each in sides:
            self._note_lengthened(each)
        return tuple(self._measured(each, server, plan) for each, server in zip(played, servers, strict=True))

    def _measured(self, played: Played, server: Server, plan: Plan) -> ServerRun:
        return ServerRun.of(
            played.target,
            played.records,
            self._traffic.slos,
            client=ClientUsage(
                cpu_share=played.client_cpu_share, loop_delay=summarise(np.asarray(played.loop_delays_s))
            ),
            max_lag_ms=self._flags.max_send_lag_ms,
            num_planned=plan.num_requests,
            gauges=_gauges(played),
            notes=(*server.known.notes, *_without_gauges(played)),
        )

    def _at_rate(self, plan: Plan, rate_rps: float) -> Plan:
        """The plan with its items closer together or farther apart."""
        assert self._base_rps is not None
        items = self._traffic.items(rate_rps / self._base_rps)
        return Plan.of(items, num_warmup_items=plan.num_warmup_items, cancel_after=plan.cancel_after)

    # --- several rates ------------------------------------------------------------------------------

    def _sweep(self, runner: asyncio.Runner, servers: Sequence[Server], plan: Plan) -> tuple[ServerRun, ...]:
        tried = [_Tried(rates=[]) for _ in servers]
        for rate_rps in self._rates_rps:
            runs = self._play(runner, servers, self._at_rate(plan, rate_rps), what=f"{rate_rps:,.3g} requests/s")
            for each, run in zip(tried, runs, strict=True):
                self._note(each, rate_rps, run)
            if self.was_stopped:
                break
        return tuple(_in_full(each, None) for each in tried)

    def _search(self, runner: asyncio.Runner, server: Server, plan: Plan) -> ServerRun:
        assert self._base_rps is not None
        tried = _Tried(rates=[])

        def attainment_at(rate_rps: float) -> float:
            what = f"{server.known.target.name} at {rate_rps:,.3g} requests/s"
            (run,) = self._play(runner, [server], self._at_rate(plan, rate_rps), what=what, decide=True)
            self._note(tried, rate_rps, run)
            if self.was_stopped:
                raise Stopped("it was interrupted")
            if run.metrics.num_finished == 0:
                # Lower rates would take ever longer to tell the same.
                raise Stopped("no request finished")
            return run.metrics.attainment.joint

        found: GoodputSearch | None = None
        try:
            found = search(
                attainment_at,
                start_rps=self._base_rps,
                low_rps=self._base_rps / SEARCH_FACTOR,
                high_rps=self._base_rps * SEARCH_FACTOR,
                target=self._flags.target_attainment,
                tolerance=self._flags.tolerance,
                max_runs=SEARCH_RUNS,
            )
        except Stopped as why:
            self.warnings.append(f"{server.known.target.name}: the search for goodput ended early: {why}")
        if any(point.rate_rps == found.missed_rps and not point.valid for point in tried.rates if found):
            self.client_was_limit = True
            self.warnings.append(
                f"{server.known.target.name}: above the goodput that was found the client was the limit, not the server"
            )
        return _in_full(tried, found)

    def _note_lengthened(self, side: Side) -> None:
        if side.bodies.num_lengthened and side.target.name not in self._lengthened:
            self._lengthened.add(side.target.name)
            self.warnings.append(
                f"{side.target.name}: {side.bodies.num_lengthened:,} prompts could not be as short as planned: what "
                f"the server adds to them is as long"
            )

    def _note(self, tried: _Tried, rate_rps: float, run: ServerRun) -> None:
        """Keeps the run of the highest rate with enough attainment; before there is one, of the lowest rate."""
        if self.was_stopped and tried.best is not None:
            # The first seconds of a rate that is too high look good.
            return
        tried.rates.append(RateResult.of(rate_rps, run.metrics, run.validity))
        if not run.validity.valid:
            self.warnings.append(
                f"{run.name} at {rate_rps:,.3f} requests/s: the client was the bottleneck: {run.validity.reasons[0]}"
            )
        target = self._flags.target_attainment
        best = tried.best
        good = run.metrics.attainment.joint >= target
        if best is None:
            tried.best = run
            return
        best_is_good = best.metrics.attainment.joint >= target
        is_faster = run.metrics.offered_rps > best.metrics.offered_rps
        if (good and (not best_is_good or is_faster)) or (not good and not best_is_good and not is_faster):
            tried.best = run


def _in_full(tried: _Tried, found: GoodputSearch | None) -> ServerRun:
    assert tried.best is not None
    return msgspec.structs.replace(tried.best, search=found, rates=tuple(tried.rates))


def _without_gauges(played: Played) -> tuple[str, ...]:
    if played.no_gauges_because is None:
        return ()
    return (f"the server's own count of its requests ends early, or is missing: {played.no_gauges_because}",)


def _gauges(played: Played) -> ServerGauges | None:
    if not played.gauges:
        return None
    at_s, running, waiting = (np.array(column, dtype=np.float64) for column in zip(*played.gauges, strict=True))
    return ServerGauges(at_s=at_s, running=running, waiting=waiting)


def _rates(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--rates {text!r}: write numbers with commas, such as 1,2,4") from error
    if not all(0 < rate < float("inf") for rate in rates) or len(rates) > MAX_RATES:
        raise ConfigError(f"--rates {text}: each must be above 0, and at most {MAX_RATES} of them")
    return rates
