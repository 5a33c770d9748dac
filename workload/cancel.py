"""Clients that go away in the middle of an answer."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import ConfigError
from workload.spec import parse_outputs

if TYPE_CHECKING:
    from workload.lengths import Lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancellations:
    """Which requests are given up, and after how many tokens: a pure function of the seed and the request's index."""

    seed: int
    #: Of all requests, in 0 … 1.
    share: float
    #: Tokens that the client takes; None: anywhere in the answer, each place as likely.
    lengths: Lengths | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"the share must be above 0 and at most 1, got {self.share:g}")

    def after_tokens(self, index: int, output_tokens: int) -> int | None:
        """After so many tokens the client goes, before the last; None: it takes the whole answer.

        An answer that ends before the drawn length is taken whole, so fewer than `share` may go.
        """
        rng = random.Random(f"{self.seed}/cancellations/{index}")
        if rng.random() >= self.share or output_tokens < 2:
            return None
        tokens = rng.randrange(1, output_tokens) if self.lengths is None else self.lengths.sample(rng)
        return tokens if tokens < output_tokens else None


def parse_cancel(text: str, seed: int) -> Cancellations:
    """`SHARE` or `SHARE@LENGTHS`, as in `0.05@lognormal:mean=30,sigma=1`. Raises ConfigError."""
    share, at, lengths = text.partition("@")
    try:
        return Cancellations(seed=seed, share=float(share), lengths=parse_outputs(lengths) if at else None)
    except ValueError as error:
        raise ConfigError(f"cancel {text!r}: {error}; the form is SHARE or SHARE@LENGTHS") from error
