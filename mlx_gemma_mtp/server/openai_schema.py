"""Bodies of OpenAI's chat completions and completions. Imports no MLX.

A field that is declared `None` is known, and refused with any other value: what it asks for isn't here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .schema import Body, MaxTokens, Mtp, Part, Penalty, Seed, Stop, Temperature, TopK, TopP

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class FunctionCall(Body):
    """A call within an assistant's message; `arguments` is JSON text of an object."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str = "{}"


class ToolCallMessage(Body):
    """A call that the model made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Body):
    """One message of a conversation. `name` and `annotations` are labels: the chat template has no place for them."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCallMessage] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class FunctionTool(Body):
    """A function on offer."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]+$", max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    """A tool on offer: only functions are."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Body):
    """A function's name."""

    name: str


class NamedTool(Body):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class SchemaFormat(Body):
    """A JSON Schema that the answer has to be valid under."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer has to look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class StreamOptions(Body):
    """What a stream tells beside its text; `include_mtp`: who proposed each piece of it, and the counters so far."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None
    include_mtp: bool = False


class TemplateArguments(Body):
    """The chat template's own switches."""

    enable_thinking: bool | None = None


class Sampled(Mtp):
    """What chat completions and completions have in common."""

    model: str
    max_tokens: MaxTokens = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    n: Annotated[int | None, Field(ge=1, le=16)] = None
    seed: Seed = None
    stop: Stop = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None


class ChatRequest(Sampled):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: MaxTokens = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolBody] | None, Field(max_length=512)] = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateArguments | None = None
    modalities: list[Literal["text"]] | None = None
    # Hints and labels that change no token.
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    store: Literal[False] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    safety_identifier: str | None = None
    # Known, and not to be had here.
    moderation: None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    functions: None = None
    function_call: None = None
    verbosity: Literal["medium"] | None = None


Ids = list[Annotated[int, Field(ge=0, lt=2**31)]]


class CompletionRequest(Sampled):
    """The body of /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=128)] | Ids | list[Ids]
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None
