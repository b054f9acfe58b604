"""The application: routes, and the one place where every failure becomes an answer. Knows nothing of sockets."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Header
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import ASGIApp, Scope

from .. import __version__
from . import anthropic, openai, responses
from .anthropic_schema import CountRequest, MessagesRequest
from .errors import ApiError, of_validation
from .guard import Guard, Rules
from .openai_schema import ChatRequest, CompletionRequest
from .responses_schema import ResponsesRequest
from .service import Run, Service, usage_of
from .sse import ClientGone, EventResponse, event, to_json, while_connected

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_STATUSES: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        200: "The answer, or with stream: true its events",
        400: "Something in the request is wrong",
        401: "The API key is missing or wrong",
        403: "This host or origin may not ask",
        404: "There is no such model",
        413: "The body is too large",
        422: "A constraint that can't be enforced",
        429: "The queue is full: Retry-After says when to try again",
        503: "The server is shutting down",
        504: "The request took too long",
    }.items()
}


def make_app(service: Service, rules: Rules | None = None) -> ASGIApp:
    """The server's ASGI application."""
    app = FastAPI(
        title="mlx-gemma-mtp",
        version=__version__,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        lifespan=_lifespan(service),
    )
    _add_errors(app)
    _add_operation(app, service)
    _add_openai(app, service)
    _add_anthropic(app, service)
    rules = rules or Rules()
    service.metrics.follow(service.stats)
    guard = Guard(app, rules=rules, failure=_failure, answered=service.metrics.answered)
    if not rules.origins:
        return guard
    # Outermost: a page may read why it was refused only where the refusal names it, too.
    return CORSMiddleware(guard, allow_origins=rules.origins, allow_methods=["GET", "POST"], allow_headers=["*"])


def _lifespan(service: Service) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    return lifespan


def _add_errors(app: FastAPI) -> None:
    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return _failure(request.scope, error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _failure(request.scope, of_validation(error.errors()))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        known = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for this path"}
        text = known.get(error.status_code, str(error.detail))
        answer = _failure(request.scope, ApiError(error.status_code, text))
        answer.headers.update(error.headers or {})
        return answer

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=499)

    async def unexpected(request: Request, error: Exception) -> Response:
        return _failure(request.scope, ApiError(500, f"the server failed: {type(error).__name__}", code="server_error"))

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(Exception, unexpected)


def _add_operation(app: FastAPI, service: Service) -> None:
    page, policy = _page()

    @app.get("/", include_in_schema=False)
    async def page_route() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": policy, "referrer-policy": "no-referrer"})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The server answers."""
        return {"status": "ok", "version": __version__}

    @app.get("/ready")
    async def ready() -> Response:
        """The server takes requests."""
        stats = service.stats()
        status = {"status": "closing" if service.closing else "ready", "rows": stats.running, "waiting": stats.waiting}
        return JSONResponse(status, status_code=503 if service.closing else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=_METRICS_TYPE)

    @app.get("/v1/stats")
    async def stats() -> dict[str, Any]:
        """The engine's own figures, as JSON."""
        return service.stats().to_dict()


def _add_openai(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    def model(name: str) -> dict[str, Any]:
        limits = {"context_length": service.settings.context}
        return {"id": name, "object": "model", "created": started, "owned_by": "mlx-gemma-mtp", **limits}

    @app.get("/v1/models")
    async def models(anthropic_version: Annotated[str | None, Header()] = None) -> dict[str, Any]:
        """The models served, in the form of the API that asks."""
        names = service.settings.models
        if anthropic_version is None:
            return {"object": "list", "data": [model(n) for n in names]}
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started))
        data = [{"type": "model", "id": n, "display_name": n, "created_at": created} for n in names]
        return {"data": data, "has_more": False, "first_id": names[0], "last_id": names[-1]}

    @app.get("/v1/models/{name:path}", responses=_STATUSES)
    async def one_model(name: str) -> dict[str, Any]:
        """One of the models served."""
        service.check_model(name)
        return model(name)

    @app.post("/v1/chat/completions", responses=_STATUSES)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """OpenAI's chat completions."""
        _note(request, service, [m.model_dump(exclude_none=True) for m in body.messages])
        run = await service.start(await openai.chat_job(service, body))
        answer = openai.ChatAnswer(run, body, service.codec)
        if body.stream:
            return _stream(request, service, run, answer.chunks())
        return await _whole(request, service, run, run.finished(), answer.whole)

    @app.post("/v1/completions", responses=_STATUSES)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """OpenAI's completions of raw prompts."""
        _note(request, service, body.prompt)
        run = await service.start(await openai.completion_job(service, body))
        answer = openai.CompletionAnswer(run, body, service.codec)
        if body.stream:
            return _stream(request, service, run, answer.chunks())
        return await _whole(request, service, run, answer.collect(), answer.whole)

    @app.post("/v1/responses", responses=_STATUSES)
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        """OpenAI's responses, for text."""
        _note(request, service, body.model_dump(include={"instructions", "input"}, exclude_none=True))
        run = await service.start(await responses.responses_job(service, body))
        answer = responses.ResponseAnswer(run, body)
        if body.stream:
            return _stream(request, service, run, answer.events(), failed=answer.failed)
        return await _whole(request, service, run, run.finished(), answer.whole)


def _add_anthropic(app: FastAPI, service: Service) -> None:
    @app.post("/v1/messages", responses=_STATUSES)
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Anthropic's messages."""
        _note(request, service, body.model_dump(include={"system", "messages"}, exclude_none=True))
        run = await service.start(await anthropic.messages_job(service, body))
        answer = anthropic.MessageAnswer(run, body)
        if body.stream:
            return _stream(request, service, run, answer.events())
        return await _whole(request, service, run, run.finished(), answer.whole)

    @app.post("/v1/messages/count_tokens", responses=_STATUSES)
    async def count_tokens(body: CountRequest) -> dict[str, int]:
        """Tokens that a prompt has."""
        return {"input_tokens": await anthropic.count(service, body)}


def _stream(
    request: Request,
    service: Service,
    run: Run,
    events: AsyncIterator[bytes],
    *,
    failed: Callable[[ApiError], bytes] | None = None,
) -> Response:
    def told(error: ApiError) -> bytes:
        request.state.notes["error"] = error.code
        if failed is not None:
            return failed(error)
        return event(_body(request.scope, error), "error" if _is_anthropic(request.scope) else None)

    def over() -> None:
        run.cancel()
        _note_end(request, run)

    return EventResponse(events, cancel=over, failed=told, timeout=service.settings.timeout)


async def _whole(
    request: Request,
    service: Service,
    run: Run,
    work: Coroutine[Any, Any, object],
    made: Callable[[], Mapping[str, Any]],
) -> Response:
    try:
        await while_connected(request, work, cancel=run.cancel, timeout=service.settings.timeout)
    finally:
        _note_end(request, run)
    return Response(to_json(made()), media_type="application/json")


def _note(request: Request, service: Service, prompt: object) -> None:
    """Text goes to the log only where that was asked for."""
    if service.settings.log_prompts:
        request.state.notes["prompt"] = prompt


def _note_end(request: Request, run: Run) -> None:
    stats = usage_of(run.choices)
    request.state.notes.update(
        prompt_tokens=sum(c.prompt_tokens for c in run.choices),
        tokens=sum(c.tokens for c in run.choices),
        rounds=stats.rounds,
        accepted=stats.accepted,
        contract=stats.contract,
        finish=[c.finish or "unfinished" for c in run.choices],
    )


def _is_anthropic(scope: Scope) -> bool:
    return str(scope["path"]).startswith("/v1/messages") or any(k == b"anthropic-version" for k, _ in scope["headers"])


def _body(scope: Scope, error: ApiError) -> dict[str, Any]:
    return error.anthropic(scope["state"].get("request_id")) if _is_anthropic(scope) else error.openai()


def _failure(scope: Scope, error: ApiError) -> Response:
    scope["state"]["notes"]["error"] = error.code or error.status
    return JSONResponse(_body(scope, error), status_code=error.status, headers=error.headers)


def _page() -> tuple[str, str]:
    """The page, and the policy that lets it run its own script and talk to this server alone."""
    text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    sources = []
    for tag in ("script", "style"):
        found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert found is not None
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        sources.append(f"{tag}-src 'sha256-{digest}'")
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return text, f"default-src 'none'; {'; '.join(sources)}; {rest}"
