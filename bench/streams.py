"""A client of a server's streams that costs little: one thread, raw sockets, bytes hardly looked at.

    python streams.py     driven by JSON lines on stdin and stdout; see `answer`

What a client does with a stream is its own affair and its own cost: this one shows what the server adds. Knows nothing
of engines.
"""

from __future__ import annotations

import heapq
import json
import selectors
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

_END = b"0\r\n\r\n"


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Post `bodies` to `port` at `path`, each at its time of `arrivals`, and read all of the streams to their ends.

    For each: `marks`, when bytes came, in seconds since the start, and `last`, the last event that is JSON. `cpu_s` is
    the processor time of this process.
    """
    cpu = time.process_time()
    marks, received = _read(request["port"], request["path"], request["bodies"], request["arrivals"])
    cpu = time.process_time() - cpu
    return {"marks": marks, "last": [_last(data) for data in received], "cpu_s": cpu}


def _read(
    port: int, path: str, bodies: Sequence[dict[str, Any]], arrivals: Sequence[float]
) -> tuple[list[list[float]], list[bytes]]:
    marks: list[list[float]] = [[] for _ in bodies]
    parts: list[list[bytes]] = [[] for _ in bodies]
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\ncontent-type: application/json\r\n"
    posts = []
    for body in bodies:
        data = json.dumps(body).encode()
        posts.append(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    coming = [(at, i) for i, at in enumerate(arrivals)]
    heapq.heapify(coming)
    begin = time.perf_counter()
    with selectors.DefaultSelector() as selector:
        while coming or selector.get_map():
            while coming and time.perf_counter() - begin >= coming[0][0]:
                _, i = heapq.heappop(coming)
                connection = socket.create_connection(("127.0.0.1", port))
                connection.sendall(posts[i])
                selector.register(connection, selectors.EVENT_READ, i)
            wait = max(begin + coming[0][0] - time.perf_counter(), 0) if coming else None
            for key, _ in selector.select(wait):
                ready = key.fileobj
                assert isinstance(ready, socket.socket)
                data = ready.recv(65536)
                marks[key.data].append(time.perf_counter() - begin)
                parts[key.data].append(data)
                if not data or data.endswith(_END):
                    selector.unregister(ready)
                    ready.close()
    return marks, [b"".join(p) for p in parts]


def _last(received: bytes) -> dict[str, Any]:
    """Raises RuntimeError for an answer that isn't a whole stream."""
    if not received.startswith(b"HTTP/1.1 200") or not received.endswith(_END):
        raise RuntimeError(f"no whole stream: {received[:300]!r}")
    found: dict[str, Any] = json.loads(b"{" + received.rsplit(b"data: {", 1)[1].partition(b"\n")[0])
    return found


def main() -> None:
    """Answer one JSON line with another until stdin ends."""
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
