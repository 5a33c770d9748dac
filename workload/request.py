"""One request of a workload, before it has tokens."""

from __future__ import annotations

from typing import NamedTuple


class WorkloadRequest(NamedTuple):
    """What a client will ask, and when. Streams of these are ordered by `arrival_s`."""

    #: Since the start of the workload; >= 0.
    arrival_s: float
    #: > 0.
    prompt_tokens: int
    #: Tokens that the answer will have; > 0.
    output_tokens: int
    #: One id for each block of `hash_block_tokens` prompt tokens, the last block may be partial; empty where
    #: nothing is known of shared prefixes. Two requests share as many tokens as their ids have equal leading ones.
    hash_ids: tuple[int, ...] = ()
    #: Tokens that one of `hash_ids` stands for; 0 without ids.
    hash_block_tokens: int = 0
    #: Name of the SLO class it belongs to.
    slo_class: str = "default"
    #: Who asks.
    tenant: str = ""
    #: Larger goes first.
    priority: int = 0
