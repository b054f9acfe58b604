"""Grammars of outputs that call tools: from tools' JSON Schemas to Lark. Knows no HTTP, no MLX, and compiles nothing.

The grammar holds Gemma's format, the tools' names and the arguments' types, names, enums and required keys. Keys come
sorted, as the chat template writes them. Of a tool that is not `strict`, other keywords are advice; a strict one that
uses them is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_ANNOTATIONS = frozenset(
    "$schema $id $comment $defs definitions title description default deprecated readOnly writeOnly examples "
    "additionalProperties".split()
)
_HELD = frozenset("type enum const properties required items anyOf oneOf nullable $ref".split())
_MAX_RULES = 2000
_COMMON = r"""
value: string | NUMBER | "true" | "false" | "null" | list | object
list: "[" (value ("," value)*)? "]"
object: "{" (KEY ":" value ("," KEY ":" value)*)? "}"
KEY: /[A-Za-z_][A-Za-z0-9_.-]*/
NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/
INTEGER: /-?(0|[1-9][0-9]*)/
TEXT: /(?s:.+)/
"""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function on offer. `parameters` is a JSON Schema of an object; None: it takes none."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class CallRules:
    """What an output may be: text, calls, or text and then calls.

    `need`: "call" (calls alone), or "either" (text, a `schema`'s JSON, or calls). `many`: more than one call.
    """

    need: Literal["call", "either"] = "call"
    many: bool = True
    json_answer: str | None = None


def call_grammar(tools: Sequence[Tool], rules: CallRules, *, marks: tuple[int, int, int]) -> str:
    """A Lark grammar; `marks` are the ids of `<|tool_call>`, `<tool_call|>` and `<|"|>`.

    `json_answer` is a Lark grammar of its own, whose start symbol is `start`. Raises ValueError, naming the tool.
    """
    opens, closes, quote = (f"<[{i}]>" for i in marks)
    writer = _Rules(quote)
    calls = [f"{opens} {_literal('call:' + tool.name)} {writer.arguments(tool)} {closes}" for tool in tools]
    lines = [f"call: {' | '.join(calls)}", f"calls: call{'+' if rules.many else ''}"]
    if rules.need == "call":
        lines.append("start: calls")
    elif rules.json_answer is None:
        lines.append("start: TEXT? calls?")
    else:
        lines += ["start: answer | calls", rules.json_answer.replace("start:", "answer:", 1)]
    return "\n".join([*lines, f"string: {quote} TEXT? {quote}", *writer.lines]) + _COMMON


class _Rules:
    """Rules for schemas, made as they are met; a `$ref` is a rule of its own, so it may recur."""

    def __init__(self, quote: str) -> None:
        self.lines: list[str] = []
        self._quote = quote
        self._refs: dict[str, str] = {}
        self._tool = Tool(name="")

    def arguments(self, tool: Tool) -> str:
        """The rule of a tool's arguments."""
        self._tool, self._refs = tool, {}
        schema = tool.parameters or {"type": "object", "properties": {}}
        if "properties" not in schema and schema.get("type", "object") == "object" and "$ref" not in schema:
            return "object" if schema.get("additionalProperties", True) is not False and len(schema) > 1 else '"{}"'
        return self._schema(schema, "#")

    def _rule(self, body: str) -> str:
        name = f"r{len(self.lines)}"
        self.lines.append(f"{name}: {body}")
        if len(self.lines) > _MAX_RULES:
            raise ValueError(f"tool {self._tool.name!r}: its parameters need more than {_MAX_RULES} rules")
        return name

    def _schema(self, schema: object, where: str) -> str:
        """A Lark expression for a schema, to be used in brackets of its own."""
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, Mapping):
            raise ValueError(f"tool {self._tool.name!r}: the schema at {where} is {schema!r}, expected an object")
        self._check(schema, where)
        if "$ref" in schema:
            return self._ref(schema["$ref"], where)
        if "const" in schema:
            return self._constant(schema["const"])
        if "enum" in schema:
            return self._rule(" | ".join(self._constant(v) for v in schema["enum"]))
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self._rule(" | ".join(self._schema(s, f"{where}/{key}/{i}") for i, s in enumerate(schema[key])))
        kinds = schema.get("type", "object" if "properties" in schema else None)
        if kinds is None:
            return "value"
        parts = [self._kind(kind, schema, where) for kind in (kinds if isinstance(kinds, list) else [kinds])]
        if schema.get("nullable"):
            parts.append('"null"')
        return parts[0] if len(parts) == 1 else self._rule(" | ".join(parts))

    def _check(self, schema: Mapping[str, Any], where: str) -> None:
        unknown = [k for k in schema if k not in _HELD | _ANNOTATIONS]
        if self._tool.strict and unknown:
            raise ValueError(f"tool {self._tool.name!r} is strict, but {unknown[0]!r} at {where} can't be enforced")
        for key in ("enum", "anyOf", "oneOf"):
            if key in schema and (not isinstance(schema[key], list) or not schema[key]):
                raise ValueError(f"tool {self._tool.name!r}: {key} at {where} is no list of alternatives")

    def _kind(self, kind: object, schema: Mapping[str, Any], where: str) -> str:
        if kind == "string":
            return "string"
        if kind == "array":
            item = self._schema(schema.get("items", True), f"{where}/items")
            return self._rule(f'"[" ({item} ("," {item})*)? "]"')
        if kind == "object":
            return self._object(schema, where)
        simple = {"integer": "INTEGER", "number": "NUMBER", "boolean": '("true" | "false")', "null": '"null"'}
        if not isinstance(kind, str) or kind not in simple:
            raise ValueError(f"tool {self._tool.name!r}: type at {where} is {kind!r}, expected a JSON Schema type")
        return simple[kind]

    def _object(self, schema: Mapping[str, Any], where: str) -> str:
        properties = schema.get("properties")
        if properties is None:
            return "object"
        if not isinstance(properties, Mapping):
            raise ValueError(f"tool {self._tool.name!r}: properties at {where} is {properties!r}, expected an object")
        required = schema.get("required", [])
        if not isinstance(required, list):
            raise ValueError(f"tool {self._tool.name!r}: required at {where} is {required!r}, expected a list of names")
        names = sorted(properties, key=str.lower)
        # Two chains, from the last key to the first: `bare` where none was written before, `rest` where one was.
        bare, rest = '""', '""'
        for name in reversed(names):
            item = f"{_literal(name + ':')} {self._schema(properties[name], f'{where}/properties/{name}')}"
            optional = name not in required
            after = rest
            rest = self._rule(f'"," {item} {after}' + (f" | {after}" if optional else ""))
            bare = self._rule(f"{item} {after}" + (f" | {bare}" if optional else ""))
        return self._rule(f'"{{" {bare} "}}"')

    def _constant(self, value: object) -> str:
        if isinstance(value, str):
            return f"({self._quote} {_literal(value)} {self._quote})" if value else f"({self._quote} {self._quote})"
        if isinstance(value, Mapping | list):
            raise ValueError(f"tool {self._tool.name!r}: the constant {value!r} is no text, number, boolean or null")
        return _literal(json.dumps(value))

    def _ref(self, ref: object, where: str) -> str:
        found: object = self._tool.parameters
        if not isinstance(ref, str) or not ref.startswith("#"):
            raise ValueError(f"tool {self._tool.name!r}: $ref at {where} is {ref!r}, expected one within the schema")
        if ref in self._refs:
            return self._refs[ref]
        for part in ref.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, Mapping) or part not in found:
                raise ValueError(f"tool {self._tool.name!r}: $ref at {where} names {ref!r}, which is not there")
            found = found[part]
        name = self._rule("")  # its place first: it may refer to itself
        self._refs[ref] = name
        self.lines[int(name[1:])] = f"{name}: {self._schema(found, ref)}"
        return name


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
