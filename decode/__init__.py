"""Writes answers: the running batch, preemption, and the reader's side of the handoff."""

from decode.batch import DecodeBatch, DecodeLimits

__all__ = ["DecodeBatch", "DecodeLimits"]
