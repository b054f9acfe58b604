"""What a caller asks for and what it gets back. Knows nothing of MLX, models or text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""Why a request ended: a stop token, its `max_tokens`, its caller, or a failure."""


Contract = Literal["exact", "distribution"]
"""`exact`: the tokens are those of plain decoding with the same seed. `distribution`: their law is."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. The default is greedy decoding (temperature 0).

    Order: bias and suppressed tokens, penalties (repetition over prompt and output, the others over the output),
    stop ids held back for the first `min_tokens`, temperature, top-k, top-p, min-p.

    Raises ValueError, naming the field, the value and what was expected.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    suppress_tokens: Sequence[int] = ()
    logprobs: int | None = None
    constraint: object | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, self.temperature >= 0, "a number of at least 0")
        _check("top_k", self.top_k, self.top_k >= 0, "a count of at least 0 (0: off)")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "a number from 0 to 1")
        _check("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "a number above 0")
        _check("min_tokens", self.min_tokens, self.min_tokens >= 0, "a count of at least 0")
        _check(
            "seed", self.seed, self.seed is None or -(2**63) <= self.seed < 2**64, "None or a whole number of 64 bits"
        )
        _check("logprobs", self.logprobs, self.logprobs is None or self.logprobs >= 0, "None or a count")

    @property
    def contract(self) -> Contract:
        """What the output promises; see `Contract`."""
        return "exact" if self.temperature == 0 or self.seed is not None else "distribution"

    @property
    def penalties(self) -> tuple[float, float, float]:
        """(repetition, presence, frequency)."""
        return self.repetition_penalty, self.presence_penalty, self.frequency_penalty

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken, and no logit is changed or reported."""
        edits = self.logit_bias or self.suppress_tokens or self.min_tokens or self.penalties != (1.0, 0.0, 0.0)
        return self.temperature == 0 and not edits and self.logprobs is None and self.constraint is None


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt to decode.

    `prompt` is a non-empty sequence of token ids; `stop_ids` end the output (and are not part of it) unless
    `ignore_eos`; `depth` is the number of drafts per round for this row (None: the scheduler's own); `choice` tells
    several outputs of one prompt and seed apart: each has noise of its own. `stop` strings end the text in front of
    them, behind the first `min_tokens` tokens: they are looked for by whoever makes text of the tokens (see `stops`).
    `checkpoints`: lengths of the prompt at which later prompts may part from it (ends of turns): a prefix cache can go
    on from there.
    """

    prompt: Sequence[int]
    max_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: Sequence[str] = ()
    stop_ids: frozenset[int] = frozenset()
    depth: int | None = None
    ignore_eos: bool = False
    choice: int = 0
    checkpoints: Sequence[int] = ()

    def __post_init__(self) -> None:
        _check("prompt", self.prompt, len(self.prompt) > 0, "at least one token id")
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "a count of at least 1")
        _check("depth", self.depth, self.depth is None or self.depth >= 0, "None or a count of at least 0")
        stops = not isinstance(self.stop, str) and all(isinstance(text, str) and text for text in self.stop)
        _check("stop", self.stop, stops, "texts of at least one character")


class ConstraintError(RuntimeError):
    """An output can't go on under its constraint. It is that one output's failure: no other row is concerned."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability under the model itself (no bias, penalty or temperature), and the likeliest tokens'."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """Tokens that one request got in one step.

    `drafted[i]` is true when `tokens[i]` was proposed by the drafter and accepted, false when the target
    itself chose it. A stop token ends the request and is not among `tokens`. `error` says what went wrong where the
    finish reason is "error".
    """

    request_id: int
    tokens: tuple[int, ...]
    drafted: tuple[bool, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.drafted):
            raise ValueError(f"drafted has {len(self.drafted)} flags for {len(self.tokens)} tokens")


def _check(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name} is {value!r}, expected {expected}")
