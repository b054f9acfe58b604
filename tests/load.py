"""Many clients at once against the `serve` command, some of which leave in the middle: `python -m tests.load`.

Every answer that is read to its end has to be the text that the pair gives alone, without drafts. Prints figures as
JSON; exit code 1 if an answer differs, a request fails, a row is left in use or memory grows to the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx

from mlx_gemma_mtp import SamplingParams, load

ANIMALS = ("squirrel", "fox", "bear", "owl", "horse", "cow", "rabbit", "dog")
QUESTIONS = ("What is the capital of France?", "Name the sixth planet.", "What do people speak in Austria?")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A request, and the text that it has to give."""

    body: dict[str, Any]
    expected: str


@dataclass(kw_only=True)
class Figures:
    """What was seen. Times are in seconds."""

    answers: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def report(self, seconds: float) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "seconds": round(seconds, 1),
            "answers": self.answers,
            "left": self.left,
            "wrong": self.wrong[:3],
            "failed": self.failed[:3],
            "tokens_per_second": round(self.tokens / seconds, 1),
            "first_token_ms": _percentiles(self.first),
            "between_tokens_ms": _percentiles(self.between),
            "between_blocks_ms": _percentiles([x for x in self.between if x]),
            "server_rss_mb": {k: round(v / 1e6, 1) for k, v in memory_of(self.memory).items()},
            "memory_growth": round(growth(self.memory), 4),
        }


def memory_of(samples: Sequence[int]) -> dict[str, float]:
    """Bytes at the start, and the medians of a run's three thirds: the first one warms up."""
    thirds = [samples[len(samples) * i // 3 : len(samples) * (i + 1) // 3] or samples for i in range(3)]
    names = ("first third", "middle third", "last third")
    return {"start": float(samples[0])} | {n: float(statistics.median(t)) for n, t in zip(names, thirds, strict=True)}


def growth(samples: Sequence[int]) -> float:
    """How much more memory the last third of a run took than the middle one, as a share."""
    found = memory_of(samples)
    return found["last third"] / found["middle third"] - 1


def _percentiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times) or [0.0]
    return {f"p{p}": round(1000 * ordered[min(len(ordered) * p // 100, len(ordered) - 1)], 2) for p in (50, 90, 99)}


def cases(count: int) -> list[Case]:
    """Requests of different lengths and kinds, each decoded alone and without drafts."""
    runtime, chance, out = load("demo"), random.Random(7), list[Case]()
    for i in range(count):
        question = f"Tell me a story about a {chance.choice(ANIMALS)}." if i % 3 else chance.choice(QUESTIONS)
        text = "word " * chance.choice((0, 0, 5, 60, 150)) + question
        messages = [{"role": "user", "content": text}]
        sampling = {"temperature": 1.3, "seed": i} if i % 2 else {"temperature": 0}
        tokens = chance.randint(5, 120)
        alone = runtime.generate(
            messages, max_tokens=tokens, sampling=SamplingParams(**sampling), depth=0
        )  # fmt: skip
        body = {"model": "demo", "messages": messages, "max_tokens": tokens, "top_k": 0, "top_p": 1, **sampling}
        body |= {"stream": True, "stream_options": {"include_mtp": True}}
        out.append(Case(body=body, expected=alone.text))
    return out


async def client(url: str, given: list[Case], end: float, leave: float, seed: int, figures: Figures) -> None:
    """One client: asks, reads or leaves, and asks again."""
    chance = random.Random(seed)
    async with httpx.AsyncClient(timeout=300) as http:
        while time.monotonic() < end:
            case = chance.choice(given)
            leaves = chance.randint(0, 6) if chance.random() < leave else None
            try:
                await _ask(http, url, case, leaves, figures)
            except (httpx.HTTPError, AssertionError, KeyError) as error:
                figures.failed.append(f"{type(error).__name__}: {error}")


async def _ask(http: httpx.AsyncClient, url: str, case: Case, leaves: int | None, figures: Figures) -> None:
    text, last, seen, done = "", time.perf_counter(), 0, False
    async with http.stream("POST", f"{url}/v1/chat/completions", json=case.body) as response:
        assert response.status_code == 200, (await response.aread()).decode()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, line
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
            tokens = chunk.get("mtp", {}).get("tokens", seen)
            if tokens > seen:
                now = time.perf_counter()
                (figures.between if seen else figures.first).append(now - last)
                figures.between += [0.0] * (tokens - seen - 1)
                figures.tokens += tokens - seen
                last, seen = now, tokens
            if leaves is not None and seen >= 4 * leaves:
                figures.left += 1
                return
    assert done, "the stream broke off"
    figures.answers += 1
    if text != case.expected:
        figures.wrong.append(f"expected {case.expected!r}, got {text!r}")


async def _watch(pid: int, figures: Figures) -> None:
    while True:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        figures.memory.append(pages * os.sysconf("SC_PAGE_SIZE"))
        await asyncio.sleep(0.5)


async def attack(
    url: str, pid: int, given: list[Case], *, clients: int, seconds: float, leave: float
) -> dict[str, Any]:
    """Run the clients; returns what `Figures.report` says, and the rows still in use afterwards."""
    figures, begun = Figures(), time.monotonic()
    watch = asyncio.create_task(_watch(pid, figures))
    end = begun + seconds
    await asyncio.gather(*(client(url, given, end, leave, i, figures) for i in range(clients)))
    spent = time.monotonic() - begun
    rows = -1
    async with httpx.AsyncClient(timeout=60) as http:
        for _ in range(100):
            stats = (await http.get(f"{url}/v1/stats")).json()
            rows = stats["running"] + stats["waiting"]
            if rows == 0:
                break
            await asyncio.sleep(0.1)
    watch.cancel()
    return {"clients": clients, **figures.report(spent), "rows_left": rows, "prefix_hits": stats["prefix_hits"]}


def serve(*options: str) -> tuple[subprocess.Popen[str], str]:
    """Start the command; returns its process and URL. Its log goes nowhere."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_gemma_mtp", "serve", "--port", "0", *options], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    url = ""
    while not url:
        line = process.stderr.readline()
        assert line, "the server ended"
        url = line.split(" at ")[1].split(" ")[0] if " at http" in line else ""
    # A pipe that nobody reads would fill up and hold the server.
    threading.Thread(target=_drain, args=(process.stderr,), daemon=True).start()
    for _ in range(400):
        try:
            httpx.get(f"{url}/health")
            break
        except httpx.TransportError:
            time.sleep(0.05)
    return process, url


def _drain(pipe: IO[str]) -> None:
    with pipe:
        for _ in pipe:
            pass


def run(*, clients: int, seconds: float, leave: float, count: int, options: tuple[str, ...] = ()) -> dict[str, Any]:
    """Everything: cases, a server, clients."""
    given = cases(count)
    process, url = serve("--max-waiting", str(2 * clients), *options)
    try:
        return asyncio.run(attack(url, process.pid, given, clients=clients, seconds=seconds, leave=leave))
    finally:
        process.terminate()
        process.wait(60)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--leave", type=float, default=0.3)
    parser.add_argument("--cases", type=int, default=40)
    parser.add_argument("--growth", type=float, default=0.03, help="most that memory may grow between the last thirds")
    parser.add_argument("options", nargs="*", help="more options of `serve`, behind --")
    given = parser.parse_args()
    report = run(
        clients=given.clients,
        seconds=given.seconds,
        leave=given.leave,
        count=given.cases,
        options=tuple(given.options),
    )
    report["memory_flat"] = report["memory_growth"] <= given.growth
    print(json.dumps(report, indent=1))
    return 1 if report["wrong"] or report["failed"] or report["rows_left"] or not report["memory_flat"] else 0


if __name__ == "__main__":
    sys.exit(main())
