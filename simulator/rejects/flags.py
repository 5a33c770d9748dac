"""The flags of `tandem rejects`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 (read at run time by the command line parser)
from typing import Annotated

from cyclopts import Group, Parameter

REPLAY_GROUP = Group("Replay", sort_key=1)


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class RejectsFlags:
    """Whether and how refusals are replayed, and where figures go."""

    replay: Annotated[
        bool,
        Parameter(
            name="--replay",
            group=REPLAY_GROUP,
            negative="",
            show_default=False,
            help="Simulate the logged cluster and tell how many of the refused would have met their targets.",
        ),
    ] = False

    samples: Annotated[
        int,
        Parameter(
            name="--samples",
            group=REPLAY_GROUP,
            help="Refused requests that are tried, each let in alone: of every class and reason some, all if there are "
            "no more. More make the intervals narrower.",
        ),
    ] = 200

    seed: Annotated[int, Parameter(name="--seed", group=REPLAY_GROUP, help="Of the choice of these requests.")] = 0

    json: Annotated[Path | None, Parameter(name="--json", help="File for the same figures as one JSON document.")] = (
        None
    )
