"""Server-sent events, and answers whose work ends when the client goes. Knows no API and no engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError

T = TypeVar("T")

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class ClientGone(Exception):  # noqa: N818
    """The client closed its connection: there is nobody to answer."""


def event(data: Mapping[str, Any] | str, name: str | None = None) -> bytes:
    """One event."""
    text = data.encode() if isinstance(data, str) else to_json(data)
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + text + b"\n\n"


def event_head(data: Mapping[str, Any]) -> bytes:
    """What events have in common that begin with the same fields: `continued` adds the rest of one."""
    return b"data: " + to_json(data)[:-1] + b","


def continued(head: bytes, data: Mapping[str, Any]) -> bytes:
    """The event of `event_head` and at least one field more."""
    return head + to_json(data)[1:] + b"\n\n"


def to_json(data: object) -> bytes:
    """JSON. Half of a surrogate pair, which UTF-8 can't hold, is written as JSON's escape: the same to who reads it."""
    return _ENCODER.encode(data).encode("utf-8", "backslashreplace")


class EventResponse(Response):
    """A stream of events. `cancel` is called when it is over, however it ends.

    It ends when the client goes, and after `timeout` seconds with what `failed` makes of the error.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        cancel: Callable[[], None],
        failed: Callable[[ApiError], bytes],
        timeout: float,
    ) -> None:
        self._events, self._cancel, self._failed, self._timeout = events, cancel, failed, timeout
        self.status_code, self.background = 200, None
        self.init_headers(_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        work = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait((work, gone), timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            elif not gone.done():
                await _stop(work)
                last = self._failed(timed_out(self._timeout))
                # A client that doesn't read can't be told.
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(_part(send, last, more=False), 1)
        finally:
            self._cancel()
            await _stop(work)
            await _stop(gone)

    async def _send(self, send: Send) -> None:
        try:
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except ApiError as error:
            await _part(send, self._failed(error), more=True)
        await _part(send, b"", more=False)


async def _part(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def while_connected(
    request: Request, work: Coroutine[Any, Any, T], *, cancel: Callable[[], None], timeout: float
) -> T:
    """The result of `work`, given up when the client goes (ClientGone) or after `timeout` seconds (ApiError)."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(request.receive))
    try:
        await asyncio.wait((task, gone), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientGone
        raise timed_out(timeout)
    finally:
        cancel()
        await _stop(task)
        await _stop(gone)


async def disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def timed_out(seconds: float) -> ApiError:
    """The request took too long."""
    return ApiError(504, f"the request took longer than {seconds:g} seconds", code="timeout")


async def _stop(task: asyncio.Future[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError, ApiError):
        await task
