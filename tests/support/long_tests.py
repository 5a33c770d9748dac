"""Tests that take minutes run with LONG_TESTS=1 only; a shorter variant of each always runs."""

from __future__ import annotations

import os

import pytest

LONG = os.environ.get("LONG_TESTS") == "1"

only_long = pytest.mark.skipif(not LONG, reason="only with LONG_TESTS=1")
