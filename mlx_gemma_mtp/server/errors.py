"""Errors as both APIs show them. Knows no HTTP framework."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_OPENAI_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_ANTHROPIC_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that can't be answered: HTTP status, what is wrong, and the field it is about.

    `retry_after`: seconds after which trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        return {} if self.retry_after is None else {"retry-after": str(max(1, math.ceil(self.retry_after)))}

    def openai(self) -> dict[str, Any]:
        """OpenAI's body."""
        kind = _OPENAI_KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self, request_id: str | None = None) -> dict[str, Any]:
        """Anthropic's body."""
        kind = _ANTHROPIC_KINDS.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        message = self.message if self.param is None or self.param in self.message else f"{self.param}: {self.message}"
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong: 400."""
    return ApiError(400, message, param=param, code=code)


def of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors, of the value that it is about. No value is repeated: it may be a prompt."""
    error = min(errors, key=lambda e: e["type"] in ("string_type", "list_type", "model_type", "none_required"))
    path = _path(error["loc"])
    if error["type"] == "json_invalid":
        reason = error.get("ctx", {}).get("error", "")
        return bad(
            f"the body is no valid JSON: {reason}" if reason else "the body is no valid JSON", code="invalid_json"
        )
    if error["type"] == "extra_forbidden":
        return bad(f"unrecognized request argument: {path}", path, "unknown_parameter")
    if error["type"] == "missing":
        return bad(f"missing required parameter: {path}" if path else "the body is missing", path, "missing_parameter")
    return bad(f"invalid value for {path or 'the body'}: {error['msg']}", path, "invalid_value")


def _path(loc: Sequence[str | int]) -> str | None:
    """`messages[0].role`, without the names that pydantic gives to a union's members."""
    out = ""
    for part in loc:
        if isinstance(part, int):
            out += f"[{part}]"
        elif part.isidentifier() and part not in ("body", "str", "int", "float", "bool", "dict") and part[0].islower():
            out += f".{part}" if out else part
    return out or None
