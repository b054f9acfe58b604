"""Between the APIs and the engine: a checked request to token ids, and its events to text, calls and counters.

Knows neither API and no HTTP. Text work runs in a thread of its own, so that a long prompt holds no stream up; the
tokenizer isn't for several threads at once, hence only one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

from ..engine import EngineClosed, EngineStats, QueueFull
from ..request import Request, SamplingParams, TokenEvent, TokenLogprob
from ..stats import SpecStats
from ..text import Piece, TextCodec
from ..tool_calls import CallDelta, Delta, ToolStream
from .errors import ApiError, bad
from .metrics import Metrics

T = TypeVar("T")
Finish = Literal["stop", "stop_string", "length", "tool_calls"]


class Stream(Protocol):
    """One request in the engine; see `handle.Handle`."""

    @property
    def stats(self) -> SpecStats:
        """Its counters, up to date."""

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """Its events."""

    def cancel(self) -> None:
        """End it."""


class Backend(Protocol):
    """See `engine.Engine`."""

    def submit(self, request: Request) -> Stream:
        """Queue a request. Raises ValueError, QueueFull and EngineClosed."""

    def stats(self) -> EngineStats:
        """How the engine stands."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the server was started with. `models`: names it answers to; `timeout`: seconds for a whole request.

    `bitwise` and `differing_shapes`: see `generation.Generation`.
    """

    models: tuple[str, ...]
    context: int
    defaults: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=1.0))
    max_tokens: int = 4096
    timeout: float = 600.0
    log_prompts: bool = False
    bitwise: bool | None = None
    differing_shapes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request of either API, checked. `tools`: names of the tools on offer, None for none."""

    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    max_tokens: int | None = None
    n: int = 1
    stops: Sequence[str] = ()
    depth: int | None = None
    ignore_eos: bool = False
    tools: frozenset[str] | None = None
    suppress_thought: bool = False


@dataclass(kw_only=True)
class Call:
    """A tool call of an output; `arguments` is JSON text, complete unless the output was cut."""

    name: str
    arguments: str = ""


@dataclass(kw_only=True)
class Choice:
    """One output, as far as it has come."""

    index: int
    prompt_tokens: int  # 0 where another output has the same prompt, and counts it
    stats: SpecStats
    text: str = ""
    thinking: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tokens: int = 0
    thinking_tokens: int = 0
    finish: Finish | None = None
    stop_match: str | None = None

    @property
    def cached_tokens(self) -> int:
        """Of `prompt_tokens`, those that a prefix cache had."""
        return min(self.stats.reused, self.prompt_tokens)

    def add(self, deltas: Sequence[Delta]) -> None:
        """Note what a stream gave."""
        for delta in deltas:
            if isinstance(delta, CallDelta):
                if delta.name is not None:
                    self.calls.append(Call(name=delta.name))
                self.calls[delta.index].arguments += delta.arguments
            elif delta.kind == "thinking":
                self.thinking += delta.text
            else:
                self.text += delta.text


@dataclass(frozen=True, kw_only=True)
class Update:
    """News of one output: what its new tokens say, the logprobs of those of its answer, and whether it ended."""

    choice: Choice
    deltas: Sequence[Delta]
    logprobs: Sequence[TokenLogprob] = ()
    ids: Sequence[int] = ()

    @property
    def text(self) -> str:
        """New text of the answer."""
        return "".join(d.text for d in self.deltas if isinstance(d, Piece) and d.kind == "answer")

    @property
    def thinking(self) -> str:
        """New text of the thought."""
        return "".join(d.text for d in self.deltas if isinstance(d, Piece) and d.kind == "thinking")


class Run:
    """A job under way: iterate over it for updates. `cancel` it whenever it isn't read to its end."""

    def __init__(
        self,
        job: Job,
        choices: list[Choice],
        streams: list[Stream],
        codec: TextCodec,
        metrics: Metrics,
        settings: Settings,
    ) -> None:
        self.job, self.choices, self._settings = job, choices, settings
        self._streams, self._codec, self._metrics = streams, codec, metrics
        self._begun = time.perf_counter()

    def report(self, stats: SpecStats, depth: int | None) -> dict[str, Any]:
        """The extension field of every response: what speculation did, and what its output promises."""
        return {
            "contract": stats.contract,
            "bitwise": self._settings.bitwise,
            "differing_shapes": list(self._settings.differing_shapes),
            "depth": "auto" if depth is None else depth,
            "rounds": stats.rounds,
            "drafted": stats.drafted,
            "accepted": stats.accepted,
            "accepted_per_round": round(stats.accepted_per_round, 4),
            "acceptance_per_position": [round(x, 4) for x in stats.acceptance_per_position],
        }

    def cancel(self) -> None:
        """End all of it. After its end: nothing."""
        for stream in self._streams:
            stream.cancel()

    def updates(self) -> AsyncIterator[Update]:
        """All updates, of all outputs, as they come. Raises ApiError where the engine fails."""
        return self._read(0) if len(self._streams) == 1 else self._read_all()

    async def _read_all(self) -> AsyncIterator[Update]:
        readers = [self._read(i) for i in range(len(self._streams))]
        coming = {asyncio.ensure_future(anext(reader)): reader for reader in readers}
        try:
            while coming:
                done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    reader = coming.pop(task)
                    with suppress(StopAsyncIteration):
                        update = task.result()
                        coming[asyncio.ensure_future(anext(reader))] = reader
                        yield update
        finally:
            for task in coming:
                task.cancel()
            self.cancel()

    async def finished(self) -> list[Choice]:
        """All outputs, when all have ended."""
        async for _ in self.updates():
            pass
        return self.choices

    async def _read(self, i: int) -> AsyncIterator[Update]:
        stream, choice, job = self._streams[i], self.choices[i], self.job
        reader = ToolStream(
            self._codec,
            prompt=job.prompts[i // job.n],
            tools=job.tools,
            stops=job.stops,
            min_tokens=job.sampling.min_tokens,
        )
        last, reason = self._begun, "cancelled"
        try:
            async for event in stream:
                now = time.perf_counter()
                if event.tokens:
                    self._metrics.tokens(len(event.tokens), now - last, first=choice.tokens == 0)
                    last = now
                update = self._update(choice, reader, event)
                reason = choice.finish or reason
                yield update
                if choice.finish is not None:
                    break
        except ApiError:
            reason = "error"
            raise
        finally:
            stream.cancel()
            self._metrics.ended(reason)

    def _update(self, choice: Choice, reader: ToolStream, event: TokenEvent) -> Update:
        block = reader.read(event.tokens, event.drafted)
        deltas = block.deltas
        logprobs = [event.logprobs[i] for i in block.answered] if event.logprobs else []
        choice.tokens += block.kept
        choice.thinking_tokens += block.thought
        if reader.stop_match is None and event.finish_reason is not None:
            if event.finish_reason in ("error", "cancelled"):
                self.cancel()
                raise _failure(event)
            deltas = [*deltas, *reader.flush(cut=event.finish_reason == "length")]
        if reader.stop_match is not None:
            choice.finish, choice.stop_match = "stop_string", reader.stop_match
        elif event.finish_reason is not None:
            called = reader.calls and event.finish_reason == "stop"
            choice.finish = "tool_calls" if called else "length" if event.finish_reason == "length" else "stop"
        choice.add(deltas)
        choice.logprobs += logprobs
        return Update(choice=choice, deltas=deltas, logprobs=logprobs, ids=event.tokens[: block.kept])


def _failure(event: TokenEvent) -> ApiError:
    if event.finish_reason == "cancelled":
        return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
    return ApiError(500, f"the request failed: {event.error or 'no reason is known'}", code="engine_error")


class Service:
    """Turns jobs into runs."""

    def __init__(self, engine: Backend, codec: TextCodec, settings: Settings, metrics: Metrics) -> None:
        self.codec, self.settings, self.metrics = codec, settings, metrics
        self._engine = engine
        self._texts = ThreadPoolExecutor(1, thread_name_prefix="text")
        self.closing = False

    def close(self) -> None:
        """Let the text thread end."""
        self._texts.shutdown(wait=False)

    def stats(self) -> EngineStats:
        """How the engine stands."""
        return self._engine.stats()

    def check_model(self, name: str) -> None:
        """Raises ApiError for a model that isn't served."""
        if name not in self.settings.models:
            known = ", ".join(repr(m) for m in self.settings.models)
            raise ApiError(
                404, f"the model {name!r} does not exist; served here: {known}", param="model", code="model_not_found"
            )

    def sampling(self, **given: Any) -> SamplingParams:
        """The model's own defaults, changed by what a request gives (None: nothing)."""
        try:
            return replace(self.settings.defaults, **{k: v for k, v in given.items() if v is not None})
        except ValueError as error:
            raise bad(str(error)) from error

    async def text(self, function: Callable[..., T], *args: Any, **more: Any) -> T:
        """Call `function` in the text thread; its ValueErrors become 400."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._texts, lambda: function(*args, **more))
        except RecursionError as error:
            raise bad("the request is nested too deeply") from error
        except ValueError as error:
            raise bad(str(error)) from error

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> list[int]:
        """Ids of a conversation."""
        return await self.text(self.codec.render, messages, thinking=thinking, tools=tools or None)

    async def start(self, job: Job) -> Run:
        """Submit a job; all of its outputs, or none, are under way when this returns. Raises ApiError."""
        requests, choices, streams = self._requests(job), list[Choice](), list[Stream]()
        try:
            for request in requests:
                streams.append(await self._submit(request))
                tokens = len(request.prompt) if request.choice == 0 else 0
                choices.append(Choice(index=len(choices), prompt_tokens=tokens, stats=streams[-1].stats))
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        for prompt in job.prompts:
            self.metrics.prompt_tokens(len(prompt))
        return Run(job, choices, streams, self.codec, self.metrics, self.settings)

    def _requests(self, job: Job) -> list[Request]:
        context, requests = self.settings.context, list[Request]()
        for prompt in job.prompts:
            room = context - len(prompt)
            if room < 1:
                raise bad(
                    f"the prompt has {len(prompt)} tokens, and the model's context is {context}: "
                    "no token is left for the answer",
                    "messages",
                    "context_length_exceeded",
                )
            wanted = self.settings.max_tokens if job.max_tokens is None else job.max_tokens
            try:
                requests += [
                    Request(
                        prompt=prompt,
                        max_tokens=min(wanted, room),
                        sampling=job.sampling,
                        stop_ids=self.codec.stop_ids,
                        depth=job.depth,
                        ignore_eos=job.ignore_eos,
                        choice=choice,
                    )
                    for choice in range(job.n)
                ]
            except ValueError as error:
                raise bad(str(error)) from error
        return requests

    async def _submit(self, request: Request) -> Stream:
        try:
            if request.sampling.constraint is None:
                return self._engine.submit(request)
            return await self._submit_elsewhere(request)
        except ValueError as error:
            status = 400 if request.sampling.constraint is None else 422
            raise ApiError(status, str(error), code="invalid_request") from error
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full", retry_after=error.retry_after) from error
        except EngineClosed as error:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5) from error

    async def _submit_elsewhere(self, request: Request) -> Stream:
        """A grammar seen for the first time is compiled by `submit`, which can take seconds."""
        future = asyncio.get_running_loop().run_in_executor(None, self._engine.submit, request)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(_cancel_late)
            raise


def _cancel_late(future: asyncio.Future[Stream]) -> None:
    """Nobody waits for it any more."""
    if not future.cancelled() and future.exception() is None:
        future.result().cancel()


def usage_of(choices: Sequence[Choice]) -> SpecStats:
    """The counters of all outputs."""
    return SpecStats.total(choice.stats for choice in choices)
