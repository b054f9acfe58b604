"""An engine that gives scripted outputs: for what the server makes of events that no demo model would bring about."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from mlx_gemma_mtp.engine import EngineClosed, EngineStats, QueueFull
from mlx_gemma_mtp.request import FinishReason, Request, TokenEvent, TokenLogprob
from mlx_gemma_mtp.stats import SpecStats
from mlx_gemma_mtp.text import TextCodec

Script = Callable[[Request], Sequence[TokenEvent]]


@dataclass(kw_only=True)
class FakeStream:
    """One request; `gate` holds its events back until it is set."""

    id: int
    request: Request
    events: Sequence[TokenEvent]
    gate: asyncio.Event | None = None
    stats: SpecStats = field(default_factory=SpecStats)
    cancelled: bool = False
    ended: bool = False

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        for event in self.events:
            if self.gate is not None:
                await self.gate.wait()
            await asyncio.sleep(0)
            if event.tokens and self.stats.prefills:
                accepted = sum(event.drafted)
                self.stats.add_round(drafted=max(accepted, 3), accepted=accepted)
            elif event.tokens:
                self.stats.prefills = 1
            yield event
        self.ended = True

    def cancel(self) -> None:
        """Note it."""
        self.cancelled = self.cancelled or not self.ended


class FakeEngine:
    """`engine.Engine` as far as the server uses it. `limit`: requests taken at a time."""

    def __init__(self, script: Script, *, limit: int = 1000) -> None:
        self.script, self.limit, self.closed, self.gated = script, limit, False, False
        self.streams: list[FakeStream] = []
        self.gate: asyncio.Event | None = None

    def submit(self, request: Request) -> FakeStream:
        """See `engine.Engine.submit`."""
        if self.closed:
            raise EngineClosed("closed")
        if sum(not (s.ended or s.cancelled) for s in self.streams) >= self.limit:
            raise QueueFull(self.limit, 2.4)
        if request.depth is not None and request.depth > 6:
            raise ValueError(f"depth is {request.depth}, expected at most 6")
        self.gate = asyncio.Event() if self.gated and self.gate is None else self.gate
        stats = SpecStats(contracts={request.sampling.contract: 1})
        stream = FakeStream(
            id=len(self.streams), request=request, events=self.script(request), gate=self.gate, stats=stats
        )
        self.streams.append(stream)
        return stream

    def stats(self) -> EngineStats:
        """Little of it."""
        running = sum(not (s.ended or s.cancelled) for s in self.streams)
        return EngineStats(running=running, spec=SpecStats.total(s.stats for s in self.streams))


def events_of(
    codec: TextCodec, text: str, *, chunk: int = 3, finish: FinishReason = "stop", logprobs: bool = False
) -> list[TokenEvent]:
    """Events of an output that says `text`, `chunk` tokens at a time; all but the last of a chunk were drafted."""
    ids = codec.encode(text)[1:]
    out = []
    for start in range(0, len(ids), chunk):
        tokens = tuple(ids[start : start + chunk])
        drafted = (*[True] * (len(tokens) - 1), False) if start else (False,) * len(tokens)
        found = tuple(TokenLogprob(t, -0.5, ((t, -0.5), (5, -2.0))) for t in tokens) if logprobs else ()
        out.append(TokenEvent(request_id=0, tokens=tokens, drafted=drafted, logprobs=found))
    error = "boom" if finish == "error" else None
    end = TokenEvent(request_id=0, tokens=(), drafted=(), finish_reason=finish, error=error)
    return [*out, end]
