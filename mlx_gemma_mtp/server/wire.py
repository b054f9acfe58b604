"""HTTP at the socket: uvicorn's protocol over httptools, whose chunks cost a third of h11's, with a limit on heads.

Knows nothing of what is asked or answered.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 * 2**10
"""Bytes that may come in a row without a body's being among them, and what one read brings more."""


class Protocol(HttpToolsProtocol):
    """One connection. httptools would hold a head, or trailers, of any size."""

    _outside = 0

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._outside += len(data)
        super().data_received(data)
        if self._outside > MAX_HEAD and not self.transport.is_closing():
            self.send_400_response(f"The head is larger than {MAX_HEAD} bytes.")

    def on_body(self, body: bytes) -> None:
        """See `httptools`: part of a body, whose size is limited elsewhere."""
        self._outside = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See `httptools`."""
        self._outside = 0
        super().on_message_complete()
