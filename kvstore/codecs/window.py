"""The residual window: what of a sequence a lossy codec leaves alone.

KIVI keeps the newest tokens in full precision (section 3.3): the model looks at them most. Here a block that lies in
them when it is stored is stored as it is, and stays so: it is rewritten only with what is computed anew.
"""

from __future__ import annotations

#: The newest tokens of a sequence that stay exact.
DEFAULT_WINDOW_TOKENS = 32


def num_lossy_blocks(num_tokens: int, block_tokens: int, window_tokens: int = DEFAULT_WINDOW_TOKENS) -> int:
    """How many leading blocks of a sequence of `num_tokens` lie wholly before its last `window_tokens` tokens."""
    return max(0, num_tokens - window_tokens) // block_tokens
