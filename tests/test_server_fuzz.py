"""Requests made by schemathesis from the server's own OpenAPI: no answer is a failure of the server's."""

from __future__ import annotations

import json
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings

from .serving import Fake

FAKE = Fake("Hello there, my dear old friend.")
OPENAPI = json.loads(FAKE.ask("/openapi.json", method="GET").text)
schema = schemathesis.openapi.from_dict(OPENAPI)


@schema.parametrize()
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
def test_no_request_makes_the_server_fail(case: Any) -> None:
    kwargs = case.as_transport_kwargs(base_url="http://test")
    body = kwargs.get("json")
    if isinstance(body, dict):
        body = body | {"model": "demo"}  # any other is 404 at once
    response = FAKE.ask(
        kwargs["url"].removeprefix("http://test"),
        body,
        method=kwargs["method"],
        params=kwargs.get("params"),
        headers={k: v for k, v in (kwargs.get("headers") or {}).items() if v.isascii()},
    )
    assert response.status_code < 500, response.text


def test_the_schema_names_every_route() -> None:
    assert set(OPENAPI["paths"]) == {
        "/health", "/ready", "/metrics", "/v1/stats", "/v1/models", "/v1/models/{name}", "/v1/chat/completions",
        "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    }  # fmt: skip
