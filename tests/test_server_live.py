"""The openai, anthropic and llm clients, unmodified, against a server over the demo pair."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import httpx
import openai
import pytest
from pydantic import BaseModel

from .serving import Live, demo_server

pytestmark = [
    # openai's and anthropic's clients warn of their own parsing of types newer than they are.
    pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning"),
]

FRANCE: Any = {"role": "user", "content": "What is the capital of France?"}
STORY: Any = {"role": "user", "content": "Tell me a story about a squirrel."}
GREEDY: Any = {"temperature": 0}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "The name of the city."}},
    "required": ["city"],
}
WEATHER: Any = {"role": "user", "content": "How is the weather in Paris?"}


@pytest.fixture(scope="module")
def gpt(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(live: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0) as client:
        yield client


def tool(name: str) -> Any:
    about = {"get_time": "Get the time in a city.", "get_weather": "Get the weather of a city."}[name]
    return {"type": "function", "function": {"name": name, "description": about, "parameters": PARAMETERS}}


class TestOpenai:
    def test_chat(self, gpt: openai.OpenAI) -> None:
        got = gpt.chat.completions.create(model="demo", messages=[FRANCE], temperature=0)
        assert got.choices[0].message.content == "The capital of France is Paris."
        assert got.usage is not None
        details = got.usage.completion_tokens_details
        assert details is not None
        assert details.accepted_prediction_tokens
        assert got.model_extra is not None
        assert got.model_extra["mtp"]["contract"] == "exact"
        assert got.model_extra["mtp"]["bitwise"] is True

    def test_every_depth_says_the_same(self, gpt: openai.OpenAI) -> None:
        """llama.cpp#23398: turning drafts on and off for one request."""
        texts, drafted = set(), {}
        for depth in (0, 1, 5):
            got = gpt.chat.completions.create(
                model="demo", messages=[STORY], temperature=1, seed=11, max_tokens=60, extra_body={"depth": depth}
            )
            texts.add(got.choices[0].message.content)
            assert got.model_extra is not None
            drafted[depth] = got.model_extra["mtp"]["drafted"]
        assert len(texts) == 1
        assert drafted[0] == 0
        assert min(drafted[1], drafted[5]) > 0

    def test_stream(self, gpt: openai.OpenAI) -> None:
        whole = gpt.chat.completions.create(model="demo", messages=[STORY], temperature=0)
        with gpt.chat.completions.stream(
            model="demo", messages=[STORY], temperature=0, stream_options={"include_usage": True}
        ) as stream:
            for _ in stream:
                pass
            final = stream.get_final_completion()
        assert final.choices[0].message.content == whole.choices[0].message.content
        assert final.usage == whole.usage

    def test_tools_loop(self, gpt: openai.OpenAI) -> None:
        tools, messages = [tool("get_time"), tool("get_weather")], [WEATHER]
        got = gpt.chat.completions.create(model="demo", messages=messages, tools=tools, temperature=0)
        assert got.choices[0].finish_reason == "tool_calls"
        calls = got.choices[0].message.tool_calls
        assert calls is not None
        assert calls[0].type == "function"
        assert (calls[0].function.name, json.loads(calls[0].function.arguments)) == ("get_weather", {"city": "Paris"})
        messages = [*messages, got.choices[0].message, {
            "role": "tool", "tool_call_id": calls[0].id, "content": '{"sky": "sunny", "degrees": 21}'}]  # fmt: skip
        answer = gpt.chat.completions.create(model="demo", messages=messages, tools=tools, temperature=0)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.content

    def test_a_call_that_streams(self, gpt: openai.OpenAI) -> None:
        with gpt.chat.completions.stream(
            model="demo", messages=[WEATHER], tools=[tool("get_weather")], temperature=0
        ) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion()
        assert "tool_calls.function.arguments.delta" in kinds
        calls = final.choices[0].message.tool_calls
        assert calls is not None
        assert json.loads(calls[0].function.arguments) == {"city": "Paris"}

    @pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_time"}}])
    def test_a_call_that_has_to_be(self, gpt: openai.OpenAI, choice: Any) -> None:
        got = gpt.chat.completions.create(
            model="demo", messages=[STORY], tools=[tool("get_weather"), tool("get_time")], tool_choice=choice,
            temperature=1, seed=3, max_tokens=200,
        )  # fmt: skip
        calls = got.choices[0].message.tool_calls
        assert calls is not None
        names = {c.function.name for c in calls if c.type == "function"}
        assert names
        assert names <= ({"get_time"} if isinstance(choice, dict) else {"get_weather", "get_time"})
        if got.choices[0].finish_reason == "tool_calls":  # else the last one was cut
            assert all(set(json.loads(c.function.arguments)) == {"city"} for c in calls if c.type == "function")

    def test_json_schema(self, gpt: openai.OpenAI) -> None:
        class Planet(BaseModel):
            name: Literal["Mars", "Venus"]
            inner: bool

        got = gpt.chat.completions.parse(
            model="demo", messages=[FRANCE], response_format=Planet, temperature=0, max_tokens=300
        )
        assert isinstance(got.choices[0].message.parsed, Planet)

    def test_logprobs(self, gpt: openai.OpenAI) -> None:
        got = gpt.chat.completions.create(
            model="demo", messages=[FRANCE], temperature=0, logprobs=True, top_logprobs=3
        ).choices[0]
        assert got.logprobs is not None
        assert got.logprobs.content is not None
        assert "".join(t.token for t in got.logprobs.content) == got.message.content
        for t in got.logprobs.content:
            assert t.logprob == max(x.logprob for x in t.top_logprobs)
            assert len(t.top_logprobs) == 3

    def test_completions_models_and_responses(self, gpt: openai.OpenAI) -> None:
        assert [m.id for m in gpt.models.list()] == ["demo"]
        text = "<bos><|turn>user\nWhat is the capital of France?<turn|>\n<|turn>model\n"
        got = gpt.completions.create(model="demo", prompt=text, temperature=0, max_tokens=30)
        assert got.choices[0].text == "The capital of France is Paris."
        response = gpt.responses.create(model="demo", input="What is the capital of France?", temperature=0)
        assert response.output_text == "The capital of France is Paris."
        with gpt.responses.stream(model="demo", input="What is the capital of France?", temperature=0) as stream:
            kinds = [event.type for event in stream]
            assert stream.get_final_response().output_text == "The capital of France is Paris."
        assert "response.output_text.delta" in kinds

    def test_errors_are_typed(self, gpt: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as missing:
            gpt.chat.completions.create(model="gpt-9", messages=[FRANCE])
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            gpt.chat.completions.create(model="demo", messages=[FRANCE], extra_body={"nonsense": 1})
        assert wrong.value.param == "nonsense"
        for schema in ({"type": "teapot"}, {"type": "string", "pattern": "("}, {"$ref": "#/nowhere"}):
            form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            with pytest.raises(openai.UnprocessableEntityError, match="schema can't be used"):
                gpt.chat.completions.create(model="demo", messages=[FRANCE], response_format=form)

    def test_a_stream_that_is_left_frees_its_row(self, gpt: openai.OpenAI, live: Live) -> None:
        before = live.engine.stats().ended.get("cancelled", 0)
        stream = gpt.chat.completions.create(
            model="demo", messages=[STORY], stream=True, max_tokens=5000, extra_body={"ignore_eos": True}
        )
        for _, _chunk in zip(range(3), stream, strict=False):
            pass
        stream.close()
        live.wait_idle()
        assert live.engine.stats().ended.get("cancelled", 0) == before + 1

    def test_an_asking_that_is_given_up_frees_its_row(self, live: Live) -> None:
        async def go() -> None:
            async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
                asking = client.chat.completions.create(
                    model="demo", messages=[STORY], max_tokens=7000, extra_body={"ignore_eos": True}
                )
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(asking, 0.5)

        before = live.engine.stats().ended.get("cancelled", 0)
        asyncio.run(go())
        live.wait_idle()
        assert live.engine.stats().ended.get("cancelled", 0) == before + 1


class TestAnthropic:
    def test_message(self, claude: anthropic.Anthropic) -> None:
        got = claude.messages.create(model="demo", max_tokens=50, messages=[FRANCE], extra_body=GREEDY)
        assert got.content[0].type == "text"
        assert got.content[0].text == "The capital of France is Paris."
        assert got.stop_reason == "end_turn"

    def test_stream(self, claude: anthropic.Anthropic) -> None:
        with claude.messages.stream(model="demo", max_tokens=100, messages=[FRANCE], extra_body=GREEDY) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == "The capital of France is Paris."
        assert final.content[0].type == "text"
        assert final.content[0].text == text
        assert final.usage.output_tokens > 5

    def test_tools_loop(self, claude: anthropic.Anthropic) -> None:
        tools: Any = [{"name": "get_weather", "description": "Get the weather of a city.", "input_schema": PARAMETERS}]
        with claude.messages.stream(
            model="demo", max_tokens=100, messages=[WEATHER], tools=tools, extra_body=GREEDY
        ) as stream:
            got = stream.get_final_message()
        assert got.stop_reason == "tool_use"
        call = next(b for b in got.content if b.type == "tool_use")
        assert (call.name, call.input) == ("get_weather", {"city": "Paris"})
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": '{"sky": "sunny", "degrees": 21}'}
        messages: Any = [WEATHER, {"role": "assistant", "content": got.content}, {"role": "user", "content": [result]}]
        answer = claude.messages.create(model="demo", max_tokens=100, messages=messages, tools=tools, extra_body=GREEDY)
        assert answer.stop_reason == "end_turn"
        assert answer.content[0].type == "text"

    def test_thinking_and_counting(self, claude: anthropic.Anthropic) -> None:
        got = claude.messages.create(
            model="demo", max_tokens=200, messages=[FRANCE], thinking={"type": "enabled", "budget_tokens": 1024}
        )
        assert {b.type for b in got.content} <= {"thinking", "text"}
        counted = claude.messages.count_tokens(
            model="demo", messages=[FRANCE], thinking={"type": "enabled", "budget_tokens": 1024}
        )
        assert counted.input_tokens == got.usage.input_tokens
        assert [m.id for m in claude.models.list()] == ["demo"]

    def test_errors_are_typed(self, claude: anthropic.Anthropic) -> None:
        with pytest.raises(anthropic.NotFoundError, match="claude-9"):
            claude.messages.create(model="claude-9", max_tokens=5, messages=[FRANCE])
        part: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "x"}}
        with pytest.raises(anthropic.BadRequestError, match="'image'"):
            claude.messages.create(model="demo", max_tokens=5, messages=[{"role": "user", "content": [part]}])


def test_llm(live: Live, tmp_path: Path) -> None:
    """Simon Willison's llm, by its command line."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: demo\n  model_name: demo\n  api_base: {live.url}/v1\n  api_key_name: none\n"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    got = subprocess.run(
        [sys.executable, "-m", "llm", "-m", "demo", "-o", "temperature", "0", FRANCE["content"]],
        capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert got.stdout.strip() == "The capital of France is Paris.", got.stderr


def start(*options: str, **environment: str) -> tuple[subprocess.Popen[str], str, list[str]]:
    """The `serve` command in a process of its own, its URL, and what it said first."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_gemma_mtp", "serve", "--port", "0", *options],
        stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert process.stderr is not None
    said = [process.stderr.readline() for _ in range(5)]
    url = said[1].split(" at ")[1].split(" ")[0]
    for _ in range(200):
        try:
            httpx.get(f"{url}/health", timeout=5)
            break
        except httpx.TransportError:
            time.sleep(0.05)
    return process, url, said


def test_the_command_says_how_to_use_it_and_drains_on_sigterm() -> None:
    process, url, said = start("--log-prompts", "--depth", "3")
    try:
        assert "demo at http://127.0.0.1:" in said[1]
        assert "memory: 11.0 MB of weights" in said[2]
        assert said[3] == "drafts: 3 a round\n"
        assert "curl http://127.0.0.1:" in said[4]
        body = {"model": "demo", "messages": [STORY], "stream": True, "max_tokens": 300, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.wait(30) == 0
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")
    finally:
        process.kill()
        assert process.stderr is not None
        process.stderr.close()
        process.wait()


def test_what_can_not_be_served_is_said_at_once() -> None:
    def run(*options: str) -> str:
        got = subprocess.run(
            [sys.executable, "-m", "mlx_gemma_mtp", "serve", *options], capture_output=True, text=True, check=False
        )
        assert got.returncode != 0
        return got.stderr

    assert "give an --api-key, or --insecure" in run("--host", "0.0.0.0")
    assert "no number of bytes" in run("--prefix-cache", "lots")
    assert "expected" in run("--depth", "9")


def test_tokens_that_a_prefix_cache_had_are_reported() -> None:
    with demo_server(engine={"prefix_cache": 50_000_000}) as live, httpx.Client(timeout=60) as http:
        body = {"model": "demo", "max_tokens": 3, "messages": [{**FRANCE, "content": "word " * 60}]}
        plain = [http.post(f"{live.url}/v1/chat/completions", json=body | {"n": 2}).json()["usage"] for _ in range(2)]
        cached = [u["prompt_tokens_details"]["cached_tokens"] for u in plain]
        assert cached[0] == 0
        assert cached[1] == plain[1]["prompt_tokens"] - 1
        other = http.post(f"{live.url}/v1/messages", json=body).json()["usage"]
        assert other["cache_read_input_tokens"] == cached[1]
        assert other["input_tokens"] == 1
        response = http.post(f"{live.url}/v1/responses", json={"model": "demo", "input": "word " * 60})
        assert response.json()["usage"]["input_tokens_details"]["cached_tokens"] == cached[1]


@pytest.mark.parametrize(
    "given",
    [
        {"min_tokens": 10**30}, {"top_k": 2**31 - 1}, {"top_p": 1e-300}, {"temperature": 1e-40}, {"min_p": 1e-300},
        {"repetition_penalty": 1e-300},
    ],
)  # fmt: skip
def test_numbers_at_their_limits(live: Live, given: dict[str, Any]) -> None:
    body = {
        "model": "demo",
        "max_tokens": 12,
        "messages": [STORY],
        "temperature": 0.5,
        "seed": 2,
        "top_k": 0,
        "top_p": 1,
    }
    before = live.engine.stats().failed_steps
    got = httpx.post(f"{live.url}/v1/chat/completions", json=body | given, timeout=60)
    assert got.status_code == 200
    assert live.engine.stats().failed_steps == before
    if set(given) & {"top_p", "temperature"}:
        greedy = httpx.post(f"{live.url}/v1/chat/completions", json=body | {"temperature": 0}, timeout=60)
        assert got.json()["choices"][0]["message"] == greedy.json()["choices"][0]["message"]
