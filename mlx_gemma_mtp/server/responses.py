"""OpenAI's responses API, for text: bodies to jobs, updates to its events and objects."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..constraints import JsonSchema
from . import prompts
from .errors import ApiError, bad, of_validation
from .responses_schema import Item, ResponsesRequest
from .schema import Part
from .service import Job, Run, Service, usage_of
from .sse import event

_PARTS: TypeAdapter[str | list[Part]] = TypeAdapter(str | list[Part])
_ROLES = ("system", "developer", "user", "assistant")


async def responses_job(service: Service, body: ResponsesRequest) -> Job:
    """The job of a response. Raises ApiError."""
    service.check_model(body.model)
    effort = body.reasoning.effort if body.reasoning else None
    thinks, budget = prompts.thinking(effort=effort, budget=body.thinking_budget)
    spec = prompts.constraint(
        service.codec, [], choice="none", named=None, parallel=True, schema=_schema(body), budget=budget
    )
    ids = await service.render(_messages(body), thinking=thinks, tools=None)
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
        ),
        max_tokens=body.max_output_tokens,
        depth=body.depth,
        ignore_eos=body.ignore_eos,
    )


class ResponseAnswer:
    """A run's updates as a response: a reasoning item where there was a thought, then a message."""

    def __init__(self, run: Run, body: ResponsesRequest) -> None:
        self._run, self._body = run, body
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._ids = {"thinking": f"rs_{uuid.uuid4().hex}", "answer": f"msg_{uuid.uuid4().hex}"}
        self._number = -1
        self._items: list[str] = []  # kinds of the items begun so far

    def whole(self) -> dict[str, Any]:
        """The object, when the run has ended."""
        choice = self._run.choices[0]
        cut = choice.finish == "length"
        kinds = (["thinking"] if choice.thinking else []) + (["answer"] if choice.text or not choice.thinking else [])
        done = self._object("incomplete" if cut else "completed", [self._item(k, "completed") for k in kinds])
        return done | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": self._usage(),
            "mtp": self._run.report(usage_of(self._run.choices), self._body.depth),
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The stream's events; those of one update come together."""
        begun = self._object("in_progress", [])
        yield b"".join(self._event(f"response.{name}", {"response": begun}) for name in ("created", "in_progress"))
        async for update in self._run.updates():
            out: list[bytes] = []
            for kind, text in (("thinking", update.thinking), ("answer", update.text)):
                if text:
                    out += self._begin(kind)
                    name = "response.reasoning_text.delta" if kind == "thinking" else "response.output_text.delta"
                    extra: dict[str, Any] = {"logprobs": []} if kind == "answer" else {}
                    out.append(self._event(name, self._at() | {"delta": text} | extra))
            if out:
                yield b"".join(out)
        last = [] if self._items else self._begin("answer")
        last += self._end()
        whole = self.whole()
        yield b"".join([*last, self._event(f"response.{whole['status']}", {"response": whole})])

    def failed(self, error: ApiError) -> bytes:
        """The event of a failure."""
        return self._event("error", {"code": error.code, "message": error.message, "param": error.param})

    def _begin(self, kind: str) -> list[bytes]:
        if self._items and self._items[-1] == kind:
            return []
        out = self._end()
        self._items.append(kind)
        item = self._item(kind, "in_progress", empty=True)
        added = self._event("response.output_item.added", {"output_index": len(self._items) - 1, "item": item})
        part = self._event("response.content_part.added", self._at() | {"part": self._part(kind, "")})
        return [*out, added, part]

    def _end(self) -> list[bytes]:
        if not self._items:
            return []
        kind = self._items[-1]
        part = self._part(kind, self._text(kind))
        if kind == "thinking":
            done = self._event("response.reasoning_text.done", self._at() | {"text": part["text"]})
        else:
            done = self._event("response.output_text.done", self._at() | {"text": part["text"], "logprobs": []})
        item = {"output_index": len(self._items) - 1, "item": self._item(kind, "completed")}
        return [
            done,
            self._event("response.content_part.done", self._at() | {"part": part}),
            self._event("response.output_item.done", item),
        ]

    def _at(self) -> dict[str, Any]:
        return {"item_id": self._ids[self._items[-1]], "output_index": len(self._items) - 1, "content_index": 0}

    def _text(self, kind: str) -> str:
        choice = self._run.choices[0]
        return choice.thinking if kind == "thinking" else choice.text

    def _part(self, kind: str, text: str) -> dict[str, Any]:
        if kind == "thinking":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _item(self, kind: str, status: str, *, empty: bool = False) -> dict[str, Any]:
        content = [] if empty else [self._part(kind, self._text(kind))]
        if kind == "thinking":
            return {"id": self._ids[kind], "type": "reasoning", "status": status, "summary": [], "content": content}
        return {"id": self._ids[kind], "type": "message", "role": "assistant", "status": status, "content": content}

    def _object(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": body.model,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "parallel_tool_calls": True,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "max_output_tokens": body.max_output_tokens,
            "previous_response_id": None,
            "store": False,
            "tool_choice": "auto",
            "tools": [],
            "text": {"format": {"type": body.text.format.type if body.text and body.text.format else "text"}},
            "truncation": "disabled",
            "usage": None,
        }

    def _usage(self) -> dict[str, Any]:
        choice = self._run.choices[0]
        return {
            "input_tokens": choice.prompt_tokens,
            "input_tokens_details": {"cached_tokens": choice.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": choice.tokens,
            "output_tokens_details": {"reasoning_tokens": choice.thinking_tokens},
            "total_tokens": choice.prompt_tokens + choice.tokens,
        }

    def _event(self, name: str, data: dict[str, Any]) -> bytes:
        self._number += 1
        return event({"type": name, "sequence_number": self._number} | data, name)


def _schema(body: ResponsesRequest) -> JsonSchema | None:
    wanted = body.text.format if body.text else None
    if wanted is None:
        return None
    if wanted.type != "json_schema" and wanted.schema_ is not None:
        raise bad(f"text.format.schema is not for the type {wanted.type!r}", "text.format.schema", "invalid_value")
    if wanted.type == "text":
        return None
    if wanted.type == "json_schema" and wanted.schema_ is None:
        raise bad("text.format.schema is missing", "text.format.schema", "missing_parameter")
    return prompts.json_schema(wanted.schema_ if wanted.type == "json_schema" else None, "text.format.schema")


def _messages(body: ResponsesRequest) -> list[prompts.Message]:
    out: list[prompts.Message] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*out, {"role": "user", "content": body.input}]
    thought, thought_at = "", ""
    for i, item in enumerate(body.input):
        where, extra = f"input[{i}]", item.model_extra or {}
        if item.type == "reasoning":
            thought += "".join(part["text"] for part in _reasoning(extra, where))
            thought_at = where
            continue
        if item.type != "message":
            raise bad(f"{where} is of type {item.type!r}: only messages and reasoning are read here", where)
        message = _message(item, where)
        if thought:
            if message["role"] != "assistant":
                raise _stray(thought_at)
            message["reasoning_content"] = thought
        thought = ""
        out.append(message)
    if thought:
        raise _stray(thought_at)
    return out


def _stray(where: str) -> ApiError:
    return bad(f"{where}: a thought has to stand before an assistant's message", where, "invalid_value")


def _message(item: Item, where: str) -> prompts.Message:
    extra = item.model_extra or {}
    if extra.get("role") not in _ROLES:
        raise bad(f"{where}.role has to be one of {', '.join(_ROLES)}", f"{where}.role", "invalid_value")
    try:
        content = _PARTS.validate_python(extra.get("content"), strict=True)
    except ValidationError as error:
        raise of_validation([{**e, "loc": ("input", where, *e["loc"])} for e in error.errors()]) from error
    prompts.check_keys(extra, ("role", "content", "id", "status"), where)
    return {"role": extra["role"], "content": prompts.text_of(content, f"{where}.content")}


def _reasoning(extra: dict[str, Any], where: str) -> Sequence[dict[str, str]]:
    content = extra.get("content") or []
    good = isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    )
    if not good:
        raise bad(f"{where}.content is no list of texts", f"{where}.content", "invalid_value")
    # A summary or an encrypted thought isn't the thought.
    prompts.check_keys({k: v for k, v in extra.items() if v != []}, ("content", "id", "status"), where)
    for i, part in enumerate(content):
        prompts.check_keys(part, ("type", "text"), f"{where}.content[{i}]")
    return content
