"""bench/streams.py, the cheap client of `bench/serve.py --http`, against a server over a fake engine."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from .bench_modules import BENCH, bench_module
from .serving import Fake, listening

if not BENCH.is_dir():
    pytest.skip("a source distribution has no benchmarks", allow_module_level=True)


def body(**more: object) -> dict[str, object]:
    return {"model": "demo", "prompt": "Hi", "stream": True, "stream_options": {"include_usage": True}} | more


def test_streams_are_read_to_their_ends() -> None:
    with listening(Fake("Hello there, you three.").app) as url:
        request = {"port": urlsplit(url).port, "path": "/v1/completions", "arrivals": [0.1, 0.0, 0.0]}
        found = bench_module("streams").answer(request | {"bodies": [body()] * 3})
    tokens = [last["usage"]["completion_tokens"] for last in found["last"]]
    assert tokens[0] == tokens[1] == tokens[2] > 3
    assert all(0 < times[0] <= times[-1] for times in found["marks"])
    assert found["marks"][0][0] > 0.1 > 0.0 < found["cpu_s"]


def test_an_answer_that_is_no_stream_is_an_error() -> None:
    with listening(Fake().app) as url:
        request = {"port": urlsplit(url).port, "path": "/v1/completions", "arrivals": [0.0]}
        with pytest.raises(RuntimeError, match=r"HTTP/1\.1 404"):
            bench_module("streams").answer(request | {"bodies": [body(model="other")]})
