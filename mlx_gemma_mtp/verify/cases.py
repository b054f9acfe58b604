"""Requests to verify: read from JSON lines, checked, and given a seed where they need one."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any

from ..constraints import Both, Grammar, JsonSchema, Lark, Regex, ThinkingBudget
from ..request import SamplingParams
from ..runtime import Runtime
from ..stops import checked_stops
from ..text import TextCodec

BUILT_IN = Path(__file__).parents[1] / "data" / "verify_prompts.jsonl"

_SEED = 20_000
_HIGHEST_RANDOM_ID = 200_000  # above are the marks of images and sounds


class CaseError(ValueError):
    """A request that can't be verified: names the line, the field, what was found and what was expected."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request to decode in every way. `text` is what is shown of it; `seeded`: the seed is our own."""

    name: str
    text: str
    tokens: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seeded: bool = False
    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    choice: int = 0

    def __post_init__(self) -> None:
        if self.sampling.contract != "exact":
            raise ValueError(f"request {self.name}: seed is None, expected one: sampled tokens are compared")


_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_COUNTS = ("top_k", "seed", "min_tokens")
_PROMPTS = ("prompt", "tokens", "messages")
_GRAMMARS = ("response_format", "regex", "grammar")
_ENDS = ("max_tokens", "max_completion_tokens", "stop", "stop_token_ids", "ignore_eos")
_OTHERS = ("id", "n", "logit_bias", "suppress_tokens", "logprobs", "top_logprobs", "thinking_budget", "tools")
_FIELDS = (*_PROMPTS, *_NUMBERS, *_COUNTS, *_GRAMMARS, *_ENDS, *_OTHERS)
_WITHOUT_EFFECT = frozenset({"model", "stream", "stream_options", "user", "metadata", "store", "service_tier"})
"""Fields of OpenAI's requests that change no token: they may be there."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request is read against."""

    vocab_size: int
    max_positions: int
    max_tokens: int = 64

    @staticmethod
    def of(rt: Runtime, max_tokens: int = 64) -> Limits:
        """Those of a pair; `max_tokens` is for requests that don't say."""
        config = rt.config
        return Limits(vocab_size=config.vocab_size, max_positions=config.max_positions, max_tokens=max_tokens)


def read_cases(lines: Iterable[str], codec: TextCodec | None, limits: Limits, *, source: str = "") -> list[Case]:
    """Cases of JSON lines: a prompt, tokens or messages, and parameters under OpenAI's (else vLLM's) names.

    Unlike OpenAI's, a request without `temperature` is greedy. A prompt goes through the chat template if there is
    one. `regex`, `grammar` (Lark) and `thinking_budget` stand beside `response_format`; each of `n` choices is a case.
    Blank lines are skipped, null is the same as leaving a field out. Raises CaseError.
    """
    cases = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            cases += _cases(_object(line), number, codec, limits)
        except ValueError as error:
            raise CaseError(f"{source}{', ' if source else ''}line {number}: {error}") from error
    if not cases:
        raise CaseError(f"{source or 'the file'} has no requests, expected one JSON object per line")
    return cases


def built_in_cases(codec: TextCodec | None, limits: Limits) -> list[Case]:
    """The bundled requests. Without a tokenizer, random ids (the same everywhere) take the place of their texts."""
    lines = BUILT_IN.read_text(encoding="utf-8").splitlines()
    if codec is None:
        lines = [json.dumps(_without_text(json.loads(line), limits.vocab_size)) for line in lines]
    elif not codec.has_chat_template:
        lines = [json.dumps(_as_prompt(json.loads(line))) for line in lines]
    return read_cases(lines, codec, limits, source=BUILT_IN.name)


def _without_text(data: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    text = _as_prompt(data).pop("prompt")
    draw, top = random.Random(text), min(vocab_size, _HIGHEST_RANDOM_ID)
    rest = {k: v for k, v in data.items() if k not in _PROMPTS}
    return {**rest, "tokens": [draw.randrange(3, top) for _ in range(1 + len(text) // 4)]}


def _as_prompt(data: dict[str, Any]) -> dict[str, Any]:
    if "messages" not in data:
        return data
    rest = {k: v for k, v in data.items() if k != "messages"}
    return {**rest, "prompt": "\n".join(m["content"] for m in data["messages"])}


def _object(line: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"field {max(names, key=names.count)!r} is there twice")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        data = json.loads(line, object_pairs_hook=once, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: nested too deep") from error
    if not isinstance(data, dict):
        raise ValueError(f"{type(data).__name__}, expected a JSON object")
    return data


def _cases(data: dict[str, Any], number: int, codec: TextCodec | None, limits: Limits) -> list[Case]:
    data = {name: value for name, value in data.items() if name not in _WITHOUT_EFFECT}
    if unknown := [name for name in data if name not in _FIELDS]:
        raise ValueError(f"field {unknown[0]!r} isn't supported here, expected one of {', '.join(_FIELDS)}")
    data = {name: value for name, value in data.items() if value is not None}
    sampling = _sampling(data, limits.vocab_size)
    seeded = sampling.contract != "exact"
    if seeded:
        sampling = replace(sampling, seed=_SEED + number)
    text, tokens = _prompt(data, codec, limits.vocab_size)
    max_tokens = _max_tokens(data, limits.max_tokens)
    if len(tokens) + max_tokens > limits.max_positions:
        raise ValueError(
            f"prompt and max_tokens are {len(tokens)} + {max_tokens} tokens, expected at most "
            f"{limits.max_positions} together"
        )
    stop = data.get("stop", [])
    if stop and codec is None:
        raise ValueError("stop needs a tokenizer, which this model lacks: give stop_token_ids")
    count = _typed(data, "n", int, "a count of at least 1", 1)
    if count < 1:
        raise ValueError(f"n is {count}, expected a count of at least 1")
    name = _typed(data, "id", str, "a text", f"line {number}")
    return [
        Case(
            name=name if count == 1 else f"{name}, choice {choice}",
            text=text,
            tokens=tokens,
            sampling=sampling,
            seeded=seeded,
            max_tokens=max_tokens,
            stop=checked_stops(_typed(data, "stop", str | list, "a text or a list of texts", [])),
            stop_ids=tuple(_ids(data, "stop_token_ids", limits.vocab_size)),
            ignore_eos=_typed(data, "ignore_eos", bool, "true or false", False),
            choice=choice,
        )
        for choice in range(count)
    ]


def _typed(data: Mapping[str, Any], name: str, kind: type | UnionType, expected: str, default: Any) -> Any:
    value = data.get(name, default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, bool | int)):
        raise ValueError(f"{name} is {value!r}, expected {expected}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, expected {expected}")
    return value


def _prompt(data: Mapping[str, Any], codec: TextCodec | None, vocab_size: int) -> tuple[str, tuple[int, ...]]:
    """What to show of the prompt, and its ids."""
    given = [name for name in _PROMPTS if name in data]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ValueError(f"{found} of prompt, tokens and messages is there, expected exactly one")
    if "tools" in data and given != ["messages"]:
        raise ValueError(f"tools are there beside {given[0]}, expected them with messages")
    if given == ["tokens"]:
        ids = _ids(data, "tokens", vocab_size)
        if not ids:
            raise ValueError("tokens is empty, expected at least one token id")
        return " ".join(map(str, ids)), tuple(ids)
    if codec is None:
        raise ValueError(f"{given[0]} needs a tokenizer, which this model lacks: give tokens")
    if given == ["messages"]:
        messages = _typed(data, "messages", list, "a list of messages", [])
        ids = codec.render(messages, tools=_typed(data, "tools", list, "a list of tools", []) or None)
        return json.dumps(messages, ensure_ascii=False), tuple(ids)
    text = _typed(data, "prompt", str, "a text", "")
    ids = codec.render([{"role": "user", "content": text}]) if codec.has_chat_template else codec.encode(text)
    if not ids:
        raise ValueError("prompt is empty, expected a text")
    return text, tuple(ids)


def _ids(data: Mapping[str, Any], name: str, vocab_size: int) -> list[int]:
    values: list[int] = _typed(data, name, list, "a list of token ids", [])
    for value in values:
        if type(value) is not int or not 0 <= value < vocab_size:
            raise ValueError(f"{name} has {value!r}, expected token ids from 0 to {vocab_size - 1}")
    return values


def _max_tokens(data: Mapping[str, Any], default: int) -> int:
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in data]
    if len(names) == 2:
        raise ValueError("max_tokens and max_completion_tokens are the same: expected one of them")
    name = names[0] if names else "max_tokens"
    count: int = _typed(data, name, int, "a count of at least 1", default)
    if count < 1:
        raise ValueError(f"{name} is {count}, expected a count of at least 1")
    return count


def _sampling(data: Mapping[str, Any], vocab_size: int) -> SamplingParams:
    fields: dict[str, Any] = {}
    for name in _NUMBERS:
        if name in data:
            fields[name] = float(_typed(data, name, int | float, "a number", 0))
    for name in _COUNTS:
        if name in data:
            fields[name] = _typed(data, name, int, "a whole number", 0)
    if "suppress_tokens" in data:
        fields["suppress_tokens"] = tuple(_ids(data, "suppress_tokens", vocab_size))
    if "logit_bias" in data:
        fields["logit_bias"] = _bias(_typed(data, "logit_bias", dict, "an object", {}), vocab_size)
    return SamplingParams(**fields, logprobs=_logprobs(data), constraint=_constraint(data))


def _logprobs(data: Mapping[str, Any]) -> int | None:
    """`logprobs` is true beside `top_logprobs`, as in chats, or a count, as in completions."""
    asked = _typed(data, "logprobs", bool | int, "true, false or a count", False) if "logprobs" in data else False
    top: int = _typed(data, "top_logprobs", int, "a count", 0)
    if asked is False or asked is True:
        if top and not asked:
            raise ValueError(f"top_logprobs is {top} without logprobs, expected logprobs to be true")
        return top if asked else None
    if "top_logprobs" in data:
        raise ValueError(f"logprobs is {asked} beside top_logprobs, expected true or one of them")
    return int(asked)


def _constraint(data: Mapping[str, Any]) -> object | None:
    given = [name for name in _GRAMMARS if name in data]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are there, expected one of them")
    grammar = _grammar(given[0], data) if given else None
    if "thinking_budget" not in data:
        return grammar
    budget = ThinkingBudget(_typed(data, "thinking_budget", int, "a count", 0))
    return budget if grammar is None else Both(grammar, budget)


def _grammar(name: str, data: Mapping[str, Any]) -> Grammar | None:
    if name != "response_format":
        text = _typed(data, name, str, "a text", "")
        return Regex(text) if name == "regex" else Lark(text)
    wanted = _typed(data, name, dict, "an object", {})
    kind = wanted.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return JsonSchema({"type": "object"})
    schema = wanted.get("json_schema")
    if kind != "json_schema" or not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
        raise ValueError(
            f"response_format is {wanted!r}, expected text, json_object, or json_schema with a schema in json_schema"
        )
    return JsonSchema(schema["schema"])


def _bias(given: Mapping[str, Any], vocab_size: int) -> dict[int, float]:
    bias = {}
    for name in given:
        if not (name.isascii() and name.isdigit() and int(name) < vocab_size):
            raise ValueError(f"logit_bias has token id {name!r}, expected 0 to {vocab_size - 1}")
        bias[int(name)] = float(_typed(given, name, int | float, "a number, as logit_bias of that token", 0))
    return bias
