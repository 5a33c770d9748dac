"""Reads prompts: the queue, the chunks it offers to the step loop, and the holder's side of the handoff."""

from prefill.admission import PrefillLimits
from prefill.leases import SendOffer
from prefill.queue import LocalHandoff, PrefillQueue

__all__ = ["LocalHandoff", "PrefillLimits", "PrefillQueue", "SendOffer"]
