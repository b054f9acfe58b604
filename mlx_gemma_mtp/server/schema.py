"""What both APIs' bodies have in common. Imports no MLX."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Body(BaseModel):
    """A part of a request: types are not converted, and a field that is not declared is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Part(BaseModel):
    """A part of a message's content: `type` says which, the rest depends on it."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: str


class Mtp(Body):
    """This server's own fields, the same in every API."""

    depth: Annotated[int | None, Field(ge=0, le=8, description="Drafts per round; 0: none. Default: the server's.")] = (
        None
    )
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=10)] = None
    min_tokens: Annotated[int | None, Field(ge=0)] = None
    ignore_eos: bool = False
    thinking_budget: Annotated[
        int | None, Field(ge=0, le=10_000_000, description="Tokens that thoughts may take; 0: no thinking.")
    ] = None


Seed = Annotated[int | None, Field(ge=-(2**63), lt=2**63)]
StopStrings = Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=16)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)] | StopStrings | None
MaxTokens = Annotated[int | None, Field(ge=1, le=10_000_000)]
Temperature = Annotated[float | None, Field(ge=0, le=2)]
TopP = Annotated[float | None, Field(gt=0, le=1)]
TopK = Annotated[int | None, Field(ge=0, le=2**31 - 1)]
Penalty = Annotated[float | None, Field(ge=-2, le=2)]
