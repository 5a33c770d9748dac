"""Where one request's time went, in phases that sum exactly to what the gateway measured.

The gateway's own clock gives the marks; workers report durations on theirs (`PhaseTimes`), which are clamped
into the interval they must lie in, so that skew or transit time never makes the sum wrong. What a lost worker
cost belongs to the phase in which it was lost:

    received      sent       first token    first decode token      end
       |--gateway--|--queue+prefill--|--handoff--|---------decode-----|
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from contracts.ids import RequestId, WorkerId
    from contracts.messages import Placement
    from contracts.requests import GenerateRequest, PhaseTimes, TokenDelta
    from gateway.terms import Terms

_US_PER_S = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Phases in whole microseconds: `gateway + queue + prefill + handoff + decode == total`, exactly."""

    request_id: RequestId
    total_us: int
    #: Received until Prefill was sent: validating, tokenising, dispatch.
    gateway_us: int
    #: Of that: from hearing that a worker is being started until it was placed.
    waking_us: int = 0
    #: Prefill sent until the prompt's first step, with the transit of both messages.
    queue_us: int
    prefill_us: int
    #: The part of the handoff that the client waited for: first token until the decode worker went on.
    handoff_us: int
    decode_us: int
    #: Received until the first token; None when none came.
    ttft_us: int | None
    num_prompt_tokens: int
    num_output_tokens: int
    #: How often the request was taken up again on other workers.
    num_replays: int
    #: How often another worker went on with it.
    num_moves: int
    #: "stop", "length", "cancelled", or the code of the error that ended the request.
    outcome: str
    #: The last ones that it was placed on, or moved to.
    prefill_worker: WorkerId | None
    decode_worker: WorkerId | None
    tenant: str
    #: Empty: none.
    slo_class: str
    #: What the coordinator expected of the last placement; None where it knew nothing of costs.
    predicted_ttft_us: int | None
    predicted_tpot_us: int | None
    #: Prompt tokens that the first try found in a cache; None: not told.
    num_cached_tokens: int | None
    #: Of these by where they stood: "device", "peer", "dram", "ssd"; what is not told is left out.
    cached_by_tier: Mapping[str, int]
    #: One word, for a request that no worker took.
    refused_why: str | None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None below two tokens, or where not even the first came."""
        if self.ttft_us is None or self.num_output_tokens < 2:
            return None
        return (self.total_us - self.ttft_us) / _US_PER_S / (self.num_output_tokens - 1)

    def as_json(self) -> dict[str, object]:
        """Milliseconds, for people and clients."""
        phases = ("total", "gateway", "queue", "prefill", "handoff", "decode")
        return {
            "request_id": self.request_id,
            **{f"{phase}_ms": getattr(self, f"{phase}_us") / 1000 for phase in phases},
            "waking_ms": _ms(self.waking_us),
            "ttft_ms": _ms(self.ttft_us),
            "predicted_ttft_ms": _ms(self.predicted_ttft_us),
            "predicted_tpot_ms": _ms(self.predicted_tpot_us),
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached_tokens,
            "cached_by_tier": dict(self.cached_by_tier),
            "completion_tokens": self.num_output_tokens,
            "replays": self.num_replays,
            "moves": self.num_moves,
            "outcome": self.outcome,
            "prefill_worker": self.prefill_worker,
            "decode_worker": self.decode_worker,
            "tenant": self.tenant,
            "slo_class": self.slo_class or None,
        }


@dataclass(slots=True, kw_only=True)
class Marks:
    """When one request passed which point, on the gateway's clock; what workers reported. Only grows."""

    received_s: float
    #: First heard that a worker is being started for it, and first placed after that.
    waking_s: float | None = None
    woken_s: float | None = None
    sent_s: float | None = None
    first_token_s: float | None = None
    #: The latest so far.
    last_token_s: float | None = None
    #: Arrival of the first delta that came from decoding.
    decoding_s: float | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    handoff_s: float | None = None
    #: Adoption to sampling, of the first delta that came from decoding.
    first_decode_s: float | None = None
    cached_tokens: int | None = None
    cached_by_tier: Mapping[str, int] | None = None

    def note(self, delta: TokenDelta, now_s: float) -> None:
        """Takes the times of a delta that is being delivered (in order, once)."""
        if delta.token_ids:
            self.last_token_s = now_s
            if self.first_token_s is None:
                self.first_token_s = now_s
        phases = delta.phases
        if phases is not None:
            self._note_phases(phases)
        if self.decoding_s is None and delta.index + len(delta.token_ids) > 1:
            self.decoding_s = now_s
            self.first_decode_s = None if phases is None else phases.decode_s

    def _note_phases(self, phases: PhaseTimes) -> None:
        for name in ("queue_s", "prefill_s", "handoff_s", "cached_tokens"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(phases, name))
        if self.cached_by_tier is None and phases.cached_tokens is not None:
            self.cached_by_tier = phases.cached_by_tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    gateway_us: int
    queue_us: int
    prefill_us: int
    handoff_us: int
    decode_us: int


def timeline_of(
    marks: Marks,
    end_s: float,
    *,
    request: GenerateRequest,
    terms: Terms,
    placement: Placement | None,
    num_output_tokens: int,
    num_replays: int,
    num_moves: int,
    outcome: str,
    refused_why: str | None,
) -> Timeline:
    """The timeline of a request that ends now."""
    predicted = None if placement is None else placement.predicted
    phases = split(marks, end_s)
    ttft_s = None if marks.first_token_s is None else marks.first_token_s - marks.received_s
    return Timeline(
        request_id=request.request_id,
        total_us=sum(getattr(phases, name) for name in phases.__slots__),
        gateway_us=phases.gateway_us,
        waking_us=waking_us(marks, phases.gateway_us),
        queue_us=phases.queue_us,
        prefill_us=phases.prefill_us,
        handoff_us=phases.handoff_us,
        decode_us=phases.decode_us,
        ttft_us=None if ttft_s is None else round(ttft_s * _US_PER_S),
        num_prompt_tokens=request.num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        num_replays=num_replays,
        num_moves=num_moves,
        outcome=outcome,
        prefill_worker=None if placement is None else placement.prefill.worker_id,
        decode_worker=None if placement is None else placement.decode.worker_id,
        tenant=terms.tenant,
        slo_class=terms.slo_class,
        predicted_ttft_us=None if predicted is None else _us_if_finite(predicted.ttft_s),
        predicted_tpot_us=None if predicted is None else _us_if_finite(predicted.tpot_s),
        num_cached_tokens=marks.cached_tokens,
        cached_by_tier=marks.cached_by_tier or {},
        refused_why=refused_why,
    )


def split(marks: Marks, end_s: float) -> Phases:
    """Divides `end_s - received_s` into phases; pure. Marks that were never reached end with the request."""
    total_us = _us(end_s - marks.received_s)
    sent_us = _mark_us(marks, marks.sent_s, total_us)
    first_us = max(sent_us, _mark_us(marks, marks.first_token_s, total_us))
    decoding_us = max(first_us, _mark_us(marks, marks.decoding_s, total_us))
    prefill_us, queue_us = _split_prefill(marks, first_us - sent_us)
    handoff_us = _visible_handoff_us(marks, decoding_us - first_us)
    return Phases(
        gateway_us=sent_us,
        queue_us=queue_us,
        prefill_us=prefill_us,
        handoff_us=handoff_us,
        decode_us=total_us - first_us - handoff_us,
    )


def waking_us(marks: Marks, gateway_us: int) -> int:
    """The part of the gateway's phase in which a worker was being started for the request."""
    if marks.waking_s is None:
        return 0
    begin_us = min(gateway_us, _us(marks.waking_s - marks.received_s))
    return _mark_us(marks, marks.woken_s, gateway_us) - begin_us


def _split_prefill(marks: Marks, window_us: int) -> tuple[int, int]:
    """Prefill as the worker timed it, the rest of the window is waiting. Without a report: all waiting."""
    if marks.prefill_s is None:
        return (0, window_us)
    prefill_us = min(_us(marks.prefill_s), window_us)
    return (prefill_us, window_us - prefill_us)


def _visible_handoff_us(marks: Marks, window_us: int) -> int:
    """Pulling starts during prefill, so only what is left of it after the first token was waited for."""
    if marks.handoff_s is None or marks.decoding_s is None:
        return 0
    decoded_us = _us(marks.first_decode_s or 0.0)
    return max(0, min(_us(marks.handoff_s), window_us - decoded_us))


def _mark_us(marks: Marks, at_s: float | None, total_us: int) -> int:
    return total_us if at_s is None else min(total_us, _us(at_s - marks.received_s))


def _ms(duration_us: int | None) -> float | None:
    return None if duration_us is None else duration_us / 1000


def _us_if_finite(duration_s: float) -> int | None:
    return _us(duration_s) if math.isfinite(duration_s) else None


def _us(duration_s: float) -> int:
    return max(0, round(duration_s * _US_PER_S))
