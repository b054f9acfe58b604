"""Anthropic's API over scripted outputs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlx_gemma_mtp.constraints import JsonSchema, Lark, ThinkingBudget
from mlx_gemma_mtp.request import FinishReason

from .fake_engine import events_of
from .serving import CODEC, Fake, events

CALL = '<|tool_call>call:get_time{city:<|"|>Ro"m{e<|"|>}<tool_call|>'
TOOLS = [{"name": "get_time", "description": "The time.", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}]  # fmt: skip


def test_an_answer() -> None:
    fake = Fake("<|channel>thought\nHm.\n<channel|>Hello there, friend.")
    got = fake.message(system=[{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]).json()
    assert got["type"] == "message"
    assert [(b["type"], b.get("text", b.get("thinking"))) for b in got["content"]] == [
        ("thinking", "Hm."),
        ("text", "Hello there, friend."),
    ]
    assert (got["stop_reason"], got["stop_sequence"]) == ("end_turn", None)
    assert got["usage"]["input_tokens"] == len(fake.request.prompt)
    assert got["usage"]["output_tokens"] > 5
    assert got["mtp"]["contract"] == "exact"
    assert "Be kind." in fake.prompt


def test_events_of_thought_text_and_calls() -> None:
    fake = Fake(f"<|channel>thought\nHm.\n<channel|>Let me see.{CALL}{CALL}")
    got = events(fake.message(tools=TOOLS, stream=True))
    names = [e["type"] for e in got]
    assert names[:2] == ["message_start", "ping"]
    assert names[-2:] == ["message_delta", "message_stop"]
    starts = [e for e in got if e["type"] == "content_block_start"]
    assert [(e["index"], e["content_block"]["type"]) for e in starts] == [
        (0, "thinking"), (1, "text"), (2, "tool_use"), (3, "tool_use"),
    ]  # fmt: skip
    open_block = None
    for e in got:
        if e["type"] == "content_block_start":
            assert open_block is None
            open_block = e["index"]
        elif e["type"] == "content_block_stop":
            assert e["index"] == open_block
            open_block = None
        elif e["type"] == "content_block_delta":
            assert e["index"] == open_block

    def joined(index: int, key: str) -> str:
        return "".join(e["delta"].get(key, "") for e in got if e.get("index") == index and "delta" in e)

    assert (joined(0, "thinking"), joined(1, "text")) == ("Hm.", "Let me see.")
    assert [json.loads(joined(i, "partial_json")) for i in (2, 3)] == [{"city": 'Ro"m{e'}] * 2
    assert joined(0, "signature")
    assert got[-2]["delta"]["stop_reason"] == "tool_use"
    assert got[-2]["usage"]["output_tokens"] > 10


def test_a_tool_loop_reaches_the_template() -> None:
    fake = Fake("It is ten.")
    got = fake.message(
        tools=TOOLS,
        messages=[
            {"role": "user", "content": "Time?"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "I look.", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Wait."},
                {"type": "tool_use", "id": "a", "name": "get_time", "input": {"city": "Rome"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "no clock"}],
                 "is_error": True}]},
        ],
    )  # fmt: skip
    assert got.status_code == 200
    assert (
        '<|channel>thought\nI look.\n<channel|>Wait.<|tool_call>call:get_time{city:<|"|>Rome<|"|>}<tool_call|>'
        '<|tool_response>response:get_time{value:<|"|>Error: no clock<|"|>}<tool_response|>'
    ) in fake.prompt


def test_results_come_before_the_users_words() -> None:
    fake = Fake()
    fake.message(
        tools=TOOLS,
        messages=[
            {"role": "user", "content": "Time?"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "get_time", "input": {}}]},
            {"role": "user", "content": [
                {"type": "text", "text": "And now?"}, {"type": "tool_result", "tool_use_id": "a", "content": "ten"}]},
        ],
    )  # fmt: skip
    assert fake.prompt.index("ten") < fake.prompt.index("And now?")


@pytest.mark.parametrize(
    ("text", "finish", "more", "reason", "sequence"),
    [
        ("One two three", "stop", {}, "end_turn", None),
        ("One two three", "length", {}, "max_tokens", None),
        ("One two three", "stop", {"stop_sequences": ["two"]}, "stop_sequence", "two"),
        (CALL, "stop", {"tools": TOOLS}, "tool_use", None),
        (CALL[:40], "length", {"tools": TOOLS}, "max_tokens", None),
    ],
)
def test_stop_reasons(text: str, finish: FinishReason, more: dict[str, Any], reason: str, sequence: str | None) -> None:
    fake = Fake(lambda _: events_of(CODEC, text, finish=finish))
    got = fake.message(**more).json()
    assert (got["stop_reason"], got["stop_sequence"]) == (reason, sequence)
    last = next(e for e in events(fake.message(stream=True, **more)) if e["type"] == "message_delta")
    assert last["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


def test_counting_is_what_the_message_takes() -> None:
    fake = Fake()
    body = {"model": "demo", "messages": [{"role": "user", "content": "Time?"}], "tools": TOOLS, "system": "Be kind."}
    got = fake.ask("/v1/messages/count_tokens", body).json()
    fake.ask("/v1/messages", body | {"max_tokens": 5})
    assert got == {"input_tokens": len(fake.request.prompt)}


@pytest.mark.parametrize(
    ("choice", "held"),
    [
        ({"type": "auto"}, False),
        ({"type": "any"}, True),
        ({"type": "tool", "name": "get_time"}, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, True),
    ],
)
def test_tool_choice(choice: dict[str, Any], held: bool) -> None:
    fake = Fake()
    assert fake.message(tools=TOOLS, tool_choice=choice).status_code == 200
    assert isinstance(fake.request.sampling.constraint, Lark) is held
    fake.message(tools=TOOLS, tool_choice={"type": "none"})
    assert list(fake.request.sampling.suppress_tokens) == [48]


@pytest.mark.parametrize(
    ("more", "constraint"),
    [
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
         JsonSchema({"type": "object"})),
        ({"output_config": {"effort": "low"}, "thinking": {"type": "adaptive"}}, ThinkingBudget(512)),
    ],
)  # fmt: skip
def test_output_config(more: dict[str, Any], constraint: object) -> None:
    fake = Fake("{}")
    fake.message(**more)
    assert fake.request.sampling.constraint == constraint


@pytest.mark.parametrize(
    ("thinking", "thinks", "constraint"),
    [
        ({"type": "enabled", "budget_tokens": 1024}, True, ThinkingBudget(1024)),
        ({"type": "adaptive"}, True, None),
        ({"type": "disabled"}, False, None),
    ],
)
def test_thinking(thinking: dict[str, Any], thinks: bool, constraint: object) -> None:
    fake = Fake()
    fake.message(thinking=thinking)
    assert ("<|think|>" in fake.prompt) is thinks
    assert fake.request.sampling.constraint == constraint


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"nonsense": 1}, "unrecognized request argument: nonsense"),
        ({"temperature": 1.5}, "temperature"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "'document'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [
            {"type": "image"}]}]}]}, "messages[0].content[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]}, "doesn't make"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": 5}]}]}, "no list of blocks"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f"}]}]}, "input"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tool_choice": {"type": "any"}}, "no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens"),
        ({"thinking": {"type": "disabled"}, "thinking_budget": 5}, "give one of them"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"thinking": {"type": "disabled", "budget_tokens": 5}}, "thinking is disabled"),
        ({"tools": TOOLS, "tool_choice": {"type": "auto", "name": "get_time"}}, "tool_choice.name"),
        ({"tools": [TOOLS[0] | {"input_examples": [{}]}]}, "input_examples"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The"}]}, "messages[1]"),
    ],
)  # fmt: skip
def test_errors(body: dict[str, Any], says: str) -> None:
    fake = Fake()
    got = fake.message(**body)
    assert (got.status_code, got.json()["type"], got.json()["error"]["type"]) == (400, "error", "invalid_request_error")
    assert says in got.json()["error"]["message"]
    assert got.json()["request_id"] == got.headers["request-id"]
    assert not fake.engine.streams


RESULT: dict[str, Any] = {"type": "tool_result", "tool_use_id": "a", "content": "12:00"}
USE: dict[str, Any] = {"type": "tool_use", "id": "a", "name": "get_time", "input": {}}


def blocks(assistant: list[dict[str, Any]], user: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": assistant},
        {"role": "user", "content": user},
    ]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (blocks([USE | {"colour": 1}], [RESULT]), "messages[1].content[0].colour"),
        (blocks([USE | {"caller": {"type": "code_execution"}}], [RESULT]), "messages[1].content[0].caller"),
        (blocks([USE], [RESULT | {"priority": "high"}]), "messages[2].content[0].priority"),
        (blocks([USE], [RESULT | {"is_error": "no"}]), "messages[2].content[0].is_error"),
        (blocks([USE], [RESULT | {"content": [{"type": "text", "text": "x", "lang": "en"}]}]),
         "messages[2].content[0].content[0].lang"),
        (blocks([{"type": "thinking", "thinking": "x", "effort": 1}], [RESULT]), "messages[1].content[0].effort"),
        (blocks([{"type": "redacted_thinking", "data": "x", "of": 1}], [RESULT]), "messages[1].content[0].of"),
        (blocks([{"type": "text", "text": "x", "citations": [{"type": "char_location"}]}], [RESULT]),
         "messages[1].content[0].citations"),
    ],
)  # fmt: skip
def test_fields_of_blocks_that_nothing_reads_are_refused(messages: list[dict[str, Any]], says: str) -> None:
    got = Fake().message(messages=messages, tools=TOOLS)
    assert got.status_code == 400
    assert says in got.json()["error"]["message"]


def test_labels_of_blocks_change_nothing() -> None:
    """What clients send by themselves: hints for a cache, signatures, who called, null for what there is not."""
    cached = {"cache_control": {"type": "ephemeral"}}
    plain, labelled = Fake(), Fake()
    thought: dict[str, Any] = {"type": "thinking", "thinking": "Hm."}
    past = [thought, {"type": "text", "text": "So"}, USE]
    assert plain.message(messages=blocks(past, [RESULT]), tools=TOOLS).status_code == 200
    past = [
        thought | {"signature": "x"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "So", "citations": None} | cached,
        USE | {"caller": {"type": "direct"}, "toolset_name": None} | cached,
    ]
    now = [RESULT | {"is_error": False} | cached]
    got = labelled.message(messages=blocks(past, now), tools=TOOLS, metadata={"user_id": "u"})
    assert got.status_code == 200
    assert labelled.prompt == plain.prompt
