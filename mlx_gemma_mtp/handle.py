"""`Handle`: what a caller holds of a request in an engine. Knows nothing of MLX, schedulers or how requests are run."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from .generation import Generation
from .request import Request, TokenEvent
from .stats import SpecStats

Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class RequestFailed(RuntimeError):  # noqa: N818
    """A request ended with an error; `generation` has what it had given until then."""

    def __init__(self, message: str, generation: Generation) -> None:
        super().__init__(message)
        self.generation = generation


class Handle:
    """One request. Iterate over it (`for` or `async for`) for its events, or ask for its result, or both.

    Its events end after the one with a finish reason; an event goes to one reader. Cancelled when it, or an iterator
    over it, is dropped before the end. `finish` completes an output; being its engine's, it keeps that alive.
    """

    def __init__(self, stream: Stream, finish: Callable[[Generation, Request], None]) -> None:
        self._stream, self._finish = stream, finish

    @property
    def id(self) -> int:
        """The `request_id` of its events."""
        return self._stream.id

    @property
    def stats(self) -> SpecStats:
        """Its counters, up to date."""
        return self._stream.output.stats

    def __iter__(self) -> Iterator[TokenEvent]:
        try:
            while (event := self._stream.take(None)) is not None:
                yield event
        finally:
            self.cancel()

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return _AsyncEvents(self)

    def cancel(self) -> None:
        """End the request: its row is freed within a step, its last event says "cancelled". After its end: nothing."""
        self._stream.cancel()

    def result(self, timeout: float | None = None) -> Generation:
        """All of the output, when it has ended; events not read so far are taken. See `Generation`.

        `timing.prefill_seconds` is the time from `submit` to the first token. Raises TimeoutError after `timeout`
        seconds (the request goes on), and RequestFailed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._stream.take(None if deadline is None else max(deadline - time.monotonic(), 0)) is not None:
            pass
        return self._finished()

    async def aresult(self) -> Generation:
        """`result` for asyncio. Giving up waiting doesn't cancel the request."""
        while await self._stream.take_async() is not None:
            pass
        return self._finished()

    def _finished(self) -> Generation:
        output = self._stream.output
        self._finish(output, self._stream.request)
        if self._stream.error is not None:
            raise RequestFailed(self._stream.error, output)
        return output

    def __del__(self) -> None:
        self.cancel()


class _AsyncEvents:
    """Iterates over a handle's events; a generator's end would come late when it is dropped."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        event = await self._handle._stream.take_async()
        if event is None:
            raise StopAsyncIteration
        return event

    async def aclose(self) -> None:
        """End the request."""
        self._handle.cancel()

    def __del__(self) -> None:
        self._handle.cancel()


class Stream:
    """What the engine's thread and the readers of one request share."""

    def __init__(self, request_id: int, request: Request, stats: SpecStats, cancel: Callable[[], None]) -> None:
        """`cancel` asks for the request's end. Finalizers call it: it may take no lock."""
        self.id, self.request, self.ended = request_id, request, False
        self.output = Generation(contract=request.sampling.contract, stats=stats)
        self.output.logprobs = None if request.sampling.logprobs is None else []
        self.output.timing.prompt_tokens = len(request.prompt)
        self.error: str | None = None
        self._cancel = cancel
        self._events: deque[TokenEvent] = deque()
        self._waiters: list[Waiter] = []
        self._changed, self._submitted, self._begun = threading.Condition(), time.monotonic(), False

    def cancel(self) -> None:
        """Ask for its end, unless it has ended."""
        if not self.ended:
            self._cancel()

    def put(self, event: TokenEvent) -> list[Waiter]:
        """In the engine's thread: publish an event; returns whom to wake in event loops."""
        timing, since = self.output.timing, time.monotonic() - self._submitted
        with self._changed:
            if event.tokens and not self._begun:
                self._begun, timing.prefill_seconds = True, since
            elif self._begun:
                timing.decode_seconds = since - timing.prefill_seconds
                timing.decode_tokens += len(event.tokens)
            self.ended = event.finish_reason is not None
            self._events.append(event)
            self._changed.notify_all()
            waiters, self._waiters = self._waiters, []
        return waiters

    def take(self, timeout: float | None) -> TokenEvent | None:
        """The next event, waited for; None behind the last. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(self._ready, timeout):
                raise TimeoutError(f"request {self.id} has not ended")
            return self._pop()

    async def take_async(self) -> TokenEvent | None:
        """`take` for an event loop, which isn't blocked."""
        while True:
            with self._changed:
                if self._ready():
                    return self._pop()
                loop = asyncio.get_running_loop()
                waiter = loop.create_future()
                self._waiters.append((loop, waiter))
            await waiter

    def _ready(self) -> bool:
        return bool(self._events) or self.ended

    def _pop(self) -> TokenEvent | None:
        if not self._events:
            return None
        event = self._events.popleft()
        output = self.output
        output.tokens += event.tokens
        output.drafted += event.drafted
        output.finish_reason, self.error = event.finish_reason, event.error
        if output.logprobs is not None:
            output.logprobs += event.logprobs
        return event


def wake(waiters: list[asyncio.Future[None]]) -> None:
    """In their event loop: let readers look again."""
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
