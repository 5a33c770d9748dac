"""Conversations of several turns: each turn waits for the answer before it, and a time to think."""

from __future__ import annotations

from typing import NamedTuple


class ChatTurn(NamedTuple):
    """What a user says, and how long the answer will be."""

    #: Of the user's message alone; > 0.
    new_tokens: int
    #: Tokens that the answer will have; > 0.
    output_tokens: int
    #: From the end of the answer before to when this turn is due; 0 for the first.
    think_s: float = 0.0
    #: What the user says; None: words are made up, `new_tokens` of them.
    text: str | None = None


class Chat(NamedTuple):
    """One conversation. Streams of these are ordered by `arrival_s`."""

    #: When the first turn is due, since the start of the workload; >= 0.
    arrival_s: float
    #: At least one.
    turns: tuple[ChatTurn, ...]
    #: Chats with one number and one length of it begin with the same system prompt.
    system_prompt: int = 0
    #: 0: there is none.
    system_prompt_tokens: int = 0
    #: Name of the SLO class of all its turns.
    slo_class: str = "default"

    def prompt_tokens(self) -> tuple[int, ...]:
        """Of each turn's whole prompt: the system prompt, all messages and answers before it, and its own message."""
        sent: list[int] = []
        tokens = self.system_prompt_tokens
        for turn in self.turns:
            sent.append(tokens + turn.new_tokens)
            tokens += turn.new_tokens + turn.output_tokens
        return tuple(sent)
