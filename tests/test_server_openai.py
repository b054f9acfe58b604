"""OpenAI's API over scripted outputs: what goes in reaches the engine, what comes out has OpenAI's form."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlx_gemma_mtp.constraints import Both, JsonSchema, Lark, ThinkingBudget
from mlx_gemma_mtp.request import Request

from .fake_engine import events_of
from .serving import CODEC, Fake, events

CALL = '<|tool_call>call:get_time{city:<|"|>R"om{e<|"|>,n:[1,{a:null}]}<tool_call|>'
ARGUMENTS = {"city": 'R"om{e', "n": [1, {"a": None}]}
TOOLS = [
    {"type": "function", "function": {"name": "get_time", "description": "The time.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}},
    {"type": "function", "function": {"name": "noop"}},
]  # fmt: skip


class TestChat:
    def test_an_answer(self) -> None:
        fake = Fake("Hello there, my dear old friend.")
        got = fake.chat().json()
        assert got["object"] == "chat.completion"
        assert got["model"] == "demo"
        assert got["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello there, my dear old friend.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ]
        stats, usage = fake.engine.streams[0].stats, got["usage"]
        tokens = len(CODEC.encode("Hello there, my dear old friend.")) - 1
        assert usage["prompt_tokens"] == len(fake.request.prompt)
        assert usage["completion_tokens"] == tokens
        assert usage["total_tokens"] == tokens + usage["prompt_tokens"]
        details = usage["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] == stats.accepted > 0
        assert details["rejected_prediction_tokens"] == stats.drafted - stats.accepted > 0
        assert got["mtp"]["contract"] == "exact"
        assert got["mtp"]["depth"] == "auto"
        assert len(got["mtp"]["acceptance_per_position"]) == len(stats.accepted_per_position)

    def test_a_stream_says_the_same(self) -> None:
        fake = Fake("<|channel>thought\nHm, 🎉.\n<channel|>Hello there 🎉.")
        whole = fake.chat().json()["choices"][0]["message"]
        got = events(fake.chat(stream=True, stream_options={"include_usage": True}))
        deltas = [c["choices"][0]["delta"] for c in got if c["choices"]]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(d.get("content", "") for d in deltas) == whole["content"] == "Hello there 🎉."
        assert "".join(d.get("reasoning_content", "") for d in deltas) == whole["reasoning_content"] == "Hm, 🎉."
        assert [c["choices"][0]["finish_reason"] for c in got[:-1]] == [None] * (len(got) - 2) + ["stop"]
        assert got[-1]["choices"] == []
        assert got[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
        assert all(c["usage"] is None for c in got[:-1])
        assert len({c["id"] for c in got}) == 1
        assert "usage" not in events(fake.chat(stream=True))[0]

    def test_what_is_asked_for_reaches_the_engine(self) -> None:
        fake = Fake()
        fake.chat(
            max_completion_tokens=7, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=3, presence_penalty=0.5,
            frequency_penalty=-0.5, repetition_penalty=1.1, logit_bias={"7": -100, "9": 2.5}, min_tokens=2, depth=0,
            ignore_eos=True, logprobs=True, top_logprobs=4,
        )  # fmt: skip
        request, sampling = fake.request, fake.request.sampling
        assert (request.max_tokens, request.depth, request.ignore_eos) == (7, 0, True)
        assert request.stop_ids == CODEC.stop_ids
        assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 5, 0.1)
        assert (sampling.seed, sampling.min_tokens, sampling.logprobs) == (3, 2, 4)
        assert sampling.penalties == (1.1, 0.5, -0.5)
        assert sampling.logit_bias == {7: -100, 9: 2.5}

    def test_the_models_own_defaults_hold_where_nothing_is_said(self) -> None:
        from mlx_gemma_mtp.generation_config import generation_defaults

        from .serving import DEMO

        fake = Fake(defaults=generation_defaults(DEMO))
        fake.chat(top_p=0.5)
        assert (fake.request.sampling.temperature, fake.request.sampling.top_k) == (1.0, 64)
        assert fake.request.sampling.top_p == 0.5
        assert fake.chat(temperature=0).json()["mtp"]["contract"] == "exact"
        assert fake.chat().json()["mtp"]["contract"] == "distribution"

    def test_n_choices_have_noise_of_their_own(self) -> None:
        fake = Fake(lambda r: events_of(CODEC, f"Choice {r.choice}."))
        got = fake.chat(n=3).json()
        assert [c["message"]["content"] for c in got["choices"]] == ["Choice 0.", "Choice 1.", "Choice 2."]
        assert got["usage"]["prompt_tokens"] == len(fake.request.prompt)
        chunks = events(fake.chat(n=3, stream=True))
        texts = ["", "", ""]
        for choice in (c for chunk in chunks for c in chunk["choices"]):
            texts[choice["index"]] += choice["delta"].get("content", "")
        assert texts == ["Choice 0.", "Choice 1.", "Choice 2."]

    def test_stop_strings(self) -> None:
        fake = Fake("One two three four five six seven.")
        got = fake.chat(stop=["three", "zz"]).json()["choices"][0]
        assert (got["message"]["content"], got["finish_reason"]) == ("One two ", "stop")
        assert fake.engine.streams[-1].cancelled
        chunks = events(fake.chat(stop="four", stream=True))
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "One two three "

    def test_length(self) -> None:
        fake = Fake(lambda _: events_of(CODEC, "One two", finish="length"))
        assert fake.chat(max_tokens=2).json()["choices"][0]["finish_reason"] == "length"

    def test_logprobs(self) -> None:
        fake = Fake(lambda _: events_of(CODEC, "<|channel>thought\nx\n<channel|>A é.", logprobs=True))
        got = fake.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
        assert b"".join(bytes(t["bytes"]) for t in got).decode() == "A é."
        assert all(t["logprob"] == -0.5 and len(t["top_logprobs"]) == 2 for t in got)
        assert got[0]["token"] == bytes(got[0]["bytes"]).decode()
        chunks = events(fake.chat(logprobs=True, top_logprobs=2, stream=True))
        streamed = [t for c in chunks for t in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
        assert streamed == got

    def test_mtp_in_a_stream(self) -> None:
        chunks = events(Fake("One two three four.").chat(stream=True, stream_options={"include_mtp": True}))
        told = [c["mtp"] for c in chunks if "pieces" in c.get("mtp", {})]
        pieces = [p for m in told for p in m["pieces"]]
        assert "".join(p["text"] for p in pieces) == "One two three four."
        assert {p["drafted"] for p in pieces} == {True, False}
        assert [i for m in told for i in m["ids"]] == CODEC.encode("One two three four.")[1:]
        assert told[-1]["rounds"] >= 1
        assert chunks[-1]["mtp"]["accepted"] == told[-1]["accepted"]


class TestTools:
    def test_calls(self) -> None:
        fake = Fake(f"Let me see. {CALL}<|tool_call>call:noop{{}}<tool_call|>")
        got = fake.chat(tools=TOOLS).json()["choices"][0]
        assert got["finish_reason"] == "tool_calls"
        assert got["message"]["content"] == "Let me see. "
        calls = got["message"]["tool_calls"]
        assert [c["function"]["name"] for c in calls] == ["get_time", "noop"]
        assert [json.loads(c["function"]["arguments"]) for c in calls] == [ARGUMENTS, {}]
        assert len({c["id"] for c in calls}) == 2
        assert "<|tool>declaration:get_time{" in fake.prompt

    def test_calls_alone_have_no_content(self) -> None:
        assert Fake(CALL).chat(tools=TOOLS).json()["choices"][0]["message"]["content"] is None

    def test_calls_stream_as_deltas(self) -> None:
        fake = Fake(f"{CALL}<|tool_call>call:noop{{}}<tool_call|>")
        chunks = events(fake.chat(tools=TOOLS, stream=True))
        parts = [p for c in chunks for p in c["choices"][0]["delta"].get("tool_calls", [])]
        first = [p for p in parts if "id" in p]
        assert [(p["index"], p["function"]["name"]) for p in first] == [(0, "get_time"), (1, "noop")]
        joined = ["".join(p["function"]["arguments"] for p in parts if p["index"] == i) for i in (0, 1)]
        assert [json.loads(j) for j in joined] == [ARGUMENTS, {}]
        assert len([p for p in parts if p["index"] == 0]) > 3
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"

    def test_a_cut_call_says_so(self) -> None:
        fake = Fake(lambda _: events_of(CODEC, CALL[:40], finish="length"))
        got = fake.chat(tools=TOOLS).json()["choices"][0]
        assert got["finish_reason"] == "length"
        with pytest.raises(ValueError, match=r"Unterminated|delimiter|Expecting"):
            json.loads(got["message"]["tool_calls"][0]["function"]["arguments"])

    def test_a_loop_reaches_the_template(self) -> None:
        fake = Fake("It is ten.")
        conversation: list[dict[str, Any]] = [
            {"role": "user", "content": "Time?"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "get_time", "arguments": json.dumps(ARGUMENTS)}},
                {"id": "b", "type": "function", "function": {"name": "noop", "arguments": ""}}]},
            {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "nothing"}]},
            {"role": "tool", "tool_call_id": "a", "content": "ten"},
        ]  # fmt: skip
        assert fake.chat(messages=conversation, tools=TOOLS).status_code == 200
        assert (
            '<|tool_call>call:get_time{city:<|"|>R"om{e<|"|>,n:[1,{a:null}]}<tool_call|><|tool_call>call:noop{}'
            '<tool_call|><|tool_response>response:noop{value:<|"|>nothing<|"|>}<tool_response|>'
            '<|tool_response>response:get_time{value:<|"|>ten<|"|>}<tool_response|>'
        ) in fake.prompt

    @pytest.mark.parametrize(
        ("choice", "more", "held"),
        [
            ("auto", {}, False),
            (None, {}, False),
            ("required", {}, True),
            ({"type": "function", "function": {"name": "noop"}}, {}, True),
            ("auto", {"parallel_tool_calls": False}, True),
        ],
    )
    def test_tool_choice_is_held_by_a_grammar(self, choice: Any, more: dict[str, Any], held: bool) -> None:
        fake = Fake()
        assert fake.chat(tools=TOOLS, tool_choice=choice, **more).status_code == 200
        constraint = fake.request.sampling.constraint
        assert isinstance(constraint, Lark) is held
        if isinstance(choice, dict):
            assert isinstance(constraint, Lark)
            assert "get_time" not in constraint.grammar

    def test_tool_choice_none_forbids_the_mark(self) -> None:
        fake = Fake()
        fake.chat(tools=TOOLS, tool_choice="none")
        assert list(fake.request.sampling.suppress_tokens) == [48]
        assert fake.request.sampling.constraint is None
        fake.chat()
        assert list(fake.request.sampling.suppress_tokens) == []

    def test_a_strict_tool_is_held(self) -> None:
        fake, tool = Fake(), json.loads(json.dumps(TOOLS[0]))
        tool["function"]["strict"] = True
        fake.chat(tools=[tool])
        assert isinstance(fake.request.sampling.constraint, Lark)
        tool["function"]["parameters"]["properties"]["city"]["pattern"] = "^a"
        got = fake.chat(tools=[tool])
        assert got.status_code == 422
        assert "'pattern'" in got.json()["error"]["message"]

    def test_types_that_the_template_does_not_know(self) -> None:
        fake = Fake()
        parameters = {"type": "object", "properties": {
            "a": {"type": ["string", "null"]}, "b": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}}  # fmt: skip
        fake.chat(tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}])
        assert 'a:{nullable:true,type:<|"|>STRING<|"|>}' in fake.prompt
        assert 'b:{nullable:true,type:<|"|>INTEGER<|"|>}' in fake.prompt


class TestConstraints:
    def test_json_schema(self) -> None:
        fake, schema = Fake("{}"), {"type": "object", "properties": {"a": {"type": "integer"}}}
        fake.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
        assert fake.request.sampling.constraint == JsonSchema(schema)
        fake.chat(response_format={"type": "json_object"})
        assert fake.request.sampling.constraint == JsonSchema({"type": "object"})
        fake.chat(response_format={"type": "text"})
        assert fake.request.sampling.constraint is None

    def test_json_or_calls(self) -> None:
        fake = Fake("{}")
        fake.chat(response_format={"type": "json_object"}, tools=TOOLS)
        constraint = fake.request.sampling.constraint
        assert isinstance(constraint, Lark)
        assert "answer: %json" in constraint.grammar

    @pytest.mark.parametrize(
        ("asked", "thinks", "budget"),
        [
            ({}, False, None),
            ({"reasoning_effort": "none"}, False, None),
            ({"reasoning_effort": "low"}, True, 512),
            ({"reasoning_effort": "high"}, True, None),
            ({"thinking_budget": 33}, True, 33),
            ({"thinking_budget": 0}, False, None),
            ({"enable_thinking": True}, True, None),
            ({"enable_thinking": True, "thinking_budget": 9}, True, 9),
            ({"chat_template_kwargs": {"enable_thinking": True}}, True, None),
            ({"chat_template_kwargs": {"enable_thinking": False}}, False, None),
        ],
    )
    def test_thinking(self, asked: dict[str, Any], thinks: bool, budget: int | None) -> None:
        fake = Fake()
        assert fake.chat(**asked).status_code == 200
        assert ("<|think|>" in fake.prompt) is thinks
        assert fake.request.sampling.constraint == (None if budget is None else ThinkingBudget(budget))

    def test_both(self) -> None:
        fake = Fake("{}")
        fake.chat(response_format={"type": "json_object"}, thinking_budget=5)
        assert fake.request.sampling.constraint == Both(JsonSchema({"type": "object"}), ThinkingBudget(5))


class TestCompletions:
    def test_prompts_of_all_forms(self) -> None:
        fake = Fake("Yes.")
        assert fake.ask("/v1/completions", {"model": "demo", "prompt": "Once"}).json()["choices"][0]["text"] == "Yes."
        assert list(fake.request.prompt) == CODEC.encode("Once")
        assert fake.request.max_tokens == 16
        got = fake.ask("/v1/completions", {"model": "demo", "prompt": ["a", "b"], "n": 2, "max_tokens": 3}).json()
        assert [c["index"] for c in got["choices"]] == [0, 1, 2, 3]
        assert [list(s.request.prompt) for s in fake.engine.streams[-4:]] == [
            CODEC.encode(t) for t in ("a", "a", "b", "b")
        ]
        assert got["usage"]["prompt_tokens"] == len(CODEC.encode("a")) + len(CODEC.encode("b"))
        fake.ask("/v1/completions", {"model": "demo", "prompt": [2, 5, 6]})
        assert list(fake.request.prompt) == [2, 5, 6]
        fake.ask("/v1/completions", {"model": "demo", "prompt": [[2, 5], [2]]})
        assert list(fake.request.prompt) == [2]

    def test_streams_and_logprobs(self) -> None:
        fake = Fake(lambda _: events_of(CODEC, "One two.", logprobs=True))
        body = {"model": "demo", "prompt": "x", "logprobs": 1}
        got = fake.ask("/v1/completions", body).json()["choices"][0]
        assert "".join(got["logprobs"]["tokens"]) == got["text"] == "One two."
        assert got["logprobs"]["text_offset"][0] == 0
        assert got["logprobs"]["text_offset"][-1] == len("One two.") - len(got["logprobs"]["tokens"][-1])
        chunks = events(fake.ask("/v1/completions", body | {"stream": True, "stream_options": {"include_usage": True}}))
        assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"]) == "One two."
        assert [t for c in chunks if c["choices"] for t in c["choices"][0]["logprobs"]["tokens"]] == got["logprobs"][
            "tokens"
        ]
        assert chunks[-1]["usage"]["completion_tokens"] == len(got["logprobs"]["tokens"])


class TestResponses:
    def test_an_answer(self) -> None:
        fake = Fake("<|channel>thought\nHm.\n<channel|>Hello.")
        body = {"model": "demo", "input": "Hi", "instructions": "Be kind.", "reasoning": {"effort": "high"}}
        got = fake.ask("/v1/responses", body).json()
        assert got["status"] == "completed"
        assert [o["type"] for o in got["output"]] == ["reasoning", "message"]
        assert got["output"][0]["content"][0]["text"] == "Hm."
        assert got["output"][1]["content"][0]["text"] == "Hello."
        assert got["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
        assert "Be kind." in fake.prompt

    def test_events(self) -> None:
        fake = Fake("<|channel>thought\nHm.\n<channel|>Hello there, you.")
        got = events(fake.ask("/v1/responses", {"model": "demo", "input": "Hi", "stream": True}))
        names = [e["type"].removeprefix("response.") for e in got]
        assert names[:3] == ["created", "in_progress", "output_item.added"]
        assert names[-1] == "completed"
        assert [e["sequence_number"] for e in got] == list(range(len(got)))
        assert "".join(e["delta"] for e in got if e["type"] == "response.output_text.delta") == "Hello there, you."
        assert "".join(e["delta"] for e in got if e["type"] == "response.reasoning_text.delta") == "Hm."
        assert names.count("output_item.done") == 2
        assert got[-1]["response"]["output"][1]["content"][0]["text"] == "Hello there, you."

    def test_a_conversation_and_json(self) -> None:
        fake = Fake("{}")
        body = {
            "model": "demo",
            "input": [
                {"role": "user", "content": "One"},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Two"}]},
                {"role": "user", "content": [{"type": "input_text", "text": "Three"}]},
            ],
            "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
            "max_output_tokens": 5,
        }
        assert fake.ask("/v1/responses", body).status_code == 200
        assert "user\nOne<turn|>\n<|turn>model\nTwo<turn|>\n<|turn>user\nThree" in fake.prompt
        assert fake.request.sampling.constraint == JsonSchema({"type": "object"})
        assert fake.request.max_tokens == 5


def test_no_answer_at_all_is_an_empty_text() -> None:
    fake = Fake("")
    assert fake.chat().json()["choices"][0]["message"]["content"] == ""
    assert events(fake.chat(stream=True))[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_request_gets_the_room_that_the_context_has() -> None:
    fake = Fake(context=40)
    assert fake.chat(max_tokens=1000).status_code == 200
    assert fake.request.max_tokens == 40 - len(fake.request.prompt)
    got = fake.chat(messages=[{"role": "user", "content": "word " * 100}])
    assert got.status_code == 400
    assert got.json()["error"]["code"] == "context_length_exceeded"


def test_no_request_is_lost_when_one_of_many_fails() -> None:
    def script(request: Request) -> Any:
        return events_of(CODEC, "A b c d e f g.", finish="error" if request.choice == 1 else "stop")

    fake = Fake(script)
    got = fake.chat(n=3)
    assert got.status_code == 500
    assert got.json()["error"]["message"] == "the request failed: boom"
    assert not [s for s in fake.engine.streams if not (s.ended or s.cancelled)]
