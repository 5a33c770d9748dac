"""From flags to the workload of a study: a trace or drawn requests, a part of it, faster, with SLO classes."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from contracts.config import parse_duration_s
from contracts.errors import ConfigError
from workload import (
    SloClass,
    WorkloadRequest,
    parse_arrivals,
    parse_outputs,
    parse_prompts,
    parse_slo,
    read_trace,
    synthetic,
)
from workload.reuse import prefix_reuse
from workload.transform import at_speed, window

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from simulator.study.flags import WorkloadFlags
    from workload import TraceSummary

DEFAULT_ARRIVALS = "poisson:1"
DEFAULT_LENGTHS = "sharegpt"
DEFAULT_NUM_REQUESTS = 1000
DEFAULT_SLO = "interactive:1000,50"
#: In one study, as many rows of its result are held in memory.
MAX_REQUESTS = 50_000_000
#: From the first arrival to the last: an idle cluster has heartbeats to simulate.
MAX_SPAN_S = 366 * 86_400.0
#: Beyond this all come at once, and say so better.
MAX_RATE_RPS = 1e9
#: What a row of the result holds.
MAX_PROMPT_TOKENS = 2**31 - 1

_MAX_DURATION_S = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Of one pass over a workload."""

    num_requests: int
    #: From the first arrival to the last.
    span_s: float
    prompt_tokens: int
    output_tokens: int

    @property
    def rate_rps(self) -> float | None:
        """None where all come at once."""
        return (self.num_requests - 1) / self.span_s if self.span_s > 0 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """A workload that can be read again and again, also faster or slower than asked for."""

    text: str
    #: Plain data that repeats it.
    facts: dict[str, object]
    slos: tuple[SloClass, ...]
    #: As asked for.
    totals: Totals
    warnings: tuple[str, ...]
    #: Before `--speed` or `--rate`, which make time run so many times faster.
    source: Callable[[], Iterable[WorkloadRequest]]
    speed: float

    def requests(self, factor: float = 1.0) -> Iterable[WorkloadRequest]:
        """At `factor` times the rate that was asked for."""
        speed = self.speed * factor
        return self.source() if speed == 1.0 else at_speed(self.source(), speed)


def build_traffic(flags: WorkloadFlags) -> Traffic:
    """Raises ConfigError that names the flag, or `file:line` of a trace."""
    _check(flags)
    slos = _slos(flags)
    warnings: tuple[str, ...] = ()
    if flags.trace is None:
        source, facts, name = _drawn(flags, slos), _drawn_facts(flags), "drawn requests"
    else:
        trace = read_trace(flags.trace)
        kept = _kept(trace.requests, flags)
        source = _classified(kept, slos, flags.seed)
        facts = {"source": "trace", "file": str(flags.trace), "sha256": _sha256(flags.trace), "summary": trace.summary}
        name = f"{flags.trace.name} ({trace.summary.kind})"
        warnings = (*_left_out(trace.summary), *_shared_prefixes(kept))
    totals = _totals(source(), flags)
    speed = _speed(flags, totals)
    totals = replace(totals, span_s=totals.span_s / speed)
    _check_time(totals)
    return Traffic(
        text=_text(name, totals, speed),
        facts={
            **facts,
            "num_requests": totals.num_requests,
            "start": flags.start,
            "duration": flags.duration,
            "speed": speed,
            "seed": flags.seed,
            "slos": slos,
        },
        slos=slos,
        totals=totals,
        warnings=warnings,
        source=source,
        speed=speed,
    )


def _check(flags: WorkloadFlags) -> None:
    if flags.trace is not None:
        drawn = [name for name in ("arrivals", "prompts", "outputs") if getattr(flags, name) is not None]
        if drawn:
            raise ConfigError(f"--{drawn[0]}: a --trace says this already")
    elif flags.start is not None:
        raise ConfigError("--start: needs a --trace")
    if flags.speed is not None and flags.rate is not None:
        raise ConfigError("--speed and --rate: give one of them")
    for name in ("speed", "rate"):
        value: float | None = getattr(flags, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} {value:g}: must be a number above 0")
    if flags.requests is not None and not 1 <= flags.requests <= MAX_REQUESTS:
        raise ConfigError(f"--requests {flags.requests}: must be between 1 and {MAX_REQUESTS:,}")


def _slos(flags: WorkloadFlags) -> tuple[SloClass, ...]:
    slos = tuple(parse_slo(text) for text in flags.slo or (DEFAULT_SLO,))
    if len({slo.name for slo in slos}) < len(slos):
        raise ConfigError(f"--slo: each class needs a name of its own: {', '.join(slo.name for slo in slos)}")
    return slos


def _drawn(flags: WorkloadFlags, slos: tuple[SloClass, ...]) -> Callable[[], Iterable[WorkloadRequest]]:
    arrivals = parse_arrivals(flags.arrivals or DEFAULT_ARRIVALS)
    prompts = parse_prompts(flags.prompts or DEFAULT_LENGTHS)
    outputs = parse_outputs(flags.outputs or DEFAULT_LENGTHS)
    duration_s = _positive_duration_s(flags)
    num_requests = flags.requests
    if num_requests is None:
        # One more than is allowed, so that a duration which brings too many is told rather than cut.
        num_requests = DEFAULT_NUM_REQUESTS if duration_s is None else MAX_REQUESTS + 1
    return lambda: synthetic(
        arrivals=arrivals,
        prompts=prompts,
        outputs=outputs,
        seed=flags.seed,
        num_requests=num_requests,
        duration_s=duration_s,
        slo_mix={slo.name: 1.0 for slo in slos},
    )


def _drawn_facts(flags: WorkloadFlags) -> dict[str, object]:
    return {
        "source": "drawn",
        "arrivals": flags.arrivals or DEFAULT_ARRIVALS,
        "prompts": flags.prompts or DEFAULT_LENGTHS,
        "outputs": flags.outputs or DEFAULT_LENGTHS,
    }


def _kept(requests: tuple[WorkloadRequest, ...], flags: WorkloadFlags) -> tuple[WorkloadRequest, ...]:
    start_s = _duration_s("--start", flags.start) or 0.0
    duration_s = _positive_duration_s(flags) or _MAX_DURATION_S
    kept = tuple(islice(window(requests, start_s, start_s + duration_s), flags.requests))
    if not kept:
        raise ConfigError(f"--start, --duration: no request of {flags.trace} arrives then")
    return kept


def _positive_duration_s(flags: WorkloadFlags) -> float | None:
    duration_s = _duration_s("--duration", flags.duration)
    if duration_s == 0:
        raise ConfigError(f"--duration {flags.duration}: must be above 0")
    return duration_s


def _duration_s(flag: str, text: str | None) -> float | None:
    """`None` when not given."""
    if text is None:
        return None
    try:
        duration_s = parse_duration_s(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from error
    if not isinstance(duration_s, float) or not 0 <= duration_s < _MAX_DURATION_S:
        raise ConfigError(f"{flag} {text}: not a possible time")
    return duration_s


def _classified(
    requests: tuple[WorkloadRequest, ...], slos: tuple[SloClass, ...], seed: int
) -> Callable[[], Iterable[WorkloadRequest]]:
    names = [slo.name for slo in slos]

    def with_class() -> Iterator[WorkloadRequest]:
        rng = random.Random(f"{seed}/slo_classes")
        for request in requests:
            yield request._replace(slo_class=names[0] if len(names) == 1 else rng.choice(names))

    return with_class


def _totals(requests: Iterable[WorkloadRequest], flags: WorkloadFlags) -> Totals:
    num_requests = prompt_tokens = output_tokens = 0
    first_s = last_s = 0.0
    for request in requests:
        if num_requests == 0:
            first_s = request.arrival_s
        num_requests += 1
        last_s = request.arrival_s
        if request.prompt_tokens > MAX_PROMPT_TOKENS:
            raise ConfigError(f"a prompt of {request.prompt_tokens:,} tokens: at most {MAX_PROMPT_TOKENS:,} can be")
        prompt_tokens += request.prompt_tokens
        output_tokens += request.output_tokens
    if num_requests == 0:
        raise ConfigError(f"--duration {flags.duration}: no request arrives before it is over")
    if num_requests > MAX_REQUESTS:
        raise ConfigError(f"--duration {flags.duration}: brings more than {MAX_REQUESTS:,} requests")
    return Totals(
        num_requests=num_requests,
        span_s=last_s - first_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )


def _speed(flags: WorkloadFlags, totals: Totals) -> float:
    if flags.rate is None:
        return flags.speed or 1.0
    if totals.rate_rps is None:
        raise ConfigError(f"--rate {flags.rate:g}: all requests of the workload come at once, it has no rate to scale")
    return flags.rate / totals.rate_rps


def _check_time(totals: Totals) -> None:
    if totals.span_s > MAX_SPAN_S:
        raise ConfigError(
            f"the requests arrive over {totals.span_s / 86_400:,.4g} days: at most {MAX_SPAN_S / 86_400:g} are "
            f"simulated; --speed, --rate or --duration shorten them"
        )
    if totals.rate_rps is not None and totals.rate_rps > MAX_RATE_RPS:
        raise ConfigError(f"{totals.rate_rps:.4g} requests per second: at most {MAX_RATE_RPS:g} are simulated")


def _text(name: str, totals: Totals, speed: float) -> str:
    rate = "all at once" if totals.rate_rps is None else f"in {totals.span_s:,.1f} s ({totals.rate_rps:,.3f}/s)"
    scaled = "" if speed == 1.0 else f", time scaled {speed:.4g} times"
    prompt_tokens = totals.prompt_tokens / totals.num_requests
    output_tokens = totals.output_tokens / totals.num_requests
    return (
        f"{name}: {totals.num_requests:,} requests {rate}{scaled}, on average {prompt_tokens:,.0f} prompt and "
        f"{output_tokens:,.0f} output tokens"
    )


def _left_out(summary: TraceSummary) -> tuple[str, ...]:
    num_rows = summary.num_without_prompt + summary.num_without_output
    if not num_rows:
        return ()
    return (f"{num_rows:,} of the trace's {summary.num_rows:,} rows have no prompt or no output tokens: left out",)


def _shared_prefixes(requests: tuple[WorkloadRequest, ...]) -> tuple[str, ...]:
    if not requests[0].hash_ids:
        return ()
    share = prefix_reuse(requests).token_hit_rate
    if share == 0:
        return ()
    return (
        f"no prefix cache is modelled: every prompt is computed whole, though {share:.1%} of the prompt tokens "
        f"repeat an earlier request's",
    )


def _sha256(path: Path) -> str | None:
    """None of a pipe, which cannot be read twice."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
