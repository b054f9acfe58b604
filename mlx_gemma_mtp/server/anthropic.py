"""Anthropic's messages: bodies to jobs, updates to their events and objects."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

from ..constraints import JsonSchema
from ..text import Piece
from ..tool_calls import CallDelta, Delta
from ..tool_grammar import Tool
from . import prompts
from .anthropic_schema import CountRequest, MessageBody, MessagesRequest
from .errors import bad
from .schema import Part
from .service import Choice, Job, Run, Service
from .sse import event

_STOP = {"stop": "end_turn", "stop_string": "stop_sequence", "length": "max_tokens", "tool_calls": "tool_use"}
_EFFORTS = {"low": prompts.EFFORTS["low"], "medium": prompts.EFFORTS["medium"]}
# Clients send a thought back with its signature; this server needs none.
_SIGNATURE = "mlx-gemma-mtp"


async def count(service: Service, body: CountRequest) -> int:
    """Tokens of a prompt. Raises ApiError."""
    service.check_model(body.model)
    ids, _ = await _prompt(service, body)
    return len(ids)


async def messages_job(service: Service, body: MessagesRequest) -> Job:
    """The job of a message. Raises ApiError."""
    service.check_model(body.model)
    ids, tools = await _prompt(service, body)
    thinks, budget = _thinking(body)
    choice = body.tool_choice
    kind: prompts.Choice = "none" if not tools or (choice and choice.type == "none") else "auto"
    if choice and choice.type in ("any", "tool"):
        kind = "required"
    named = choice.name if choice and choice.type == "tool" else None
    spec = prompts.constraint(
        service.codec,
        tools,
        choice=kind,
        named=named,
        parallel=not (choice and choice.disable_parallel_tool_use),
        schema=_schema(body),
        budget=budget if thinks else None,
    )
    suppressed = service.codec.mark("<|tool_call>") if tools and kind == "none" else None
    return Job(
        prompts=[ids],
        sampling=service.sampling(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            min_p=body.min_p,
            seed=body.seed,
            repetition_penalty=body.repetition_penalty,
            min_tokens=body.min_tokens,
            constraint=spec,
            suppress_tokens=None if suppressed is None else (*service.settings.defaults.suppress_tokens, suppressed),
        ),
        max_tokens=body.max_tokens,
        stops=body.stop_sequences or [],
        depth=body.depth,
        ignore_eos=body.ignore_eos,
        tools=frozenset(t.name for t in tools) if tools and kind != "none" else None,
    )


class MessageAnswer:
    """A run's updates as a message."""

    def __init__(self, run: Run, body: MessagesRequest) -> None:
        self._run, self._body = run, body
        self._id = f"msg_{uuid.uuid4().hex[:24]}"
        self._block: dict[str, Any] | None = None
        self._index = -1

    def whole(self) -> dict[str, Any]:
        """The object, when the run has ended."""
        choice = self._run.choices[0]
        content: list[dict[str, Any]] = []
        if choice.thinking:
            content.append({"type": "thinking", "thinking": choice.thinking, "signature": _SIGNATURE})
        if choice.text or not choice.calls:
            content.append({"type": "text", "text": choice.text})
        for call in choice.calls:
            content.append({"type": "tool_use", "id": _call_id(), "name": call.name, "input": _object(call.arguments)})
        return self._message(content) | self._end(choice) | {"usage": self._usage(choice), "mtp": self._report(choice)}

    async def events(self) -> AsyncIterator[bytes]:
        """The stream's events; those of one update come together."""
        choice = self._run.choices[0]
        begun = self._message([]) | {"stop_reason": None, "stop_sequence": None, "usage": self._usage(choice)}
        yield _named({"type": "message_start", "message": begun}, {"type": "ping"})
        async for update in self._run.updates():
            if data := [e for delta in update.deltas for e in self._of(delta)]:
                yield _named(*data)
        last = [*(self._of(Piece(kind="answer", text="")) if self._block is None else ()), *self._close()]
        usage = self._usage(choice)
        end = {"type": "message_delta", "delta": self._end(choice), "usage": usage, "mtp": self._report(choice)}
        yield _named(*last, end, {"type": "message_stop"})

    def _of(self, delta: Delta) -> list[dict[str, Any]]:
        """Events of one delta: the end of a block and the start of another, where it is of another kind."""
        out: list[dict[str, Any]] = []
        if isinstance(delta, CallDelta):
            if delta.name is not None:
                out += self._open({"type": "tool_use", "id": _call_id(), "name": delta.name, "input": {}})
            inner = {"type": "input_json_delta", "partial_json": delta.arguments}
        elif delta.kind == "thinking":
            out += self._open({"type": "thinking", "thinking": "", "signature": ""}, same=True)
            inner = {"type": "thinking_delta", "thinking": delta.text}
        else:
            out += self._open({"type": "text", "text": ""}, same=True)
            inner = {"type": "text_delta", "text": delta.text}
        if next(iter(list(inner.values())[1:])):
            out.append({"type": "content_block_delta", "index": self._index, "delta": inner})
        return out

    def _open(self, block: dict[str, Any], *, same: bool = False) -> list[dict[str, Any]]:
        """Begin a block; `same`: unless one of its kind is open."""
        if same and self._block is not None and self._block["type"] == block["type"]:
            return []
        out = self._close()
        self._block, self._index = block, self._index + 1
        return [*out, {"type": "content_block_start", "index": self._index, "content_block": block}]

    def _close(self) -> list[dict[str, Any]]:
        block, self._block = self._block, None
        if block is None:
            return []
        out: list[dict[str, Any]] = []
        if block["type"] == "thinking":
            signature = {"type": "signature_delta", "signature": _SIGNATURE}
            out.append({"type": "content_block_delta", "index": self._index, "delta": signature})
        return [*out, {"type": "content_block_stop", "index": self._index}]

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._body.model,
            "content": content,
        }

    def _end(self, choice: Choice) -> dict[str, Any]:
        return {"stop_reason": _STOP[choice.finish or "stop"], "stop_sequence": choice.stop_match}

    def _usage(self, choice: Choice) -> dict[str, Any]:
        """Input tokens that a prefix cache had are counted apart: the start of a stream doesn't know of them yet."""
        return {
            "input_tokens": choice.prompt_tokens - choice.cached_tokens,
            "output_tokens": choice.tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": choice.cached_tokens,
        }

    def _report(self, choice: Choice) -> dict[str, Any]:
        return self._run.report(choice.stats, self._body.depth)


async def _prompt(service: Service, body: CountRequest) -> tuple[list[int], list[Tool]]:
    tools = [
        prompts.tool(t.name, t.description, t.input_schema, bool(t.strict), f"tools[{i}].input_schema")
        for i, t in enumerate(body.tools or [])
    ]
    choice = body.tool_choice
    if choice is not None and choice.type == "tool" and choice.name is None:
        raise bad("tool_choice.name is missing", "tool_choice")
    if choice is not None and choice.type != "tool" and choice.name is not None:
        raise bad(f"tool_choice.name is not for the type {choice.type!r}", "tool_choice.name", "invalid_value")
    if choice is not None and choice.type in ("any", "tool") and not tools:
        raise bad("tool_choice asks for a call, but there are no tools", "tool_choice")
    prompts.check_names(tools, choice.name if choice is not None and choice.type == "tool" else None)
    rendered = _system(body) + _messages(body.messages)
    prompts.check_tool_results(rendered)
    if body.messages[-1].role == "assistant":
        last = f"messages[{len(body.messages) - 1}]"
        raise bad(f"{last} is the assistant's: an answer that is begun can't be continued here", last, "unsupported")
    thinks, _ = _thinking(body)
    ids = await service.render(rendered, thinking=thinks, tools=prompts.for_template(tools))
    return ids, tools


def _system(body: CountRequest) -> list[prompts.Message]:
    text = body.system if isinstance(body.system, str) else "\n\n".join(b.text for b in body.system or [])
    return [{"role": "system", "content": text}] if text else []


def _thinking(body: CountRequest) -> tuple[bool, int | None]:
    wanted = body.thinking
    if wanted is not None and wanted.type == "enabled" and wanted.budget_tokens is None:
        raise bad("thinking.budget_tokens is missing", "thinking.budget_tokens")
    if wanted is not None and wanted.type == "disabled" and (wanted.budget_tokens or wanted.display):
        raise bad("thinking is disabled, and has a budget or a display", "thinking", "invalid_value")
    budget = wanted.budget_tokens if wanted is not None and wanted.type != "disabled" else None
    extra = body.thinking_budget if isinstance(body, MessagesRequest) else None
    if extra is not None and wanted is not None:
        raise bad("thinking and thinking_budget both say how much to think: give one of them", "thinking_budget")
    enabled = None if wanted is None else wanted.type != "disabled"
    effort = body.output_config.effort if body.output_config else None
    if enabled and budget is None and effort is not None:
        budget = _EFFORTS.get(effort)
    return prompts.thinking(enabled=enabled, budget=budget if extra is None else extra)


def _schema(body: CountRequest) -> JsonSchema | None:
    wanted = body.output_config.format if body.output_config else None
    return None if wanted is None else prompts.json_schema(wanted.schema_, "output_config.format.schema")


def _messages(given: Sequence[MessageBody]) -> list[prompts.Message]:
    out: list[prompts.Message] = []
    for i, m in enumerate(given):
        where = f"messages[{i}].content"
        if isinstance(m.content, str):
            out.append({"role": m.role, "content": m.content})
        elif m.role == "user":
            out += _user(m.content, where)
        else:
            out.append(_assistant(m.content, where))
    return out


def _user(parts: Sequence[Part], where: str) -> list[prompts.Message]:
    """Results first: they belong to the model's turn before."""
    results: list[prompts.Message] = []
    texts: list[Part] = []
    for i, part in enumerate(parts):
        if part.type != "tool_result":
            texts.append(part)
            continue
        extra, at = part.model_extra or {}, f"{where}[{i}]"
        content = extra.get("content")
        prompts.check_keys(extra, ("tool_use_id", "content", "is_error", "cache_control"), at)
        if not isinstance(extra.get("is_error", False), bool | None):
            raise bad(f"{at}.is_error is neither true nor false", f"{at}.is_error", "invalid_value")
        inner = content if isinstance(content, str) else prompts.text_of(_parts(content, at), f"{at}.content")
        # The template has no other way to say that a call failed.
        text = f"Error: {inner}" if extra.get("is_error") else inner
        results.append({"role": "tool", "tool_call_id": _text(extra, "tool_use_id", at), "content": text})
    if texts or not results:
        results.append({"role": "user", "content": prompts.text_of(texts, where)})
    return results


def _assistant(parts: Sequence[Part], where: str) -> prompts.Message:
    texts: list[Part] = []
    thought, calls = "", []
    for i, part in enumerate(parts):
        extra, at = part.model_extra or {}, f"{where}[{i}]"
        if part.type == "thinking":
            prompts.check_keys(extra, ("thinking", "signature"), at)
            thought += _text(extra, "thinking", at)
        elif part.type == "tool_use":
            prompts.check_keys(extra, ("id", "name", "input", "cache_control", "caller"), at)
            if extra.get("caller") not in (None, {"type": "direct"}):
                raise bad(f"{at}.caller: only the model itself makes calls here", f"{at}.caller", "invalid_value")
            arguments = extra.get("input")
            if not isinstance(arguments, dict):
                raise bad(f"{at}.input is no object", f"{at}.input")
            checked = prompts.arguments_of(json.dumps(arguments), f"{at}.input")
            calls.append((_text(extra, "id", at), _text(extra, "name", at), checked))
        elif part.type == "redacted_thinking":
            # Only its maker can read it, and earlier thoughts are no part of a prompt.
            prompts.check_keys(extra, ("data",), at)
        else:
            texts.append(part)
    text = prompts.text_of(texts, where)
    if calls:
        return prompts.call_message(calls, text, thought)
    return {"role": "assistant", "content": text} | ({"reasoning_content": thought} if thought else {})


def _parts(content: object, where: str) -> list[Part]:
    if content is None:
        return []
    if not isinstance(content, list):
        raise bad(f"{where}.content is no text and no list of blocks", f"{where}.content")
    for block in content:
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise bad(f"{where}.content has a block without a type", f"{where}.content")
    return [Part.model_validate(block) for block in content]


def _text(extra: dict[str, Any], key: str, where: str) -> str:
    value = extra.get(key)
    if not isinstance(value, str):
        raise bad(f"{where}.{key} is missing or no text", f"{where}.{key}")
    return value


def _object(text: str) -> dict[str, Any]:
    """A call's input; of one that was cut short there is none yet, as the stop reason says."""
    try:
        return cast(dict[str, Any], json.loads(text, parse_float=_finite))
    except (ValueError, RecursionError):
        return {}


def _finite(text: str) -> float:
    """A number that can be written as JSON again."""
    return min(max(float(text), -sys.float_info.max), sys.float_info.max)


def _call_id() -> str:
    return f"toolu_{uuid.uuid4().hex[:24]}"


def _named(*data: dict[str, Any]) -> bytes:
    return b"".join(event(d, d["type"]) for d in data)
