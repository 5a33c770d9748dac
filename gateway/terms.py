"""On which terms a request runs: who asks, what it was promised, when its turn is, whose cached KV it may use.

All of it is settled before the request is submitted, so that coordinator and workers need not know who has which
key. See docs/slo.md for what clients see of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import BadRequest
from contracts.requests import MOST_PRIORITY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from contracts.requests import KvClass
    from gateway.schemas import GenerationBody
    from workload.slo import SloClass

#: Everybody without a tenant's key.
DEFAULT_TENANT = "default"

#: Names the SLO class of requests whose body does not.
SLO_CLASS_HEADER = "x-tandem-slo-class"

#: No tenant's name holds one: a tenant's salts never are another tenant's.
_SALT_SEPARATOR = "/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    name: str
    #: Requests that ask for more get this.
    max_priority: int = MOST_PRIORITY
    #: Of requests that name none; None: the gateway's default.
    slo_class: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    tenant: str = DEFAULT_TENANT
    #: Empty: none, and no targets.
    slo_class: str = ""
    #: From when the client asked.
    ttft_target_s: float | None = None
    #: Mean over the later tokens.
    tpot_target_s: float | None = None
    #: Larger goes first.
    priority: int = 0
    #: Prompts share KV only where it is equal.
    cache_salt: str = DEFAULT_TENANT
    #: And only with requests of the same class.
    kv_class: KvClass = "exact"


#: Of whoever brings nothing.
NO_TERMS = Terms()


class TermsBook:
    """Settles terms. Pure."""

    def __init__(
        self, slos: Mapping[str, SloClass], default_class: str | None, default_kv_class: KvClass = "exact"
    ) -> None:
        """`default_kv_class` is that of requests which do not ask for exact KV."""
        self._slos = slos
        self._default_class = default_class
        self._default_kv_class: KvClass = default_kv_class

    def terms(self, tenant: Tenant, body: GenerationBody, class_header: str | None) -> Terms:
        """Raises BadRequest for an SLO class that there is not."""
        asked = body.slo_class or class_header or None
        name = asked or tenant.slo_class or self._default_class
        slo = None if name is None else self._slos.get(name)
        if asked is not None and slo is None:
            known = ", ".join(sorted(self._slos)) or "none"
            raise BadRequest(f"slo_class: there is no SLO class {asked[:64]!r}; known are: {known}", param="slo_class")
        salt = tenant.name if body.cache_salt is None else f"{tenant.name}{_SALT_SEPARATOR}{body.cache_salt}"
        return Terms(
            tenant=tenant.name,
            slo_class="" if slo is None else slo.name,
            ttft_target_s=None if slo is None else slo.ttft_ms / 1e3,
            tpot_target_s=None if slo is None else slo.tpot_ms / 1e3,
            # On the wire lower is earlier, as with vLLM.
            priority=min(-(body.priority or 0), tenant.max_priority),
            cache_salt=salt,
            kv_class="exact" if body.exact_kv else self._default_kv_class,
        )
