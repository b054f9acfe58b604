"""Are the tokens with drafts those of plain decoding? Decodes both ways, compares, judges the first difference.

Every request is under the `exact` contract here: sampled ones without a seed get one. Knows nothing of terminals,
pages or exit codes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx

from ..request import Request, SamplingParams
from ..runtime import Runtime
from ..sampling import History, unpacked
from ..speculative import MAX_DEPTH
from ..stats import SpecStats
from .cases import Case, CaseError
from .judge import Choice, number, rounding
from .peer import MlxLm, MlxLmError
from .report import CaseReport, Check, Difference, Output, Report, Speculation

DEPTHS = (1, 2, 3, 4, 5, 6)

Progress = Callable[[str, float], None]


class Pair:
    """What `verify` asks of a pair: decode cases, and judge a difference."""

    def __init__(self, rt: Runtime) -> None:
        self.rt = rt

    def request(self, case: Case) -> Request:
        """The request of a case."""
        return self.rt.request(
            case.tokens,
            max_tokens=case.max_tokens,
            sampling=case.sampling,
            stop=case.stop,
            stop_ids=case.stop_ids,
            ignore_eos=case.ignore_eos,
            choice=case.choice,
        )

    def check(self, case: Case) -> None:
        """Raises CaseError for a request whose constraint can't be kept here."""
        try:
            self.rt.constraint(self.request(case))
        except ValueError as error:
            raise CaseError(f"request {case.name}: {error}") from error

    def decode(self, cases: Sequence[Case], depth: int, max_batch: int) -> tuple[list[Output], SpecStats]:
        """Decode cases as one ragged batch of at most `max_batch` rows; later ones join as others leave."""
        requests = [self.request(case) for case in cases]
        found = self.rt.decode(requests, depth=depth, max_batch=min(max_batch, len(cases)))
        return [Output(tuple(f.tokens), f.finish_reason) for f in found], SpecStats.total(f.stats for f in found)

    def difference(self, case: Case, plain: Output, other: Output) -> Difference | None:
        """The first difference of two outputs of a case, judged; None if they are the same."""
        if plain == other:
            return None
        both = zip(plain.tokens, other.tokens, strict=False)
        shorter = min(len(plain.tokens), len(other.tokens))
        at = next((i for i, (a, b) in enumerate(both) if a != b), shorter)
        request, raw = self.request(case), self.rt.next_logits([*case.tokens, *plain.tokens[:at]])
        history = History(case.sampling, case.tokens, plain.tokens[:at], request.stop_ids, case.choice)
        choice = Choice(raw, history, self._allowed(request, plain.tokens[:at]))
        a, b = (self._token(o, at, choice, request.stop_ids) for o in (plain, other))
        found = Difference(position=at, expected=a, got=b, expected_text=self._text(a), got_text=self._text(b))
        if a is None or b is None or a == b:
            return found
        config = self.rt.config
        scale = number(mx.abs(raw).max())
        tolerance = rounding(scale, self.rt.dtype, len(config.layers), config.hidden_size)
        margin, excluded = choice.margin(a, b)
        near = choice.within_reach(a, tolerance) and choice.within_reach(b, tolerance)
        return replace(found, margin=margin, tolerance=tolerance, excluded=excluded, near_tie=near)

    def _allowed(self, request: Request, output: Sequence[int]) -> mx.array | None:
        """Which tokens (V,) the request's constraint lets come behind `output`; None: it has none."""
        constraint = self.rt.constraint(request)
        if constraint is None:
            return None
        constraint.advance(output)
        return unpacked(mx.array(constraint.masks([])), self.rt.config.vocab_size)[0]

    def _token(self, output: Output, at: int, choice: Choice, stop_ids: frozenset[int]) -> int | None:
        """The token that an output chose at a position; the likeliest stop id where it says "stop"."""
        if at < len(output.tokens):
            return output.tokens[at]
        if output.finish_reason != "stop" or not stop_ids:
            return None
        scores = choice.scores()
        return max(stop_ids, key=lambda token: number(scores[token]))

    def _text(self, token: int | None) -> str:
        return "" if token is None or self.rt.text is None else self.rt.text.decode([token])


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
    begin, pair, info = time.perf_counter(), Pair(rt), rt.info()
    ticks = _Ticks(progress, len(cases) * (1 + 2 * len(depths) + mlx_lm))
    for case in cases:
        pair.check(case)
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
        exactness=info["exactness"],
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


def _check_depth(pair: Pair, report: Report, depth: int, ticks: _Ticks) -> None:
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


def _check_mlx_lm(pair: Pair, report: Report, ticks: _Ticks) -> str | None:
    """Compare greedy outputs with mlx-lm's; returns why not, where it can't."""
    try:
        other = MlxLm(pair.rt)
    except MlxLmError as error:
        return str(error)
    for entry in report.cases:
        case, plain = entry.case, entry.plain
        ticks.next(f"mlx-lm: {case.name}", 1)
        if not case.sampling.greedy or case.stop:
            case = replace(case, sampling=SamplingParams(), stop=())
            plain = pair.decode([case], 0, 1)[0][0]
        found = pair.difference(case, plain, other.decode(case, plain, pair.request(case).stop_ids))
        entry.mlx_lm = Check(way="alone", depth=0, difference=found)
    return None
