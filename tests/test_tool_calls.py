"""Gemma 4's tool calls as models write them. Names of complaints are threads of other projects (shared/research)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlx_gemma_mtp
from mlx_gemma_mtp.text import Piece, TextCodec
from mlx_gemma_mtp.tool_calls import QUOTE, CallDelta, CallWriter, Delta, ToolStream, resolve_name

DEMO = Path(mlx_gemma_mtp.__file__).parent / "demo"


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    codec = TextCodec.from_directory(DEMO)
    assert codec is not None
    return codec


def write(body: str, *, chunk: int = 1, close: bool = True) -> tuple[str | None, str]:
    """A body with `<|"|>` for the mark, in chunks of characters: name and JSON text."""
    writer, out = CallWriter(), ""
    for i, part in enumerate(body.split(QUOTE)):
        out += writer.quote() if i else ""
        for start in range(0, len(part), chunk):
            out += writer.push(part[start : start + chunk])
    out += writer.close() if close else ""
    return writer.name, out


def parsed(body: str) -> tuple[str | None, Any]:
    name, text = write(body)
    assert write(body, chunk=1000) == (name, text)
    return name, json.loads(text)


def rendered(value: object) -> str:
    """A value in Gemma's format, as the official template writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{rendered(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(rendered, value)) + "]"
    return json.dumps(value)


texts = st.text(max_size=12).filter(lambda t: QUOTE not in t)
keys = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,6}", fullmatch=True)
numbers = st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@given(arguments=st.dictionaries(keys, values, max_size=4), chunk=st.integers(1, 9))
def test_canonical_calls_come_back_in_any_chunking(arguments: dict[str, Any], chunk: int) -> None:
    name, text = write(f"call:a_tool{rendered(arguments)}", chunk=chunk)
    assert name == "a_tool"
    assert json.loads(text) == arguments
    assert text == json.dumps(arguments, ensure_ascii=False)


@given(body=st.text(alphabet="call:ab{}()[]'\"=, \\<|>1\n") | st.text(), cut=st.booleans())
def test_anything_gives_json_or_no_call(body: str, cut: bool) -> None:
    name, text = write(body, close=not cut)
    if name is None:
        assert text == ""
    elif not cut:
        assert isinstance(json.loads(text), dict)


def test_strings_hold_braces_quotes_and_newlines() -> None:
    code = 'if (x) { console.log("y\'s") \\ <|tool_call> }}\n\t]'
    assert parsed(f"call:write{{content:{QUOTE}{code}{QUOTE},path:{QUOTE}a.js{QUOTE}}}") == (
        "write",
        {"content": code, "path": "a.js"},
    )


def test_mlx_lm_1126_unbalanced_braces_in_strings() -> None:
    assert parsed(f"call:w{{a:{QUOTE}test }} only{QUOTE},b:{QUOTE}{{{QUOTE}}}")[1] == {"a": "test } only", "b": "{"}


def test_mlx_lm_1150_hyphens_in_names() -> None:
    assert parsed("call:manim-video{n:1}") == ("manim-video", {"n": 1})


def test_rapid_mlx_1102_nested_objects_are_not_truncated() -> None:
    body = (
        f"call:ask{{arguments:{{message:{QUOTE}How {{are}} you?{QUOTE},to:[{{id:1}},{{id:2}}]}},agent:{QUOTE}b{QUOTE}}}"
    )
    assert parsed(body)[1] == {
        "arguments": {"message": "How {are} you?", "to": [{"id": 1}, {"id": 2}]},
        "agent": "b",
    }


def test_omlx_1830_single_quotes_with_commas_colons_braces_and_apostrophes() -> None:
    body = "call:google:mcp:text:create-pdf-file{filename: 'output.pdf', text: 'It's: a, {b}', n: 2}"
    assert parsed(body) == (
        "google:mcp:text:create-pdf-file",
        {"filename": "output.pdf", "text": "It's: a, {b}", "n": 2},
    )


@pytest.mark.parametrize(
    ("emitted", "declared", "meant"),
    [
        ("google:mcp:create-pdf-file", ["create-pdf-file", "other"], "create-pdf-file"),  # omlx#1830, #1854
        ("functions.get_weather", ["get_weather"], "get_weather"),  # mlxcel#521
        ("default_api/get_weather", ["get_weather"], "get_weather"),
        ("mcp.calendar:list", ["mcp.calendar:list", "list"], "mcp.calendar:list"),
        ("a.b.c", ["c", "b.c"], "a.b.c"),  # two could be meant
        ("forget", ["get"], "forget"),
        ("nobody", ["get"], "nobody"),
    ],
)
def test_names_with_a_prefix(emitted: str, declared: list[str], meant: str) -> None:
    assert resolve_name(emitted, declared) == meant


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (f"call:terminal(command:{QUOTE}ls -a{QUOTE})", {"command": "ls -a"}),
        ("call:f(a='x, y', b=2, c=True, d=None, e=[1, 2], f={'g': 1})",
         {"a": "x, y", "b": 2, "c": True, "d": None, "e": [1, 2], "f": {"g": 1}}),
        ('call:f({"a": "b", "n": {"m": [1, "2"]}})', {"a": "b", "n": {"m": [1, "2"]}}),
        ("call:f()", {}),
    ],
)  # fmt: skip
def test_omlx_1846_vllm_53642_calls_in_parentheses(body: str, expected: dict[str, Any]) -> None:
    assert parsed(body)[1] == expected


def test_mlx_vlm_1459_a_name_without_call() -> None:
    assert parsed("mcp.calendar:list_events{limit:5}") == ("mcp.calendar:list_events", {"limit": 5})


def test_yzma_243_missing_commas() -> None:
    assert parsed(f"call:f{{command:{QUOTE}look{QUOTE}angle:90 fast:true}}")[1] == {
        "command": "look",
        "angle": "90 fast:true",
    }
    assert parsed(f"call:f{{a:{QUOTE}x{QUOTE}b:{QUOTE}y{QUOTE}c:[1]d:2}}")[1] == {"a": "x", "b": "y", "c": [1], "d": 2}


def test_ollama_15255_quotes_within_strings() -> None:
    body = f"call:sh{{cmd:{QUOTE}echo \"a\" 'b' \\n{QUOTE}}}"
    assert parsed(body)[1] == {"cmd": "echo \"a\" 'b' \\n"}
    assert parsed(r'call:sh{"cmd": "echo \"a\" \u00e9 \\n \ud83d\ude00"}')[1] == {"cmd": 'echo "a" é \\n 😀'}


def test_ollama_17182_null_arguments_stay() -> None:
    assert parsed("call:f{a:null,b:,c:[null]}")[1] == {"a": None, "b": None, "c": [None]}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("call:f{a:{b:[1,2", {"a": {"b": [1, 2]}}),
        (f"call:f{{a:{QUOTE}x", {"a": "x"}),
        ("call:f{a:'x'", {"a": "x"}),
        ("call:f{a", {"a": None}),
        ("call:f{a:[1}", {"a": ["1}"]}),
        ("call:f{a:[{b:1]}", {"a": [{"b": "1]"}]}),
        ("call:f", {}),
        ("call:f{city:Paris, France}", {"city": "Paris", "France": None}),
        ("call : f {a : 1 , }", {"a": 1}),
        ("call:f{a:007,b:-1.5e3,c:1.}", {"a": "007", "b": -1500.0, "c": "1."}),
        (f'call:f{{{QUOTE}a b{QUOTE}:1,"c":2}}', {"a b": 1, "c": 2}),
    ],
)
def test_what_is_malformed_is_understood_as_well_as_can_be(body: str, expected: dict[str, Any]) -> None:
    assert parsed(body) == ("f", expected)


def test_arguments_stream() -> None:
    writer = CallWriter()
    steps = [writer.push("call:w{te"), writer.push("xt:"), writer.quote(), writer.push('a "'), writer.push("b"),
             writer.quote(), writer.push(",n"), writer.push(":1"), writer.push("2}")]  # fmt: skip
    assert steps == ["{", '"text": ', '"', 'a \\"', "b", '"', "", ', "n": ', "12}"]


def read(
    codec: TextCodec,
    text: str,
    *,
    tools: Sequence[str] | None = ("get_weather", "get_time"),
    cut: bool = False,
    **more: Any,
) -> list[Delta]:
    stream, out = ToolStream(codec, tools=tools, **more), list[Delta]()
    for token in codec.encode(text)[1:]:
        out += stream.push(token)
        if stream.stop_match is not None:
            return out
    return out + stream.flush(cut=cut)


def told(deltas: Sequence[Delta]) -> tuple[str, str, list[tuple[str | None, str]]]:
    """Answer, thought and calls of deltas."""
    calls: list[tuple[str | None, str]] = []
    for d in deltas:
        if isinstance(d, CallDelta):
            if d.index == len(calls):
                calls.append((d.name, ""))
                assert d.name
            else:
                assert d.name is None
                assert d.index == len(calls) - 1
            calls[d.index] = (calls[d.index][0], calls[d.index][1] + d.arguments)
    pieces = [d for d in deltas if isinstance(d, Piece)]
    by_kind = {kind: "".join(p.text for p in pieces if p.kind == kind) for kind in ("answer", "thinking")}
    return by_kind["answer"], by_kind["thinking"], calls


def test_parallel_calls_between_text(codec: TextCodec) -> None:
    text = (
        'Let me look. <|tool_call>call:get_weather{city:<|"|> Paris<|"|>}<tool_call|>'
        '<|tool_call>call:get_time{city:<|"|>Rome "{x}"<|"|>}<tool_call|>done'
    )
    assert told(read(codec, text)) == (
        "Let me look. done",
        "",
        [("get_weather", '{"city": " Paris"}'), ("get_time", '{"city": "Rome \\"{x}\\""}')],
    )


def test_ollama_18307_a_call_within_an_open_thought(codec: TextCodec) -> None:
    text = '<|channel>thought\nLet us go.<|tool_call>call:get_time{city:<|"|>Rome<|"|>}<tool_call|>'
    assert told(read(codec, text)) == ("", "Let us go.", [("get_time", '{"city": "Rome"}')])


def test_two_calls_within_one_pair_of_marks(codec: TextCodec) -> None:
    text = "<|tool_call>call:get_time{a:1}, call:get_weather{b:2}<tool_call|>"
    assert told(read(codec, text))[2] == [("get_time", '{"a": 1}'), ("get_weather", '{"b": 2}')]


def test_a_call_that_never_closed_before_the_next(codec: TextCodec) -> None:
    text = '<|tool_call>call:get_time(city:<|"|>a<|"|><|tool_call>call:get_weather{b:2}<tool_call|>'
    assert told(read(codec, text))[2] == [("get_time", '{"city": "a"}'), ("get_weather", '{"b": 2}')]


@pytest.mark.parametrize("body", ["hello there", "", "call:a b{c:1}", '<|"|>get_time<|"|>', "{a:1}"])
def test_omlx_1830_what_is_no_call_is_not_dropped(codec: TextCodec, body: str) -> None:
    text = f"<|tool_call>{body}<tool_call|>"
    assert told(read(codec, text)) == (text, "", [])
    assert told(read(codec, text.removesuffix("<tool_call|>"), cut=True)) == (f"<|tool_call>{body}", "", [])


def test_a_bare_name_is_a_call_where_it_is_declared(codec: TextCodec) -> None:
    assert told(read(codec, "<|tool_call>get_time<tool_call|>"))[2] == [("get_time", "{}")]
    assert told(read(codec, "<|tool_call>other<tool_call|>"))[0] == "<|tool_call>other<tool_call|>"


def test_a_call_that_was_cut_stays_incomplete(codec: TextCodec) -> None:
    """Completed, half of a file's content would look like all of it."""
    text = '<|tool_call>call:get_time{city:<|"|>Ro'
    assert told(read(codec, text, cut=True))[2] == [("get_time", '{"city": "Ro')]
    assert told(read(codec, text, cut=False))[2] == [("get_time", '{"city": "Ro"}')]


def test_omlx_1846_a_call_spelled_as_text_is_text(codec: TextCodec) -> None:
    text = "I would write call:get_time{a:1} or call:get_time(a=1)."
    assert told(read(codec, text)) == (text, "", [])


def test_without_tools_nothing_is_looked_for(codec: TextCodec) -> None:
    assert told(read(codec, "<|tool_call>call:get_time{a:1}<tool_call|>", tools=None)) == ("call:get_time{a:1}", "", [])


def test_stop_strings_end_the_answer_but_not_a_call(codec: TextCodec) -> None:
    text = '<|channel>thought\nan END<channel|>a<|tool_call>call:get_time{city:<|"|>END<|"|>}<tool_call|>b END c'
    assert told(read(codec, text, stops=["END"])) == ("ab ", "an END", [("get_time", '{"city": "END"}')])


def test_text_held_for_a_stop_string_comes_before_a_call(codec: TextCodec) -> None:
    assert told(read(codec, "a EN<|tool_call>call:get_time{}<tool_call|>", stops=["END"])) == (
        "a EN",
        "",
        [("get_time", "{}")],
    )


@pytest.mark.parametrize("prompt", ["<|turn>model\n<|channel>thought\n"])
def test_mlx_vlm_899_omlx_2533_a_thought_that_the_prompt_opened(codec: TextCodec, prompt: str) -> None:
    deltas = read(codec, "I know.<channel|>It is warm.", prompt=codec.encode(prompt))
    assert told(deltas) == ("It is warm.", "I know.", [])


def test_where_tokens_belong(codec: TextCodec) -> None:
    stream = ToolStream(codec, tools=["f"])
    places = []
    for token in codec.encode("a<|channel>thought\nb<channel|>c<|tool_call>call:f{}<tool_call|>d")[1:]:
        stream.push(token)
        places.append((codec.token_bytes(token), stream.in_answer))
    assert (b"<|channel>", False) in places
    assert (b"<channel|>", True) in places
    assert (b"<|tool_call>", False) in places
    assert places[-1] == (b"d", True)


def test_bytes_of_tokens(codec: TextCodec) -> None:
    ids = codec.encode(" the 🎉\n")[1:]
    assert b"".join(map(codec.token_bytes, ids)) == " the 🎉\n".encode()
    assert codec.token_bytes(10**9) == b""
