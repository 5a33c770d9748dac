"""Reads prompts: the queue, the chunks it offers to the step loop, and the holder's side of the handoff."""

from prefill.admission import PrefillLimits
from prefill.queue import LocalHandoff, PrefillQueue, SendOffer

__all__ = ["LocalHandoff", "PrefillLimits", "PrefillQueue", "SendOffer"]
