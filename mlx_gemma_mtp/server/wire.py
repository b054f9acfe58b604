"""HTTP at the socket: uvicorn's protocol over httptools, whose chunks cost a third of h11's, with a limit on heads.

Knows nothing of what is asked or answered.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD = 64 * 2**10
"""Bytes that may come in a row without a body's being among them, and what one read brings more."""

MAX_QUEUED = 8
"""Requests that may wait behind one that runs before nothing more is read: only who reads sees a client leave."""


class Protocol(HttpToolsProtocol):
    """One connection, without upgrades: a wish for one is ignored. Ends what runs when the client goes."""

    _outside = 0

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self._open: deque[RequestResponseCycle] = deque()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._unset_keepalive_if_required()
        self._outside += len(data)
        try:
            self._feed(memoryview(data))
        except HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        # httptools would hold a head, or trailers, of any size.
        if self._outside > MAX_HEAD and not self.transport.is_closing():
            self.send_400_response(f"The head is larger than {MAX_HEAD} bytes.")

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        super().connection_lost(exc)
        self._disconnect()

    def on_headers_complete(self) -> None:
        """See `httptools`."""
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self._running()
        self._open.append(self.cycle)
        if len(self._open) <= MAX_QUEUED:
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        """See `httptools`: part of a body, whose size is limited elsewhere."""
        self._outside = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See `httptools`."""
        if self.parser.should_upgrade():
            return
        self._outside = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Close the connection; say why, unless an earlier request's answer has to come first."""
        running = self._running()
        if running is None or (running is self.cycle and running.more_body and not running.response_started):
            super().send_400_response(msg)
        else:
            self.transport.close()
        self._disconnect()

    def _feed(self, data: memoryview) -> None:
        """Parse all of `data`. Raises HttpParserError."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
            head = self._head()
            # httptools takes what follows such a head for another protocol's: it has to see one without the wish.
            self.parser = HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self.parser.feed_data(head)

    def _head(self) -> bytes:
        """The head just read, without its Upgrade headers. Raises HttpParserError for CONNECT."""
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":
            raise HttpParserError("CONNECT is for proxies")
        headers = [b"%s: %s\r\n" % (name, value) for name, value in self.headers if name != b"upgrade"]
        return b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version.encode(), b"".join(headers))

    def _running(self) -> RequestResponseCycle | None:
        """The request that is being answered: the others in `_open` wait for it."""
        while self._open and self._open[0].response_complete:
            self._open.popleft()
        return self._open[0] if self._open else None

    def _disconnect(self) -> None:
        """Tell what runs that nobody reads its answer."""
        running = self._running()
        if running is not None:
            running.disconnected = True
            running.message_event.set()
            self.flow.resume_writing()
