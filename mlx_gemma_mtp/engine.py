"""`Engine`: many callers, one thread that touches MLX. Knows nothing of HTTP, models or how a round is run.

Callers put commands into a queue; the engine's thread obeys them between steps and puts events into the queues of the
requests they belong to. No lock is held while a step runs, and nothing here polls: an idle engine waits.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Protocol, TypeVar

import mlx.core as mx

from .generation import Generation
from .handle import Handle, Stream, wake
from .jobs import Job
from .request import FinishReason, Request, TokenEvent
from .residency import wired
from .scheduler import Scheduler
from .stats import SpecStats
from .stops import OutputReader
from .text import TextCodec

log = logging.getLogger(__name__)

T = TypeVar("T")

_NOTE_SECONDS = 0.05
"""How old `Engine.stats` may be while a batch runs; whenever a request ends, it is made anew."""


class EngineClosed(RuntimeError):  # noqa: N818
    """The engine has been shut down, or is about to be."""


class QueueFull(RuntimeError):  # noqa: N818
    """As many requests wait as may; `retry_after` is about how many seconds it takes until one has ended."""

    def __init__(self, limit: int, retry_after: float) -> None:
        super().__init__(f"{limit} requests are in the engine, and it takes no more: retry in {retry_after:.1f} s")
        self.retry_after = retry_after


class Models(Protocol):
    """What an engine asks of a runtime; see `runtime.Runtime`."""

    @property
    def text(self) -> TextCodec | None:
        """For the text of results."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """What ends a request that names no stop ids."""

    def bitwise(self) -> tuple[bool | None, tuple[str, ...]]:
        """What results say of it; see `generation.Generation`."""

    def serving(
        self, *, depth: int | str, max_batch: int, prefill_budget: int, kv_budget: int | None, prefix_cache: int
    ) -> AbstractContextManager[Scheduler]:
        """Entered, used and left in the engine's thread. Raises RuntimeError if another engine is in it."""


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A snapshot. `running` rows, `paused` and `waiting` requests, `ended` ones by reason. Memory is in bytes.

    `spec` sums the counters of all requests. For the rest see `scheduler.SchedulerStats`.
    """

    running: int = 0
    waiting: int = 0
    paused: int = 0
    ended: Mapping[FinishReason, int] = field(default_factory=dict)
    steps: int = 0
    failed_steps: int = 0
    rounds: int = 0
    preemptions: int = 0
    prefilled_tokens: int = 0
    spec: SpecStats = field(default_factory=SpecStats)
    kv_bytes: int = 0
    kv_budget: int | None = None
    prefix_bytes: int = 0
    prefix_entries: int = 0
    prefix_hits: int = 0
    prefix_tokens: int = 0
    peak_memory: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"ended": dict(self.ended), "spec": self.spec.to_dict()}


class Engine:
    """Runs requests from any number of threads and event loops as one ragged batch.

    It owns `rt` until `shutdown`: direct calls of the runtime raise RuntimeError meanwhile. `max_batch` rows run at a
    time, at most `max_waiting` requests more are taken (None: any number). A row that is `buffer` tokens ahead of who
    iterates over it pauses. For the other options see `scheduler.Scheduler`. As a context manager it drains on leaving,
    or cancels what is left if an exception leaves. Raises ValueError (an option) and RuntimeError (`rt` is taken).
    """

    def __init__(
        self,
        rt: Models,
        *,
        max_batch: int = 8,
        depth: int | str = "auto",
        prefill_budget: int = 512,
        kv_budget: int | None = None,
        prefix_cache: int = 0,
        max_waiting: int | None = None,
        buffer: int = 256,
    ) -> None:
        if buffer < 1:
            raise ValueError(f"buffer is {buffer}, expected at least 1")
        if max_waiting is not None and max_waiting < 0:
            raise ValueError(f"max_waiting is {max_waiting}, expected None or a count of at least 0")
        self._models, self._prefixes = rt, prefix_cache > 0
        limit = None if max_waiting is None else max_batch + max_waiting
        serving = partial(
            rt.serving,
            depth=depth,
            max_batch=max_batch,
            prefill_budget=prefill_budget,
            kv_budget=kv_budget,
            prefix_cache=prefix_cache,
        )
        self._loop = _Loop(serving, limit=limit, buffer=buffer)
        self._finalizer = weakref.finalize(self, _Loop.stop, self._loop)
        try:
            self._loop.started.result()
        except BaseException:
            self._finalizer()
            raise

    def submit(self, request: Request) -> Handle:
        """Queue a request. Returns at once, except that a grammar seen for the first time is compiled here.

        Without stop ids of its own it ends at the model's. Raises ValueError (it can't be run, and why), QueueFull and
        EngineClosed.
        """
        request = request if request.stop_ids else replace(request, stop_ids=self._models.stop_ids)
        if self._prefixes and self._models.text is not None and not request.checkpoints:
            request = replace(request, checkpoints=self._models.text.checkpoints(request.prompt))
        return Handle(self._loop.submit(request, self._reader(request)), self._complete)

    def stats(self) -> EngineStats:
        """How it stands: at most a twentieth of a second old, and never older than the last end of a request."""
        return self._loop.noted

    def shutdown(self, *, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no more requests, and return when the thread has ended; True if every request ended by itself.

        `drain` lets those submitted finish, for `timeout` seconds at most (None: as long as it takes); the rest is
        cancelled. The step that is running is always waited for. May be called again, and from any thread.
        """
        return self._loop.stop(drain=drain, timeout=timeout)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.shutdown(drain=kind is None)

    def _reader(self, request: Request) -> OutputReader | None:
        if not request.stop:
            return None
        if self._models.text is None:
            raise ValueError(f"stop is {request.stop!r}, but this checkpoint has no tokenizer: use stop_ids")
        stream = self._models.text.stream(request.prompt)
        return OutputReader(stream, request.stop, min_tokens=request.sampling.min_tokens)

    def _complete(self, output: Generation, request: Request) -> None:
        output.bitwise, output.differing_shapes = self._models.bitwise()
        output.timing.peak_memory, output.timing.reused_tokens = self.stats().peak_memory, output.stats.reused
        if self._models.text is not None and not request.stop:
            output.text, output.thinking = self._models.text.split(output.tokens, request.prompt)


class _Loop:
    """The thread, and all that it alone touches. It doesn't know its `Engine`, which may be dropped."""

    def __init__(
        self, serving: Callable[[], AbstractContextManager[Scheduler]], *, limit: int | None, buffer: int
    ) -> None:
        self.started: Future[None] = Future()
        self.noted = EngineStats()
        self._serving, self._limit, self._buffer = serving, limit, buffer
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock, self._grammars = threading.Lock(), threading.Lock()
        # Under the lock: whether requests are taken, and how many there are.
        self._closed, self._live, self._cut = False, 0, False
        self._scheduler: Scheduler | None = None
        self._streams: dict[int, Stream] = {}
        self._begun: dict[int, Stream] = {}
        self._paused: set[int] = set()
        self._stopping = False
        self._steps, self._failed, self._past = 0, 0, SpecStats()
        self._ended: Counter[FinishReason] = Counter()
        self._noted_at, self._ended_at, self._pace = 0.0, 0.0, 1.0
        self._over = threading.Event()
        self._thread = _run_in_thread(self._run)

    # --- for callers, in their threads

    def submit(self, request: Request, reader: OutputReader | None) -> Stream:
        """See `Engine.submit`."""
        with self._lock:
            scheduler = self._room()
        if request.sampling.constraint is None:
            job = scheduler.prepare(request)
        else:
            with self._grammars:
                job = scheduler.prepare(request)
        stream = Stream(job.id, request, job.stats, reader=reader, buffer=self._buffer, link=self)
        with self._lock:
            self._room()
            self._live += 1
            self._commands.put(partial(self._add, job, stream))
        return stream

    def end(self, request_id: int, reason: FinishReason) -> None:
        """See `Link`: this queue's `put` takes no lock that the calling thread could hold."""
        self._commands.put(partial(self._cancel, request_id, reason))

    def resume(self, request_id: int) -> None:
        """See `Link`."""
        self._commands.put(partial(self._resume, request_id))

    def _room(self) -> Scheduler:
        if self._closed or self._scheduler is None:
            raise EngineClosed("the engine is shut down, or about to be")
        if self._limit is not None and self._live >= self._limit:
            raise QueueFull(self._live, self._pace)
        return self._scheduler

    def stop(self, *, drain: bool = False, timeout: float | None = None) -> bool:
        """See `Engine.shutdown`."""
        with self._lock:
            self._closed = True
        self._commands.put(partial(self._stop, drain))
        # A finalizer may run in any thread.
        if threading.current_thread() is not self._thread and not self._over.wait(timeout if drain else None):
            self._commands.put(partial(self._stop, False))
            self._over.wait()
        return not self._cut

    # --- the thread

    def _run(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._over.set)
            scheduler, error = _attempt(lambda: stack.enter_context(self._serving()))
            if scheduler is None:
                self.started.set_exception(error)
                return
            stack.callback(self._finish)
            self._scheduler = scheduler
            mx.reset_peak_memory()
            self.started.set_result(None)
            while not (self._stopping and not self._streams):
                self._obey(wait=not scheduler.busy)
                if scheduler.busy:
                    self._work(scheduler)

    def _work(self, scheduler: Scheduler) -> None:
        """Step until nothing is left to do."""
        with wired():
            while scheduler.busy and not (self._stopping and not self._streams):
                self._step(scheduler)
                self._obey(wait=False)

    def _obey(self, *, wait: bool) -> None:
        """Do what callers asked for; with `wait`, wait until they ask for something."""
        self._note(always=wait)
        asked = False
        with suppress(Empty):
            while True:
                self._commands.get(block=wait and not asked)()
                asked = True
        if asked:
            self._note(always=True)

    def _add(self, job: Job, stream: Stream) -> None:
        self._streams[job.id] = stream
        if self._scheduler is not None:
            self._scheduler.enqueue(job)

    def _cancel(self, request_id: int, reason: FinishReason = "cancelled") -> None:
        if request_id in self._streams and self._scheduler is not None:
            self._try(partial(self._scheduler.cancel, request_id))
            self._end([request_id], reason)

    def _resume(self, request_id: int) -> None:
        if request_id in self._paused and self._scheduler is not None:
            self._paused.remove(request_id)
            self._scheduler.resume(request_id)

    def _stop(self, drain: bool) -> None:
        self._stopping = True
        for request_id in list(self._paused):
            self._resume(request_id)
        if not drain and self._streams:
            self._cut = True
            for request_id in list(self._streams):
                self._cancel(request_id)

    def _step(self, scheduler: Scheduler) -> None:
        events = self._try(scheduler.step)
        self._steps += 1
        self._deliver(events or ())

    def _try(self, work: Callable[[], T]) -> T | None:
        """Have the scheduler do something; if that fails, end the requests that it cost their K/V."""
        result, error = _attempt(work)
        if error is not None and self._scheduler is not None:
            self._fail(self._scheduler, error)
        return result

    def _fail(self, scheduler: Scheduler, error: Exception) -> None:
        self._failed += 1
        log.error("a step failed", exc_info=error)
        message = f"a step failed: {type(error).__name__}: {error}"
        # Its frames hold arrays that are wanted back.
        traceback.clear_frames(error.__traceback__)
        del error
        scheduler.abort()
        lost = [i for i in self._streams if i not in scheduler]
        if not lost:
            # Failing without an end would go on for ever.
            lost = list(self._streams)
            for request_id in lost:
                if _attempt(partial(scheduler.cancel, request_id))[1] is not None:
                    scheduler.abort()
        mx.clear_cache()
        self._end(lost, "error", message)

    def _end(self, ids: Iterable[int], reason: FinishReason, error: str | None = None) -> None:
        nothing = partial(TokenEvent, tokens=(), drafted=(), finish_reason=reason, error=error)
        self._deliver([nothing(request_id=i) for i in ids])

    def _deliver(self, events: Iterable[TokenEvent]) -> None:
        """Hand events to their streams; those of requests that have been cancelled are dropped."""
        ready: list[tuple[Stream, TokenEvent]] = []
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is None:
                continue
            ready.append((stream, event))
            self._begun[stream.id] = stream
        for stream, event in ready:
            if event.finish_reason is not None:
                stream.settle(sum(len(e.tokens) for s, e in ready if s is stream))
                self._count_end(stream, event.finish_reason)
        self._note(always=any(event.finish_reason for _, event in ready))
        wakes: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
        for stream, event in ready:
            for loop, waiter in stream.put(event):
                wakes.setdefault(loop, []).append(waiter)
        for loop, waiters in wakes.items():
            # A closed loop reads no more.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(wake, waiters)
        # Last: this may end requests.
        for stream, _ in ready:
            if not stream.pause() or self._stopping or self._scheduler is None:
                continue
            # One that ends in the round that was on its way is none to resume.
            if self._try(partial(self._scheduler.pause, stream.id)):
                self._paused.add(stream.id)

    def _count_end(self, stream: Stream, reason: FinishReason) -> None:
        del self._streams[stream.id], self._begun[stream.id]
        self._paused.discard(stream.id)
        self._past.add(stream.output.stats)
        self._ended[reason] += 1
        now = time.monotonic()
        if self._ended_at:
            self._pace += 0.2 * (now - self._ended_at - self._pace)
        self._ended_at = now if self._streams else 0.0
        with self._lock:
            self._live -= 1

    def _note(self, *, always: bool) -> None:
        """Make a snapshot for `Engine.stats`."""
        now = time.monotonic()
        if not always and now < self._noted_at + _NOTE_SECONDS:
            return
        spec = SpecStats()
        for part in (self._past, *(stream.output.stats for stream in self._begun.values())):
            spec.add(part)
        held = {} if self._scheduler is None else asdict(self._scheduler.stats())
        held["waiting"] = len(self._streams) - held.setdefault("running", 0) - len(self._paused)
        self._noted_at = now
        self.noted = EngineStats(
            **held,
            paused=len(self._paused),
            ended=dict(self._ended),
            steps=self._steps,
            failed_steps=self._failed,
            spec=spec,
            peak_memory=mx.get_peak_memory(),
        )

    def _finish(self) -> None:
        """End what is left, if the thread itself failed."""
        with self._lock:
            self._closed, self._scheduler = True, None
        with suppress(Empty):
            while True:
                self._commands.get(block=False)()
        self._cut = self._cut or bool(self._streams)
        self._end(list(self._streams), "error", "the engine has failed")
        mx.clear_cache()


_Work = SimpleQueue[Callable[[], None]]
_spare: list[tuple[threading.Thread, _Work]] = []


def _run_in_thread(function: Callable[[], None]) -> threading.Thread:
    """Run a function in a thread of the engines', which is kept for the next one.

    MLX frees what a thread has compiled after Python has parted with the thread; a process that ends just then aborts.
    """
    try:
        thread, work = _spare.pop()
    except IndexError:
        work = SimpleQueue()
        thread = threading.Thread(target=_serve, args=(work,), name="mlx-gemma-mtp engine", daemon=True)
        thread.start()
    work.put(function)
    return thread


def _serve(work: _Work) -> None:
    while True:
        work.get()()
        _spare.append((threading.current_thread(), work))


def _attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Its result, or its error: whatever fails in the thread becomes an answer to those who wait for it."""
    try:
        return function(), None
    except Exception as error:
        return None, error
