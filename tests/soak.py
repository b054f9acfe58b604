"""Soak: thousands of random requests through the demo pair, many of them cancelled or impossible.

    python -m tests.soak [--requests 5000] [--seed 0]

Every request has to end with its tokens or its error, memory has to return to where it began, and no row may be left.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import math
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_gemma_mtp import Engine, Handle, Request, Runtime, SamplingParams, TokenEvent, load
from mlx_gemma_mtp.constraints import Regex

LONGEST = 1_500
KV_BUDGET = 24 << 20
_CHECKED = 40
"""How many finished requests are computed again, alone and without drafts."""

_INVALID: tuple[tuple[dict[str, Any], str], ...] = (
    ({"prompt": [1_000_000]}, "token id 1000000"),
    ({"prompt": []}, "prompt is"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": 9_000}, "expected at most"),
    ({"depth": 9}, "depth is 9"),
    ({"sampling": SamplingParams(constraint=Regex("a(")), "prompt": [5]}, "can't be used"),
    ({"stop": ("",)}, "stop is"),
)


@dataclass
class Report:
    """What happened. `wrong` has a line for everything that should not have."""

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    tokens: int = 0
    compared: int = 0
    memory: dict[str, float] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return self.__dict__ | {"ends": dict(self.ends)}


def some_sampling(draw: random.Random) -> SamplingParams:
    """Greedy half of the time; else one of the ways of choosing tokens."""
    seed = draw.randrange(1 << 30)
    kinds: list[SamplingParams] = [
        SamplingParams(temperature=0.8, seed=seed),
        SamplingParams(temperature=1.2, top_k=20, top_p=0.9),
        SamplingParams(temperature=0.7, min_p=0.05, seed=seed, repetition_penalty=1.1),
        SamplingParams(presence_penalty=0.5, frequency_penalty=0.2, logprobs=2),
        SamplingParams(constraint=Regex("[a-z ]{1,40}")),
        SamplingParams(temperature=1.0, suppress_tokens=(5, 6), min_tokens=4),
    ]
    return SamplingParams() if draw.random() < 0.5 else draw.choice(kinds)


def some_request(rt: Runtime, draw: random.Random, longest: int) -> Request:
    """A prompt and an output of 1 to `longest` tokens together, short ones more often; some prompts begin alike."""
    total = max(2, round(math.exp(draw.uniform(0, math.log(longest)))))
    new = draw.randint(1, min(64, total - 1))
    start = draw.randrange(4)
    prompt = [3 + (start * 97 + i * i) % 2_000 for i in range(total - new)]
    prompt[len(prompt) // 2 :] = [draw.randrange(3, 2_000) for _ in prompt[len(prompt) // 2 :]]
    sampling = some_sampling(draw)
    return rt.request(
        prompt,
        max_tokens=new,
        sampling=sampling,
        stop=("the",) if draw.random() < 0.1 else (),
        ignore_eos=sampling.constraint is None and draw.random() < 0.5,
        depth=draw.choice([None, None, None, 0, 5]),
    )


class Soak:
    """One run; readers in threads and in an event loop, all at once."""

    def __init__(self, rt: Runtime, engine: Engine, *, seed: int, longest: int) -> None:
        self.rt, self.engine, self.longest = rt, engine, longest
        self.report = Report()
        self._draw = random.Random(seed)
        self._lock = threading.Lock()
        self._done: list[tuple[Request, list[int]]] = []

    def run(self, count: int, threads: int = 12) -> None:
        """Submit `count` requests from `threads` threads, a fifth of which read with asyncio."""
        seeds = [self._draw.randrange(1 << 60) for _ in range(count)]
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(self._one, seeds):
                pass

    def check_tokens(self) -> None:
        """Compute some of what is exact again, one at a time and without drafts."""
        for request, tokens in self._draw.sample(self._done, min(_CHECKED, len(self._done))):
            alone = self.rt.decode([request], depth=0)[0].tokens
            self.report.compared += 1
            if alone != tokens:
                self._wrong(f"{len(request.prompt)} + {request.max_tokens} tokens, {request.sampling}: other tokens")

    def _one(self, seed: int) -> None:
        draw = random.Random(seed)
        if draw.random() < 0.1:
            self._invalid(draw)
            return
        request = some_request(self.rt, draw, self.longest)
        leave = draw.choice(_LEAVING) if draw.random() < 1 / 3 else None
        handle = self.engine.submit(request)
        if leave is not None:
            leave(handle, draw)
            self._count("cancelled")
        else:
            events = asyncio.run(_read_async(handle)) if draw.random() < 0.2 else list(handle)
            self._finished(request, handle, events)

    def _invalid(self, draw: random.Random) -> None:
        options, said = draw.choice(_INVALID)
        try:
            self.engine.submit(Request(**{"prompt": [3, 4], "max_tokens": 5, **options}))
        except ValueError as error:
            if said not in str(error):
                self._wrong(f"{options}: {error}")
            self._count("invalid")
        else:
            self._wrong(f"{options} was taken")

    def _finished(self, request: Request, handle: Handle, events: list[TokenEvent]) -> None:
        tokens = [t for e in events for t in e.tokens]
        reason = events[-1].finish_reason
        self._count(str(reason), len(tokens))
        ok = reason == "stop" or (reason == "length" and len(tokens) == request.max_tokens)
        if not ok or any(e.finish_reason for e in events[:-1]):
            self._wrong(f"request {handle.id}: {len(tokens)} of {request.max_tokens} tokens, {events[-1]}")
        if handle.stats.tokens != len(tokens):
            self._wrong(f"request {handle.id}: {len(tokens)} tokens, counted {handle.stats.tokens}")
        if request.sampling.contract == "exact" and request.sampling.constraint is None and not request.stop:
            with self._lock:
                self._done.append((request, tokens))

    def _count(self, end: str, tokens: int = 0) -> None:
        with self._lock:
            self.report.ends[end] += 1
            self.report.tokens += tokens

    def _wrong(self, what: str) -> None:
        with self._lock:
            self.report.wrong.append(what)


async def _read_async(handle: Handle) -> list[TokenEvent]:
    return [event async for event in handle]


def _at_once(handle: Handle, draw: random.Random) -> None:
    handle.cancel()
    handle.result()


def _later(handle: Handle, draw: random.Random) -> None:
    time.sleep(draw.random() / 2)
    handle.cancel()
    handle.result()


def _dropping(handle: Handle, draw: random.Random) -> None:
    for _ in zip(handle, range(draw.randint(1, 4)), strict=False):
        pass


def _dropping_async(handle: Handle, draw: random.Random) -> None:
    async def read() -> None:
        async for _ in handle:
            break

    asyncio.run(read())


_LEAVING: list[Callable[[Handle, random.Random], None]] = [_at_once, _later, _dropping, _dropping_async]


def resident_bytes() -> int:
    """What the process holds in memory; 0 where /proc is missing."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096
    except FileNotFoundError:
        return 0


def settled_memory() -> int:
    """Bytes of arrays alive, with nothing left to collect."""
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


def soak(count: int, *, seed: int = 0, longest: int = LONGEST, rt: Runtime | None = None) -> Report:
    """Run it; see the module."""
    rt = load("demo") if rt is None else rt
    rt.decode([Request(prompt=[2, 3], max_tokens=2)])
    begin, start, resident = time.monotonic(), settled_memory(), resident_bytes()
    engine = Engine(rt, max_batch=8, depth=3, kv_budget=KV_BUDGET, prefix_cache=4 << 20, buffer=16)
    with engine:
        run = Soak(rt, engine, seed=seed, longest=longest)
        report = run.report
        run.run(count)
        while (stats := engine.stats()).running or stats.waiting or stats.paused:
            time.sleep(0.05)
        report.stats = stats.to_dict()
        idle = settled_memory() - stats.prefix_bytes
    after = settled_memory()
    report.memory = {
        "start": start,
        "idle_without_prefixes": idle,
        "after": after,
        "peak": stats.peak_memory,
        "resident_start": resident,
        "resident_after": resident_bytes(),
    }
    # A buffer that MLX takes from its pool may be larger than what is kept in it, and counts whole.
    for name, found, pooled in (("idle, less the prefix cache", idle, stats.prefix_bytes / 8), ("after", after, 0)):
        if not abs(found - start) <= 0.01 * start + pooled:
            report.wrong.append(f"memory {name}: {found} bytes, began with {start}")
    if stats.kv_bytes or stats.failed_steps:
        report.wrong.append(f"left over: {stats.kv_bytes} bytes of K/V; {stats.failed_steps} steps failed")
    if sum(report.ends.values()) != count:
        report.wrong.append(f"{sum(report.ends.values())} requests ended, expected {count}")
    run.check_tokens()
    report.seconds = round(time.monotonic() - begin, 1)
    return report


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report = soak(args.requests, seed=args.seed)
    print(json.dumps(report.to_dict(), indent=1))
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
