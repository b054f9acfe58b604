"""HTTP at the socket: wishes for an upgrade, clients that leave, and bad requests behind good ones."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from .serving import Fake, chat_body, listening, rest

UPGRADE = b"Host: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
HEAD = b"POST /echo HTTP/1.1\r\n" + UPGRADE
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
BAD = [b"!!!\r\n\r\n", b"GET /x HTTP/1.1\r\nX-Long: " + b"y" * 70_000, b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n"]


class Told:
    """An application that answers with path and body; at /stream and /wait it goes on until the client leaves."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.begun, self.left = threading.Event(), threading.Event()
        self.url = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.paths.append(scope["path"])
        self.headers.append(dict(scope["headers"]))
        self.begun.set()
        if scope["path"] == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if scope["path"] in ("/stream", "/wait"):
            while message["type"] != "http.disconnect":
                message = await receive()
            self.left.set()
            await send({"type": "http.response.body", "body": b"too late", "more_body": True})
            return
        out = scope["path"].encode() + b" " + body
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(out))]})
        await send({"type": "http.response.body", "body": out})

    def connect(self) -> socket.socket:
        address = urlsplit(self.url)
        return socket.create_connection((str(address.hostname), address.port or 0), timeout=10)

    def ask(self, *packets: bytes) -> bytes:
        """Send each in a packet of its own, read all that comes back."""
        with self.connect() as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for packet in packets:
                client.sendall(packet)
                threading.Event().wait(0.02)
            return rest(client)

    def behind(self, good: bytes, bad: bytes) -> bytes:
        """Send `bad` when `good` has been read: in one read, not all of it would count. Read all that comes back."""
        with self.connect() as client:
            client.sendall(good)
            assert self.begun.wait(10)
            client.sendall(bad)
            return rest(client)


@pytest.fixture
def told() -> Iterator[Told]:
    app = Told()
    with listening(app, lifespan="off") as app.url:
        yield app


def with_length(body: bytes) -> list[bytes]:
    return [HEAD + b"Content-Length: %d\r\n\r\n" % len(body), body]


def chunked(body: bytes) -> list[bytes]:
    return [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)]


class TestUpgrade:
    @pytest.mark.parametrize("packets", [with_length(SMUGGLED), chunked(SMUGGLED)])
    @pytest.mark.parametrize("cut", ["one packet", "a packet each", "bytes"])
    def test_it_is_ignored(self, told: Told, packets: list[bytes], cut: str) -> None:
        packets = [*packets, LAST]
        if cut == "one packet":
            packets = [b"".join(packets)]
        elif cut == "bytes":
            packets = [packets[0][:30], packets[0][30:-1], packets[0][-1:] + packets[1][:5], packets[1][5:], packets[2]]
        got = told.ask(*packets)
        assert told.paths == ["/echo", "/last"]
        assert got.count(b"HTTP/1.1 200 OK") == 2
        assert b"/echo " + SMUGGLED in got
        assert b"upgrade" not in told.headers[0]
        assert told.headers[0][b"http2-settings"] == b"AAMAAABk"

    def test_many_on_one_connection(self, told: Told) -> None:
        got = told.ask(b"".join([*with_length(b"one"), b"GET /two HTTP/1.1\r\n" + UPGRADE + b"X-Empty:\r\n\r\n",
                                 *chunked(b"three"), LAST]))  # fmt: skip
        assert told.paths == ["/echo", "/two", "/echo", "/last"]
        assert told.headers[1][b"x-empty"] == b""
        assert [part in got for part in (b"/echo one", b"/two ", b"/echo three")] == [True] * 3

    def test_two_lengths_are_refused(self, told: Told) -> None:
        got = told.ask(HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 400 ")
        assert told.paths == []

    def test_a_chat(self) -> None:
        """What Java's HttpClient sends."""
        fake, told = Fake(), Told()
        body = str(chat_body()).replace("'", '"').encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\n" + UPGRADE
        with listening(fake.app) as told.url:
            got = told.ask(head + b"Content-Length: %d\r\n\r\n" % len(body), body, LAST)
        assert got.startswith(b"HTTP/1.1 200 OK")
        assert b"Hello there." in got


@pytest.mark.parametrize("path", [b"stream", b"wait"])
@pytest.mark.parametrize("behind", [0, 1, 3])
def test_a_client_that_leaves_ends_what_runs(told: Told, path: bytes, behind: int) -> None:
    with told.connect() as client:
        client.sendall(b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path + SMUGGLED * behind)
        threading.Event().wait(0.2)
    assert told.left.wait(10)
    assert told.paths == [f"/{path.decode()}"]


@pytest.mark.parametrize("bad", BAD)
def test_nothing_is_written_into_an_answer(told: Told, bad: bytes) -> None:
    with told.connect() as client:
        client.sendall(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        got = b""
        while not got.endswith(b"4\r\npart\r\n"):
            got += client.recv(65536)
        client.sendall(bad)
        assert rest(client) == b""
    assert told.left.wait(10)


@pytest.mark.parametrize("bad", BAD)
def test_nothing_is_written_before_an_answer(told: Told, bad: bytes) -> None:
    """A client would take it for the answer to its first request."""
    assert told.behind(b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n", bad) == b""
    assert told.left.wait(10)


@pytest.mark.parametrize("before", [b"", b"GET /first HTTP/1.1\r\nHost: localhost\r\n\r\n"])
@pytest.mark.parametrize("bad", BAD)
def test_who_asks_badly_is_told(told: Told, before: bytes, bad: bytes) -> None:
    got = told.behind(before, bad) if before else told.ask(bad)
    assert got.count(b"HTTP/1.1 200 OK") == bool(before)
    assert got.count(b"HTTP/1.1 400 Bad Request") == 1


@pytest.mark.parametrize("bad", [b"no number\r\n", b"0\r\nX-Long: " + b"y" * 70_000])
def test_a_bad_body_or_trailer_is_told(told: Told, bad: bytes) -> None:
    good = b"POST /wait HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"
    assert told.behind(good, bad).startswith(b"HTTP/1.1 400 Bad Request")
    assert told.left.wait(10)
