"""Bodies of Anthropic's messages API. Imports no MLX."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .schema import Body, Mtp, Part, StopStrings, TopK


class TextBlock(Body):
    """A text of the system prompt."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    citations: None = None


class MessageBody(Body):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    content: str | list[Part]


class ToolSpec(Body):
    """A tool on offer: only the client's own are."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]+$", max_length=256)]
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    strict: bool | None = None
    # Known, and not to be had here: the chat template has no place for them.
    input_examples: Annotated[list[Any], Field(max_length=0)] | None = None
    # Hints, and what every tool here is anyway.
    cache_control: dict[str, Any] | None = None
    eager_input_streaming: bool | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    defer_loading: Literal[False] | None = None


class ToolChoice(Body):
    """Whether, and which, tools have to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    """Whether the model thinks first, and how many tokens that may take."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int | None, Field(ge=1, le=10_000_000)] = None
    display: Literal["summarized"] | None = None


class JsonFormat(Body):
    """The answer has to be JSON, valid under a schema."""

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Body):
    """What the answer has to look like; `effort` limits a thought, where there is one."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonFormat | None = None


class CountRequest(Body):
    """The body of /v1/messages/count_tokens."""

    model: str
    messages: Annotated[list[MessageBody], Field(min_length=1, max_length=10_000)]
    system: str | list[TextBlock] | None = None
    tools: Annotated[list[ToolSpec] | None, Field(max_length=512)] = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None


class MessagesRequest(CountRequest, Mtp):
    """The body of /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, le=10_000_000)]
    temperature: Annotated[float | None, Field(ge=0, le=1)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: TopK = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop_sequences: StopStrings | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
