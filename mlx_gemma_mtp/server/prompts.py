"""From either API's messages and tools to what the chat template takes, and to constraints. Knows no HTTP.

Every error names the field, and nothing that is asked for is left out.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from ..constraints import Both, Grammar, JsonSchema, Lark, Spec, ThinkingBudget
from ..text import TextCodec
from ..tool_calls import CALL_CLOSE, CALL_OPEN, QUOTE
from ..tool_grammar import CallRules, Tool, call_grammar
from .errors import ApiError, bad
from .schema import Part

Message = dict[str, Any]
Choice = Literal["none", "auto", "required"]

_TEXT_PARTS = ("text", "input_text", "output_text")
# Hints for caches of prompts, and what an earlier answer was sent with: they change no token.
LABELS = frozenset({"cache_control", "prompt_cache_breakpoint", "annotations", "logprobs"})
_DEEPEST = 64
# How much thought goes with OpenAI's words; None: no limit.
EFFORTS: dict[str, int | None] = {
    "none": 0, "minimal": 128, "low": 512, "medium": 2048, "high": None, "xhigh": None,
}  # fmt: skip


def check_keys(extra: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raises ApiError for a field that nothing here reads; null asks for nothing."""
    for key, value in extra.items():
        if value is not None and key not in known:
            raise bad(f"unrecognized request argument: {where}.{key}", f"{where}.{key}", "unknown_parameter")


def text_of(content: str | Sequence[Part] | None, where: str) -> str:
    """The text of a content; parts that are no text are refused by name."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for i, part in enumerate(content):
        extra = part.model_extra or {}
        if part.type not in _TEXT_PARTS:
            raise bad(
                f"{where}[{i}] is a part of type {part.type!r}: this server reads text only, no images, audio or files",
                f"{where}[{i}]",
                "unsupported_content",
            )
        if not isinstance(extra.get("text"), str):
            raise bad(f"{where}[{i}].text is missing or no text", f"{where}[{i}].text", "invalid_value")
        check_keys(extra, LABELS | {"text"}, f"{where}[{i}]")
        texts.append(extra["text"])
    return "".join(texts)


def call_message(calls: Sequence[tuple[str, str, Mapping[str, Any]]], text: str, thinking: str | None) -> Message:
    """An assistant's message with calls (id, name, arguments)."""
    message: Message = {
        "role": "assistant",
        "content": text,
        "tool_calls": [
            {"id": i, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}
            for i, name, arguments in calls
        ],
    }
    return message | ({"reasoning_content": thinking} if thinking else {})


def arguments_of(text: str, where: str) -> dict[str, Any]:
    """A call's arguments from JSON text."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise bad(f"{where} is no JSON: {error}", where, "invalid_value") from error
    if not isinstance(value, dict):
        raise bad(f"{where} is no JSON object", where, "invalid_value")
    _check_depth(value, where)
    return value


def check_tool_results(messages: Sequence[Message]) -> None:
    """Every tool message has to answer a call of the assistant's message before it."""
    open_calls: set[str] = set()
    for i, message in enumerate(messages):
        if message["role"] == "tool":
            if message["tool_call_id"] not in open_calls:
                raise bad(
                    f"messages[{i}] answers the call {message['tool_call_id']!r}, "
                    "which the assistant's message before it doesn't make",
                    f"messages[{i}].tool_call_id",
                    "invalid_value",
                )
        else:
            open_calls = {call["id"] for call in message.get("tool_calls", [])}


def tool(name: str, description: str | None, parameters: Mapping[str, Any] | None, strict: bool, where: str) -> Tool:
    """A tool, its schema checked as far as the template reads it."""
    if parameters is not None:
        _check_depth(parameters, where)
        _check_schema(parameters, where)
    return Tool(name=name, description=description or "", parameters=parameters, strict=strict)


def for_template(tools: Sequence[Tool]) -> list[Message]:
    """Tools as the chat template takes them."""
    return [
        {
            "type": "function",
            "function": {
                "name": t.name,
                "description": t.description,
                "parameters": _plain(t.parameters or {"type": "object", "properties": {}}),
            },
        }
        for t in tools
    ]


def check_names(tools: Sequence[Tool], named: str | None) -> None:
    """Names have to be different, and the one that has to be called among them."""
    names = [t.name for t in tools]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise bad(f"tools: the name {twice!r} is there twice", "tools", "invalid_value")
    if named is not None and named not in names:
        raise bad(f"tool_choice: there is no tool {named!r}", "tool_choice", "invalid_value")


def constraint(
    codec: TextCodec,
    tools: Sequence[Tool],
    *,
    choice: Choice,
    named: str | None,
    parallel: bool,
    schema: JsonSchema | None,
    budget: int | None,
) -> Spec | None:
    """What the output has to hold to: a grammar, a thinking budget, both or nothing. Raises ApiError."""
    grammar: Grammar | None = schema
    if tools and choice != "none":
        held = choice == "required" or named is not None or not parallel or schema is not None
        if held or any(t.strict for t in tools):
            grammar = _calls(codec, tools, choice=choice, named=named, parallel=parallel, schema=schema)
    limit = ThinkingBudget(budget) if budget else None
    if grammar is not None and limit is not None:
        return Both(grammar, limit)
    return grammar or limit


def json_schema(schema: Mapping[str, Any] | None, where: str) -> JsonSchema:
    """A schema for the answer; None stands for any object."""
    try:
        return JsonSchema({"type": "object"} if schema is None else schema)
    except ValueError as error:
        raise ApiError(422, f"{where}: {error}", param=where, code="invalid_schema") from error


def thinking(
    *, effort: str | None = None, enabled: bool | None = None, budget: int | None = None
) -> tuple[bool, int | None]:
    """Whether to think, and how many tokens it may take (None: any number). Raises ApiError where they disagree."""
    if effort is not None and budget is not None:
        raise bad("reasoning_effort and thinking_budget both limit the thought: give one of them", "thinking_budget")
    limit = EFFORTS[effort] if effort is not None else budget
    wanted = (effort is not None or budget is not None) and limit != 0
    if enabled is not None and (effort is not None or budget is not None) and enabled != wanted:
        raise bad(
            f"enable_thinking is {str(enabled).lower()}, but the thinking budget or effort says otherwise",
            "enable_thinking",
        )
    return bool(enabled if enabled is not None else wanted), limit


def _calls(
    codec: TextCodec,
    tools: Sequence[Tool],
    *,
    choice: Choice,
    named: str | None,
    parallel: bool,
    schema: JsonSchema | None,
) -> Lark:
    marks = [codec.mark(m) for m in (CALL_OPEN, CALL_CLOSE, QUOTE)]
    opens, closes, quote = (-1 if m is None else m for m in marks)
    if min(opens, closes, quote) < 0:
        raise ApiError(422, "this model's vocabulary has no marks for tool calls", param="tools", code="unsupported")
    must = choice == "required" or named is not None
    rules = CallRules(
        need="call" if must else "either",
        many=parallel and named is None,
        json_answer=None if schema is None else schema.lark,
    )
    try:
        offered = [t for t in tools if named is None or t.name == named]
        return Lark(call_grammar(offered, rules, marks=(opens, closes, quote)))
    except ValueError as error:
        raise ApiError(422, str(error), param="tools", code="invalid_schema") from error


def _check_depth(value: object, where: str) -> None:
    layer, depth = [value], 0
    while layer:
        depth += 1
        if depth > _DEEPEST:
            raise bad(f"{where} is nested more than {_DEEPEST} deep", where, "invalid_value")
        layer = [
            inner
            for outer in layer
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]


def _check_schema(schema: object, where: str) -> None:
    """What the template walks through has to have the form that it expects."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise bad(f"{where} is no JSON Schema, expected an object", where, "invalid_value")
    properties = schema.get("properties")
    if properties is not None:
        if not isinstance(properties, dict):
            raise bad(f"{where}.properties is no object", f"{where}.properties", "invalid_value")
        for name, inner in properties.items():
            _check_schema(inner, f"{where}.properties.{name}")
    if "items" in schema:
        _check_schema(schema["items"], f"{where}.items")
    options = schema.get("anyOf")
    for i, inner in enumerate(options if isinstance(options, list) else []):
        _check_schema(inner, f"{where}.anyOf[{i}]")
    required = schema.get("required")
    if required is not None and not (isinstance(required, list) and all(isinstance(r, str) for r in required)):
        raise bad(f"{where}.required is no list of names", f"{where}.required", "invalid_value")
    kind = schema.get("type")
    kinds = kind if isinstance(kind, list) else [] if kind is None else [kind]
    if not all(isinstance(k, str) for k in kinds):
        raise bad(f"{where}.type is no type's name, or list of them", f"{where}.type", "invalid_value")


def _plain(schema: Any) -> Any:
    """A schema in the words that the template knows: it drops `anyOf`, and garbles a list of types."""
    if isinstance(schema, bool):
        return {}
    out = {k: v for k, v in schema.items() if k != "anyOf"}
    options = schema.get("anyOf")
    if isinstance(options, list):
        real = [o for o in options if isinstance(o, dict) and o.get("type") != "null"]
        out = {**(_plain(real[0]) if len(real) == 1 else {"anyOf": options}), **out}
        if len(real) < len(options) and len(real) == 1:
            out["nullable"] = True
    kinds = out.get("type")
    if isinstance(kinds, list):
        real_kinds = [k for k in kinds if k != "null"]
        if len(real_kinds) < len(kinds):
            out["nullable"] = True
        out["type"] = real_kinds[0] if real_kinds else "null"
    if isinstance(out.get("properties"), dict):
        out["properties"] = {name: _plain(inner) for name, inner in out["properties"].items()}
    if isinstance(out.get("items"), dict):
        out["items"] = _plain(out["items"])
    return out
