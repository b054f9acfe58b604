"""`Handle`: what a caller holds of a request in an engine. Knows nothing of MLX, schedulers or how requests are run."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Protocol

from .generation import Filling, Generation
from .request import FinishReason, Request, TokenEvent
from .stats import SpecStats
from .stops import OutputReader

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
        self._stream.streamed = True
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
        if output.error is not None:
            raise RequestFailed(output.error, output)
        return output

    def __del__(self) -> None:
        self.cancel()


class Link(Protocol):
    """How a stream reaches its engine. Finalizers call it, in any thread: it may take no lock and not wait."""

    def end(self, request_id: int, reason: FinishReason) -> None:
        """End a request, if it hasn't ended."""

    def resume(self, request_id: int) -> None:
        """Go on with a paused row: its reader has read all there was."""


class _AsyncEvents:
    """Iterates over a handle's events; a generator's end would come late when it is dropped."""

    def __init__(self, handle: Handle) -> None:
        self._handle, handle._stream.streamed = handle, True

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
    """What the engine's thread and the readers of one request share.

    Stop strings are looked for where events are read, so that the engine's thread makes no text. A row that is more
    than `buffer` tokens ahead of its reader pauses, and goes on when half of them are read: a slow reader costs nobody
    a row or memory. An output that nobody has begun to iterate over is a result in the making, bounded by its
    max_tokens, and never pauses: who reads many results in turn would else have them computed in turn.
    """

    def __init__(
        self,
        request_id: int,
        request: Request,
        stats: SpecStats,
        *,
        reader: OutputReader | None,
        buffer: int,
        link: Link,
    ) -> None:
        """`reader`: for requests with stop strings."""
        self.id, self.request, self.ended, self.streamed = request_id, request, False, False
        self.output = Generation(contract=request.sampling.contract, stats=stats)
        self.output.timing.prompt_tokens = len(request.prompt)
        self._filling = Filling(self.output, reader, logprobs=request.sampling.logprobs is not None)
        self._buffer, self._link = buffer, link
        self._events: deque[TokenEvent] = deque()
        self._waiters: list[Waiter] = []
        self._changed, self._submitted = threading.Condition(), time.monotonic()
        self._unread, self._paused, self._first = 0, False, False
        self._published, self._cut = 0, 0

    def cancel(self) -> None:
        """Ask for its end, unless it has ended."""
        if not self.ended:
            self._link.end(self.id, "cancelled")

    def put(self, event: TokenEvent) -> list[Waiter]:
        """In the engine's thread: publish an event; returns whom to wake in event loops."""
        timing, since = self.output.timing, time.monotonic() - self._submitted
        with self._changed:
            if event.tokens and not self._first:
                self._first, timing.prefill_seconds = True, since
            elif self._first:
                timing.decode_seconds = since - timing.prefill_seconds
                timing.decode_tokens += len(event.tokens)
            self.ended = event.finish_reason is not None
            self._unread += len(event.tokens)
            self._published += len(event.tokens)
            self._events.append(event)
            self._changed.notify_all()
            waiters, self._waiters = self._waiters, []
        return waiters

    def settle(self, coming: int) -> None:
        """In the engine's thread, before the last `coming` tokens are published: those that never will be are cut."""
        with self._changed:
            stats = self.output.stats
            stats.cut += stats.tokens + self._cut - self._published - coming

    def pause(self) -> bool:
        """In the engine's thread: whether its row should pause now. It resumes through the link."""
        with self._changed:
            if self._paused or self.ended or not self.streamed or self._unread <= self._buffer:
                return False
            self._paused = True
            return True

    def take(self, timeout: float | None) -> TokenEvent | None:
        """The next event, waited for; None behind the last. Raises TimeoutError."""
        with self._changed:
            while True:
                if not self._changed.wait_for(self._ready, timeout):
                    raise TimeoutError(f"request {self.id} has not ended")
                if (event := self._pop()) is not None or self._over:
                    return event

    async def take_async(self) -> TokenEvent | None:
        """`take` for an event loop, which isn't blocked."""
        while True:
            with self._changed:
                while self._ready():
                    if (event := self._pop()) is not None or self._over:
                        return event
                loop = asyncio.get_running_loop()
                waiter = loop.create_future()
                self._waiters.append((loop, waiter))
            await waiter

    @property
    def _over(self) -> bool:
        """Whether nothing is left to read."""
        return self.ended and not self._events

    def _ready(self) -> bool:
        return bool(self._events) or self.ended

    def _pop(self) -> TokenEvent | None:
        """The next event, up to a stop string; None if there is none, or it lies behind one."""
        if not self._events:
            return None
        event = self._events.popleft()
        self._unread -= len(event.tokens)
        if self._paused and self._unread <= self._buffer // 2:
            self._paused = False
            self._link.resume(self.id)
        cut = self.output.stats.cut
        step = self._filling.take(event)
        self._cut += self.output.stats.cut - cut
        if step is None:
            return None
        if not self._filling.stopped:
            return event
        if not self.ended:
            self._link.end(self.id, "stop")
        return replace(
            event,
            tokens=step.tokens,
            drafted=step.drafted,
            finish_reason="stop",
            logprobs=event.logprobs[: len(step.tokens)],
        )


def wake(waiters: list[asyncio.Future[None]]) -> None:
    """In their event loop: let readers look again."""
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
