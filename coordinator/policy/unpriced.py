"""Where nothing is known (yet) of what steps cost: prompts are counted in tokens instead of seconds.

A fresh cluster fetches prefixes all the same. A copy then counts as the tokens that would be computed in the time it
takes, at an ordinary pace; so it is made over a link of any but the slowest kinds, and of several readers
the one is preferred that needs to copy less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from coordinator.policy.sources import Sources, is_cheaper

if TYPE_CHECKING:
    from coordinator.policy.fleet_view import Expected, FleetView
    from coordinator.policy.outlook import Outlook
    from coordinator.policy.question import Question
    from coordinator.policy.sources import FetchRules, Link, Source

#: What computing a token of a prompt is taken for: an accelerator that reads five thousand a second. One that is
#: faster loses a few milliseconds on the first prompts; processors need several times as much.
_TOKEN_S = 2e-4


class TokenCounts:
    """Of one question's prompt. `rules` None: nothing is fetched."""

    def __init__(
        self, question: Question, view: FleetView, outlook: Outlook, link: Link, rules: FetchRules | None
    ) -> None:
        self._question = question
        self._view = view
        self._link = link
        self._sources: Sources | None = None
        #: Nothing is booked where nothing is predicted: there is a budget of copies or there is none.
        self._may_copy = rules is not None and rules.replica_share > 0
        if rules is not None and question.held_lengths:
            self._sources = Sources(question, view, outlook, link, rules)
        #: By class of KV and blocks held.
        self._found: dict[tuple[int, int], tuple[float, Source | None]] = {}

    def to_read(self) -> Expected:
        """By row: tokens of the prompt that are computed there, and those that a copy counts as."""
        question, view = self._question, self._view
        tokens = np.full(len(view.infos), float(question.item.prompt_tokens))
        if question.held is None:
            return tokens
        readers = view.can_read.nonzero()[0]
        kinds = zip(view.kv_class[readers].tolist(), question.held[readers].tolist(), strict=True)
        tokens[readers] = [self._find(*kind)[0] for kind in kinds]
        return tokens

    def source(self, row: int) -> Source | None:
        """Where a reader is to fetch from; None: from nowhere."""
        return self._find(self._view.kv_class.item(row), self._question.held_by(row))[1]

    def _find(self, kv_class: int, held_blocks: int) -> tuple[float, Source | None]:
        key = kv_class, held_blocks
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._best(kv_class, held_blocks)
        return found

    def _best(self, kv_class: int, held_blocks: int) -> tuple[float, Source | None]:
        question, link, sources = self._question, self._link, self._sources
        alone_tokens = float(question.item.prompt_tokens - held_blocks * link.block_tokens)
        best: tuple[float, Source | None] = alone_tokens, None
        if sources is None:
            return best
        for source in (*sources.first(kv_class), *sources.second(kv_class)):
            if not sources.allows(kv_class, source, held_blocks, self._may_copy):
                continue
            num_tokens = (source.blocks - held_blocks) * link.block_tokens
            copy_s = link.transfer.transfer_s(num_tokens * link.kv_token_bytes, 1)
            tokens = alone_tokens - num_tokens + copy_s / _TOKEN_S
            if tokens < best[0] and is_cheaper(copy_s, num_tokens * _TOKEN_S):
                best = tokens, source
        return best
