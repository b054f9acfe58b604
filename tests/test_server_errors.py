"""Everything that can't be answered: the status, the words of the right API, and the field that it is about."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

import httpx
import pytest

from mlx_gemma_mtp.request import FinishReason
from mlx_gemma_mtp.server.guard import Rules

from .fake_engine import events_of
from .serving import CODEC, Fake, chat_body, events

USER = {"role": "user", "content": "Hi"}
CALLING = {
    "role": "assistant",
    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
}


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"temprature": 1}, "temprature", "unrecognized request argument: temprature"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 99}, "n", "less than or equal to 16"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "no token id"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "no token 99999"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "give one of them"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"depth": 9}, "depth", "less than or equal to 8"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'system', 'developer'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id", "needs one"),
        ({"messages": [USER, {"role": "tool", "content": "x", "tool_call_id": "a"}]}, "messages[1].tool_call_id",
         "doesn't make"),
        ({"messages": [USER, CALLING, {"role": "tool", "content": "x", "tool_call_id": "z"}]},
         "messages[2].tool_call_id", "'z'"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {
            "name": "f", "arguments": "{"}}]}]}, "messages[1].tool_calls[0].arguments", "no JSON"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {
            "name": "f", "arguments": "[1]"}}]}]}, "messages[1].tool_calls[0].arguments", "no JSON object"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"tools": [TOOL, TOOL]}, "tools", "there twice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g'"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": [1]}}}]},
         "tools[0].function.parameters.properties", "no object"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "'none', 'minimal'"),
        ({"reasoning_effort": "low", "thinking_budget": 5}, "thinking_budget", "give one of them"),
        ({"enable_thinking": False, "thinking_budget": 5}, "enable_thinking", "says otherwise"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "is missing"),
        ({"functions": [{}]}, "functions", "None"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction", "None"),
        ({"web_search_options": {}}, "web_search_options", "None"),
        ({"store": True}, "store", "False"),
        ({"modalities": ["text", "audio"]}, "modalities[1]", "'text'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "lang": "en"}]}]},
         "messages[0].content[0].lang", "unrecognized"),
        ({"messages": [USER | {"lang": "en"}]}, "messages[0].lang", "unrecognized"),
        ({"messages": [USER, {"role": "assistant", "content": "x", "refusal": "No."}, USER]}, "messages[1].refusal",
         "None"),
        ({"messages": [USER | {"reasoning_content": "x"}]}, "messages[0].reasoning_content", "only an assistant"),
        ({"messages": [USER, {"role": "assistant", "content": "x", "reasoning_content": "a", "reasoning": "b"}, USER]},
         "messages[1].reasoning", "differ"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {
            "name": "f", "arguments": "{}", "strict": True}}]}]}, "messages[1].tool_calls[0].function.strict",
         "unrecognized"),
        ({"tools": [TOOL | {"cache": 1}]}, "tools[0].cache", "unrecognized"),
        ({"tools": [{"type": "function", "function": TOOL["function"] | {"returns": 1}}]}, "tools[0].function.returns",
         "unrecognized"),
        ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "response_format.json_schema", "'text'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}},
         "response_format.json_schema.x", "unrecognized"),
        ({"stream": True, "stream_options": {"every": 5}}, "stream_options.every", "unrecognized"),
        ({"chat_template_kwargs": {"add_vision_id": True}}, "chat_template_kwargs.add_vision_id", "unrecognized"),
    ],
)  # fmt: skip
def test_openai_400(body: dict[str, Any], param: str, says: str) -> None:
    fake = Fake()
    got = fake.chat(**body)
    error = got.json()["error"]
    assert (got.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert says in error["message"]
    assert not fake.engine.streams


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:x"}},
        {"type": "input_audio", "input_audio": {"data": "x", "format": "wav"}},
        {"type": "file", "file": {"file_id": "x"}},
        {"type": "video"},
    ],
)
def test_parts_that_are_no_text_are_refused_by_name(part: dict[str, Any]) -> None:
    got = Fake().chat(messages=[{"role": "user", "content": [{"type": "text", "text": "See"}, part]}])
    assert got.status_code == 400
    error = got.json()["error"]
    assert (error["param"], error["code"]) == ("messages[0].content[1]", "unsupported_content")
    assert repr(part["type"]) in error["message"]


def test_labels_of_messages_change_nothing() -> None:
    """Names of speakers, hints for a cache and notes on earlier answers: the chat template has no place for them."""
    plain, labelled = Fake(), Fake()
    past: dict[str, Any] = {"role": "assistant", "content": "Hello."}
    assert plain.chat(messages=[USER, past, USER]).status_code == 200
    part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}, "prompt_cache_breakpoint": None}
    past |= {"refusal": None, "annotations": [{"type": "url_citation"}], "name": "bot", "audio": None}
    got = labelled.chat(messages=[USER | {"name": "ann"}, past, {"role": "user", "content": [part]}], user="u")
    assert got.status_code == 200
    assert labelled.prompt == plain.prompt


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"role": "user", "content": "x", "lang": "en"}, "input[0].lang"),
        ({"role": "user", "content": [{"type": "input_text", "text": "x", "lang": "en"}]}, "input[0].content[0].lang"),
        ({"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]}, "input[0].summary"),
        ({"type": "reasoning", "summary": [], "encrypted_content": "x"}, "input[0].encrypted_content"),
        ({"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x", "y": 1}]}, "input[0].content[0].y"),
    ],
)
def test_fields_of_items_that_nothing_reads_are_refused(item: dict[str, Any], says: str) -> None:
    got = Fake().ask("/v1/responses", {"model": "demo", "input": [item, USER]})
    assert got.status_code == 400
    assert says in got.json()["error"]["message"]


@pytest.mark.parametrize("after", [[], [USER], [USER, {"role": "assistant", "content": "Hm."}]])
def test_thoughts_before_no_answer_are_refused(after: list[Any]) -> None:
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}]}
    got = Fake().ask("/v1/responses", {"model": "demo", "input": [USER, thought, *after]})
    assert (got.status_code, got.json()["error"]["param"]) == (400, "input[1]")
    assert "before an assistant's message" in got.json()["error"]["message"]


def test_a_schema_for_plain_text_is_refused() -> None:
    body = {"model": "demo", "input": "Hi", "text": {"format": {"type": "text", "schema": {}}}}
    assert Fake().ask("/v1/responses", body).json()["error"]["param"] == "text.format.schema"


def test_unknown_models_are_404_in_either_apis_words() -> None:
    fake = Fake()
    got = fake.chat(model="gpt-9")
    assert (got.status_code, got.json()["error"]["code"]) == (404, "model_not_found")
    assert "'demo'" in got.json()["error"]["message"]
    got = fake.message(model="claude-9")
    assert (got.status_code, got.json()["type"], got.json()["error"]["type"]) == (404, "error", "not_found_error")
    assert fake.ask("/v1/models/other", method="GET").status_code == 404


@pytest.mark.parametrize(
    ("schema", "status"),
    [
        ({"type": "object", "if": {}}, 422),
        ({"type": "teapot"}, 200),
        ({"type": "string", "pattern": "("}, 200),
        ({"$ref": "#/nowhere"}, 200),
    ],
)
def test_a_schema_that_can_not_be_enforced_is_422(schema: dict[str, Any], status: int) -> None:
    """Compiling happens in the engine: the true one's refusals are in test_server_live."""
    got = Fake().chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert got.status_code == status
    error = got.json().get("error", {})
    assert error.get("param") == (None if status == 200 else "response_format.json_schema.schema")
    assert status == 200 or "'if'" in error["message"]


def test_the_engines_refusals_keep_their_words() -> None:
    got = Fake().chat(depth=8)
    assert (got.status_code, got.json()["error"]["message"]) == (400, "depth is 8, expected at most 6")


def test_a_full_queue_says_when_to_come_again() -> None:
    fake = Fake(limit=2)
    got = fake.chat(n=3)
    assert (got.status_code, got.headers["retry-after"]) == (429, "3")
    assert got.json()["error"]["type"] == "rate_limit_error"
    assert [s.cancelled for s in fake.engine.streams] == [True, True]
    fake.engine.limit = 0
    got = fake.message()
    assert (got.status_code, got.json()["error"]["type"]) == (429, "rate_limit_error")


def test_a_closed_engine_is_503() -> None:
    fake = Fake()
    fake.engine.closed = True
    got = fake.chat()
    assert (got.status_code, got.json()["error"]["code"], got.headers["retry-after"]) == (503, "shutting_down", "5")
    assert fake.message().json()["error"]["type"] == "overloaded_error"


@pytest.mark.parametrize("finish", ["error", "cancelled"])
def test_failures_under_way(finish: FinishReason) -> None:
    fake = Fake(lambda _: events_of(CODEC, "One two", finish=finish))
    status, kind = (500, "server_error") if finish == "error" else (503, "server_error")
    got = fake.chat()
    assert (got.status_code, got.json()["error"]["type"]) == (status, kind)
    text = fake.chat(stream=True).text
    last = json.loads(text.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["type"] == kind
    assert "[DONE]" not in text
    text = fake.message(stream=True).text
    assert "event: error\n" in text
    assert json.loads(text.strip().splitlines()[-1].removeprefix("data: "))["type"] == "error"
    got_events = events(fake.ask("/v1/responses", {"model": "demo", "input": "x", "stream": True}))
    assert got_events[-1]["type"] == "error"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"[1]", 400),
        (b"null", 400),
        (b'{"model": "\xff\xfe"}', 400),
        (b'{"model": "demo", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"model": "demo", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}', 400),
        (b'{"model": "demo", "temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}', 400),
        (b'{"model": "demo", "metadata": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400),
        (b'{"model": "demo", "tools": [{"type": "function", "function": {"name": "f", "parameters": '
         + b'{"properties": {"a": ' * 100 + b"{}" + b"}}" * 100
         + b'}}], "messages": [{"role": "user", "content": "x"}]}', 400),
        (b'{"model": "demo", "seed": ' + b"9" * 5000 + b"}", 400),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_bodies_that_are_no_request(content: bytes, status: int, path: str) -> None:
    fake = Fake()
    got = fake.ask(path, content=content, headers={"content-type": "application/json"})
    assert got.status_code == status
    assert got.json()["error"]["message"]


def test_a_models_name_may_be_anything() -> None:
    """Half of a surrogate pair can't be written into an answer as it is."""
    content = b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}'
    got = Fake().ask("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert got.status_code in (400, 404)


def test_other_content_types_are_not_read() -> None:
    """A page of another site could send them without asking first."""
    body = json.dumps(chat_body()).encode()
    assert Fake().ask("/v1/chat/completions", content=body, headers={"content-type": "text/plain"}).status_code == 400


def test_large_bodies_are_413() -> None:
    fake = Fake(rules=Rules(max_body=1000, hosts=None))
    assert fake.chat().status_code == 200
    got = fake.chat(messages=[{"role": "user", "content": "x" * 2000}])
    assert (got.status_code, got.json()["error"]["code"]) == (413, "body_too_large")
    got = fake.message(messages=[{"role": "user", "content": "x" * 20000}])
    assert (got.status_code, got.json()["error"]["type"]) == (413, "request_too_large")


def test_paths_and_methods() -> None:
    fake = Fake()
    assert fake.ask("/v1/nothing", {}).status_code == 404
    got = fake.ask("/v1/chat/completions", method="GET")
    assert (got.status_code, got.headers["allow"]) == (405, "POST")
    assert got.json()["error"]["type"] == "invalid_request_error"


class TestKeys:
    def test_without_the_key_nothing_is_answered(self) -> None:
        fake = Fake(rules=Rules(key="sesame", hosts=None))
        paths = [("/v1/chat/completions", "POST"), ("/v1/models", "GET"), ("/metrics", "GET"), ("/openapi.json", "GET")]
        for path, method in paths:
            for headers in ({}, {"authorization": "Bearer sesam"}, {"x-api-key": "é"}, {"authorization": "sesame"}):
                got = fake.ask(path, method=method, headers=[(k, v.encode("utf-8")) for k, v in headers.items()])
                assert (got.status_code, got.json()["error"]["type"]) == (401, "authentication_error")
        for headers in (
            {"authorization": "Bearer sesame"},
            {"authorization": "bearer  sesame "},
            {"x-api-key": "sesame"},
        ):
            assert fake.ask("/v1/models", method="GET", headers=headers).status_code == 200

    def test_health_and_the_page_need_none(self) -> None:
        fake = Fake(rules=Rules(key="sesame", hosts=None))
        assert [fake.ask(p, method="GET").status_code for p in ("/", "/health", "/ready")] == [200, 200, 200]


class TestOrigins:
    def test_a_foreign_host_is_refused(self) -> None:
        """Else another site's name, pointed at this machine, would let its pages in."""
        fake = Fake(rules=Rules())
        ok = ["localhost", "LOCALHOST:8080", "127.0.0.1:8080", "[::1]:8080"]
        assert [fake.ask("/health", method="GET", headers={"host": h}).status_code for h in ok] == [200] * 4
        bad = ["evil.example", "localhost.evil.example", "", "127.0.0.1.evil.example:8080"]
        assert [fake.ask("/health", method="GET", headers={"host": h}).status_code for h in bad] == [403] * 4

    def test_pages_of_others_need_leave(self) -> None:
        def status(rules: Rules, origin: str) -> httpx.Response:
            return Fake(rules=rules).ask("/v1/models", method="GET", headers={"origin": origin, "host": "localhost:1"})

        assert status(Rules(), "http://localhost:1").status_code == 200
        assert status(Rules(), "http://evil.example").status_code == 403
        assert status(Rules(), "null").status_code == 403
        assert "access-control-allow-origin" not in status(Rules(), "http://localhost:1").headers
        allowed = status(Rules(origins=["http://app.example"]), "http://app.example")
        assert allowed.headers["access-control-allow-origin"] == "http://app.example"
        refused = status(Rules(origins=["http://app.example"], key="sesame"), "http://app.example")
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "http://app.example")

    def test_preflight(self) -> None:
        asked = {"origin": "http://app.example", "access-control-request-method": "POST", "host": "localhost",
                 "access-control-request-headers": "content-type,authorization"}  # fmt: skip
        fake = Fake(rules=Rules(origins=["http://app.example"], key="sesame"))
        got = fake.ask("/v1/chat/completions", method="OPTIONS", headers=asked)
        assert got.status_code == 200
        assert "authorization" in got.headers["access-control-allow-headers"].lower()


class TestLogs:
    def test_a_line_per_request_without_what_was_said(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO", "mlx_gemma_mtp")
        fake = Fake("The secret answer is six, my friend.")
        got = fake.chat(messages=[{"role": "user", "content": "my secret question"}], user="secret user")
        fake.chat(nonsense="secret value")
        fake.chat(messages=[{"role": "user", "content": ["secret part"]}])
        lines = [json.loads(r.getMessage()) for r in caplog.records]
        assert [line["status"] for line in lines] == [200, 400, 400]
        assert lines[0]["id"] == got.headers["x-request-id"]
        assert lines[0]["tokens"] == got.json()["usage"]["completion_tokens"]
        assert lines[0]["finish"] == ["stop"]
        assert lines[1]["error"] == "unknown_parameter"
        assert "secret" not in caplog.text

    def test_prompts_where_they_are_asked_for(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO", "mlx_gemma_mtp")
        Fake(log_prompts=True).chat(messages=[{"role": "user", "content": "my secret question"}])
        assert "my secret question" in caplog.text


def test_metrics() -> None:
    fake = Fake("One two three four five six.")
    fake.chat()
    fake.chat(nonsense=1)
    lines = fake.ask("/metrics", method="GET").text.splitlines()
    tokens = len(CODEC.encode("One two three four five six.")) - 1
    for line in (
        'mlx_gemma_mtp_http_requests_total{route="/v1/chat/completions",status="200"} 1.0',
        'mlx_gemma_mtp_http_requests_total{route="/v1/chat/completions",status="400"} 1.0',
        f"mlx_gemma_mtp_output_tokens_total {tokens}.0",
        "mlx_gemma_mtp_time_to_first_token_seconds_count 1.0",
        f"mlx_gemma_mtp_time_between_tokens_seconds_count {tokens - 1}.0",
        'mlx_gemma_mtp_outputs_total{reason="stop"} 1.0',
        "mlx_gemma_mtp_rows 0.0",
        "mlx_gemma_mtp_waiting_requests 0.0",
        f"mlx_gemma_mtp_accepted_tokens_total {fake.engine.streams[0].stats.accepted}.0",
    ):
        assert line in lines
    assert any(line.startswith('mlx_gemma_mtp_accepted_by_position_total{position="1"}') for line in lines)
    assert any(line.startswith("mlx_gemma_mtp_peak_memory_bytes") for line in lines)


def test_ready_until_it_closes() -> None:
    fake = Fake()
    assert fake.ask("/ready", method="GET").json()["status"] == "ready"
    fake.service.closing = True
    assert fake.ask("/ready", method="GET").status_code == 503
    assert fake.ask("/health", method="GET").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_takes_too_long_ends(stream: bool) -> None:
    fake = Fake(timeout=0.2)
    fake.engine.gated = True
    got = fake.chat(stream=stream)
    assert "longer than 0.2 seconds" in got.text
    assert got.status_code == (200 if stream else 504)
    assert fake.engine.streams[0].cancelled


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 2])
def test_a_client_that_goes_frees_its_rows(stream: bool, n: int) -> None:
    fake = Fake()
    fake.engine.gated = True

    async def go() -> None:
        body = json.dumps(chat_body(stream=stream, n=n)).encode()
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
        scope: dict[str, Any] = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions",
            "query_string": b"", "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
            "scheme": "http", "server": ("test", 80), "client": ("test", 1), "root_path": "",
            "asgi": {"version": "3.0"},
        }  # fmt: skip

        async def send(_: Any) -> None:
            pass

        task = asyncio.ensure_future(fake.app(scope, messages.get, send))
        while len(fake.engine.streams) < n:
            await asyncio.sleep(0.01)
        messages.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(task, 5)

    asyncio.run(go())
    assert [s.cancelled for s in fake.engine.streams] == [True] * n


def test_models() -> None:
    fake = Fake(models=("demo", "gpt-4o"))
    got = fake.ask("/v1/models", method="GET").json()
    assert [m["id"] for m in got["data"]] == ["demo", "gpt-4o"]
    assert fake.ask("/v1/models/gpt-4o", method="GET").json()["object"] == "model"
    assert fake.chat(model="gpt-4o").json()["model"] == "gpt-4o"
    got = fake.ask("/v1/models", method="GET", headers={"anthropic-version": "2023-06-01"}).json()
    assert (got["first_id"], got["has_more"], got["data"][0]["type"]) == ("demo", False, "model")


def test_the_schemas_import_without_mlx() -> None:
    names = ", ".join(f"mlx_gemma_mtp.server.{m}_schema" for m in ("openai", "anthropic", "responses"))
    code = f"import sys, {names}; print([m for m in sys.modules if m.partition('.')[0] in ('mlx', 'numpy')])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/v1/responses", b'{"model": "demo", "input": "x", "metadata": {"a": "\\ud800"}}', 200),
        ("/v1/responses", b'{"model": "demo", "input": "x", "metadata": {"a": "\\ud800"}, "stream": true}', 200),
        ("/v1/responses", b'{"model": "demo", "input": "x", "metadata": {"a": NaN}}', 400),
        ("/v1/responses", b'{"model": "demo", "input": "x", "include": ["message.output_text.logprobs"]}', 400),
        ("/v1/messages", b'{"model": "demo", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}], '
         b'"thinking": {"type": "adaptive", "display": "omitted"}}', 400),
    ],
)  # fmt: skip
def test_what_can_not_be_given_back_is_refused(path: str, content: bytes, status: int) -> None:
    got = Fake().ask(path, content=content, headers={"content-type": "application/json"})
    assert got.status_code == status
    if status == 200:
        assert b'"metadata":{"a":"\\ud800"}' in got.content


@pytest.mark.parametrize(
    ("parameters", "statuses"),
    [
        ({"anyOf": [{"properties": {"a": [1]}}]}, (400, 400)),
        ({"properties": {"x": {"anyOf": [{"properties": {"a": {}}, "required": 5}]}}}, (400, 400)),
        ({"properties": {"x": {"oneOf": [{"properties": {"a": {}}, "required": 5}]}}}, (200, 422)),
        ({"properties": {"x": {"$ref": []}}}, (200, 422)),
    ],
)
def test_schemas_of_tools_that_are_none(parameters: dict[str, Any], statuses: tuple[int, int]) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    got = [Fake().chat(tools=tools, tool_choice=choice) for choice in ("auto", "required")]
    assert tuple(g.status_code for g in got) == statuses


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('"\\ud83d"', "\ufffd"),
        ('"\\udc00\\ud83da\\ud83d\\ude00"', "\ufffd\ufffda😀"),
        ("1e999", sys.float_info.max),
        ("[" * 5000, None),
    ],
)
def test_calls_that_json_can_not_hold(written: str, read: object) -> None:
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    got = Fake(f"<|tool_call>call:f{{a:{written}}}<tool_call|>").message(tools=tools)
    assert got.status_code == 200
    assert got.json()["content"][-1]["input"] == ({} if read is None else {"a": read})


def test_a_header_that_is_no_origin_is_refused() -> None:
    got = Fake().ask("/v1/models", method="GET", headers={"origin": "http://["})
    assert got.status_code == 403


@pytest.mark.parametrize("n", [1, 2])
def test_an_error_of_ones_own_is_told(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several outputs, each is read in a task of its own."""

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    fake = Fake(timeout=5)
    monkeypatch.setattr("mlx_gemma_mtp.server.service.ToolStream.read", broken)
    assert fake.chat(n=n).status_code == 500


def test_outputs_that_fail_are_counted() -> None:
    fake = Fake(lambda _: events_of(CODEC, "One two", finish="error"))
    fake.chat()
    assert 'mlx_gemma_mtp_outputs_total{reason="error"} 1.0' in fake.ask("/metrics", method="GET").text


def test_depths_are_a_histogram() -> None:
    fake = Fake("One two three four five six.")
    fake.chat()
    stats = fake.engine.streams[0].stats
    assert stats.drafted_per_position == [stats.rounds] * 3
    lines = fake.ask("/metrics", method="GET").text.splitlines()
    for line in (
        'mlx_gemma_mtp_depth_bucket{le="2"} 0.0',
        f'mlx_gemma_mtp_depth_bucket{{le="3"}} {stats.rounds}.0',
        f"mlx_gemma_mtp_depth_count {stats.rounds}.0",
        f"mlx_gemma_mtp_depth_sum {stats.drafted}.0",
    ):
        assert line in lines
