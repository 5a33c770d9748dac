"""Every bound of the gateway's core, by name. Reaching one is an error for somebody, never growth."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayLimits:
    #: Requests open at once; more are refused with NoCapacity.
    max_open_requests: int = 4096
    #: Requests waiting for the coordinator's answer.
    max_waiting_dispatch: int = 2048
    #: Requests in one Dispatch call.
    max_dispatch_batch: int = 64
    dispatch_timeout_s: float = 2.0
    #: The same where the request can be placed without it, by the snapshot.
    dispatch_timeout_with_snapshot_s: float = 0.5
    #: How long a new request waits for a coordinator that does not answer.
    dispatch_patience_s: float = 5.0
    prefill_timeout_s: float = 5.0
    #: Workers send a frame at least every second: silence this long means the worker is dead or hung.
    frames_idle_timeout_s: float = 3.0
    reopen_backoff_s: float = 0.1
    max_reopen_backoff_s: float = 1.0
    #: A stream that stayed closed so long is forgotten until a request needs it.
    reopen_give_up_s: float = 30.0
    #: Output tokens of one request that its client has not taken.
    max_buffered_tokens: int = 2048
    #: Output tokens that arrived ahead of a missing one.
    max_early_tokens: int = 1024
    #: How long a missing output token may take, once a later one is here.
    gap_timeout_s: float = 3.0
    #: How often a request that a worker may have started is taken up again; 0: never, and no failure is retried.
    max_replays: int = 3
    #: How long a request that nobody has any more waits for a worker (a restart takes 1 to 8 s).
    replay_patience_s: float = 30.0
    #: How long a request waits for a worker that is being started for it.
    wake_patience_s: float = 120.0
    #: Between two questions for a place, from the second on; doubles each time.
    replay_backoff_s: float = 0.1
    max_replay_backoff_s: float = 1.0
    #: Cancels waiting for one worker; beyond, they are dropped (the worker's own deadline remains).
    max_waiting_cancels: int = 4096
    max_cancel_batch: int = 512
    cancel_timeout_s: float = 1.0
    cancel_attempts: int = 3
    cancel_backoff_s: float = 0.2
    #: Answers to claims waiting for one worker; beyond, they are dropped (the claims are repeated).
    max_waiting_verdicts: int = 4096
    max_verdict_batch: int = 512
    grant_timeout_s: float = 1.0
    #: How long a stopping gateway waits for its last cancels to leave.
    stop_grace_s: float = 1.0
    members_timeout_s: float = 1.0
    #: How often the coordinator is asked who is there.
    members_interval_s: float = 1.0
    #: At least so long between two such questions where others have come or gone.
    members_pause_s: float = 0.1
    #: How often a coordinator that did not answer is tried again.
    probe_interval_s: float = 0.25
    #: How long requests are placed by its last answer while it does not answer.
    snapshot_ttl_s: float = 60.0
    #: A worker that its coordinator has not heard for so long may be dead: the snapshot's last choice.
    silent_after_s: float = 1.5
    #: How long a worker is believed in that was well and that the coordinator names no more: one that was just started
    #: knows nobody yet.
    unnamed_for_s: float = 3.0
