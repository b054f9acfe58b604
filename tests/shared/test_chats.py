"""Golden chats of real Gemma 4 checkpoints, through the server: bodies of either API to the recorded ids."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_gemma_mtp.server.app import make_app
from mlx_gemma_mtp.server.guard import Rules
from mlx_gemma_mtp.text import TextCodec

from ..fake_engine import FakeEngine, events_of
from ..serving import service_over
from . import DATA, needs_shared

pytestmark = needs_shared

CHATS = json.loads((DATA / "golden_chat_ids.json").read_text("utf-8"))["cases"] if DATA.is_dir() else []
TEMPLATES = sorted((DATA / "templates").glob("official_*.jinja"))
EMPTY_THOUGHT = "<|channel>thought\n<channel|>"
CALL = '<|tool_call>call:get_weather{city:<|"|>São "Paulo" {x}<|"|>,days:[1,2]}<tool_call|>'


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    directory = tmp_path_factory.mktemp("gemma4")
    with gzip.open(DATA / "tokenizer/tokenizer.json.gz") as packed, open(directory / "tokenizer.json", "wb") as out:
        shutil.copyfileobj(packed, out)
    for source, name in (
        ("tokenizer/tokenizer_config.12B-it.json", "tokenizer_config.json"),
        ("configs/gemma-4-E2B-it.generation_config.json", "generation_config.json"),
        ("templates/official_E2B-E4B.chat_template.20260709.candidate.jinja", "chat_template.jinja"),
    ):
        shutil.copyfile(DATA / source, directory / name)
    codec = TextCodec.from_directory(directory)
    assert codec is not None
    return codec


class Server:
    """A server over a fake engine, with the real tokenizer and one of the official templates."""

    def __init__(self, codec: TextCodec, template: Path, said: str = "Hello.") -> None:
        codec._tokenizer.chat_template = template.read_text(encoding="utf-8")
        self.engine = FakeEngine(lambda _: events_of(codec, said))
        self.app = make_app(service_over(self.engine, codec, context=131072), Rules(hosts=None))

    def post(self, path: str, body: Any) -> Any:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post(path, json=body)

        response = asyncio.run(go())
        assert response.status_code == 200, response.text
        return response.json()


def openai_body(chat: dict[str, Any]) -> dict[str, Any]:
    messages = json.loads(json.dumps(chat["messages"]))
    for message in messages:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    tools = {"tools": chat["tools"]} if chat["tools"] else {}
    return {"model": "demo", "messages": messages, "enable_thinking": chat["thinking"], **tools}


def anthropic_body(chat: dict[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "demo", "max_tokens": 5, "messages": []}
    for message in chat["messages"]:
        if message["role"] == "system":
            body["system"] = message["content"]
        elif message["role"] == "tool":
            result = {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": message["content"]}
            body["messages"].append({"role": "user", "content": [result]})
        elif message.get("tool_calls"):
            calls = [(c["id"], c["function"]) for c in message["tool_calls"]]
            content = [{"type": "tool_use", "id": i, "name": f["name"], "input": f["arguments"]} for i, f in calls]
            body["messages"].append({"role": "assistant", "content": content})
        else:
            body["messages"].append({"role": message["role"], "content": message["content"]})
    functions = [t["function"] for t in chat["tools"]]
    if functions:
        body["tools"] = [
            {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]} for f in functions
        ]
    return body | ({"thinking": {"type": "adaptive"}} if chat["thinking"] else {})


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
@pytest.mark.parametrize("chat", CHATS, ids=lambda chat: chat["name"])
@pytest.mark.parametrize("api", ["openai", "anthropic"])
def test_bodies_give_the_recorded_ids(codec: TextCodec, template: Path, chat: dict[str, Any], api: str) -> None:
    server = Server(codec, template)
    if api == "openai":
        server.post("/v1/chat/completions", openai_body(chat))
    else:
        server.post("/v1/messages", anthropic_body(chat))
    expected = list(chat["ids"])
    ids = list(server.engine.streams[-1].request.prompt)
    # The larger models' templates start an answer without thinking with an empty thought (mlxcel#687).
    if chat["messages"][-1]["role"] == "user" and not chat["thinking"] and "E2B" not in template.name:
        expected += codec.encode(EMPTY_THOUGHT)[1:]
    assert ids == expected


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_calls_of_the_real_vocabulary(codec: TextCodec, template: Path) -> None:
    """Its pieces cut the format elsewhere than the demo's: `{"`, `}<` and the like are single tokens."""
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
    server = Server(codec, template, f"Ja! {CALL}{CALL}")
    body = {"model": "demo", "messages": [{"role": "user", "content": "?"}], "tools": [tool]}
    message = server.post("/v1/chat/completions", body)["choices"][0]["message"]
    assert message["content"] == "Ja! "
    arguments = {"city": 'São "Paulo" {x}', "days": [1, 2]}
    assert [json.loads(c["function"]["arguments"]) for c in message["tool_calls"]] == [arguments] * 2


def test_optional_types_survive_the_official_templates(codec: TextCodec) -> None:
    properties = {"a": {"type": ["string", "null"]}, "b": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}
    parameters = {"type": "object", "properties": properties}
    tool = {"type": "function", "function": {"name": "f", "description": "x", "parameters": parameters}}
    for template in TEMPLATES:
        server = Server(codec, template)
        body = {"model": "demo", "messages": [{"role": "user", "content": "?"}], "tools": [tool]}
        server.post("/v1/chat/completions", body)
        prompt = codec._tokenizer.decode(server.engine.streams[-1].request.prompt)
        assert 'nullable:true,type:<|"|>STRING<|"|>' in prompt
        assert 'nullable:true,type:<|"|>INTEGER<|"|>' in prompt
