"""The body of OpenAI's responses API, for text. Imports no MLX."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from .openai_schema import Effort
from .schema import Body, MaxTokens, Mtp, Part, Seed, Temperature, TopK, TopP


class Item(Part):
    """An item of the input: a message, or what an earlier response gave."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str = "message"


class TextFormat(Body):
    """What the answer has to look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Body):
    """How the text has to be."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Body):
    """How much thought goes before the answer."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesStream(Body):
    """How a stream is sent."""

    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Mtp):
    """The body of /v1/responses."""

    model: str
    input: str | Annotated[list[Item], Field(min_length=1, max_length=10_000)]
    instructions: str | None = None
    max_output_tokens: MaxTokens = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    seed: Seed = None
    stream: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    # Hints and labels that change no token; nothing is stored, whatever `store` says.
    metadata: dict[str, str] | None = None
    store: bool | None = None
    user: str | None = None
    service_tier: str | None = None
    truncation: Literal["disabled"] | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    stream_options: ResponsesStream | None = None
    safety_identifier: str | None = None
    parallel_tool_calls: bool | None = None
    tool_choice: Literal["none", "auto"] | None = None
    # Known, and not to be had here.
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    previous_response_id: None = None
    conversation: None = None
    background: Literal[False] | None = None
