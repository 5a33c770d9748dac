"""What gateways tell of requests that were accepted."""

from __future__ import annotations

from dataclasses import replace

from contracts.messages import Predicted, TtftTally
from gateway.promises import Promises
from gateway.terms import NO_TERMS, Terms

TERMS = Terms(slo_class="a", ttft_target_s=2.0, tpot_target_s=0.1)


def predicted(ttft_s: float) -> Predicted:
    return Predicted(waited_s=0.0, queue_s=ttft_s, transfer_s=0.0, prefill_s=0.0, ttft_s=ttft_s, tpot_s=0.0)


def test_they_are_counted_by_class_and_prediction_until_they_are_taken() -> None:
    promises = Promises()
    for ttft_s in (0.5, 2.0, 2.5):
        promises.first_token(TERMS, predicted(1.85), ttft_s)
    promises.first_token(TERMS, predicted(0.0), 2.1)
    promises.first_token(replace(TERMS, slo_class="b"), predicted(1.85), 0.1)
    promises.first_token(NO_TERMS, predicted(1.85), 2.0)
    assert promises.take() == (TtftTally("a", 18, 3, 1), TtftTally("a", 0, 1, 1), TtftTally("b", 18, 1, 0))
    assert promises.take() == ()
