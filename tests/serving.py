"""A server in this process for tests: over a fake engine without a socket, or over the demo pair with one."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.types import ASGIApp

import mlx_gemma_mtp
from mlx_gemma_mtp import Engine, load
from mlx_gemma_mtp.request import Request, SamplingParams
from mlx_gemma_mtp.server.app import make_app
from mlx_gemma_mtp.server.guard import Rules
from mlx_gemma_mtp.server.metrics import Metrics
from mlx_gemma_mtp.server.service import Backend, Service, Settings
from mlx_gemma_mtp.server.wire import Protocol
from mlx_gemma_mtp.text import TextCodec

from .fake_engine import FakeEngine, events_of

DEMO = Path(mlx_gemma_mtp.__file__).parent / "demo"
GREEDY = SamplingParams()


def demo_codec() -> TextCodec:
    """The demo pair's tokenizer and template."""
    codec = TextCodec.from_directory(DEMO)
    assert codec is not None
    return codec


def service_over(engine: Backend, codec: TextCodec, **settings: Any) -> Service:
    """A service that calls its model "demo" and decodes greedily."""
    given: dict[str, Any] = {"models": ("demo",), "context": 8192, "defaults": GREEDY, "timeout": 600.0} | settings
    return Service(engine, codec, Settings(**given), Metrics())


class Fake:
    """A server over a fake engine that says `text` to everything."""

    def __init__(
        self, text: str | Callable[[Request], Any] = "Hello there.", *, rules: Rules | None = None, **more: Any
    ):
        self.codec = CODEC
        said = text if callable(text) else lambda _: events_of(CODEC, text)
        self.engine = FakeEngine(said, limit=more.pop("limit", 1000))
        self.service = service_over(self.engine, CODEC, **more)
        self.app = make_app(self.service, rules or Rules(hosts=None))

    def ask(self, path: str, body: Any = None, *, method: str = "POST", **more: Any) -> httpx.Response:
        """One request."""

        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                given = more if body is None else more | {"json": body}
                return await client.request(method, path, **given)

        return asyncio.run(go())

    def chat(self, **more: Any) -> httpx.Response:
        """A chat completion; `more` goes into its body."""
        return self.ask("/v1/chat/completions", chat_body(**more))

    def message(self, **more: Any) -> httpx.Response:
        """An Anthropic message."""
        body = {"model": "demo", "max_tokens": 500, "messages": [{"role": "user", "content": "Hi"}]}
        return self.ask("/v1/messages", body | more)

    @property
    def request(self) -> Request:
        """The last request that reached the engine."""
        return self.engine.streams[-1].request

    @property
    def prompt(self) -> str:
        """Its prompt as text, marks included."""
        return "".join(self.codec.token_bytes(t).decode() for t in self.request.prompt)


CODEC = demo_codec()


def chat_body(**more: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    return {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]} | more


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The data of a stream's events, without [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    if "[DONE]" in lines:
        assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@contextmanager
def listening(app: ASGIApp, **config: Any) -> Iterator[str]:
    """Serve an application on a free port of this machine; yields its URL."""
    given: dict[str, Any] = {"log_config": None, "access_log": False, "ws": "none", "http": Protocol}
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, **(given | config)))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextmanager
def demo_server(rules: Rules | None = None, engine: Mapping[str, Any] | None = None, **settings: Any) -> Iterator[Live]:
    """A server over the demo pair on a free port."""
    runtime = load("demo")
    # What "auto" chooses depends on what rounds cost here.
    with Engine(runtime, **({"depth": 3} | dict(engine or {}))) as running:
        bitwise, differing = runtime.bitwise()
        exactness = {"bitwise": bitwise, "differing_shapes": differing}
        service = service_over(running, demo_codec(), **exactness, **settings)
        with listening(make_app(service, rules)) as url:
            yield Live(url, running, service)


class Live:
    """A server under way."""

    def __init__(self, url: str, engine: Engine, service: Service) -> None:
        self.url, self.engine, self.service = url, engine, service

    def wait_idle(self, seconds: float = 20) -> None:
        """Wait until no row is in use and nothing waits; fails if rows leak."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            stats = self.engine.stats()
            if stats.running == stats.waiting == 0:
                return
            time.sleep(0.02)
        raise AssertionError(f"rows leak: {self.engine.stats()}")


def rest(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    out = b""
    try:
        while part := client.recv(65536):
            out += part
    except ConnectionError:
        pass
    return out
