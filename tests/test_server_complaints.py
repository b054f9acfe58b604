"""What users of other servers complained of (shared/research/field.md), each as a test that names its threads.

Complaints about the format of calls alone are in test_tool_calls.py. These run on the demo pair, end to end.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest

from mlx_gemma_mtp.request import Request

from .fake_engine import events_of
from .serving import CODEC, Fake, Live, chat_body, events

STORY = [{"role": "user", "content": "Tell me a story about a squirrel."}]
SCHEMA = {
    "type": "object",
    "properties": {"planet": {"enum": ["Mars", "Venus"]}},
    "required": ["planet"],
    "additionalProperties": False,
}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "planet", "schema": SCHEMA}}
TOOLS = [{"type": "function", "function": {"name": "get_time", "description": "Get the time in a city.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]  # fmt: skip
FUNCTION = {"name": "get_time", "arguments": '{"city": "Rome", "zone": null}'}
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": FUNCTION}]}
RESULT = {"role": "tool", "tool_call_id": "a", "content": "ten"}


def ask(live: Live, **more: Any) -> dict[str, Any]:
    response = httpx.post(f"{live.url}/v1/chat/completions", json=chat_body(**{"messages": STORY, **more}), timeout=300)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def content(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


class TestSilentlyDropped:
    @pytest.mark.parametrize("depth", [0, 4])
    def test_ollama_16563_16776_17183_json_schema_is_held(self, live: Live, depth: int) -> None:
        ends = set()
        for seed in range(3):
            got = ask(live, response_format=JSON_FORMAT, temperature=1.5, seed=seed, depth=depth, max_tokens=200)
            ends.add(got["choices"][0]["finish_reason"])
            if got["choices"][0]["finish_reason"] == "stop":
                jsonschema.validate(json.loads(content(got)), SCHEMA)
            else:  # any amount of white space is JSON, too
                assert content(got).startswith("{")
        assert "stop" in ends

    def test_omlx_2399_constraints_hold_among_others(self, live: Live) -> None:
        """There, 4 of 6 constrained requests were kept when they ran together, and 0 of 6 alone."""
        requests: list[dict[str, Any]] = [
            {"response_format": JSON_FORMAT},
            {},
            {"response_format": JSON_FORMAT},
            {},
        ] * 2
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda r: ask(live, temperature=0, max_tokens=80, depth=3, **r), requests))
        for request, answer in zip(requests, got, strict=True):
            if request and answer["choices"][0]["finish_reason"] == "length":
                assert content(answer).startswith("{")
            elif request:
                jsonschema.validate(json.loads(content(answer)), SCHEMA)
            else:
                assert "Once upon a time" in content(answer)

    def test_omlx_2399_penalties_hold_with_drafts(self, live: Live) -> None:
        plain = ask(live, temperature=0, max_tokens=120, depth=3)
        changed = ask(live, temperature=0, max_tokens=120, depth=3, frequency_penalty=2, presence_penalty=2)
        same = ask(live, temperature=0, max_tokens=120, depth=0, frequency_penalty=2, presence_penalty=2)
        assert content(plain) != content(changed) == content(same)

    def test_omlx_2399_logit_bias_holds_with_drafts(self, live: Live) -> None:
        token = CODEC.encode("Once")[1]
        assert content(ask(live, temperature=0, max_tokens=20)).startswith("Once")
        assert "Once" not in content(ask(live, temperature=0, max_tokens=20, logit_bias={str(token): -100}))

    def test_vllm_39573_a_thinking_budget_is_kept_with_drafts(self, live: Live) -> None:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        spent = []
        for budget in (1, 6, 100):
            got = ask(
                live, messages=question, enable_thinking=True, thinking_budget=budget, temperature=0, depth=4
            )  # fmt: skip
            spent.append(got["usage"]["completion_tokens_details"]["reasoning_tokens"])
        assert 0 < spent[0] <= 2
        assert 2 < spent[1] <= 7 < spent[2]

    def test_mlx_vlm_logprobs_come_with_drafts(self, live: Live) -> None:
        got = ask(live, logprobs=True, top_logprobs=2, temperature=0, max_tokens=30, depth=4)
        assert got["mtp"]["accepted"] > 0
        told = got["choices"][0]["logprobs"]["content"]
        assert "".join(t["token"] for t in told) == content(got)

    def test_mlx_vlm_each_request_has_its_own_sampler(self, live: Live) -> None:
        """There, a batch took the sampler of its first request."""
        kinds: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 2, "seed": 4}, {"temperature": 2, "seed": 9}]
        alone = [content(ask(live, max_tokens=40, **k)) for k in kinds]
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda k: content(ask(live, max_tokens=40, **k)), kinds * 2))
        assert together == alone * 2
        assert len(set(alone)) == 3

    def test_llama_cpp_23398_drafts_can_be_off_for_one_request(self, live: Live) -> None:
        off, on = (ask(live, temperature=0, max_tokens=30, depth=d) for d in (0, 3))
        assert (off["mtp"]["drafted"], on["mtp"]["drafted"] > 0) == (0, True)
        assert content(off) == content(on)

    def test_omlx_3536_every_answer_says_whether_it_drafted(self, live: Live) -> None:
        """There, a log line claimed drafts that never were."""
        got = ask(live, temperature=0, max_tokens=30)
        details = got["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] == got["mtp"]["accepted"] > 0
        assert got["mtp"]["accepted"] + got["mtp"]["rounds"] + 1 >= got["usage"]["completion_tokens"]


class TestTemplates:
    def test_mlx_vlm_899_omlx_2533_no_thought_leaks_behind_a_tools_result(self) -> None:
        """The prompt opens the thought there, so the output never says that it is one."""
        fake = Fake("I have the time now.\n<channel|>It is ten.")
        conversation = [*STORY, CALLED, RESULT]
        got = fake.chat(messages=conversation, tools=TOOLS, enable_thinking=True).json()["choices"][0]["message"]
        assert fake.prompt.endswith("<|channel>thought\n")
        assert (got["content"], got["reasoning_content"]) == ("It is ten.", "I have the time now.")
        chunks = events(fake.chat(messages=conversation, tools=TOOLS, enable_thinking=True, stream=True))
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "It is ten."

    def test_rapid_mlx_447_the_word_thought_is_not_the_answer(self) -> None:
        got = Fake("<|channel>thought\nA plan.\n<channel|>Done.").chat(enable_thinking=True).json()
        assert got["choices"][0]["message"]["content"] == "Done."

    def test_mlx_lm_1352_without_thinking_the_answer_is_content(self, live: Live) -> None:
        got = ask(live, temperature=0, max_tokens=30)
        assert content(got)
        assert "reasoning_content" not in got["choices"][0]["message"]

    def test_mlxcel_687_thinking_is_off_where_nobody_asks(self) -> None:
        fake = Fake()
        fake.chat()
        assert "<|think|>" not in fake.prompt
        assert fake.prompt.endswith("<|turn>model\n")

    def test_ollama_17182_a_result_stays_in_the_models_turn(self) -> None:
        fake = Fake()
        fake.chat(messages=[*STORY, CALLED, RESULT], tools=TOOLS)
        assert fake.prompt.count("<|turn>model") == 1
        assert 'call:get_time{city:<|"|>Rome<|"|>,zone:null}' in fake.prompt
        assert fake.prompt.endswith("<tool_response|>")

    def test_omlx_1028_old_thoughts_are_not_sent_again(self) -> None:
        fake = Fake()
        past = {"role": "assistant", "content": "Six.", "reasoning_content": "secret plan"}
        fake.chat(messages=[*STORY, past, *STORY])
        assert "secret plan" not in fake.prompt

    def test_omlx_1846_calls_in_parentheses_reach_the_client(self) -> None:
        fake = Fake("<|tool_call>call:functions.get_time(city='Rome, \"It\\'s {x}\"', n=2)<tool_call|>")
        got = fake.chat(tools=TOOLS).json()["choices"][0]
        assert got["finish_reason"] == "tool_calls"
        function = got["message"]["tool_calls"][0]["function"]
        assert function["name"] == "get_time"
        assert json.loads(function["arguments"]) == {"city": 'Rome, "It\'s {x}"', "n": 2}

    def test_omlx_1846_what_can_not_be_read_as_a_call_is_given_as_text(self) -> None:
        """There, the answer was empty, and agents stopped without a word."""
        got = Fake("<|tool_call>I would rather not<tool_call|>").chat(tools=TOOLS).json()["choices"][0]
        assert (got["finish_reason"], got["message"]["content"]) == (
            "stop",
            "<|tool_call>I would rather not<tool_call|>",
        )

    def test_ollama_18307_a_call_within_an_open_thought_is_made(self) -> None:
        fake = Fake('<|channel>thought\nLet us go.<|tool_call>call:get_time{city:<|"|>Rome<|"|>}<tool_call|>')
        got = fake.chat(tools=TOOLS, enable_thinking=True).json()["choices"][0]
        assert got["finish_reason"] == "tool_calls"
        assert got["message"]["reasoning_content"] == "Let us go."

    def test_rapid_mlx_1102_nested_arguments_stream_whole(self) -> None:
        call = '<|tool_call>call:get_time{a:{b:{c:[<|"|>}<|"|>]}},city:<|"|>x<|"|>}<tool_call|>'
        chunks = events(Fake(call).chat(tools=TOOLS, stream=True))
        parts = [p for c in chunks for p in c["choices"][0]["delta"].get("tool_calls", [])]
        arguments = "".join(p["function"]["arguments"] for p in parts)
        assert json.loads(arguments) == {"a": {"b": {"c": ["}"]}}, "city": "x"}


class TestServers:
    def test_omlx_2786_a_second_request_does_not_turn_drafts_off(self, live: Live) -> None:
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda _: ask(live, temperature=0, max_tokens=60), range(4)))
        assert min(g["mtp"]["accepted"] for g in got) > 10
        assert len({content(g) for g in got}) == 1

    def test_mlx_vlm_1124_1083_1127_prompts_of_different_lengths(self, live: Live) -> None:
        def one(words: int) -> tuple[int, str]:
            messages = [{"role": "user", "content": "word " * words + "What is the capital of France?"}]
            body = chat_body(messages=messages, temperature=0, max_tokens=20)
            got = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=300)
            return got.status_code, got.json()["choices"][0]["message"]["content"]

        lengths = [0, 3, 40, 200, 700, 1]
        alone = [one(n) for n in lengths]
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(one, lengths)) == alone
        assert {status for status, _ in alone} == {200}

    def test_rapid_mlx_3605_mlx_swift_lm_474_past_the_window(self, live: Live) -> None:
        """The demo's window is 128 tokens; there, requests died at 515 or 1024."""
        texts = {content(ask(live, temperature=0, max_tokens=180, ignore_eos=True, depth=d)) for d in (0, 3)}
        assert len(texts) == 1

    def test_omlx_2235_one_failure_is_one_requests(self) -> None:
        def script(request: Request) -> Any:
            return events_of(CODEC, "Fine.", finish="error" if request.sampling.seed == 1 else "stop")

        fake = Fake(script)
        assert [fake.chat(seed=s).status_code for s in (0, 1, 2)] == [200, 500, 200]
