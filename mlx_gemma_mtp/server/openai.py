"""OpenAI's chat completions and completions: bodies to jobs, updates to their chunks and objects."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from ..constraints import JsonSchema
from ..request import TokenLogprob
from ..text import Piece, TextCodec
from ..tool_calls import CallDelta
from . import prompts
from .errors import bad
from .openai_schema import ChatRequest, CompletionRequest, Message, Sampled
from .service import Choice, Job, Run, Service, Update, usage_of
from .sse import continued, event, event_head

_FINISH = {"stop": "stop", "stop_string": "stop", "length": "length", "tool_calls": "tool_calls"}


async def chat_job(service: Service, body: ChatRequest) -> Job:
    """The job of a chat completion. Raises ApiError."""
    service.check_model(body.model)
    _check_stream(body)
    tools = [
        prompts.tool(f.name, f.description, f.parameters, bool(f.strict), f"tools[{i}].function.parameters")
        for i, f in enumerate(t.function for t in body.tools or [])
    ]
    choice, named = _tool_choice(body, bool(tools))
    prompts.check_names(tools, named)
    thinks, budget = _thinking(body)
    codec = service.codec
    spec = prompts.constraint(
        codec,
        tools,
        choice=choice,
        named=named,
        parallel=body.parallel_tool_calls is not False,
        schema=_schema(body),
        budget=budget,
    )
    ids = await service.render(messages(body.messages), thinking=thinks, tools=prompts.for_template(tools))
    if body.top_logprobs is not None and not body.logprobs:
        raise bad("top_logprobs needs logprobs: true", "top_logprobs")
    suppressed = codec.mark("<|tool_call>") if tools and choice == "none" else None
    return Job(
        prompts=[ids],
        sampling=service.sampling(
            **_sampling(body, codec),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            constraint=spec,
            suppress_tokens=None if suppressed is None else (*service.settings.defaults.suppress_tokens, suppressed),
        ),
        max_tokens=_max_tokens(body),
        n=body.n or 1,
        stops=_stops(body),
        depth=body.depth,
        ignore_eos=body.ignore_eos,
        tools=frozenset(t.name for t in tools) if tools and choice != "none" else None,
    )


async def completion_job(service: Service, body: CompletionRequest) -> Job:
    """The job of a completion. Raises ApiError."""
    service.check_model(body.model)
    _check_stream(body)
    given = body.prompt
    texts = [given] if isinstance(given, str) else given
    if texts and isinstance(texts[0], int):
        texts = [texts]
    if not texts:
        raise bad("prompt is empty", "prompt", "invalid_value")
    ids = [t if isinstance(t, list) else await service.text(service.codec.encode, t) for t in texts]
    if not all(ids):
        raise bad("prompt has an empty list of tokens", "prompt", "invalid_value")
    if body.thinking_budget is not None:
        raise bad("thinking_budget is for chats; a completion's prompt says itself whether to think", "thinking_budget")
    if len(ids) * (body.n or 1) > 128:
        raise bad("prompts and n ask for more than 128 outputs", "n", "invalid_value")
    return Job(
        prompts=ids,
        sampling=service.sampling(**_sampling(body, service.codec), logprobs=body.logprobs),
        max_tokens=16 if body.max_tokens is None else body.max_tokens,
        n=body.n or 1,
        stops=_stops(body),
        depth=body.depth,
        ignore_eos=body.ignore_eos,
    )


def messages(given: Sequence[Message]) -> list[prompts.Message]:
    """Messages as the chat template takes them. Raises ApiError, naming the message."""
    out: list[prompts.Message] = []
    for i, m in enumerate(given):
        where = f"messages[{i}]"
        text = prompts.text_of(m.content, f"{where}.content")
        if m.content is None and not (m.role == "assistant" and m.tool_calls):
            raise bad(f"{where}.content is missing", f"{where}.content", "missing_parameter")
        if m.tool_calls and m.role != "assistant":
            raise bad(f"{where}.tool_calls: only an assistant's message may have calls", f"{where}.tool_calls")
        if (m.role == "tool") != (m.tool_call_id is not None):
            raise bad(
                f"{where}.tool_call_id: a tool's message needs one, and no other has one", f"{where}.tool_call_id"
            )
        thought = _thought(m, where)
        if m.tool_calls:
            calls = [
                (
                    c.id,
                    c.function.name,
                    prompts.arguments_of(c.function.arguments, f"{where}.tool_calls[{j}].arguments"),
                )
                for j, c in enumerate(m.tool_calls)
            ]
            out.append(prompts.call_message(calls, text, thought))
        elif m.role == "tool":
            out.append({"role": "tool", "tool_call_id": m.tool_call_id, "content": text})
        else:
            out.append({"role": m.role, "content": text} | ({"reasoning_content": thought} if thought else {}))
    prompts.check_tool_results(out)
    return out


def _thought(m: Message, where: str) -> str | None:
    """What a message says was thought; both names for it are in use."""
    thought = m.reasoning_content or m.reasoning
    if thought and m.role != "assistant":
        field = f"{where}.reasoning_content"
        raise bad(f"{field}: only an assistant's message may have a thought", field, "invalid_value")
    if m.reasoning_content and m.reasoning and m.reasoning_content != m.reasoning:
        raise bad(f"{where}: reasoning_content and reasoning differ", f"{where}.reasoning", "invalid_value")
    return thought


class ChatAnswer:
    """A run's updates as a chat completion."""

    def __init__(self, run: Run, body: ChatRequest, codec: TextCodec) -> None:
        self._run, self._body, self._codec = run, body, codec
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._call_ids: dict[tuple[int, int], str] = {}
        self._head = event_head(self._object("chat.completion.chunk"))

    def whole(self) -> dict[str, Any]:
        """The object, when the run has ended."""
        choices = self._run.choices
        return self._object("chat.completion") | {
            "choices": [self._choice(c) for c in choices],
            "usage": usage(choices),
            "mtp": self._run.report(usage_of(choices), self._body.depth),
        }

    async def chunks(self) -> AsyncIterator[bytes]:
        """The stream's events; those of one update come together."""
        options, choices = self._body.stream_options, self._run.choices
        with_usage, with_mtp = (options.include_usage, options.include_mtp) if options else (False, False)
        empty: dict[str, Any] = {"usage": None} if with_usage else {}
        begin = {"role": "assistant", "content": ""}
        yield b"".join(self._chunk(choice.index, begin, None, empty) for choice in choices)
        async for update in self._run.updates():
            out = b""
            more = empty | {"mtp": progress(update)} if with_mtp else empty
            delta, logprobs = self._delta(update), self._logprobs(update.logprobs)
            if delta or logprobs or with_mtp:
                if logprobs:
                    delta.setdefault("content", "")
                out = self._chunk(update.choice.index, delta, None, more, logprobs)
            if update.choice.finish is not None:
                report = {"mtp": self._run.report(update.choice.stats, self._body.depth)}
                out += self._chunk(update.choice.index, {}, _FINISH[update.choice.finish], empty | report)
            if out:
                yield out
        end = b""
        if with_usage:
            report = {"usage": usage(choices), "mtp": self._run.report(usage_of(choices), self._body.depth)}
            end = continued(self._head, {"choices": []} | report)
        yield end + event("[DONE]")

    def _object(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._body.model,
            "system_fingerprint": None,
        }

    def _choice(self, choice: Choice) -> dict[str, Any]:
        calls = [
            self._call(choice.index, i, {"name": c.name, "arguments": c.arguments}) for i, c in enumerate(choice.calls)
        ]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": choice.text if choice.text or not calls else None,
            "refusal": None,
        }
        if choice.thinking:
            message["reasoning_content"] = choice.thinking
        if calls:
            message["tool_calls"] = calls
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs) if self._body.logprobs else None,
            "finish_reason": _FINISH[choice.finish or "stop"],
        }

    def _call(self, choice: int, index: int, function: Mapping[str, str]) -> dict[str, Any]:
        call_id = self._call_ids.setdefault((choice, index), f"call_{uuid.uuid4().hex[:24]}")
        return {"id": call_id, "type": "function", "function": dict(function)}

    def _delta(self, update: Update) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if thought := update.thinking:
            delta["reasoning_content"] = thought
        if text := update.text:
            delta["content"] = text
        calls: dict[int, dict[str, Any]] = {}
        for d in update.deltas:
            if not isinstance(d, CallDelta):
                continue
            if d.name is not None:
                begun = self._call(update.choice.index, d.index, {"name": d.name, "arguments": d.arguments})
                calls[d.index] = {"index": d.index, **begun}
            elif d.index in calls:
                calls[d.index]["function"]["arguments"] += d.arguments
            else:
                calls[d.index] = {"index": d.index, "function": {"arguments": d.arguments}}
        if calls:
            delta["tool_calls"] = list(calls.values())
        return delta

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not logprobs and not self._body.logprobs:
            return None
        content = [
            self._token(p.token, p.logprob) | {"top_logprobs": [self._token(t, x) for t, x in p.top]} for p in logprobs
        ]
        return {"content": content, "refusal": None} if content or self._body.logprobs else None

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._codec.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        finish: str | None,
        more: Mapping[str, Any],
        logprobs: Mapping[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return continued(self._head, {"choices": [choice], **more})


class CompletionAnswer:
    """A run's updates as a completion. Thoughts are text like any other, their marks left out."""

    def __init__(self, run: Run, body: CompletionRequest, codec: TextCodec) -> None:
        self._run, self._body, self._codec = run, body, codec
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._offsets = [0] * len(run.choices)
        self._texts = [""] * len(run.choices)
        self._tokens: list[list[TokenLogprob]] = [[] for _ in run.choices]
        self._head = event_head(self._object())

    def whole(self) -> dict[str, Any]:
        """The object, when the run has ended."""
        choices = self._run.choices
        given = [
            {
                "index": c.index,
                "text": self._texts[c.index],
                "logprobs": self._logprobs(c.index, self._tokens[c.index]),
                "finish_reason": _FINISH[c.finish or "stop"],
            }
            for c in choices
        ]
        report = self._run.report(usage_of(choices), self._body.depth)
        return self._object() | {"choices": given, "usage": usage(choices), "mtp": report}

    async def collect(self) -> None:
        """Read the run to its end."""
        async for update in self._run.updates():
            self._texts[update.choice.index] += _all_text(update)
            self._tokens[update.choice.index] += update.logprobs

    async def chunks(self) -> AsyncIterator[bytes]:
        """The stream's events."""
        options, choices = self._body.stream_options, self._run.choices
        empty: dict[str, Any] = {"usage": None} if options and options.include_usage else {}
        async for update in self._run.updates():
            c, text = update.choice, _all_text(update)
            if not (text or update.logprobs or c.finish or (options and options.include_mtp)):
                continue
            choice = {
                "index": c.index,
                "text": text,
                "logprobs": self._logprobs(c.index, update.logprobs),
                "finish_reason": None if c.finish is None else _FINISH[c.finish],
            }
            more = {"mtp": self._run.report(c.stats, self._body.depth)} if c.finish else {}
            if options and options.include_mtp:
                more["mtp"] = progress(update) | more.get("mtp", {})
            yield continued(self._head, {"choices": [choice], **empty, **more})
        end = continued(self._head, {"choices": [], "usage": usage(choices)}) if empty else b""
        yield end + event("[DONE]")

    def _object(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._body.model}

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        texts = [self._text(p.token) for p in logprobs]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(p.logprob) for p in logprobs],
            "top_logprobs": [{self._text(t): _finite(x) for t, x in p.top} for p in logprobs],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return self._codec.token_bytes(token).decode("utf-8", "replace")


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """What a request took."""
    stats = usage_of(choices)
    prompt, completion = sum(c.prompt_tokens for c in choices), sum(c.tokens for c in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "completion_tokens_details": {
            "reasoning_tokens": sum(c.thinking_tokens for c in choices),
            "accepted_prediction_tokens": stats.accepted,
            "rejected_prediction_tokens": stats.drafted - stats.accepted,
        },
        "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in choices)},
    }


def progress(update: Update) -> dict[str, Any]:
    """Who proposed which text of an update, and the counters so far."""
    pieces = [{"kind": d.kind, "text": d.text, "drafted": d.drafted} for d in update.deltas if isinstance(d, Piece)]
    stats = update.choice.stats
    counters = {"rounds": stats.rounds, "drafted": stats.drafted, "accepted": stats.accepted}
    return {"pieces": pieces, "ids": list(update.ids), "tokens": update.choice.tokens, **counters}


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI says -9999 for it."""
    return max(logprob, -9999.0)


def _all_text(update: Update) -> str:
    return "".join(d.text for d in update.deltas if isinstance(d, Piece))


def _check_stream(body: Sampled) -> None:
    if body.stream_options is not None and not body.stream:
        raise bad("stream_options is for streams: it needs stream: true", "stream_options", "invalid_value")


def _max_tokens(body: ChatRequest) -> int | None:
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise bad("max_tokens and max_completion_tokens are the same: give one of them", "max_tokens", "invalid_value")
    return body.max_completion_tokens if body.max_tokens is None else body.max_tokens


def _stops(body: Sampled) -> list[str]:
    return [body.stop] if isinstance(body.stop, str) else list(body.stop or [])


def _sampling(body: Sampled, codec: TextCodec) -> dict[str, Any]:
    bias = None
    if body.logit_bias:
        bad_key = next((k for k in body.logit_bias if not (k.isascii() and k.isdigit() and len(k) < 10)), None)
        if bad_key is not None:
            raise bad(f"logit_bias: {bad_key!r} is no token id", "logit_bias", "invalid_value")
        bias = {int(k): v for k, v in body.logit_bias.items()}
        outside = next((k for k in bias if not codec.token_bytes(k)), None)
        if outside is not None:
            raise bad(f"logit_bias: there is no token {outside}", "logit_bias", "invalid_value")
    return {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "seed": body.seed,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "min_tokens": body.min_tokens,
        "logit_bias": bias,
    }


def _tool_choice(body: ChatRequest, offered: bool) -> tuple[prompts.Choice, str | None]:
    choice = body.tool_choice
    if not offered:
        if choice not in (None, "none", "auto"):
            raise bad("tool_choice asks for a call, but there are no tools", "tool_choice", "invalid_value")
        return "none", None
    if choice is None or isinstance(choice, str):
        return choice or "auto", None
    return "required", choice.function.name


def _thinking(body: ChatRequest) -> tuple[bool, int | None]:
    inner = body.chat_template_kwargs.enable_thinking if body.chat_template_kwargs else None
    if None not in (inner, body.enable_thinking) and inner != body.enable_thinking:
        raise bad("enable_thinking and chat_template_kwargs.enable_thinking differ", "enable_thinking")
    enabled = body.enable_thinking if inner is None else inner
    return prompts.thinking(effort=body.reasoning_effort, enabled=enabled, budget=body.thinking_budget)


def _schema(body: ChatRequest) -> JsonSchema | None:
    wanted = body.response_format
    if wanted is None:
        return None
    if wanted.type != "json_schema" and wanted.json_schema is not None:
        raise bad(f"response_format.json_schema is not for the type {wanted.type!r}", "response_format.json_schema")
    if wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return prompts.json_schema(None, "response_format")
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise bad("response_format.json_schema.schema is missing", "response_format", "missing_parameter")
    return prompts.json_schema(wanted.json_schema.schema_, "response_format.json_schema.schema")
