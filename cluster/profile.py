"""`tandem profile`: measures the engine on this machine, then what a cluster adds to it, and stores both.

The engine runs as in a worker: the same cores, threads, event loop and kind of memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import uvloop

from cluster.child_main import SWITCH_INTERVAL_S
from cluster.cores import CoreDemand, CoreShare, assign_cores
from cluster.disk import LiveDisk
from cluster.link_check import measure_transports
from cluster.local import allowed_cores
from cluster.model_source import resolve_model
from cluster.plan import transfer_options, worker_environ
from cluster.serve import say
from cluster.serving_profile import cluster_to_measure, measure_answers, others_cpu_s, overheads, report_lines
from contracts.errors import ConfigError
from contracts.profile import LatencyProfile, save_profile
from contracts.transfer_models import LinkTransfer
from kvtransfer import HostPool
from rpc import LiveClock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.model_source import ModelSource
    from contracts.clock import Clock
    from contracts.config import ClusterConfig
    from contracts.latency_models import CostCurve
    from contracts.profile import ServingOverheads
    from engine.executor import LiveEngine
    from engine.profile import FitReport, Measurement, PointSpec

#: Longest context that is measured where nothing else is said; costs beyond go on as straight lines.
DEFAULT_CONTEXT_TOKENS = 2048

#: How often every step is measured, at least.
ROUNDS = 4

#: The KV pool of a profile may take so much of the machine's memory.
_MEMORY_SHARE = 0.5

#: A neighbour on the same cores is worth a word from here on; its time is taken off, but not what it does to caches.
_MAX_WAITED_SHARE = 0.05

#: Cores that others keep busy while a cluster is measured; nothing can be taken off for them there.
_MAX_OTHERS_CORES = 0.1

#: Between two lines of progress where they cannot be written over.
_PROGRESS_INTERVAL_S = 10.0

#: What can change a step's duration.
_DISTRIBUTIONS = ("tandem-serve", "torch", "numpy", "uvloop")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """None: what the configuration and the machine say."""

    output: Path | None
    threads: int | None
    max_context_tokens: int | None
    #: Whether a cluster is started and measured too.
    serving: bool


def run_profile(config: ClusterConfig, options: ProfileOptions) -> int:
    """Changes this process's cores and environment for good. Raises ConfigError; ProfileRefused, after the measured
    points have been shown, or WorkerUnavailable when a cluster cannot be measured; then nothing is stored."""
    source = resolve_model(config.model, say, dtype=config.dtype, tier=config.weights.ssd)
    limit = _context_limit(config, source.folder)
    context_tokens = _context_tokens(limit, options.max_context_tokens)
    everywhere = allowed_cores()
    share = _share(config, options.threads)
    # Before torch is imported: its threads inherit the cores, and OpenMP reads the environment once.
    os.environ.update(worker_environ(os.environ, share.threads))
    _move_to(share.cores)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    profile = uvloop.run(_profile(config, source, context_tokens, share.threads))
    if options.serving:
        # The engine is gone; what is started now is to have all cores, as `tandem serve` would.
        _move_to(everywhere)
        serving = uvloop.run(_measure_serving(config, source, context_tokens, profile))
        profile = msgspec.structs.replace(profile, serving=serving)
    path = options.output or default_path(profile)
    asyncio.run(store(profile, path))
    say(f"stored in {path}")
    return 0


def _move_to(cores: Sequence[int]) -> None:
    """This thread, and what it starts from now on."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


async def store(profile: LatencyProfile, path: Path) -> None:
    """Makes the folder where missing. Raises ConfigError."""
    try:
        disk = LiveDisk(path.parent)
    except OSError as error:
        raise ConfigError(f"profile {path}: cannot be written: {error}") from error
    await save_profile(profile, disk, path.name)


def default_path(profile: LatencyProfile) -> Path:
    """One file for each model, engine and number of threads, in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    kind = profile.engine.split(", ")[:2]
    name = "-".join((profile.model, *kind, f"{profile.threads}t"))
    folder = (Path(base) if base else Path.home() / ".cache") / "tandem" / "profiles"
    return folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name)}.json"


def _share(config: ClusterConfig, threads: int | None) -> CoreShare:
    """That of the configuration's first worker, or `threads` cores."""
    cores = allowed_cores()
    if threads is None:
        demands = [
            CoreDemand(cores=pool.cores, threads=pool.threads) for pool in config.pools for _ in range(pool.max_workers)
        ]
        return assign_cores(cores, demands)[0]
    if not 1 <= threads <= len(cores):
        raise ConfigError(f"--threads {threads}: this process may use {len(cores)} cores")
    return assign_cores(cores, [CoreDemand(threads=threads)])[0]


async def _profile(config: ClusterConfig, source: ModelSource, context_tokens: int, threads: int) -> LatencyProfile:
    # torch comes in with these.
    from engine.profile import ProfileRange, blocks_needed, fit_points, profile_points

    clock = LiveClock()
    extent = ProfileRange(
        max_chunk_tokens=_max_chunk_tokens(config, context_tokens),
        max_context_tokens=context_tokens,
        max_sequences=config.engine.max_sequences,
    )
    specs = profile_points(extent)
    pools: list[HostPool] = []
    try:
        engine = await _load(config, source.folder, threads, blocks_needed(specs, config.block_tokens), pools, clock)
        try:
            say(f"{source.name}: {engine.description}; {len(specs)} steps, {ROUNDS} rounds and one to warm up")
            measured = await _measure(engine, specs, clock)
            report = fit_points(specs, measured.steps)
            _show(specs, report, measured)
            report.errors.require_usable("the fit is not stored")
            transfer = await _measure_transfer(config)
            return _assemble(config, source, engine, threads, report, measured, transfer)
        finally:
            await engine.close()
    finally:
        for pool in pools:
            pool.close()


async def _measure_serving(
    config: ClusterConfig, source: ModelSource, context_tokens: int, profile: LatencyProfile
) -> ServingOverheads:
    from engine.model_config import load_model_config

    clock = LiveClock()
    say("a cluster of one prefill and one decode worker, asked over HTTP")
    start_s, before_s = clock.now_s(), others_cpu_s()
    answers = await measure_answers(
        cluster_to_measure(config, source.folder, profile.threads),
        max_chunk_tokens=_max_chunk_tokens(config, context_tokens),
        vocab_size=load_model_config(source.folder).vocab_size,
        clock=clock,
        progress=_Progress(clock).update,
    )
    others_cores = (others_cpu_s() - before_s) / (clock.now_s() - start_s)
    if others_cores > _MAX_OTHERS_CORES:
        say(f"others kept {others_cores:.2f} cores busy meanwhile: what serving adds is overstated")
    found = overheads(answers, profile)
    for line in report_lines(answers, profile, found):
        say(line)
    return found


def _max_chunk_tokens(config: ClusterConfig, context_tokens: int) -> int:
    """The largest chunk that is measured; a prompt of it leaves as much room for an answer."""
    return min(config.engine.max_batch_tokens, context_tokens // 2)


async def _measure(engine: LiveEngine, specs: Sequence[PointSpec], clock: Clock) -> Measurement:
    """With a word about whoever else used the cores meanwhile."""
    from engine.profile import measure_steps

    start_s, before_s = clock.now_s(), sum(_waits_for_cores().values())
    progress = _Progress(clock)
    measured = await measure_steps(
        engine, specs, clock=clock, rounds=ROUNDS, waits=_waits_for_cores, progress=progress.update
    )
    waited_share = (sum(_waits_for_cores().values()) - before_s) / (clock.now_s() - start_s)
    if waited_share > _MAX_WAITED_SHARE:
        say(f"others use these cores too: for {waited_share:.0%} of the time the engine waited for one")
    return measured


def _context_limit(config: ClusterConfig, model_dir: Path) -> int:
    from engine.model_config import load_model_config

    return config.max_model_len or load_model_config(model_dir).max_position_embeddings


def _context_tokens(limit: int, wanted: int | None) -> int:
    """The longest context to measure."""
    if wanted is None:
        return min(DEFAULT_CONTEXT_TOKENS, limit)
    if wanted > limit:
        raise ConfigError(f"--max-context {wanted}: the model's context ends at {limit} tokens")
    return wanted


async def _load(
    config: ClusterConfig, model_dir: Path, threads: int, num_blocks: int, pools: list[HostPool], clock: Clock
) -> LiveEngine:
    """`pools` gets the engine's memory, for the caller to close."""
    from engine.executor import load_engine
    from engine.runner import EngineOptions

    def make_pool(num_blocks: int, block_bytes: int) -> memoryview:
        most = int(_MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        if num_blocks * block_bytes > most:
            raise ConfigError(
                f"the profile needs {num_blocks * block_bytes / 2**30:.1f} GiB of KV, this machine spares "
                f"{most / 2**30:.1f}: choose a smaller --max-context or --max-num-seqs"
            )
        pools.append(HostPool(num_blocks, block_bytes))
        return pools[0].view()

    device = config.pools[0].device
    engine_options = EngineOptions(
        dtype=config.dtype,
        device="cpu" if device == "auto" else device,
        block_tokens=config.block_tokens,
        num_blocks=num_blocks,
        max_model_len=config.max_model_len,
    )
    engine = await load_engine(
        model_dir, engine_options, clock=clock, num_threads=threads, pool_buffer_factory=make_pool, log=say
    )
    pools[0].populate()
    return engine


async def _measure_transfer(config: ClusterConfig) -> LinkTransfer | None:
    """The configured transport between two pools on this machine, or the fastest; None where none works."""
    found = [measured for measured, _ in await measure_transports(transfer_options(config))]
    usable = [measured for measured in found if config.transport in ("auto", measured.transport)]
    best = min(usable, key=lambda measured: measured.typical_s, default=None)
    if best is None or best.bandwidth_bytes_per_s is None or best.latency_s is None:
        say("no transport could be measured")
        return None
    say(f"transfer on this machine: {best}")
    return LinkTransfer(latency_s=best.latency_s, bandwidth_bytes_s=best.bandwidth_bytes_per_s)


def _assemble(
    config: ClusterConfig,
    source: ModelSource,
    engine: LiveEngine,
    threads: int,
    report: FitReport,
    measured: Measurement,
    transfer: LinkTransfer | None,
) -> LatencyProfile:
    layout, pool = engine.identity.layout, config.pools[0]
    num_blocks = pool.kv_blocks or pool.kv_memory // layout.block_bytes
    return LatencyProfile(
        model=config.served_model_name or source.name,
        model_fingerprint=engine.identity.model_fingerprint,
        kv_token_bytes=layout.token_bytes,
        block_tokens=layout.block_tokens,
        num_blocks=num_blocks,
        max_context_tokens=min(_context_limit(config, source.folder), num_blocks * layout.block_tokens),
        engine=engine.description,
        hardware=_hardware(),
        threads=threads,
        versions={"python": platform.python_version(), **{name: version(name) for name in _DISTRIBUTIONS}},
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        latency=report.latency,
        step_overhead_s=measured.step_overhead_s,
        transfer=transfer,
        errors=report.errors,
        points=report.points,
    )


def _hardware() -> str:
    """Processor and cores that exist; a fit holds on no other."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _waits_for_cores() -> dict[str, float]:
    """By thread, without this one: seconds it was ready to run but did not, so far. Empty where no kernel tells."""
    waits_s: dict[str, float] = {}
    for file in Path("/proc/self/task").glob("*/schedstat"):
        thread = file.parent.name
        # The loop's own thread waits between steps; another one may have ended since it was listed.
        with contextlib.suppress(OSError):
            if thread != str(os.getpid()):
                waits_s[thread] = int(file.read_text().split()[1]) / 1e9
    return waits_s


class _Progress:
    """How far it is and how long it will take: one line that changes, or now and then a new one."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._start_s = self._told_s = clock.now_s()
        self._in_place = sys.stdout.isatty()

    def update(self, done: int, total: int) -> None:
        now_s = self._clock.now_s()
        left_s = (now_s - self._start_s) * (total - done) / done
        line = f"measured {done} of {total}, about {left_s:.0f} s left"
        if self._in_place:
            print(f"\r{line:<60}", end="\n" if done == total else "", flush=True)
        elif now_s - self._told_s >= _PROGRESS_INTERVAL_S:
            self._told_s = now_s
            say(line)


def _show(specs: Sequence[PointSpec], report: FitReport, measured: Measurement) -> None:
    counted = f"{'chunk':>7}{'prefix':>8}{'decodes':>9}{'context':>9}"
    say(f"{'step':<8}{counted}{'measured ms':>13}{'fitted ms':>11}{'error':>8}")
    for spec, point in zip(specs, report.points, strict=True):
        counts = f"{spec.chunk_tokens:>7}{spec.prefix_tokens:>8}{spec.num_decodes:>9}{spec.context_tokens:>9}"
        times = f"{point.measured_s * 1e3:>13.3f}{point.measured_s * (1 + point.error) * 1e3:>11.3f}"
        say(f"{point.kind:<8}{counts}{times}{point.error:>+8.1%}{'  held out' if point.held_out else ''}")
    latency, errors = report.latency, report.errors
    say(f"prefill: {_curve(latency.prefill, 'tokens')} + {latency.pair_s * 1e9:.4g} ns x pairs")
    say(f"decode: {_curve(latency.decode, 'sequences')} + {latency.context_token_s * 1e9:.4g} ns x context")
    say(f"around a step: {measured.step_overhead_s * 1e3:.3f} ms")
    say(f"held-out error: prefill {errors.prefill:.1%}, decode {errors.decode:.1%}, mixed {errors.mixed:.1%}")
    say(f"on {_hardware()}")


def _curve(curve: CostCurve, unit: str) -> str:
    knots = ", ".join(f"{knot}: {seconds * 1e3:.4g}" for knot, seconds in zip(curve.knots, curve.knot_s, strict=True))
    return f"max({curve.floor_s * 1e3:.4g} ms, ms by {unit} {{{knots}}})"
