"""What a run is told about the server, the client and their limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

#: Which of the two generation endpoints is asked, below the base URL.
Endpoint = Literal["completions", "chat"]
#: How prompts are sent: as token ids, exact for every server that takes them, or as text.
PromptForm = Literal["ids", "text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Every wait of one request has a deadline."""

    connect_s: float = 10.0
    #: From sending to the first token; None: `total_s` alone.
    first_token_s: float | None = None
    #: From sending to the end of the answer.
    total_s: float = 600.0
    #: How often a 429 or 503 with `Retry-After` is honoured; latencies count from the first time all the same.
    max_retries: int = 0
    #: The longest `Retry-After` that is waited for.
    max_retry_after_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One server."""

    #: For reports; unique in a run.
    name: str
    #: Without the `/v1`; no trailing slash.
    base_url: str
    model: str
    endpoint: Endpoint
    #: Sent with every request: authorization and what the user asked for. Never shown in a report.
    headers: tuple[tuple[str, str], ...] = ()
    #: Merged into every body, after what the load test writes.
    extra_body: dict[str, object] = field(default_factory=dict[str, object])
