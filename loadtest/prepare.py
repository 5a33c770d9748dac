"""Gets a server ready to be measured: its model, what it takes, what prompts are made of, and the bodies themselves."""

from __future__ import annotations

import sys
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import ConfigError
from loadtest.http.client import HttpClient
from loadtest.probe import DEADLINE_S, find_model, probe
from loadtest.prompts.bodies import BodyFields, BodyMaker
from loadtest.prompts.server_words import from_server
from loadtest.prompts.spool import Spool
from loadtest.prompts.tokens import Vocabulary
from loadtest.settings import Limits, Target
from workload.chats import Chat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from loadtest.flags import ServerFlags
    from loadtest.plan import Plan
    from loadtest.probe import ProbeResult
    from loadtest.prompts.bodies import Answer

#: Making fewer prompts takes no time worth telling.
_MANY = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of a server that answered."""

    target: Target
    vocabulary: Vocabulary
    found: ProbeResult
    #: Sentences for the user.
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One that can be asked."""

    known: Known
    client: HttpClient
    limits: Limits

    def bodies(self, plan: Plan, seed: int) -> PlanBodies:
        """Another seed is other prompts of the same lengths, which no cache of the server has seen."""
        known = self.known
        maker = BodyMaker(
            known.target,
            known.vocabulary,
            seed,
            form=known.found.form,
            fields=known.found.fields,
            overhead=known.found.overhead,
        )
        return PlanBodies(plan, maker)


class PlanBodies:
    """Bodies of a plan: lone requests' made at once, chats' when their turn comes, with the answers so far.

    A context: what was made may lie in a file.
    """

    def __init__(self, plan: Plan, maker: BodyMaker) -> None:
        self.path = maker.path
        self._plan = plan
        self._maker = maker
        #: Where an item's body is, of a lone request.
        self._places = array("q")
        if plan.num_requests > _MANY:
            print(f"making the prompts of {plan.num_requests:,} requests", file=sys.stderr)
        self._spool = Spool(self._lone_bodies(), on_progress=lambda num_made: None)

    def __enter__(self) -> PlanBodies:
        return self

    def __exit__(self, *exception: object) -> None:
        self._spool.close()

    @property
    def num_lengthened(self) -> int:
        """Prompts so short that what the server adds to them is longer already."""
        return self._maker.num_lengthened

    def lone(self, item: int) -> bytes:
        return self._spool[self._places[item]]

    def turn(self, item: int, turn: int, answers: Sequence[Answer]) -> bytes:
        chat = self._plan.items[item]
        assert isinstance(chat, Chat)
        return self._maker.turn(chat, item, turn, answers)

    def prompt_tokens(self, item: int, turn: int, answers: Sequence[Answer]) -> int:
        """Planned for a chat's turn, after answers that may be shorter than planned."""
        chat = self._plan.items[item]
        assert isinstance(chat, Chat)
        return self._maker.turn_tokens(chat, turn, answers)

    def _lone_bodies(self) -> Iterator[bytes]:
        num_made = 0
        for item, asked in enumerate(self._plan.items):
            self._places.append(num_made)
            if not isinstance(asked, Chat):
                num_made += 1
                yield self._maker.single(asked, self._plan.first_index[item])


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How all servers of a run are asked."""

    flags: ServerFlags
    headers: tuple[tuple[str, str], ...]
    extra_body: dict[str, object]
    limits: Limits
    #: From `--tokenizer`; None: each server is asked.
    vocabulary: Vocabulary | None
    has_chats: bool
    #: Chats bring what their users say.
    has_text: bool
    #: Longest prompt and answer of the workload, together.
    longest_tokens: int


async def prepare(name: str, base_url: str, wanted: Wanted, now_s: Callable[[], float]) -> Server:
    """Raises ConfigError for a server that does not answer, or that lacks what was asked for by name."""
    verify = not wanted.flags.insecure
    # A cold server's first token may take longer than those of the run are given.
    patience = Limits(connect_s=wanted.limits.connect_s, total_s=min(DEADLINE_S, wanted.limits.total_s))
    asking = HttpClient(base_url, headers=wanted.headers, limits=patience, now_s=now_s, verify=verify)
    try:
        found = await _look(asking, name, base_url, wanted, now_s)
    finally:
        await asking.close()
    client = HttpClient(base_url, headers=wanted.headers, limits=wanted.limits, now_s=now_s, verify=verify)
    return Server(client=client, limits=wanted.limits, known=found)


async def _look(client: HttpClient, name: str, base_url: str, wanted: Wanted, now_s: Callable[[], float]) -> Known:
    flags = wanted.flags
    model = await find_model(client, flags.model, base_url=base_url)
    target = Target(
        name=name,
        base_url=base_url,
        model=model.name,
        endpoint=flags.endpoint,
        headers=wanted.headers,
        extra_body=wanted.extra_body,
    )
    vocabulary, notes = await _vocabulary(client, target, wanted)
    found = await probe(
        client,
        target,
        vocabulary,
        form=flags.prompts_as,
        fields=BodyFields(ignore_eos=flags.ignore_eos, return_token_ids=wanted.has_chats),
        has_chats=wanted.has_chats,
        has_text=wanted.has_text,
        now_s=now_s,
    )
    return Known(
        target=target,
        vocabulary=vocabulary,
        found=found,
        notes=(*notes, *found.notes, *_too_long(model.max_model_len, wanted.longest_tokens)),
    )


async def _vocabulary(client: HttpClient, target: Target, wanted: Wanted) -> tuple[Vocabulary, tuple[str, ...]]:
    if wanted.vocabulary is not None:
        return wanted.vocabulary, ()
    try:
        return await from_server(client, target.model), ()
    except (ConfigError, OSError) as error:
        return Vocabulary.assumed(), (
            f"prompts are of common words, taken for one token each, for want of a tokenizer ({error}); --tokenizer "
            f"makes their lengths exact",
        )


def _too_long(max_model_len: int | None, longest_tokens: int) -> tuple[str, ...]:
    if max_model_len is None or longest_tokens <= max_model_len:
        return ()
    return (
        f"the workload has requests of up to {longest_tokens:,} tokens, the server takes {max_model_len:,}: "
        f"--max-context or --scale-lengths would fit them",
    )
