"""Clients that misbehave, at a socket: the server answers the next request, and no row leaks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from .serving import Live, chat_body, demo_server, rest

STORY = [{"role": "user", "content": "Tell me a story about a squirrel."}]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with demo_server(timeout=5) as live:
        yield live


@pytest.fixture
def live(server: Live) -> Iterator[Live]:
    """A server that has to answer, and to be idle, when a test is over."""
    yield server
    body = chat_body(messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0)
    got = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert got.json()["choices"][0]["message"]["content"] == "The capital of France is Paris."
    server.wait_idle()


def connect(live: Live, *, receive_buffer: int | None = None) -> socket.socket:
    address = urlsplit(live.url)
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.settimeout(30)
    client.connect((address.hostname, address.port))
    return client


def raw(live: Live, data: bytes) -> bytes:
    """Send bytes, read all that comes back."""
    with connect(live) as client:
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # closed before it was all sent
        return rest(client)


def post(body: bytes, *headers: str) -> bytes:
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return ("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""])).encode() + body


def test_ten_megabytes(live: Live) -> None:
    body = json.dumps(chat_body(messages=[{"role": "user", "content": "x" * 10_000_000}])).encode()
    got = httpx.post(f"{live.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert (got.status_code, got.json()["error"]["code"]) == (413, "body_too_large")
    assert raw(live, post(b"x" * 50_000_000)).startswith(b"HTTP/1.1 413 ")


def test_bodies_without_a_length(live: Live) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b"[" * 100_000

    got = httpx.post(f"{live.url}/v1/messages", content=parts(), headers={"content-type": "application/json"})
    assert (got.status_code, got.json()["error"]["type"]) == (413, "request_too_large")


@pytest.mark.parametrize("body", [b"\xff\xfe\xfd", b'{"model": "\xc3\x28"}', b"\x00" * 1000, b"[" * 100_000])
def test_bytes_that_are_no_text(live: Live, body: bytes) -> None:
    assert raw(live, post(body)).startswith(b"HTTP/1.1 400 ")


def test_header_floods(live: Live) -> None:
    flood = [f"X-Header-{i}: {'y' * 100}" for i in range(20_000)]
    chunked = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    trailers = chunked + "".join(f"{line}\r\n" for line in flood).encode()
    for data in (post(b"{}", *flood), post(b"{}", "X-Long: " + "z" * 2_000_000), trailers):
        got = raw(live, data)
        assert got.startswith(b"HTTP/1.1 400 ")
        assert b"head is larger than 65536 bytes" in got


def test_a_large_body_is_no_head(live: Live) -> None:
    """Nor are several requests on one connection one head."""
    body = json.dumps(chat_body(messages=[{"role": "user", "content": "x" * 3_000_000}])).encode()
    assert b"context_length_exceeded" in raw(live, post(body))
    question = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Filler: " + b"y" * 40_000 + b"\r\n\r\n"
    with connect(live) as client:
        for _ in range(5):
            client.sendall(question)
            got = b""
            while not got.endswith(b"}"):
                got += client.recv(65536)
            assert got.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\r\n" * 1000, b"A" * 200_000])
def test_what_is_no_http(live: Live, data: bytes) -> None:
    assert not raw(live, data).startswith(b"HTTP/1.1 5")


def test_a_body_that_never_comes(live: Live) -> None:
    body = json.dumps(chat_body(messages=STORY)).encode()
    with connect(live) as client:
        client.sendall(post(body)[: -len(body) // 2])
    assert live.engine.stats().running == 0


def test_a_reader_that_does_not_read(live: Live) -> None:
    """Its buffers fill, its request's time runs out, and its row is free again."""
    body = chat_body(messages=STORY, stream=True, ignore_eos=True, max_tokens=7000, temperature=2, top_logprobs=20)
    readers = []
    for _ in range(2):
        client = connect(live, receive_buffer=2048)
        client.sendall(post(json.dumps(body | {"logprobs": True}).encode()))
        readers.append(client)
    end = time.monotonic() + 20
    while (running := live.engine.stats().running) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert running == 2
    live.wait_idle(60)
    for client in readers:
        client.close()


def test_many_that_go_at_once(live: Live) -> None:
    body = json.dumps(chat_body(messages=STORY, stream=True, ignore_eos=True, max_tokens=7000)).encode()
    clients = [connect(live) for _ in range(30)]
    for client in clients:
        client.sendall(post(body))
    time.sleep(0.3)
    for client in clients:
        # The connection is reset, not closed.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        client.close()


def test_a_client_that_is_killed(live: Live) -> None:
    code = (
        "import httpx, sys\n"
        "with httpx.stream('POST', sys.argv[1], content=sys.argv[2], timeout=60,"
        " headers={'content-type': 'application/json'}) as r:\n"
        "    for line in r.iter_lines(): print(line, flush=True)\n"
    )
    body = json.dumps(chat_body(messages=STORY, stream=True, ignore_eos=True, max_tokens=7000))
    process = subprocess.Popen(
        [sys.executable, "-c", code, f"{live.url}/v1/chat/completions", body], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    live.wait_idle(60)
