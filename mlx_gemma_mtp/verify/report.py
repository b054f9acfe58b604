"""What was found: differences, verdicts, counters; ready for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..request import FinishReason, SamplingParams
from ..stats import SpecStats
from .cases import Case

Verdict = Literal["equal", "near-tie", "bug"]
"""`near-tie`: rounding errors alone could have made either choice. `bug`: they could not."""
Way = Literal["alone", "batch"]

_RANK: Mapping[Verdict, int] = {"equal": 0, "near-tie": 1, "bug": 2}


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of them; `equal` for none."""
    return max(verdicts, key=_RANK.__getitem__, default="equal")


@dataclass(frozen=True)
class Output:
    """What a request got."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where an output first differs from the plain one, `position` counted from its first token.

    A token is None where an output had ended (for a stop token, that token is named). `margin` is by how much the
    plain token's logit leads, after penalties and, for sampled requests, with noise times temperature; where
    `excluded`, top-k, top-p or min-p leave one of the two out and it is the margin before them. `tolerance`: see
    `judge.rounding`.
    """

    position: int
    expected: int | None
    got: int | None
    expected_text: str = ""
    got_text: str = ""
    margin: float | None = None
    tolerance: float | None = None
    excluded: bool = False
    near_tie: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "position": self.position,
            "plain": {"token": self.expected, "text": self.expected_text},
            "other": {"token": self.got, "text": self.got_text},
            "margin": self.margin,
            "tolerance": self.tolerance,
            "excluded_by_sampling": self.excluded,
        }


@dataclass(frozen=True, kw_only=True)
class Check:
    """One request decoded in one way, compared with its plain output."""

    way: Way
    depth: int
    difference: Difference | None

    @property
    def verdict(self) -> Verdict:
        """See `Verdict`."""
        if self.difference is None:
            return "equal"
        return "near-tie" if self.difference.near_tie else "bug"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        found = None if self.difference is None else self.difference.to_dict()
        return {"way": self.way, "depth": self.depth, "verdict": self.verdict, "difference": found}


@dataclass(kw_only=True)
class CaseReport:
    """All that was found of one request. `mlx_lm` compares greedy outputs, whatever the request's own sampling."""

    case: Case
    plain: Output
    text: str
    checks: list[Check] = field(default_factory=list)
    mlx_lm: Check | None = None

    @property
    def verdict(self) -> Verdict:
        """The worst of its checks, mlx-lm's left out."""
        return worst(check.verdict for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        other = self.mlx_lm
        return {
            "id": self.case.name,
            "verdict": self.verdict,
            "prompt": self.case.text,
            "prompt_tokens": len(self.case.tokens),
            "max_tokens": self.case.max_tokens,
            "sampling": sampling_dict(self.case.sampling),
            "seed_given": not self.case.seeded,
            "tokens": list(self.plain.tokens),
            "text": self.text,
            "finish_reason": self.plain.finish_reason,
            "stop": list(self.case.stop),
            "checks": [check.to_dict() for check in self.checks],
            "mlx_lm": None
            if other is None
            else {k: v for k, v in other.to_dict().items() if k not in ("way", "depth")},
        }


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """What the drafts did in one way at one depth, over all requests: without accepted ones little is proved."""

    way: Way
    depth: int
    stats: SpecStats


@dataclass(kw_only=True)
class Report:
    """What `verify` found. `mlx_lm_note` says why mlx-lm wasn't compared, or is None."""

    model: str
    drafter: str | None
    dtype: str
    backend: str
    exactness: dict[str, Any]
    depths: tuple[int, ...]
    max_batch: int
    cases: list[CaseReport]
    speculation: list[Speculation] = field(default_factory=list)
    mlx_lm_note: str | None = None
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """The worst of all requests; what mlx-lm does is information only."""
        return worst(case.verdict for case in self.cases)

    @property
    def mlx_lm_verdict(self) -> Verdict | None:
        """The worst of the comparisons with mlx-lm; None when there was none."""
        found = [case.mlx_lm.verdict for case in self.cases if case.mlx_lm is not None]
        return worst(found) if found else None

    def passed(self, *, allow_ties: bool = False) -> bool:
        """Whether all are equal (or, with `allow_ties`, tied)."""
        return self.verdict == "equal" or (allow_ties and self.verdict == "near-tie")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "verdict": self.verdict,
            "model": self.model,
            "drafter": self.drafter,
            "dtype": self.dtype,
            "backend": self.backend,
            "exactness": self.exactness,
            "depths": list(self.depths),
            "max_batch": self.max_batch,
            "seconds": round(self.seconds, 3),
            "requests": [case.to_dict() for case in self.cases],
            "speculation": [{"way": s.way, "depth": s.depth, **s.stats.to_dict()} for s in self.speculation],
            "mlx_lm": {"verdict": self.mlx_lm_verdict, "left_out": self.mlx_lm_note},
        }


def sampling_dict(params: SamplingParams) -> dict[str, Any]:
    """The parameters that differ from the default, ready for JSON."""
    default = SamplingParams()
    found = {k: v for k, v in vars(params).items() if v != vars(default)[k]}
    if "constraint" in found:
        found["constraint"] = str(params.constraint)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}
