"""What a worker runs, as it tells: the version of the program, and of what it says to others."""

from __future__ import annotations

from importlib.metadata import version

from contracts.layout import PROTOCOL_VERSION


def build_name() -> str:
    """Such as "0.6.0 (protocol 2)"."""
    return f"{version('tandem-serve')} (protocol {PROTOCOL_VERSION})"
