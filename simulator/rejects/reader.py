"""Reads decision logs into stretches in which the same workers were there. Pure but for opening the files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.errors import ConfigError
from coordinator.decision_records import (
    AnswerMeans,
    CostKind,
    Decision,
    Header,
    LinkCosts,
    Lost,
    WorkerGone,
    WorkerUp,
    check_beginning,
    record_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path


@dataclass(slots=True, kw_only=True)
class Stretch:
    """Decisions, none of them missing, over the same workers. What is learned in time is as at the end."""

    header: Header
    #: By id.
    workers: dict[str, WorkerUp]
    link: LinkCosts
    costs: dict[int, CostKind]
    answers: dict[int, float]
    decisions: list[Decision] = field(default_factory=list[Decision])

    def unix_s(self, decision: Decision) -> float:
        return self.header.started_at + decision.at_s


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionHistory:
    #: Only those with decisions.
    stretches: tuple[Stretch, ...]
    #: Decisions that the logs say are missing.
    num_lost: int
    #: Lines in the midst that say nothing.
    num_unreadable: int
    #: Files whose last line was cut: a coordinator died, or is still writing.
    cut_files: tuple[str, ...]

    @property
    def num_decisions(self) -> int:
        return sum(len(stretch.decisions) for stretch in self.stretches)


def read_logs(paths: Sequence[Path]) -> DecisionHistory:
    """Files of one coordinator, oldest first. Raises ConfigError for what is no log of a format that can be read, and
    for one that cannot be read at all."""
    reading = _Reading()
    cut: list[str] = []
    for path in paths:
        try:
            with path.open("rb") as file:
                if reading.read(file, str(path)):
                    cut.append(str(path))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    return DecisionHistory(
        stretches=tuple(stretch for stretch in reading.stretches if stretch.decisions),
        num_lost=reading.num_lost,
        num_unreadable=reading.num_unreadable,
        cut_files=tuple(cut),
    )


class _Reading:
    def __init__(self) -> None:
        self.stretches: list[Stretch] = []
        self.num_lost = 0
        self.num_unreadable = 0

    def read(self, lines: Iterable[bytes], where: str) -> bool:
        """Whether the last line was cut."""
        is_first, is_cut = True, False
        for line in lines:
            if is_first:
                if line.endswith(b"\n"):
                    check_beginning(line, where)
                is_first = False
            record = record_of(line)
            if record is not None and (self.stretches or isinstance(record, Header)):
                self._take(record)
            elif line.endswith(b"\n"):
                self.num_unreadable += 1
            else:
                is_cut = True
        if is_first:
            raise ConfigError(f"{where}: it is empty")
        if not self.stretches:
            raise ConfigError(f"{where}: not a decision log, or one whose first line was cut")
        return is_cut

    def _take(self, record: object) -> None:
        if isinstance(record, Header):
            self._begin(record)
            return
        stretch = self.stretches[-1]
        match record:
            case Decision():
                stretch.decisions.append(record)
            case CostKind():
                stretch.costs[record.number] = record
            case LinkCosts():
                stretch.link = record
            case AnswerMeans():
                stretch.answers = record.tokens
            case WorkerUp():
                before = stretch.workers.get(record.worker_id)
                self._set_workers({**stretch.workers, record.worker_id: record}, same=record.same_worker(before))
            case WorkerGone():
                left = {key: worker for key, worker in stretch.workers.items() if key != record.worker_id}
                self._set_workers(left, same=len(left) == len(stretch.workers))
            case Lost():
                self.num_lost += record.decisions
                self._set_workers(stretch.workers, same=False)
            case _:
                raise AssertionError(f"a kind of line that nobody reads: {record}")

    def _begin(self, header: Header) -> None:
        workers = {worker.worker_id: worker for worker in header.workers}
        costs = {kind.number: kind for kind in header.costs}
        if self.stretches:
            stretch, last = self.stretches[-1], self.stretches[-1].header
            same_run = last.started_at == header.started_at
            if same_run and _same_workers(stretch.workers, workers):
                stretch.workers, stretch.link, stretch.answers = workers, header.link, header.answers
                stretch.costs.update(costs)
                return
        self.stretches.append(
            Stretch(header=header, workers=workers, link=header.link, costs=costs, answers=header.answers)
        )

    def _set_workers(self, workers: dict[str, WorkerUp], *, same: bool) -> None:
        stretch = self.stretches[-1]
        if same or not stretch.decisions:
            stretch.workers = workers
            return
        self.stretches.append(
            Stretch(
                header=stretch.header,
                workers=workers,
                link=stretch.link,
                costs=dict(stretch.costs),
                answers=dict(stretch.answers),
            )
        )


def _same_workers(ours: dict[str, WorkerUp], theirs: dict[str, WorkerUp]) -> bool:
    return ours.keys() == theirs.keys() and all(worker.same_worker(theirs[key]) for key, worker in ours.items())
