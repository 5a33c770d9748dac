"""The weight cache of a node agent, with loaders that are processes."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cluster.background import in_background
from cluster.child import Child
from cluster.launch import CompressorLaunch, Failed, Go, LoaderLaunch, Loading, Shrunk, Sized, Tried
from cluster.launch import Filled as FilledStatus
from cluster.weights_book import LoadSeen, WeightsBook
from coldstart.cold_copies import ColdCopies, Trial
from coldstart.residence import WeightsKey
from coldstart.weight_cache import Filled, LoadPoint, WeightCache
from coldstart.whereabouts import whereabouts
from contracts.errors import LoadError, TandemError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    from cluster.guard import Guard
    from cluster.launch import Launch, Status, WeightTierOptions
    from cluster.process_log import ProcessLog
    from coldstart.cold_copies import RawMemory
    from coldstart.compressing import CompressRules
    from coldstart.handing import WeightsDoor
    from contracts.clock import Clock
    from contracts.weight_messages import NodeWeights

StatusT = TypeVar("StatusT", Sized, FilledStatus, Tried, Shrunk)

#: A loader that says nothing for so long does not get on: a disk that hangs, or the process.
STALL_S = 60.0
#: Between two looks at what lies on the disk, where nothing was loaded meanwhile.
LOOK_INTERVAL_S = 10.0
#: What a loader says it does while it fills memory.
_FILLS = "weights"
_MAX_WAITING = 64
_LOADER_COMMAND = (sys.executable, "-m", "cluster.loader_main")
_COMPRESSOR_COMMAND = (sys.executable, "-m", "cluster.compressor_main")


class WeightsService:
    """Made before the workers are planned (their launches name the door), started by the node agent."""

    def __init__(
        self,
        budget_bytes: int,
        ssd: WeightTierOptions | None,
        environ: Mapping[str, str],
        parent_pid: int,
        clock: Clock,
        log: ProcessLog,
        *,
        compress: CompressRules | None = None,
    ) -> None:
        """`compress`: None where nothing is to be compressed."""
        self._ssd = ssd
        self._ssd_root = None if ssd is None else Path(ssd.path).expanduser()
        # One thread of it: others compute on these cores.
        self._environ = {**environ, "OPENBLAS_NUM_THREADS": "1"}
        self._parent_pid = parent_pid
        self._log = log
        self._guard: Guard | None = None
        self._running: asyncio.Task[None] | None = None
        #: One that has filled its memory may still be busy with the disk tier.
        self._loaders: list[LoaderProcess] = []
        self._looking: asyncio.Task[None] | None = None
        #: Something may lie elsewhere than it did.
        self._moved = asyncio.Event()
        self._book = WeightsBook()
        #: The load that is under way, or the last one.
        self._loader: LoaderProcess | None = None
        cold = None if compress is None else ColdCopies(compress, self._start_compression, self._say)
        self.cache = WeightCache(budget_bytes, self._start_load, clock, self._say, cold=cold)

    @property
    def door(self) -> WeightsDoor:
        return self.cache.door

    def start(self, guard: Guard) -> None:
        self._guard = guard
        self.cache.open()
        without = "workers read their weights themselves"
        self._running = in_background(self.cache.run(), "the weights' door", self._say, without=without)
        without = "where weights lie is told as it was last"
        self._looking = in_background(self._look(), "the look for weights", self._say, without=without)

    async def stop(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
            await self.cache.close()
        for loader in self._loaders:
            await loader.end()

    def foresee(self, launches: Sequence[Launch]) -> None:
        """The workers that may run here: where their weights lie is told."""
        for launch in launches:
            key = key_of(launch)
            if key is not None:
                self._book.needs(key, launch.model_name)

    def report(self, models: Container[str], measured_after: int) -> NodeWeights:
        """As `WeightsBook.report`."""
        done_bytes = 0 if self._loader is None else self._loader.done_bytes
        return self._book.report(self.cache.copies(), done_bytes, models, measured_after)

    def expect(self, launch: Launch) -> None:
        """A process is starting that will ask for weights: they may begin to come while it imports what it needs."""
        key = key_of(launch)
        if key is not None and self._running is not None:
            self.cache.want(key)

    def _say(self, line: str) -> None:
        self._log.write(line.encode())

    def _start_load(self, key: WeightsKey, descriptor: int, compressed: int | None) -> LoaderProcess:
        assert self._guard is not None, "started before anybody can ask"
        launch = LoaderLaunch(
            key=key, descriptor=descriptor, compressed=compressed, ssd=self._ssd, parent_pid=self._parent_pid
        )

        def loaded(load: LoadSeen) -> None:
            self._book.loaded(key, load)
            self._moved.set()

        self._loaders = [loader for loader in self._loaders if not loader.is_gone]
        self._loaders.append(LoaderProcess(launch, self._environ, self._guard, self._log, loaded))
        self._loader = self._loaders[-1]
        return self._loader

    async def _look(self) -> None:
        while True:
            self._moved.clear()
            for key in self._book.keys:
                try:
                    place = await asyncio.to_thread(whereabouts, key, self._ssd_root)
                except (TandemError, OSError):
                    # Whoever loads it will say what is wrong with it.
                    place = None
                self._book.found(key, place)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_INTERVAL_S):
                    await self._moved.wait()

    def _start_compression(self, key: WeightsKey, memory: RawMemory, descriptor: int) -> CompressorProcess:
        assert self._guard is not None, "nothing is in memory before"
        launch = CompressorLaunch(
            key=key,
            descriptor=descriptor,
            source=memory.descriptor,
            weight_bytes=memory.weight_bytes,
            index_bytes=memory.index_bytes,
            parent_pid=self._parent_pid,
        )
        return CompressorProcess(launch, self._environ, self._guard, self._log)


def key_of(launch: Launch) -> WeightsKey | None:
    """What a worker will ask for; None of one that reads its weights itself, and of a store."""
    if launch.role == "store" or launch.weights is None:
        return None
    return WeightsKey(folder=launch.model_dir, dtype=launch.dtype)


class _FillingProcess:
    """One that fills memory that it inherits, in two steps: it says how much, and is told to go on."""

    #: For people.
    _what = "loader"

    def __init__(
        self,
        command: Sequence[str],
        launch: LoaderLaunch | CompressorLaunch,
        descriptors: Sequence[int],
        environ: Mapping[str, str],
        guard: Guard,
        log: ProcessLog,
    ) -> None:
        """Raises OSError when no process can be started."""
        self._name = launch.key.folder
        self._child = Child(command, environ, launch, guard, descriptors=descriptors)
        self._told: asyncio.Queue[Status | None] = asyncio.Queue(_MAX_WAITING)
        self._num_bytes = 0
        self._goes_on = False
        self._how = ""
        self.point = LoadPoint()
        self._ended = asyncio.create_task(self._see_out(log), name=f"{self._what}-{self._child.pid}")

    async def abort(self) -> None:
        if not self._goes_on:
            await self.end()

    async def end(self) -> None:
        """Now. Idempotent."""
        self._child.kill()
        await asyncio.wait([self._ended])

    @property
    def done_bytes(self) -> int:
        """Of its memory, that is filled and verified."""
        return int(self.point.fraction * self._num_bytes) if self.point.what == _FILLS and self.point.fraction else 0

    @property
    def is_gone(self) -> bool:
        return self._ended.done()

    async def _gone(self) -> None:
        """Its mapping goes with it."""
        async with asyncio.timeout(STALL_S):
            await asyncio.shield(self._ended)

    async def _until(self, kind: type[StatusT]) -> StatusT:
        while True:
            try:
                async with asyncio.timeout(STALL_S):
                    status = await self._told.get()
            except TimeoutError:
                raise LoadError(f"{self._name}: its {self._what} said nothing for {STALL_S:.0f} s") from None
            match status:
                case None:
                    raise LoadError(f"{self._name}: its {self._what} ended early: {self._how}")
                case Failed():
                    raise LoadError(status.message)
                case Loading(what=what, fraction=fraction):
                    self.point = LoadPoint(what, fraction)
                case _ if isinstance(status, kind):
                    return status
                case _:
                    raise LoadError(f"{self._name}: its {self._what} said {type(status).__name__}")

    async def _see_out(self, log: ProcessLog) -> None:
        try:
            self._how = await self._child.ended(self._told.put, log)
        except Exception as error:
            self._how = f"its watcher failed: {error!r}"
        finally:
            # Whoever waits reads on to the end; a queue that nobody empties is dropped with this object.
            while True:
                try:
                    self._told.put_nowait(None)
                    break
                except asyncio.QueueFull:
                    self._told.get_nowait()


class LoaderProcess(_FillingProcess):
    """Implements `coldstart.weight_cache.Load`."""

    def __init__(
        self,
        launch: LoaderLaunch,
        environ: Mapping[str, str],
        guard: Guard,
        log: ProcessLog,
        loaded: Callable[[LoadSeen], None],
    ) -> None:
        """`loaded` hears of a load that ended well. Raises OSError when no process can be started."""
        self._loaded = loaded
        descriptors = [launch.descriptor] if launch.compressed is None else [launch.descriptor, launch.compressed]
        super().__init__(_LOADER_COMMAND, launch, descriptors, environ, guard, log)

    async def sized(self) -> int:
        self._num_bytes = (await self._until(Sized)).num_bytes
        return self._num_bytes

    async def filled(self) -> Filled:
        self._child.give(Go(num_bytes=self._num_bytes))
        status = await self._until(FilledStatus)
        if status.goes_on:
            # The writable mapping is gone; what it does now is its own, and a load that fails takes nothing from it.
            self._goes_on = True
        else:
            await self._gone()
        self._loaded(
            LoadSeen(
                num_bytes=status.weight_bytes,
                tier=status.tier,
                seconds=status.seconds,
                is_direct=status.is_direct,
                converted_s=status.converted_s,
            )
        )
        return Filled(
            num_bytes=status.weight_bytes,
            index_bytes=status.index_bytes,
            tier=status.tier,
            next_tier="ssd" if status.goes_on else status.tier,
        )


class CompressorProcess(_FillingProcess):
    """Implements `coldstart.cold_copies.Compressing`."""

    _what = "compressor"

    def __init__(self, launch: CompressorLaunch, environ: Mapping[str, str], guard: Guard, log: ProcessLog) -> None:
        """Raises OSError when no process can be started."""
        descriptors = [launch.descriptor, launch.source]
        super().__init__(_COMPRESSOR_COMMAND, launch, descriptors, environ, guard, log)

    async def tried(self) -> Trial:
        status = await self._until(Tried)
        self._num_bytes = status.bound_bytes
        return Trial(rates=status.rates, bound_bytes=status.bound_bytes)

    async def compressed(self) -> int:
        self._child.give(Go(num_bytes=self._num_bytes))
        status = await self._until(Shrunk)
        await self._gone()
        return status.num_bytes
