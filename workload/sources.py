"""Where items come from: drawn from distributions, a trace of requests, or a file of conversations."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from contracts.errors import ConfigError
from workload.arrivals import Constant, Gamma, Poisson
from workload.chats import Chat, ChatTurn
from workload.drawn_chats import DEFAULT_THINK_S, ChatShape, bounded_chats, draw_chats, think_times
from workload.named import MAX_REQUESTS
from workload.prefixes import SharedPrefixes
from workload.sharegpt import parse_conversations
from workload.spec import parse_arrivals, parse_outputs, parse_prompts
from workload.synthetic import generator, slo_classes, synthetic
from workload.trace_rows import CONVERSATIONS, detect
from workload.traces import parse_trace, read_bytes
from workload.transform import spread_ties, window

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from workload.arrivals import Arrivals
    from workload.asked import Asked
    from workload.request import WorkloadRequest
    from workload.sharegpt import Message
    from workload.traces import TraceSummary

DEFAULT_ARRIVALS = "poisson:1"
DEFAULT_LENGTHS = "sharegpt"
DEFAULT_NUM_REQUESTS = 1000
#: English text has about so many in one token.
ASSUMED_CHARACTERS_PER_TOKEN = 4

#: A prompt's longest: what a row of a result holds.
MAX_PROMPT_TOKENS = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Items by arrival, that can be read again and again."""

    name: str
    items: Callable[[], Iterable[WorkloadRequest | Chat]]
    #: Plain data that repeats it.
    facts: dict[str, object]
    #: Of the requests' hash ids; 0 without.
    hash_block_tokens: int = 0
    warnings: tuple[str, ...] = ()


def open_source(asked: Asked, count_tokens: Callable[[str], int] | None) -> Source:
    """`count_tokens` of a text of a conversation; None: about. Raises ConfigError."""
    if asked.trace is None:
        return _drawn(asked)
    name, text = str(asked.trace), read_bytes(asked.trace)
    if detect(name, text) == CONVERSATIONS:
        return _conversations(asked, asked.trace, text, count_tokens)
    return _trace(asked, asked.trace, text)


def _drawn(asked: Asked) -> Source:
    if asked.chats is None:
        _refuse_think(asked)
    facts: dict[str, object] = {
        "source": "drawn",
        "arrivals": asked.arrivals or DEFAULT_ARRIVALS,
        "prompts": asked.prompts or DEFAULT_LENGTHS,
        "outputs": asked.outputs or DEFAULT_LENGTHS,
        "system_prompts": asked.system_prompts,
    }
    if asked.chats is None:
        block_tokens = asked.system_prompts.tokens if asked.system_prompts else 0
        return Source(name="drawn requests", items=_requests(asked), facts=facts, hash_block_tokens=block_tokens)
    assert asked.chats.mean_turns is not None, "a file without a trace says it"
    shape = ChatShape(
        mean_turns=asked.chats.mean_turns, max_turns=asked.chats.max_turns, mean_think_s=_mean_think_s(asked)
    )
    return Source(name="drawn chats", items=_chats(asked, shape), facts={**facts, "chats": shape})


def _requests(asked: Asked) -> Callable[[], Iterable[WorkloadRequest]]:
    arrivals = parse_arrivals(asked.arrivals or DEFAULT_ARRIVALS)
    prompts, outputs = parse_prompts(asked.prompts or DEFAULT_LENGTHS), parse_outputs(asked.outputs or DEFAULT_LENGTHS)
    shared = asked.system_prompts
    prefixes = None
    if shared is not None:
        prefixes = SharedPrefixes(
            num_system_prompts=shared.count,
            system_prompt_tokens=shared.tokens,
            zipf_exponent=shared.zipf_exponent,
            max_prompt_tokens=MAX_PROMPT_TOKENS,
            hash_block_tokens=shared.tokens,
        )
    return lambda: synthetic(
        arrivals=arrivals,
        prompts=prompts,
        outputs=outputs,
        seed=asked.seed,
        num_requests=_most_drawn(asked),
        duration_s=_drawn_duration_s(asked, arrivals),
        prefixes=prefixes,
        slo_mix=asked.slo_mix,
    )


def _chats(asked: Asked, shape: ChatShape) -> Callable[[], Iterable[Chat]]:
    arrivals = parse_arrivals(asked.arrivals or DEFAULT_ARRIVALS)
    prompts, outputs = parse_prompts(asked.prompts or DEFAULT_LENGTHS), parse_outputs(asked.outputs or DEFAULT_LENGTHS)
    return lambda: draw_chats(
        arrivals=arrivals,
        prompts=prompts,
        outputs=outputs,
        shape=shape,
        seed=asked.seed,
        num_requests=_most_drawn(asked),
        duration_s=_drawn_duration_s(asked, arrivals),
        system_prompts=asked.system_prompts,
        slo_mix=asked.slo_mix,
    )


def _drawn_duration_s(asked: Asked, arrivals: Arrivals) -> float | None:
    """Of what is drawn, so that it lasts as long as was asked once its time has been scaled.

    Ramps, steps and waves have no one rate that `--rate` could be compared with: they are drawn for as long as asked.
    """
    if asked.duration_s is None:
        return None
    if asked.rate_rps is not None and isinstance(arrivals, Poisson | Gamma | Constant):
        return asked.duration_s * asked.rate_rps / arrivals.rate_rps
    return asked.duration_s * (asked.speed or 1.0)


def _most_drawn(asked: Asked) -> int:
    if asked.num_requests is not None:
        return asked.num_requests
    # One more than is allowed, so that a duration which brings too many is told rather than cut.
    return DEFAULT_NUM_REQUESTS if asked.duration_s is None else MAX_REQUESTS + 1


def _trace(asked: Asked, path: Path, text: bytes) -> Source:
    if asked.arrivals is not None:
        raise ConfigError(f"{asked.said('arrivals')}: the trace {path} says this already")
    if asked.chats is not None:
        raise ConfigError(f"{asked.said('chats')}: the trace {path} holds requests, not conversations")
    _refuse_think(asked)
    trace = parse_trace(str(path), text)
    end_s = math.inf if asked.duration_s is None else asked.start_s + asked.duration_s
    requests = spread_ties(trace.requests) if asked.flags.spread_ties else trace.requests
    kept = tuple(islice(window(requests, asked.start_s, end_s), asked.num_requests))
    if not kept:
        raise ConfigError(f"--start, --duration: no request of {path} arrives then")

    def with_class() -> Iterator[WorkloadRequest]:
        classes = slo_classes(asked.slo_mix, generator(asked.seed, "slo_classes"))
        for request, slo_class in zip(kept, classes, strict=False):
            yield request._replace(slo_class=slo_class)

    return Source(
        name=f"{path.name} ({trace.summary.kind})",
        items=with_class,
        facts={
            "source": "trace",
            "file": str(path),
            "sha256": _sha256(path),
            "spread_ties": asked.flags.spread_ties,
            "summary": trace.summary,
        },
        hash_block_tokens=kept[0].hash_block_tokens,
        warnings=_left_out(trace.summary),
    )


def _conversations(asked: Asked, path: Path, text: bytes, count_tokens: Callable[[str], int] | None) -> Source:
    if asked.start_s:
        raise ConfigError(f"{asked.said('start')}: the conversations of {path} have no times")
    if asked.chats is not None and asked.chats.mean_turns is not None:
        raise ConfigError(f"{asked.said('chats')}.mean_turns: the conversations of {path} have as many as they have")
    read, summary = parse_conversations(str(path), text, count_tokens or _assumed_tokens, asked.num_requests)
    max_turns = None if asked.chats is None else asked.chats.max_turns
    conversations = [messages[:max_turns] for messages in read]
    warnings: list[str] = []
    if count_tokens is None:
        warnings.append(
            f"no tokenizer: lengths of {path.name} assume {ASSUMED_CHARACTERS_PER_TOKEN} characters a token"
        )
    if summary.num_left_out:
        warnings.append(
            f"{summary.num_left_out:,} of {summary.num_conversations:,} conversations have no answered message, or an "
            f"unknown speaker: left out"
        )
    chats = tuple(_timed(asked, conversations))
    return Source(
        name=f"{path.name} ({CONVERSATIONS})",
        items=lambda: chats,
        facts={
            "source": "conversations",
            "file": str(path),
            "sha256": _sha256(path),
            "summary": summary,
            "arrivals": asked.arrivals or DEFAULT_ARRIVALS,
            "mean_think_s": _mean_think_s(asked),
        },
        warnings=tuple(warnings),
    )


def _timed(asked: Asked, conversations: list[tuple[Message, ...]]) -> Iterator[Chat]:
    """In the order of the file, at random times; chats come as often as lets turns have the rate asked for."""
    mean_turns = sum(map(len, conversations)) / len(conversations)
    arrivals = parse_arrivals(asked.arrivals or DEFAULT_ARRIVALS).scaled(1.0 / mean_turns)
    think_s = think_times(_mean_think_s(asked), generator(asked.seed, "thinking"))
    chats = (
        Chat(
            arrival_s,
            tuple(
                ChatTurn(message.new_tokens, message.output_tokens, think_s(turn), message.text)
                for turn, message in enumerate(messages)
            ),
            slo_class=slo_class,
        )
        for arrival_s, messages, slo_class in zip(
            arrivals.times(generator(asked.seed, "arrivals")),
            conversations,
            slo_classes(asked.slo_mix, generator(asked.seed, "slo_classes")),
            strict=False,
        )
    )
    return bounded_chats(chats, asked.num_requests, asked.duration_s)


def _mean_think_s(asked: Asked) -> float:
    if asked.think_s is not None:
        return asked.think_s
    return DEFAULT_THINK_S if asked.chats is None else asked.chats.think_s


def _refuse_think(asked: Asked) -> None:
    if asked.think_s is not None:
        raise ConfigError(f"--think {asked.flags.think}: the workload has no chats")


def _assumed_tokens(text: str) -> int:
    return -(-len(text) // ASSUMED_CHARACTERS_PER_TOKEN)


def _left_out(summary: TraceSummary) -> tuple[str, ...]:
    num_rows = summary.num_without_prompt + summary.num_without_output
    if not num_rows:
        return ()
    return (f"{num_rows:,} of the trace's {summary.num_rows:,} rows have no prompt or no output tokens: left out",)


def _sha256(path: Path) -> str | None:
    """None of a pipe, which cannot be read twice."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
