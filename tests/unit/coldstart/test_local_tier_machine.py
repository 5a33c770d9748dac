"""Two processes share a disk tier in any order of steps; one of them is killed at any step, again and again."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coldstart.local_tier import LocalTier
from coldstart.tier_handles import Entry, Loading
from coldstart.tier_records import CheckpointKey
from contracts.errors import DeadlineExceeded, NoCapacity
from tests.support.long_tests import LONG
from tests.support.tier_faults import FakeClock, Killed, Life, MortalTierFiles

if TYPE_CHECKING:
    from collections.abc import Callable

CAPACITY_BYTES = 12_000
#: With what the tier writes down itself.
SLACK_BYTES = 1_500

KILLED = object()

numbers = st.integers(0, 4)
processes = st.integers(0, 1)


def key(number: int) -> CheckpointKey:
    return CheckpointKey(identity=f"model-{number}", dtype="auto", tensor_parallel=1)


def weights(number: int) -> bytes:
    return random.Random(number).randbytes(1000 + 1000 * number)


class Process:
    def __init__(self, root: Path, clock: FakeClock, tell: Callable[[str], None]) -> None:
        self.life = Life()
        self.tier = LocalTier(
            root, capacity_bytes=CAPACITY_BYTES, files=MortalTierFiles(self.life), clock=clock, tell=tell
        )
        self.pins: list[Entry] = []
        self.loads: list[Loading] = []


class SharedTier(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="tier-"))
        self.clock = FakeClock()
        #: What has to be found.
        self.stands: set[int] = set()
        #: Damaged since: has to be dropped when somebody looks.
        self.damaged: set[int] = set()
        self.processes = [self._born(), self._born()]

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    def _born(self) -> Process:
        return Process(self.root, self.clock, self._hear)

    def _hear(self, told: str) -> None:
        """The tier says what it removes; nothing else may go."""
        for number in set(self.stands):
            if f"entries/{key(number).folder}" in told:
                assert "damaged" in told or not self._is_pinned(number), told
                self.stands.discard(number)
                self.damaged.discard(number)

    def _is_pinned(self, number: int) -> bool:
        return any(pin.key == key(number) for process in self.processes for pin in process.pins)

    def _do(self, which: int, number: int, step: Callable[[Process], Any]) -> Any:
        """KILLED where the process was killed in the middle: `number` then stands or not."""
        process = self.processes[which]
        try:
            return step(process)
        except Killed:
            self.processes[which] = self._born()
            survivor = self.processes[1 - which].tier
            found = {int(manifest.key.identity.removeprefix("model-")) for manifest in survivor.manifests()}
            assert found - {number} <= self.stands
            # An entry on its way out was told after it went.
            for lost in self.stands - found:
                assert not self._is_pinned(lost)
            self.stands = found
            self.damaged &= found
            return KILLED

    @rule(which=processes, after=st.integers(1, 8))
    def doom(self, which: int, after: int) -> None:
        life = self.processes[which].life
        life.dies_at = life.num_steps + after

    @rule(which=processes, number=numbers)
    def look(self, which: int, number: int) -> None:
        entry = self._do(which, number, lambda process: process.tier.look_up(key(number)))
        if isinstance(entry, Entry):
            assert number in self.stands
            assert number not in self.damaged
            assert (entry.path / "weights").read_bytes() == weights(number)
            self.processes[which].pins.append(entry)
        elif entry is None:
            # If it stood it was damaged, and the tier said that it is dropped.
            assert number not in self.stands

    @rule(which=processes, number=numbers)
    def load(self, which: int, number: int) -> None:
        def acquire(process: Process) -> Entry | Loading | str:
            try:
                return process.tier.acquire(key(number), len(weights(number)) + SLACK_BYTES, wait_s=0.0)
            except (NoCapacity, DeadlineExceeded) as error:
                return error.code

        got = self._do(which, number, acquire)
        if isinstance(got, Entry):
            # It stood, or its loader was killed between the last byte and the end.
            assert (got.path / "weights").read_bytes() == weights(number)
            self.stands.add(number)
            self.processes[which].pins.append(got)
        elif isinstance(got, Loading):
            assert number not in self.stands
            self.processes[which].loads.append(got)
        elif got == DeadlineExceeded.code:
            assert any(each.key == key(number) for process in self.processes for each in process.loads)

    @precondition(lambda self: any(process.loads for process in self.processes))
    @rule(data=st.data(), how=st.sampled_from(["commit", "commit", "keep", "drop"]))
    def end_load(self, data: st.DataObject, how: str) -> None:
        which = data.draw(st.sampled_from([index for index in (0, 1) if self.processes[index].loads]))
        process = self.processes[which]
        loading = process.loads.pop()
        number = int(loading.key.identity.removeprefix("model-"))
        if how != "commit":
            self._do(which, number, lambda _: loading.abandon(keep=how == "keep"))
            return
        loading.path.mkdir(exist_ok=True)
        (loading.path / "weights").write_bytes(weights(number))
        entry = self._do(which, number, lambda _: loading.commit(origin="test"))
        if entry is not KILLED:
            self.stands.add(number)
            process.pins.append(entry)

    @precondition(lambda self: any(process.pins for process in self.processes))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        which = data.draw(st.sampled_from([index for index in (0, 1) if self.processes[index].pins]))
        self.processes[which].pins.pop(0).close()

    @precondition(lambda self: any(process.pins for process in self.processes))
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        which = data.draw(st.sampled_from([index for index in (0, 1) if self.processes[index].pins]))
        entry = self.processes[which].pins.pop(0)
        number = int(entry.key.identity.removeprefix("model-"))
        # Others keep their open files, and have to load again.
        for process in self.processes:
            for pin in [pin for pin in process.pins if pin.key == entry.key]:
                process.pins.remove(pin)
                pin.close()
        self._do(which, number, lambda _: entry.discard("wrong bytes"))

    @rule(which=processes, number=numbers)
    def evict(self, which: int, number: int) -> None:
        was_pinned = self._is_pinned(number)
        is_out = self._do(which, number, lambda process: process.tier.evict(key(number)))
        if is_out is not KILLED:
            assert is_out == (number in self.stands and not was_pinned)
            if is_out:
                self.stands.discard(number)
                self.damaged.discard(number)

    @precondition(lambda self: bool(self.stands - self.damaged))
    @rule(data=st.data(), where=st.integers(0, 100_000))
    def damage(self, data: st.DataObject, where: int) -> None:
        idle = sorted(number for number in self.stands - self.damaged if not self._is_pinned(number))
        if not idle:
            return
        number = data.draw(st.sampled_from(idle))
        path = self.root / "entries" / key(number).folder / "checkpoint" / "weights"
        changed = bytearray(path.read_bytes())
        changed[where % len(changed)] ^= 1
        path.write_bytes(changed)
        self.damaged.add(number)

    @invariant()
    def what_is_used_is_there(self) -> None:
        for process in getattr(self, "processes", []):
            for pin in process.pins:
                number = int(pin.key.identity.removeprefix("model-"))
                assert (pin.path / "weights").read_bytes() == weights(number)

    @invariant()
    def it_is_bounded(self) -> None:
        if not hasattr(self, "root"):
            return
        sizes = [path.stat().st_size for path in (self.root / "entries").rglob("*") if path.is_file()]
        assert sum(sizes) <= CAPACITY_BYTES
        found = {path.name for path in (self.root / "entries").iterdir()}
        assert found == {key(number).folder for number in self.stands}


SharedTier.TestCase.settings = settings(max_examples=150 if LONG else 25, stateful_step_count=40, deadline=None)
TestSharedTier = SharedTier.TestCase


def test_the_model_itself_would_notice_a_lost_entry(tmp_path: Path) -> None:
    machine = SharedTier()
    machine.begin()
    machine.load(0, 1)
    loading = machine.processes[0].loads[0]
    loading.path.mkdir()
    (loading.path / "weights").write_bytes(weights(1))
    machine.stands.add(1)
    loading.commit(origin="test").close()
    machine.it_is_bounded()
    shutil.rmtree(machine.root / "entries" / key(1).folder)
    with pytest.raises(AssertionError):
        machine.it_is_bounded()
    machine.teardown()
