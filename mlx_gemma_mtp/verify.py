"""Are the tokens with drafts those of plain decoding? Decodes both ways, compares, judges the first difference.

Every request is under the `exact` contract here: sampled ones without a seed get one. Knows nothing of terminals,
pages or exit codes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal

import mlx.core as mx

from .cache import KVCache
from .depth import FixedDepth
from .loading import memory_limit
from .request import FinishReason, Request, SamplingParams
from .runtime import Runtime
from .sampling import History, Rows, Sampler
from .scheduler import Scheduler
from .speculative import MAX_DEPTH
from .stats import SpecStats
from .text import TextCodec

BUILT_IN = Path(__file__).parent / "data" / "verify_prompts.jsonl"
DEPTHS = (1, 2, 3, 4, 5, 6)

Verdict = Literal["equal", "near-tie", "bug"]
"""`near-tie`: rounding errors alone could have made either choice. `bug`: they could not."""
Way = Literal["alone", "batch"]
Progress = Callable[[str, float], None]

_RANK: Mapping[Verdict, int] = {"equal": 0, "near-tie": 1, "bug": 2}
_CHUNK = 512
_SEED = 20_000
_HIGHEST_RANDOM_ID = 200_000  # above are the marks of images and sounds
_IMPOSSIBLE = -1e29
_EPS = {d: float(mx.finfo(d).eps) for d in (mx.float32, mx.bfloat16, mx.float16)}


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of them; `equal` for none."""
    return max(verdicts, key=_RANK.__getitem__, default="equal")


# --- requests ----------------------------------------------------------------------------------------------------


class CaseError(ValueError):
    """A request that can't be verified: names the line, the field, what was found and what was expected."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request to decode in every way. `text` is what is shown of it; `seeded`: the seed is our own."""

    name: str
    text: str
    tokens: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seeded: bool = False
    max_tokens: int
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.sampling.contract != "exact":
            raise ValueError(f"request {self.name}: seed is None, expected one: sampled tokens are compared")


_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_COUNTS = ("top_k", "seed", "min_tokens")
_PROMPTS = ("prompt", "tokens", "messages")
_OTHERS = ("id", "max_tokens", "max_completion_tokens", "logit_bias", "suppress_tokens", "ignore_eos")
_FIELDS = (*_PROMPTS, *_NUMBERS, *_COUNTS, *_OTHERS)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request is read against."""

    vocab_size: int
    max_positions: int
    max_tokens: int = 64

    @staticmethod
    def of(rt: Runtime, max_tokens: int = 64) -> Limits:
        """Those of a pair; `max_tokens` is for requests that don't say."""
        config = rt.config
        return Limits(vocab_size=config.vocab_size, max_positions=config.max_positions, max_tokens=max_tokens)


def read_cases(lines: Iterable[str], codec: TextCodec | None, limits: Limits, *, source: str = "") -> list[Case]:
    """Cases of JSON lines: a prompt, tokens or messages, and the parameters of `SamplingParams` under OpenAI's names.

    Unlike OpenAI's, a request without `temperature` is greedy. A prompt goes through the chat template if there is
    one. Blank lines are skipped, null is the same as leaving a field out. Raises CaseError.
    """
    cases = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            cases.append(_case(_object(line), number, codec, limits))
        except ValueError as error:
            raise CaseError(f"{source}{', ' if source else ''}line {number}: {error}") from error
    if not cases:
        raise CaseError(f"{source or 'the file'} has no requests, expected one JSON object per line")
    return cases


def built_in_cases(codec: TextCodec | None, limits: Limits) -> list[Case]:
    """The bundled requests. Without a tokenizer, random ids (the same everywhere) take the place of their texts."""
    lines = BUILT_IN.read_text(encoding="utf-8").splitlines()
    if codec is None:
        lines = [json.dumps(_without_text(json.loads(line), limits.vocab_size)) for line in lines]
    elif not codec.has_chat_template:
        lines = [json.dumps(_as_prompt(json.loads(line))) for line in lines]
    return read_cases(lines, codec, limits, source=BUILT_IN.name)


def _without_text(data: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    text = _as_prompt(data).pop("prompt")
    draw, top = random.Random(text), min(vocab_size, _HIGHEST_RANDOM_ID)
    rest = {k: v for k, v in data.items() if k not in _PROMPTS}
    return {**rest, "tokens": [draw.randrange(3, top) for _ in range(1 + len(text) // 4)]}


def _as_prompt(data: dict[str, Any]) -> dict[str, Any]:
    if "messages" not in data:
        return data
    rest = {k: v for k, v in data.items() if k != "messages"}
    return {**rest, "prompt": "\n".join(m["content"] for m in data["messages"])}


def _object(line: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"field {max(names, key=names.count)!r} is there twice")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    try:
        data = json.loads(line, object_pairs_hook=once, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: nested too deep") from error
    if not isinstance(data, dict):
        raise ValueError(f"{type(data).__name__}, expected a JSON object")
    return data


def _case(data: dict[str, Any], number: int, codec: TextCodec | None, limits: Limits) -> Case:
    if unknown := [name for name in data if name not in _FIELDS]:
        raise ValueError(f"field {unknown[0]!r} isn't supported here, expected one of {', '.join(_FIELDS)}")
    data = {name: value for name, value in data.items() if value is not None}
    sampling = _sampling(data, limits.vocab_size)
    seeded = sampling.contract != "exact"
    if seeded:
        sampling = replace(sampling, seed=_SEED + number)
    text, tokens = _prompt(data, codec, limits.vocab_size)
    max_tokens = _max_tokens(data, limits.max_tokens)
    if len(tokens) + max_tokens > limits.max_positions:
        raise ValueError(
            f"prompt and max_tokens are {len(tokens)} + {max_tokens} tokens, expected at most "
            f"{limits.max_positions} together"
        )
    return Case(
        name=_typed(data, "id", str, "a text", f"line {number}"),
        text=text,
        tokens=tokens,
        sampling=sampling,
        seeded=seeded,
        max_tokens=max_tokens,
        ignore_eos=_typed(data, "ignore_eos", bool, "true or false", False),
    )


def _typed(data: Mapping[str, Any], name: str, kind: type | UnionType, expected: str, default: Any) -> Any:
    value = data.get(name, default)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {value!r}, expected {expected}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, expected {expected}")
    return value


def _prompt(data: Mapping[str, Any], codec: TextCodec | None, vocab_size: int) -> tuple[str, tuple[int, ...]]:
    """What to show of the prompt, and its ids."""
    given = [name for name in _PROMPTS if name in data]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ValueError(f"{found} of prompt, tokens and messages is there, expected exactly one")
    if given == ["tokens"]:
        ids = _ids(data, "tokens", vocab_size)
        if not ids:
            raise ValueError("tokens is empty, expected at least one token id")
        return " ".join(map(str, ids)), tuple(ids)
    if codec is None:
        raise ValueError(f"{given[0]} needs a tokenizer, which this model lacks: give tokens")
    if given == ["messages"]:
        messages = _typed(data, "messages", list, "a list of messages", [])
        ids = codec.render(messages)
        return json.dumps(messages, ensure_ascii=False), tuple(ids)
    text = _typed(data, "prompt", str, "a text", "")
    ids = codec.render([{"role": "user", "content": text}]) if codec.has_chat_template else codec.encode(text)
    if not ids:
        raise ValueError("prompt is empty, expected a text")
    return text, tuple(ids)


def _ids(data: Mapping[str, Any], name: str, vocab_size: int) -> list[int]:
    values: list[int] = _typed(data, name, list, "a list of token ids", [])
    for value in values:
        if type(value) is not int or not 0 <= value < vocab_size:
            raise ValueError(f"{name} has {value!r}, expected token ids from 0 to {vocab_size - 1}")
    return values


def _max_tokens(data: Mapping[str, Any], default: int) -> int:
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in data]
    if len(names) == 2:
        raise ValueError("max_tokens and max_completion_tokens are the same: expected one of them")
    name = names[0] if names else "max_tokens"
    count: int = _typed(data, name, int, "a count of at least 1", default)
    if count < 1:
        raise ValueError(f"{name} is {count}, expected a count of at least 1")
    return count


def _sampling(data: Mapping[str, Any], vocab_size: int) -> SamplingParams:
    fields: dict[str, Any] = {}
    for name in _NUMBERS:
        if name in data:
            fields[name] = float(_typed(data, name, int | float, "a number", 0))
    for name in _COUNTS:
        if name in data:
            fields[name] = _typed(data, name, int, "a whole number", 0)
    if "suppress_tokens" in data:
        fields["suppress_tokens"] = tuple(_ids(data, "suppress_tokens", vocab_size))
    if "logit_bias" in data:
        fields["logit_bias"] = _bias(_typed(data, "logit_bias", dict, "an object", {}), vocab_size)
    return SamplingParams(**fields)


def _bias(given: Mapping[str, Any], vocab_size: int) -> dict[int, float]:
    bias = {}
    for name in given:
        if not (name.isascii() and name.isdigit() and int(name) < vocab_size):
            raise ValueError(f"logit_bias has token id {name!r}, expected 0 to {vocab_size - 1}")
        bias[int(name)] = float(_typed(given, name, int | float, "a number, as logit_bias of that token", 0))
    return bias


# --- the judgement -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where an output first differs from the plain one, `position` counted from its first token.

    A token is None where an output had ended (for a stop token, that token is named). `margin` is by how much the
    plain token's logit leads, after penalties and, for sampled requests, with noise times temperature; where
    `excluded`, top-k, top-p or min-p leave one of the two out and it is the margin before them. `tolerance`: see
    `rounding`.
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


def rounding(scale: float, dtype: mx.Dtype, layers: int, hidden: int) -> float:
    """How far rounding may move one logit, where the largest at its position has magnitude `scale`.

    bfloat16 and float16: scale * eps * sqrt(layers) / 2. Products are accumulated in float32, so that each layer
    rounds its results only, and independent roundings add up as their root. float32: scale * eps * sqrt(layers *
    hidden) * 4, as the sums round, too. On a GPU that multiplies float32 as TF32, eps is 2**-10 and the first rule
    holds. Two tokens may change places where they are closer than twice this.
    """
    scale = max(scale, 1.0)
    if dtype != mx.float32:
        return scale * _EPS[dtype] * math.sqrt(layers) / 2
    if mx.default_device().type == mx.gpu and os.environ.get("MLX_ENABLE_TF32", "1") != "0":
        return scale * 2.0**-10 * math.sqrt(layers) / 2
    return scale * _EPS[mx.float32] * math.sqrt(layers * hidden) * 4


def _number(x: mx.array) -> float:
    value: float = x.item()  # type: ignore[assignment]
    return value


class Choice:
    """The choice of one token: logits (V,) after a history's edits, and the scores whose highest is chosen."""

    def __init__(self, logits: mx.array, history: History) -> None:
        self._size = int(logits.shape[-1])
        self._position = len(history.prompt) + len(history.output)
        self.temperature = history.params.temperature or 1.0
        self._rows: Rows | None = None
        self.logits = logits.astype(mx.float32)
        sampler = Sampler([history], self._size, mx.random.key(0))
        if sampler.layout is not None:
            self._rows = Rows(sampler.layout, sampler.arrays)
            self.logits = self._rows.edit(self.logits[None, None], mx.zeros((1, 0), mx.int32))[0, 0]

    def scores(self, logits: mx.array | None = None) -> mx.array:
        """Scores (V,) of edited logits (default: its own), -1e30 for tokens that can't be chosen."""
        logits = self.logits if logits is None else logits
        if self._rows is None:
            return logits
        x, ids = self._rows.filtered(logits[None, None])
        x = x + self._rows.noise(mx.array([[self._position]]), ids, x.shape[-1])
        if ids is None:
            return x[0, 0]
        scores = mx.full((self._size,), -1e30)
        scores[ids[0, 0]] = x[0, 0]
        return scores

    def within_reach(self, token: int, tolerance: float) -> bool:
        """Whether logits that are each off by at most `tolerance` could have made `token` the choice.

        The two ways that help a token most are tried: it rises while all others sink; or those before it sink while
        it and all behind it rise, which is what brings a token into top-p.
        """
        own = self.logits[token]
        alone = mx.where(mx.arange(self._size) == token, tolerance, -tolerance)
        together = mx.where(self.logits > own, -tolerance, tolerance)
        for nudge in (alone, together):
            scores = self.scores(self.logits + nudge)
            if (scores[token] >= scores.max()).item() and (scores[token] > _IMPOSSIBLE).item():
                return True
        return False

    def margin(self, a: int, b: int) -> tuple[float, bool]:
        """By how much `a` leads `b`, in logits, and whether sampling leaves one of them out; see `Difference`."""
        scores = self.scores()
        excluded = bool((mx.minimum(scores[a], scores[b]) < _IMPOSSIBLE).item())
        gap = (self.logits[a] - self.logits[b]) if excluded else (scores[a] - scores[b]) * self.temperature
        return _number(gap), excluded


@dataclass(frozen=True)
class Output:
    """What a request got."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason | None


class _Pair:
    """What `verify` asks of a pair: decode cases, and judge a difference."""

    def __init__(self, rt: Runtime) -> None:
        self.rt = rt
        self.stop_ids: frozenset[int] = rt._stop_ids
        self._speculator = rt._speculator
        self.dtype = self._speculator.spec.dtype

    def decode(self, cases: Sequence[Case], depth: int, max_batch: int) -> tuple[list[Output], SpecStats]:
        """Decode cases as one ragged batch of at most `max_batch` rows; later ones join as others leave."""
        config = self.rt.config
        scheduler = Scheduler(
            self._speculator,
            vocab_size=config.vocab_size,
            max_positions=config.max_positions,
            depth=FixedDepth(depth),
            max_batch=min(max_batch, len(cases)),
            chunk=_CHUNK,
        )
        order, stats = {}, []
        for i, case in enumerate(cases):
            request = Request(
                prompt=case.tokens,
                max_tokens=case.max_tokens,
                sampling=case.sampling,
                stop_ids=self.stop_ids,
                ignore_eos=case.ignore_eos,
            )
            number, counters = scheduler.add(request)
            order[number] = i
            stats.append(counters)
        tokens: list[list[int]] = [[] for _ in cases]
        reasons: list[FinishReason | None] = [None for _ in cases]
        while scheduler.busy:
            for event in scheduler.step():
                tokens[order[event.request_id]] += event.tokens
                reasons[order[event.request_id]] = event.finish_reason
        total = SpecStats()
        for counters in stats:
            total.add(counters)
        return [Output(tuple(t), r) for t, r in zip(tokens, reasons, strict=True)], total

    def difference(self, case: Case, plain: Output, other: Output) -> Difference | None:
        """The first difference of two outputs of a case, judged; None if they are the same."""
        if plain == other:
            return None
        both = zip(plain.tokens, other.tokens, strict=False)
        shorter = min(len(plain.tokens), len(other.tokens))
        at = next((i for i, (a, b) in enumerate(both) if a != b), shorter)
        raw = self._logits([*case.tokens, *plain.tokens[:at]])
        history = History(case.sampling, case.tokens, plain.tokens[:at], self.stop_ids)
        choice = Choice(raw, history)
        a, b = (self._token(o, at, choice) for o in (plain, other))
        found = Difference(position=at, expected=a, got=b, expected_text=self._text(a), got_text=self._text(b))
        if a is None or b is None or a == b:
            return found
        config = self.rt.config
        scale = _number(mx.abs(raw).max())
        tolerance = rounding(scale, self.dtype, len(config.layers), config.hidden_size)
        margin, excluded = choice.margin(a, b)
        near = choice.within_reach(a, tolerance) and choice.within_reach(b, tolerance)
        return replace(found, margin=margin, tolerance=tolerance, excluded=excluded, near_tie=near)

    def _token(self, output: Output, at: int, choice: Choice) -> int | None:
        """The token that an output chose at a position; the likeliest stop id where it says "stop"."""
        if at < len(output.tokens):
            return output.tokens[at]
        if output.finish_reason != "stop" or not self.stop_ids:
            return None
        scores = choice.scores()
        return max(self.stop_ids, key=lambda token: _number(scores[token]))

    def _logits(self, tokens: Sequence[int]) -> mx.array:
        """Logits (V,) after `tokens`."""
        cache = KVCache.with_row(self._speculator.spec, len(tokens))
        for start in range(0, len(tokens), _CHUNK):
            hidden = self._speculator.prefill(cache, tokens[start : start + _CHUNK])
        return self._speculator.target.unembed(hidden)[0].astype(mx.float32)

    def _text(self, token: int | None) -> str:
        return "" if token is None or self.rt.text is None else self.rt.text.decode([token])


# --- mlx-lm ------------------------------------------------------------------------------------------------------


class MlxLmError(Exception):
    """mlx-lm can't decode this checkpoint; says why."""


class MlxLm:
    """The same checkpoint in mlx-lm, which decodes greedily."""

    def __init__(self, rt: Runtime) -> None:
        """Load it in the pair's dtype. Raises MlxLmError."""
        path = Path(rt.info()["model"]["path"])
        self._check_memory(path)
        try:
            from mlx_lm.utils import load_model

            # It takes the vocabulary's size from the outer config alone, where official checkpoints don't have it.
            with contextlib.redirect_stdout(sys.stderr):
                self._model, _ = load_model(path, model_config={"vocab_size": rt.config.vocab_size})
                self._model.set_dtype(_Pair(rt).dtype)
                mx.eval(self._model.parameters())
        except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            first = str(error).strip().splitlines() or [""]
            raise MlxLmError(f"mlx-lm can't load {path}: {type(error).__name__}: {first[0]}") from error

    @staticmethod
    def _check_memory(path: Path) -> None:
        needed = 2 * sum(file.stat().st_size for file in path.glob("*.safetensors"))
        if needed > memory_limit():
            have = f"{memory_limit() / 1e9:.1f} GB"
            raise MlxLmError(f"the weights twice over need {needed / 1e9:.1f} GB, this machine has {have} for them")

    def decode(self, case: Case, plain: Output, stop_ids: frozenset[int]) -> Output:
        """Its greedy output, as long as `plain`; past a stop token that `plain` ended with, one token more."""
        from mlx_lm.generate import generate_step

        stopped = plain.finish_reason == "stop"
        count = len(plain.tokens) + stopped
        steps = generate_step(mx.array(case.tokens), self._model, max_tokens=count)
        tokens = tuple(int(token) for token, _ in steps)
        if stopped and tokens[-1] in stop_ids:
            return Output(tokens[:-1], "stop")
        return Output(tokens, plain.finish_reason if not stopped else "length")


# --- the report --------------------------------------------------------------------------------------------------


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
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}


def verify(
    rt: Runtime,
    cases: Sequence[Case],
    *,
    depths: Sequence[int] = DEPTHS,
    max_batch: int = 32,
    mlx_lm: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Decode each case plainly and alone; then at each depth, alone and all in one ragged batch; and in mlx-lm.

    `progress` is called with what is done next and the share done before it. Raises ValueError for depths that
    can't be.
    """
    _check_depths(rt, depths)
    if max_batch < 1 or not cases:
        raise ValueError(f"max_batch is {max_batch} and there are {len(cases)} requests, expected at least 1 of each")
    begin, pair, info = time.perf_counter(), _Pair(rt), rt.info()
    ticks = _Ticks(progress, len(cases) * (1 + 2 * len(depths) + mlx_lm))
    plains = []
    for case in cases:
        ticks.next(f"plain: {case.name}", 1)
        plains.append(pair.decode([case], 0, 1)[0][0])
    reports = [
        CaseReport(case=case, plain=plain, text="" if rt.text is None else rt.text.decode(plain.tokens))
        for case, plain in zip(cases, plains, strict=True)
    ]
    report = Report(
        model=info["model"]["path"],
        drafter=info["drafter"] and info["drafter"]["path"],
        dtype=info["dtype"],
        backend=info["backend"],
        depths=tuple(depths),
        max_batch=max_batch,
        cases=reports,
    )
    for depth in depths:
        _check_depth(pair, report, depth, ticks)
    if mlx_lm:
        report.mlx_lm_note = _check_mlx_lm(pair, report, ticks)
    report.seconds = time.perf_counter() - begin
    return report


def _check_depths(rt: Runtime, depths: Sequence[int]) -> None:
    if not depths or len(set(depths)) < len(depths) or not all(0 <= d <= MAX_DEPTH for d in depths):
        raise ValueError(f"depths are {list(depths)}, expected different whole numbers from 0 to {MAX_DEPTH}")
    if rt.drafter_config is None and any(depths):
        raise ValueError("there is no drafter: nothing to verify but depth 0, plain decoding in a batch")


class _Ticks:
    """Tells a caller how far a count of decodings is."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def next(self, what: str, count: int) -> None:
        """`count` more begin now."""
        if self._progress is not None:
            self._progress(what, max(self._done, 0.5) / self._total)
        self._done += count


def _check_depth(pair: _Pair, report: Report, depth: int, ticks: _Ticks) -> None:
    total = SpecStats()
    for entry in report.cases:
        ticks.next(f"depth {depth}: {entry.case.name}", 1)
        outputs, stats = pair.decode([entry.case], depth, 1)
        total.add(stats)
        found = pair.difference(entry.case, entry.plain, outputs[0])
        entry.checks.append(Check(way="alone", depth=depth, difference=found))
    report.speculation.append(Speculation(way="alone", depth=depth, stats=total))
    ticks.next(f"depth {depth}: all in a batch", len(report.cases))
    outputs, stats = pair.decode([entry.case for entry in report.cases], depth, report.max_batch)
    for entry, output in zip(report.cases, outputs, strict=True):
        found = pair.difference(entry.case, entry.plain, output)
        entry.checks.append(Check(way="batch", depth=depth, difference=found))
    report.speculation.append(Speculation(way="batch", depth=depth, stats=stats))


def _check_mlx_lm(pair: _Pair, report: Report, ticks: _Ticks) -> str | None:
    """Compare greedy outputs with mlx-lm's; returns why not, where it can't."""
    try:
        other = MlxLm(pair.rt)
    except MlxLmError as error:
        return str(error)
    for entry in report.cases:
        case, plain = entry.case, entry.plain
        ticks.next(f"mlx-lm: {case.name}", 1)
        if not case.sampling.greedy:
            case = replace(case, sampling=SamplingParams())
            plain = pair.decode([case], 0, 1)[0][0]
        found = pair.difference(case, plain, other.decode(case, plain, pair.stop_ids))
        entry.mlx_lm = Check(way="alone", depth=0, difference=found)
    return None
