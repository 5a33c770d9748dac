"""The OpenAI-compatible REST API over a `GatewayCore`."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from contracts.errors import NoCapacity, NotFound, NotReady, TandemError
from contracts.messages import MembersReply
from gateway.formats import format_of
from gateway.generation import Generation, TimelineLog, run_all, timeline_json
from gateway.health import HealthCheck, HealthReport
from gateway.metrics import Metrics
from gateway.planning import Plan, Planner
from gateway.schemas import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
    parse,
    refuse_unknown,
)
from gateway.sse import EventStream
from gateway.terms import SLO_CLASS_HEADER, Terms, TermsBook
from gateway.tokenizer import TextTokenizer, TokenizingPool
from gateway.web import (
    Gate,
    error_response,
    json_response,
    read_body,
    routing_error_response,
    until_disconnect,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Sequence

    from prometheus_client.core import Metric
    from structlog.typing import FilteringBoundLogger

    from contracts.clock import Clock
    from gateway.core import GatewayCore
    from gateway.formats import Format
    from gateway.settings import GatewaySettings

BodyT = TypeVar("BodyT", bound=msgspec.Struct)

Handler = Callable[..., Awaitable[Response]]

#: Keys of a prompt this long take about a millisecond.
_HASH_IN_THREAD_TOKENS = 16_384


def create_app(
    core: GatewayCore,
    tokenizer: TextTokenizer,
    settings: GatewaySettings,
    clock: Clock,
    *,
    rng: random.Random | None = None,
) -> FastAPI:
    """The app of one gateway. `rng` gives seeds to requests that bring none; None: one that starts from the
    gateway's id and the time of day.

    The core must be entered by the caller, and stay so for as long as the app is served.
    """
    api = Api(core, TokenizingPool(tokenizer, num_threads=settings.tokenizer_threads), settings, clock, rng)
    return app_of(api, [api], settings, core.log)


def app_of(endpoints: Endpoints, apis: Sequence[Api], settings: GatewaySettings, log: FilteringBoundLogger) -> FastAPI:
    """`apis`: what stands behind the endpoints, one for each model."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        with ExitStack() as stack:
            for api in apis:
                stack.enter_context(api.pool)
            yield

    app = FastAPI(title="Tandem", version=settings.version, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Gate, settings=settings, new_request_id=apis[0].new_request_id, log=log)
    app.add_exception_handler(TandemError, _on_tandem_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    _add_routes(app, endpoints)
    return app


class Endpoints(Protocol):
    """What the paths lead to."""

    async def completions(self, request: Request) -> Response: ...
    async def chat_completions(self, request: Request) -> Response: ...
    async def tokenize(self, request: Request) -> Response: ...
    async def detokenize(self, request: Request) -> Response: ...
    async def models(self) -> Response: ...
    async def model(self, model: str) -> Response: ...
    async def timeline(self, request: Request, request_id: str) -> Response: ...
    async def health(self) -> Response: ...
    async def live(self) -> Response: ...
    async def version(self) -> Response: ...
    async def metrics(self) -> Response: ...


def _add_routes(app: FastAPI, api: Endpoints) -> None:
    gets: dict[str, Handler] = {
        "/v1/models": api.models,
        "/v1/models/{model:path}": api.model,
        "/v1/requests/{request_id}/timeline": api.timeline,
        "/health": api.health,
        "/ready": api.health,
        "/live": api.live,
        "/version": api.version,
        "/metrics": api.metrics,
    }
    posts: dict[str, tuple[Handler, type[msgspec.Struct]]] = {
        "/v1/completions": (api.completions, CompletionBody),
        "/v1/chat/completions": (api.chat_completions, ChatBody),
        "/tokenize": (api.tokenize, TokenizeBody),
        "/detokenize": (api.detokenize, DetokenizeBody),
    }
    for path, handler in gets.items():
        app.add_api_route(path, handler, methods=["GET"], response_model=None)
    for path, (handler, kind) in posts.items():
        body = {"required": True, "content": {"application/json": {"schema": msgspec.json.schema(kind)}}}
        app.add_api_route(path, handler, methods=["POST"], response_model=None, openapi_extra={"requestBody": body})


async def _on_tandem_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TandemError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return routing_error_response(error)


@dataclass(frozen=True, slots=True)
class Arrival:
    """When and as what a request came."""

    request_id: str
    received_s: float
    created: int


class Api:
    """The endpoints of one model."""

    def __init__(
        self,
        core: GatewayCore,
        pool: TokenizingPool,
        settings: GatewaySettings,
        clock: Clock,
        rng: random.Random | None = None,
    ) -> None:
        """`rng` as in `create_app`. `pool` must be entered before the first request."""
        if rng is None:
            rng = random.Random(f"{core.gateway_id} {clock.wall_s()}")
        self._core = core
        #: Why there is no core at the moment; None: there is.
        self._down: str | None = None
        self.pool = self._pool = pool
        self._settings = settings
        self._clock = clock
        self._planner = Planner(settings, pool, rng)
        self._terms_book = TermsBook(settings.slos, settings.default_slo_class, settings.kv_class)
        self._metrics = Metrics(core, settings)
        self._timelines = TimelineLog(settings.max_timelines)
        self._health = HealthCheck(core, settings, clock)
        self._started = int(clock.wall_s())
        self._request_numbers = count(1)

    def fail(self, reason: str) -> None:
        """Its core is over: requests are refused (503) with the reason until there is another."""
        self._down = reason

    def renew(self, core: GatewayCore) -> None:
        """Goes on with another core, which has been entered. What was counted begins anew."""
        self._core, self._down = core, None
        self._metrics = Metrics(core, self._settings)
        self._health = HealthCheck(core, self._settings, self._clock)

    def new_request_id(self) -> str:
        return f"{self._core.gateway_id}-http-{next(self._request_numbers)}"

    # --- generation -----------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        arrival = self._arrival(request)
        body = await self._body(request, CompletionBody)
        terms = self._terms(request, body)
        return await self._answer(request, arrival, terms, await self._planner.completion(body))

    async def chat_completions(self, request: Request) -> Response:
        arrival = self._arrival(request)
        body = await self._body(request, ChatBody)
        terms = self._terms(request, body)
        return await self._answer(request, arrival, terms, await self._planner.chat(body))

    def _terms(self, request: Request, body: GenerationBody) -> Terms:
        """Raises BadRequest; and what `submit` would raise, before the prompt costs any work."""
        terms = self._terms_book.terms(request.state.tenant, body, request.headers.get(SLO_CLASS_HEADER))
        with self._counting_refusal(terms):
            if self._down is not None:
                raise NotReady(self._down, retry_after_s=1.0, reason="model_failed")
            self._core.check_room()
        return terms

    @contextmanager
    def _counting_refusal(self, terms: Terms) -> Generator[None]:
        try:
            yield
        except (NoCapacity, NotReady) as error:
            self._metrics.count_refusal(error.reason or error.code, terms.slo_class, terms.tenant)
            raise

    async def _answer(self, request: Request, arrival: Arrival, terms: Terms, plan: Plan) -> Response:
        block_keys = [await self._block_keys(prompt.token_ids, terms) for prompt in plan.prompts]
        with self._counting_refusal(terms):
            generation = Generation(
                self._core,
                self._pool.tokenizer,
                plan,
                arrival.request_id,
                terms=terms,
                block_keys=block_keys,
                received_s=arrival.received_s,
                timeout_s=self._settings.request_timeout_s,
                metrics=self._metrics,
                timelines=self._timelines,
            )
        form = format_of(plan, self._pool.tokenizer)
        try:
            if plan.stream:
                await until_disconnect(request.receive, generation.accepted())
                return EventStream(generation, form, arrival.created, self._clock, self._settings)
            return await until_disconnect(request.receive, _whole(generation, form, arrival.created))
        except BaseException:
            generation.close("the client is gone")
            raise

    async def _block_keys(self, token_ids: tuple[int, ...], terms: Terms) -> bytes:
        return await self._pool.run(
            partial(self._core.block_hints.of, token_ids, terms.cache_salt, terms.kv_class),
            in_thread=len(token_ids) >= _HASH_IN_THREAD_TOKENS,
        )

    # --- text -----------------------------------------------------------------------------------

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request, TokenizeBody)
        tokens = await self._planner.tokenize(body)
        limit = self._settings.max_model_len
        return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": limit})

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request, DetokenizeBody)
        self._planner.check_model(body.model)
        self._planner.check_token_ids(body.tokens, "tokens")
        return json_response({"prompt": await self._pool.decode(body.tokens)})

    # --- about the gateway ----------------------------------------------------------------------

    async def models(self) -> Response:
        return json_response({"object": "list", "data": self.entries()})

    def entries(self) -> list[dict[str, object]]:
        return [self._model_entry(name) for name in self._settings.served_model_names]

    async def model(self, model: str) -> Response:
        return json_response(self._model_entry(self._planner.check_model(model)))

    async def timeline(self, request: Request, request_id: str) -> Response:
        """By the id of the answer, or by the request id."""
        answer = self.timeline_of(request.state.tenant.name, request_id)
        if answer is None:
            raise no_timeline(request_id, self._settings.max_timelines)
        return json_response(answer)

    def timeline_of(self, tenant: str, request_id: str) -> dict[str, object] | None:
        bare = request_id.removeprefix("chatcmpl-").removeprefix("cmpl-")
        timelines = self._timelines.get(tenant, bare)
        return None if timelines is None else {"id": bare, "object": "timeline", **timeline_json(timelines)}

    async def health(self) -> Response:
        report = await self.health_report()
        if report.ok:
            return json_response(report.as_json())
        return json_response(report.as_json(), NotReady.http_status, {"retry-after": "1"})

    async def health_report(self) -> HealthReport:
        if self._down is not None:
            return HealthReport(ok=False, reason=self._down, is_heard=False)
        return await self._health.report()

    async def live(self) -> Response:
        return json_response({"status": "ok"})

    async def version(self) -> Response:
        return json_response({"version": self._settings.version})

    async def metrics(self) -> Response:
        return metrics_response(self._metrics.exposition(await self._told()))

    async def metric_families(self) -> list[Metric]:
        """What `metrics` tells."""
        return list(self._metrics.families(await self._told()))

    async def _told(self) -> MembersReply:
        """Without the workers' part while the coordinator does not answer."""
        try:
            return await self._core.cluster()
        except TandemError:
            return MembersReply(members=())

    # --- shared ---------------------------------------------------------------------------------

    def _arrival(self, request: Request) -> Arrival:
        known: Arrival | None = getattr(request.state, "arrival", None)
        return known or arrival_of(request, self._clock)

    async def _body(self, request: Request, kind: type[BodyT]) -> BodyT:
        raw: bytes | None = getattr(request.state, "raw_body", None)
        # A stream may last long, and needs it no more.
        request.state.raw_body = None
        body, unknown = parse(await read_body(request, self._settings) if raw is None else raw, kind)
        if self._settings.strict_fields:
            refuse_unknown(unknown, kind)
        self._metrics.count_unknown(unknown)
        return body

    def _model_entry(self, name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "tandem",
            "max_model_len": self._settings.max_model_len,
        }


def arrival_of(request: Request, clock: Clock) -> Arrival:
    """Of a request that comes now."""
    return Arrival(request.state.request_id, clock.now_s(), int(clock.wall_s()))


def no_timeline(request_id: str, capacity: int) -> NotFound:
    return NotFound(f"no timeline of request {request_id[:64]!r}; the last {capacity} are kept")


def metrics_response(text: bytes) -> Response:
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _whole(generation: Generation, form: Format, created: int) -> Response:
    """The answer in one body."""
    pieces = await run_all([generation.whole(choice) for choice in generation.choices])
    content: dict[str, object] = {
        "id": form.id_prefix + generation.request_id,
        "object": form.whole_name,
        "created": created,
        "model": generation.plan.model,
        "choices": [form.whole(choice, piece) for choice, piece in zip(generation.choices, pieces, strict=True)],
        "usage": generation.usage(),
    }
    if generation.plan.include_timeline:
        content["timeline"] = generation.timeline()
    generation.close("finished")
    return json_response(content)
