"""What stands before every route: body limits, keys, foreign origins, request ids, the log. Plain ASGI.

Nothing here reads or logs what a body says.
"""

from __future__ import annotations

import hmac
import json
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

log = logging.getLogger(__name__)

Failure = Callable[[Scope, ApiError], ASGIApp]
"""The answer to an error, in the words of the API that the path belongs to."""

OPEN_PATHS = frozenset({"/", "/health", "/ready"})
_DRAINED = 8
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Who may ask, and how much. `hosts`: names that a Host header may have (None: any)."""

    max_body: int = 4 * 2**20
    key: str | None = None
    origins: Sequence[str] = ()
    hosts: frozenset[str] | None = LOCAL_HOSTS


class Guard:
    """Answers what may not pass itself, and passes the rest on with its whole body read."""

    def __init__(self, app: ASGIApp, *, rules: Rules, failure: Failure, answered: Callable[[str, int], None]) -> None:
        self._app, self._rules, self._failure, self._answered = app, rules, failure, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, begun, status = f"req_{uuid.uuid4().hex[:16]}", time.perf_counter(), 0
        scope.setdefault("state", {}).update(request_id=request_id, notes={})

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = request_id
            await send(message)

        try:
            try:
                self._check(Headers(scope=scope), scope)
                body = await self._body(Headers(scope=scope), receive)
            except ApiError as error:
                await self._failure(scope, error)(scope, receive, tell)
            else:
                if body is not None:
                    await self._app(scope, _replayed(body, receive), tell)
        finally:
            route = scope.get("route")
            path = route.path if route is not None else "other"
            self._answered(path, status)
            _write(scope, path, status, time.perf_counter() - begun)

    def _check(self, headers: Headers, scope: Scope) -> None:
        rules = self._rules
        host, origin = headers.get("host", ""), headers.get("origin")
        if rules.hosts is not None and _hostname(host) not in rules.hosts:
            # Another name for this address in somebody's DNS would make it their own to a browser.
            raise ApiError(403, f"the host {host!r} is not this server; start it with --allow-host to serve it")
        same = origin is not None and _netloc(origin) == host
        if origin is not None and not same and origin not in rules.origins and "*" not in rules.origins:
            raise ApiError(403, f"pages of {origin!r} may not use this server; start it with --cors-origin to let them")
        if rules.key is None or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not hmac.compare_digest(given.encode("latin-1", "replace"), rules.key.encode()):
            what = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY, or x-api-key"
            raise ApiError(401, what, code="invalid_api_key")

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None when the client goes before its end."""
        limit = self._rules.max_body
        declared = headers.get("content-length", "")
        length = int(declared[:20]) if declared.isascii() and declared.isdigit() else 0
        too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        if length > _DRAINED * limit:
            raise too_large
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            size += len(message.get("body", b""))
            if size <= limit:
                parts.append(message.get("body", b""))
            elif size > _DRAINED * limit:
                raise too_large
            if not message.get("more_body", False):
                break
        # A client that is still sending would not read the answer, hence only now.
        if size > limit:
            raise too_large
        return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then whatever else comes: the end of the connection."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _hostname(host: str) -> str:
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].lower()


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _write(scope: Scope, route: str, status: int, seconds: float) -> None:
    notes: dict[str, Any] = scope["state"]["notes"]
    record = {
        "event": "request",
        "id": scope["state"]["request_id"],
        "method": scope["method"],
        "route": route,
        "status": status,
        "ms": round(1000 * seconds, 1),
        **notes,
    }
    log.info("%s", json.dumps(record, ensure_ascii=False))
