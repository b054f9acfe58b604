"""Grammars of tool calls, compiled by llguidance for the demo's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mlx_gemma_mtp
from mlx_gemma_mtp.constraints import Grammars, JsonSchema, Lark
from mlx_gemma_mtp.request import ConstraintError
from mlx_gemma_mtp.text import TextCodec
from mlx_gemma_mtp.tool_grammar import CallRules, Tool, call_grammar

MARKS = (48, 49, 52)
END = 106
WEATHER = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {
            "unit": {"enum": ["C", "F"]},
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "at": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["city"],
    },
)
TIME = Tool(name="ns.time-of")


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    codec = TextCodec.from_directory(Path(mlx_gemma_mtp.__file__).parent / "demo")
    assert codec is not None
    return codec


@pytest.fixture(scope="module")
def grammars(codec: TextCodec) -> Grammars:
    return Grammars(codec, 2048)


def holds(codec: TextCodec, grammars: Grammars, grammar: str, text: str) -> bool:
    matcher = grammars.start(Lark(grammar))
    try:
        matcher.advance([*codec.encode(text)[1:], END])
    except ConstraintError:
        return False
    return True


def call(body: str) -> str:
    return f"<|tool_call>call:{body}<tool_call|>"


@pytest.mark.parametrize(
    ("body", "ok"),
    [
        ('get_weather{city:<|"|>Pa{"r"}is\n<|"|>}', True),
        ('get_weather{at:{lat:-1.5},city:<|"|><|"|>,days:3,tags:[<|"|>a<|"|>,<|"|>b<|"|>],unit:<|"|>C<|"|>}', True),
        ('get_weather{city:<|"|>a<|"|>,unit:<|"|>K<|"|>}', False),
        ('get_weather{city:<|"|>a<|"|>,days:3.5}', False),
        ('get_weather{days:3,city:<|"|>a<|"|>}', False),
        ("get_weather{days:3}", False),
        ('get_weather{city:<|"|>a<|"|>,other:1}', False),
        ("get_weather{}", False),
        ("ns.time-of{}", True),
        ("ns.time-of{a:1}", False),
        ("other{}", False),
    ],
)
def test_required_calls(codec: TextCodec, grammars: Grammars, body: str, ok: bool) -> None:
    grammar = call_grammar([WEATHER, TIME], CallRules(), marks=MARKS)
    assert holds(codec, grammars, grammar, call(body)) is ok


def test_calls_and_text(codec: TextCodec, grammars: Grammars) -> None:
    one, text = call("ns.time-of{}"), "Hello, {x}!\n"
    must = call_grammar([TIME], CallRules(), marks=MARKS)
    single = call_grammar([TIME], CallRules(need="either", many=False), marks=MARKS)
    assert [holds(codec, grammars, must, t) for t in (one, one + one, text, text + one, "")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert [holds(codec, grammars, single, t) for t in (one, one + one, text, text + one, one + text)] == [
        True, False, True, True, False,
    ]  # fmt: skip


def test_json_or_calls(codec: TextCodec, grammars: Grammars) -> None:
    schema = JsonSchema({"type": "object", "properties": {"start": {"type": "integer"}}, "required": ["start"]})
    grammar = call_grammar([TIME], CallRules(need="either", json_answer=schema.lark), marks=MARKS)
    texts = ('{"start": 1}', call("ns.time-of{}"), "hello", '{"start": "1"}')
    assert [holds(codec, grammars, grammar, t) for t in texts] == [True, True, False, False]


def one_parameter(schema: Any, **more: Any) -> Tool:
    return Tool(name="f", parameters={"type": "object", "properties": {"a": schema}, "required": ["a"], **more})


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": ["string", "null"]}, 'null <|"|>x<|"|>', "1"),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, "true null", "1"),
        ({"const": 5}, "5", "6"),
        ({"enum": ["", None, 2, True]}, '<|"|><|"|> null 2 true', 'false <|"|>2<|"|>'),
        ({"type": "number", "nullable": True}, "1e-5 -0.1 null", "01 .5"),
        ({}, '[1,{b:[null]}] <|"|>x<|"|>', "x"),
        ({"type": "object"}, "{} {b:1,c_d:{}}", "[]"),
        ({"type": "array"}, '[] [1,<|"|>a<|"|>]', "[1,]"),
        ({"type": "string", "pattern": "^a$", "maxLength": 1}, '<|"|>bcd<|"|>', "1"),
    ],
)
def test_schemas(codec: TextCodec, grammars: Grammars, schema: Any, good: str, bad: str) -> None:
    grammar = call_grammar([one_parameter(schema)], CallRules(), marks=MARKS)
    for values, expected in ((good, True), (bad, False)):
        for value in values.split():
            assert holds(codec, grammars, grammar, call(f"f{{a:{value}}}")) is expected, value


def test_references_may_recur(codec: TextCodec, grammars: Grammars) -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "n": {"type": "integer"}}}
    tool = one_parameter({"$ref": "#/$defs/node"}, **{"$defs": {"node": node}})
    grammar = call_grammar([tool], CallRules(), marks=MARKS)
    assert holds(codec, grammars, grammar, call("f{a:{n:1,next:{next:{n:2}}}}"))
    assert not holds(codec, grammars, grammar, call("f{a:{n:1,next:1}}"))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "pattern": "^a$"}, "'pattern' at #/properties/a can't be enforced"),
        ({"type": "text"}, "'text', expected a JSON Schema type"),
        ({"$ref": "#/$defs/none"}, "which is not there"),
        ({"$ref": "http://x"}, "within the schema"),
        ({"enum": []}, "no list of alternatives"),
        ({"type": "object", "properties": [1]}, "expected an object"),
        (7, "expected an object"),
    ],
)
def test_a_strict_tool_that_can_not_be_held_is_refused(schema: Any, message: str) -> None:
    tool = Tool(name="f", parameters={"properties": {"a": schema}}, strict=True)
    with pytest.raises(ValueError, match=message) as error:
        call_grammar([tool], CallRules(), marks=MARKS)
    assert "'f'" in str(error.value)
