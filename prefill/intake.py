"""Which prompts a worker takes: what can never fit is refused as wrong. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.errors import BadRequest

if TYPE_CHECKING:
    from contracts.ids import WorkerId
    from contracts.messages import PrefillRequest
    from contracts.requests import GenerateRequest
    from engine.plan import Engine


def check_fits(request: GenerateRequest, engine: Engine, own_worker_id: WorkerId | str) -> None:
    """Raises BadRequest, with numbers, where this engine could never read the prompt or write its answer."""
    num_tokens = len(request.token_ids)
    smallest, largest = min(request.token_ids), max(request.token_ids)
    if smallest < 0 or largest >= engine.vocab_size:
        outside = smallest if smallest < 0 else largest
        raise BadRequest(f"token id {outside} is outside the model's vocabulary of {engine.vocab_size}")
    if num_tokens >= engine.max_context_tokens:
        raise BadRequest(
            f"{num_tokens} prompt tokens leave no room for an answer in a context of {engine.max_context_tokens}"
        )
    needed = engine.identity.layout.blocks_for(num_tokens)
    if needed > engine.num_blocks:
        raise BadRequest(f"the prompt needs {needed} KV blocks, {own_worker_id} has {engine.num_blocks} in all")


def hands_over(
    ask: PrefillRequest, num_blocks: int, *, own_worker_id: WorkerId | str, budget_blocks: int, also_writes: bool
) -> bool:
    """Whether another worker gets this KV, of `num_blocks` blocks. An answer of one token ends here, and a worker that
    writes answers too keeps a prompt that is larger than its whole budget: waiting for its reader it would hold up what
    waits for nobody."""
    request = ask.request
    num_to_write = request.num_prompt_tokens + request.sampling.max_tokens - len(request.token_ids)
    if ask.decode.worker_id == own_worker_id or num_to_write <= 1:
        return False
    return not (also_writes and num_blocks > budget_blocks)
