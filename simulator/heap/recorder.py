"""What a study writes down while it runs: one row a request, weighted gaps between tokens, samples of the time line."""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING

import numpy as np

from contracts.errors import InvariantBroken
from simulator.heap.histogram import Histogram
from simulator.heap.load import queue_s, tpot_s
from simulator.heap.results import REFUSALS, Outcome, RequestColumns, TimeLine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulator.heap.request import Request
    from simulator.heap.spec import StudySpec
    from simulator.heap.worker import Worker


class Recorder:
    """Columns grow by appending; a request's row is filled in when it ends."""

    def __init__(self) -> None:
        self._arrival_s = array("d")
        self._prompt_tokens = array("i")
        self._output_tokens = array("i")
        self._outcome = array("b")
        self._prefill_worker = array("i")
        self._decode_worker = array("i")
        self._started_s = array("d")
        self._first_token_s = array("d")
        self._second_token_s = array("d")
        self._finished_s = array("d")
        self._transfer_s = array("f")
        self._preemptions = array("h")
        self._slo_class = array("h")
        self._predicted_ttft_s = array("d")
        self._predicted_tpot_s = array("d")
        self._cached_tokens = array("i")
        self._fetched_tokens = array("i")
        self._fetch_s = array("f")
        self._refusal = array("b")
        #: Index of each SLO class, in order of appearance.
        self._classes: dict[str, int] = {}
        self.itl_s = Histogram()

    def add(self, arrival_s: float, prompt_tokens: int, output_tokens: int, slo_class: str) -> int:
        """A row for a request that arrives; returns its number."""
        self._arrival_s.append(arrival_s)
        self._prompt_tokens.append(prompt_tokens)
        self._output_tokens.append(output_tokens)
        self._outcome.append(-1)
        self._prefill_worker.append(-1)
        self._decode_worker.append(-1)
        self._started_s.append(math.nan)
        self._first_token_s.append(math.nan)
        self._second_token_s.append(math.nan)
        self._finished_s.append(math.nan)
        self._transfer_s.append(0.0)
        self._preemptions.append(0)
        self._slo_class.append(self._classes.setdefault(slo_class, len(self._classes)))
        self._predicted_ttft_s.append(math.nan)
        self._predicted_tpot_s.append(math.nan)
        self._cached_tokens.append(0)
        self._fetched_tokens.append(0)
        self._fetch_s.append(0.0)
        self._refusal.append(-1)
        return len(self._arrival_s) - 1

    def end(self, request: Request, outcome: Outcome) -> None:
        """Once for each request."""
        row = request.row
        if self._outcome[row] != -1:
            raise InvariantBroken(f"{request} ends a second time: {outcome.name}")
        self._outcome[row] = outcome
        if request.prefill is not None and request.decode is not None:
            self._prefill_worker[row] = request.prefill.row
            self._decode_worker[row] = request.decode.row
        self._started_s[row] = request.started_s
        self._first_token_s[row] = request.first_token_s
        self._second_token_s[row] = request.second_token_s
        self._finished_s[row] = request.finished_s
        self._transfer_s[row] = request.transfer_s
        self._preemptions[row] = min(request.preemptions, 32_767)
        if (predicted := request.predicted) is not None:
            self._predicted_ttft_s[row] = predicted.ttft_s
            self._predicted_tpot_s[row] = predicted.tpot_s
        self._cached_tokens[row] = request.cached_tokens
        self._fetched_tokens[row] = request.fetched_tokens
        self._fetch_s[row] = request.fetch_s
        if request.refused_why:
            self._refusal[row] = REFUSALS.index(request.refused_why)

    @property
    def slo_classes(self) -> tuple[str, ...]:
        return tuple(self._classes)

    def columns(self) -> RequestColumns:
        return RequestColumns(
            arrival_s=np.array(self._arrival_s, np.float64),
            prompt_tokens=np.array(self._prompt_tokens, np.int32),
            output_tokens=np.array(self._output_tokens, np.int32),
            outcome=np.array(self._outcome, np.int8),
            prefill_worker=np.array(self._prefill_worker, np.int32),
            decode_worker=np.array(self._decode_worker, np.int32),
            started_s=np.array(self._started_s, np.float64),
            first_token_s=np.array(self._first_token_s, np.float64),
            second_token_s=np.array(self._second_token_s, np.float64),
            finished_s=np.array(self._finished_s, np.float64),
            transfer_s=np.array(self._transfer_s, np.float32),
            preemptions=np.array(self._preemptions, np.int16),
            slo_class=np.array(self._slo_class, np.int16),
            predicted_ttft_s=np.array(self._predicted_ttft_s, np.float64),
            predicted_tpot_s=np.array(self._predicted_tpot_s, np.float64),
            cached_tokens=np.array(self._cached_tokens, np.int32),
            fetched_tokens=np.array(self._fetched_tokens, np.int32),
            fetch_s=np.array(self._fetch_s, np.float32),
            refusal=np.array(self._refusal, np.int8),
        )


class Sampler:
    """Takes a sample of all workers whenever it is asked to."""

    def __init__(self, workers: Sequence[Worker], spec: StudySpec) -> None:
        self._workers = workers
        self._ttft_s = min((slo.ttft_ms for slo in spec.slos), default=math.nan) / 1e3
        self._tpot_s = min((slo.tpot_ms for slo in spec.slos), default=math.nan) / 1e3
        self._num_blocks = sum(worker.num_blocks for worker in workers)
        self._last_s = 0.0
        self._last_busy_s = [0.0] * len(workers)
        self._samples: list[tuple[float, int, int, int, float, float, float, float, float]] = []

    def take(self, now_s: float) -> None:
        prompts = answers = preempted = used_blocks = 0
        prefill_busy_s = decode_busy_s = 0.0
        num_prefill = num_decode = 0
        queues_s = steps_s = 0.0
        has_targets = not math.isnan(self._ttft_s)
        for index, worker in enumerate(self._workers):
            worker.sync()
            used_blocks += worker.used_blocks
            busy_s = worker.busy_until_now_s()
            delta_s, self._last_busy_s[index] = busy_s - self._last_busy_s[index], busy_s
            if worker.role != "decode":
                prompts += worker.prompts.num_open
                prefill_busy_s += delta_s
                num_prefill += 1
                if has_targets:
                    queues_s += queue_s(worker)
            if worker.role != "prefill":
                answers += worker.answers.num_running
                preempted += worker.answers.num_preempted
                decode_busy_s += delta_s
                num_decode += 1
                if has_targets:
                    steps_s += tpot_s(worker)
        span_s = now_s - self._last_s
        self._last_s = now_s
        self._samples.append(
            (
                now_s,
                prompts,
                answers,
                preempted,
                _share(prefill_busy_s, num_prefill * span_s),
                _share(decode_busy_s, num_decode * span_s),
                used_blocks / self._num_blocks,
                _share(queues_s, num_prefill * self._ttft_s),
                _share(steps_s, num_decode * self._tpot_s),
            )
        )

    def time_line(self) -> TimeLine:
        columns = list(zip(*self._samples, strict=True)) or [()] * 9
        return TimeLine(
            at_s=np.array(columns[0], np.float64),
            prompts=np.array(columns[1], np.int32),
            answers=np.array(columns[2], np.int32),
            preempted=np.array(columns[3], np.int32),
            prefill_busy=np.array(columns[4], np.float32),
            decode_busy=np.array(columns[5], np.float32),
            blocks_used=np.array(columns[6], np.float32),
            prefill_load=np.array(columns[7], np.float32),
            decode_load=np.array(columns[8], np.float32),
        )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
