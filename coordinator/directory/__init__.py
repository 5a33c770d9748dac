"""Which workers are believed to hold which blocks, and how that is kept in step with them."""

from coordinator.directory.directory import Directory, Match
from coordinator.directory.hints import as_hints
from coordinator.directory.sync import DirectorySync

__all__ = ["Directory", "DirectorySync", "Match", "as_hints"]
