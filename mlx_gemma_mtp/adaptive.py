"""The depth that pays: expected tokens per second of the whole batch, round by round. Knows no MLX, models or text.

Each round takes the depth K with the most expected tokens per second: the rows' acceptance rates say how many tokens,
the cost model how many seconds. Other depths are tried where they might be better: never for more than a small share
of the time spent decoding, and ever more rarely while trying changes nothing. Depth 0 (parked) is one of the depths.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .acceptance import AcceptanceModel, Predictability, committed
from .costs import DEEPEST, CostModel, Table
from .depth import DepthChoice, FixedDepth, RoundShape, RowOutcome, RowState

_GAIN = 1.02  # how much better another depth has to be,
_GAIN_OVER_PLAIN, _GAIN_OF_PLAIN = 1.03, 1.005  # than plain decoding, and plain decoding than it
_PLAIN_AGAIN = 64  # rounds of drafting after which plain decoding is measured again, times the square of the gain
_OPTIMISM = 1.2  # standard errors
_SHARE = 0.006  # of the time spent, for trying other depths
_FIRST_SHARE, _FIRST_ROUNDS = 0.03, 300  # and of the first rounds
_CREDIT = 20  # rounds over which a depth that should be better pays for being tried
_BONUS = 4.0  # plain rounds' worth of it when a text has changed
_SAVINGS = 12.0  # plain rounds' worth that can be put by
_HORIZON = 64  # rounds over which a new shape's compilation has to pay
_TRIAL = 3  # rounds at a depth never measured, besides those that compile
_REACH = 3  # drafts beyond the deepest ever measured that a trial may go
_LEAST_CHAIN = 0.15  # below, other lengths of blocks cost more compilations than they save
_PAUSE = 4  # rounds from one trial to the next
_WAIT, _LONGEST_WAIT = 4, 256  # rounds from one trial of a depth to its next: doubling


@dataclass
class _Place:
    """What is chosen for one table; for each depth, when it may be tried again and how long it waits then."""

    depth: int
    rounds: int = 0
    next: int = _PAUSE
    due: list[int] = field(default_factory=lambda: [0] * (DEEPEST + 1))
    wait: list[int] = field(default_factory=lambda: [_WAIT] * (DEEPEST + 1))

    def renew(self, longest: int) -> None:
        """What was tried in vain may be worth trying again: after `longest` rounds at most."""
        for k in range(1, DEEPEST + 1):
            self.wait[k] = min(self.wait[k], longest)
            self.due[k] = min(self.due[k], self.rounds + longest)


@dataclass
class _Trial:
    """Another depth for some rounds."""

    table: Table
    depth: int
    left: int


@dataclass
class DepthMemory:
    """What outlives a scheduler: costs, all requests' rates, seconds of a compilation and seconds left for trials."""

    costs: CostModel = field(default_factory=CostModel)
    rates: list[float] = field(default_factory=list)
    trace: float = 0.03
    purse: float = 0.0
    rounds: int = 0
    places: dict[Table, _Place] = field(default_factory=dict)


class AdaptiveDepth:
    """The depth policy of one scheduler; see `DepthPolicy`. `clock`: seconds, never falling."""

    def __init__(self, memory: DepthMemory | None = None, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._memory = DepthMemory() if memory is None else memory
        self._costs, self._clock = self._memory.costs, clock
        self._acceptance = AcceptanceModel(self._memory.rates)
        self._predictability = Predictability()
        self._places = self._memory.places
        self._running: set[int] = set()
        self._trial: _Trial | None = None
        self._depth = 0
        self._begun: deque[float] = deque()
        self._last = 0.0
        self._view: _View | None = None

    @property
    def min_chain(self) -> float:
        """See `DepthPolicy`."""
        return 0.0 if self._view is None else self._view.min_chain(self._depth)

    def plan(self, rows: Sequence[RowState], *, width: int, context: int) -> list[int]:
        """See `DepthPolicy`."""
        new = {r.request for r in rows} - self._running
        if not self._running:
            self._begun.clear()  # of rounds that failed, nothing was told
        joining = len(self._running) > 0 and len(new) == len(rows)
        self._running |= new
        if any(r.fixed is None and r.cap for r in rows) and not joining:
            self._depth = self._choose(rows, self._costs.table(width, context), news=bool(new))
        return [0 if r.cap == 0 else self._depth if r.fixed is None else r.fixed for r in rows]

    def begin(self) -> None:
        """See `DepthPolicy`."""
        self._begun.append(self._clock())

    def observe(self, shape: RoundShape, outcomes: Sequence[RowOutcome]) -> None:
        """See `DepthPolicy`."""
        now = self._clock()
        seconds = now - max(self._begun.popleft(), self._last) if self._begun else 0.0
        self._last = now
        table = self._costs.table(shape.rows, shape.context)
        expected = self._costs.level * table.seconds(shape.verified, shape.drafted)
        new = (shape.verified, shape.drafted) not in table.seen
        self._costs.observe(shape.rows, shape.verified, shape.drafted, shape.context, seconds, settled=shape.settled)
        if self._costs.measured:
            self._earn(shape, seconds, expected, new=new)
        for outcome in outcomes:
            over = outcome.request not in self._running
            self._acceptance.observe(None if over else outcome.request, outcome.offered, outcome.accepted)
            if not over:
                self._predictability.observe(outcome.request, outcome.tokens)
        self._acceptance.tick()
        self._memory.rates = self._acceptance.rates

    def forget(self, request: int) -> None:
        """See `DepthPolicy`."""
        self._acceptance.forget(request)
        self._predictability.forget(request)
        self._running.discard(request)

    def describe(self) -> DepthChoice:
        """What is chosen now, and why."""
        if self._view is None:
            return DepthChoice(depth=self._depth, reason="nothing was decoded yet")
        return self._view.describe()

    def _earn(self, shape: RoundShape, seconds: float, expected: float, *, new: bool) -> None:
        """Put by a share of a round's time; note what a compilation took."""
        memory, plain = self._memory, self._costs.seconds(shape.rows, 0, 0, shape.context)
        if new:
            memory.trace += 0.3 * (min(max(seconds - expected, 0.0), 3.0 * memory.trace) - memory.trace)
        memory.rounds += 1
        share = _SHARE if memory.rounds > _FIRST_ROUNDS else _FIRST_SHARE
        most = _SAVINGS * plain + 4.0 * memory.trace
        memory.purse = min(memory.purse + share * min(seconds, 3.0 * expected), most)

    def _choose(self, rows: Sequence[RowState], table: Table, *, news: bool) -> int:
        """The depth for the free rows: that of a trial, or the one with the best rate."""
        least = max((r.fixed for r in rows if r.fixed is not None and r.cap), default=0)
        if not any(table.known(k) for k in range(DEEPEST + 1)):
            return least
        most = max(r.cap for r in rows if r.fixed is None)
        view = _View.of(rows, table, self._acceptance, self._costs.level, least)
        place = self._place(table, view)
        changed = self._predictability.changed()
        if news or changed:
            place.renew(_WAIT)
            self._acceptance.doubt()
        if changed:
            self._memory.purse += _BONUS * view.seconds[0]
        if (running := self._ongoing(table, most)) is not None:
            return running
        best = max((k for k in range(least, DEEPEST + 1) if table.known(k) or k == least), key=view.rates.__getitem__)
        current = max(place.depth, least)
        better = view.rates[best] / view.rates[current] if table.known(current) else _GAIN + 1.0
        horizon = _HORIZON if most == DEEPEST else most
        gain = _GAIN_OVER_PLAIN if current == 0 else _GAIN_OF_PLAIN if best == 0 else _GAIN
        if better > gain and (better - 1.0) * horizon * view.seconds[current] >= self._traces(table, current, best):
            current = best
            if most == DEEPEST:
                place.depth = best
                place.renew(16 * _WAIT)
        view.depth = current
        if most == DEEPEST:
            self._view = view
            place.rounds += 1
            if place.rounds >= place.next and (trial := self._next_trial(view, table, place, current)):
                self._trial = trial
                return trial.depth
        return current

    def _place(self, table: Table, view: _View) -> _Place:
        if table not in self._places:
            known = [k for k in range(DEEPEST + 1) if table.known(k)]
            self._places[table] = _Place(max(known, key=view.rates.__getitem__))
        return self._places[table]

    def _ongoing(self, table: Table, most: int) -> int | None:
        """The depth of a trial that goes on."""
        trial = self._trial
        if trial is None or trial.table is not table or trial.left <= 1 or most < trial.depth:
            self._trial = None
            return None
        trial.left -= 1
        return trial.depth

    def _next_trial(self, view: _View, table: Table, place: _Place, current: int) -> _Trial | None:
        """Another depth that may well be better, if it can be paid for."""
        place.next = place.rounds + _PAUSE
        rate, hopes = view.rates[current], view.hopes(self._acceptance)
        least = max(view.least, 1)
        promising = [k for k in range(least, DEEPEST + 1) if k != current and hopes[k] > _GAIN * rate]
        if current > 0 and view.least == 0 and place.due[0] <= place.rounds:
            # Costs that grow with the context, say, would else go unseen: all depths' look alike from within.
            place.due[0] = place.rounds + int(_PLAIN_AGAIN * (rate / view.rates[0]) ** 2)
            return _Trial(table, 0, 1 if {(current, 0), (0, current)} <= table.seen else 2)
        if not promising:
            return None
        deepest = max(k for k in range(DEEPEST + 1) if table.known(k))
        offers = []
        for k in promising:
            if k <= deepest + _REACH and place.due[k] <= place.rounds:
                rounds = 1 if {(current, k), (k, current)} <= table.seen else _TRIAL
                loss = self._loss(view, table, current, k, rounds)
                value = (hopes[k] / rate - _GAIN) / (max(loss, 0.0) + 0.1 * view.seconds[current])
                offers.append((value, loss, k, rounds))
        offers.sort(reverse=True)
        if current == 0 and self._acceptance.stale and (not offers or offers[0][1] > self._memory.purse):
            # One draft tells whether the text has changed, at the least cost, though it may not pay itself.
            offers = [(0.0, self._loss(view, table, 0, 1, 1), 1, 1)] if place.due[1] <= place.rounds else []
        if not offers or offers[0][1] > self._memory.purse:
            return None
        _, loss, k, rounds = offers[0]
        self._memory.purse -= max(loss, 0.0)
        place.due[k] = place.rounds + place.wait[k]
        place.wait[k] = min(2 * place.wait[k], _LONGEST_WAIT)
        return _Trial(table, k, rounds)

    def _loss(self, view: _View, table: Table, current: int, k: int, rounds: int) -> float:
        """Seconds that some rounds of another depth are expected to lose, compilations included."""
        lost = rounds * max(view.seconds[k] - view.tokens[k] / view.rates[current], 0.0)
        back = 0.0 if (k, current) in table.seen else self._memory.trace
        gain = 0.0 if table.known(k) else max(view.rates[k] / view.rates[current] - 1.0, 0.0)
        return lost + self._traces(table, current, k) + back - gain * _CREDIT * view.seconds[current]

    def _traces(self, table: Table, before: int, after: int) -> float:
        """Seconds to compile what a change of depth brings."""
        shapes = {(before, after), (after, after)} if before != after else set()
        return len(shapes - table.seen) * self._memory.trace


@dataclass(kw_only=True)
class _View:
    """What is known before a round: for each depth, the batch's expected tokens, its seconds and their ratio."""

    requests: list[int]
    rows: int
    tokens: list[float]
    seconds: list[float]
    rates: list[float]
    table: Table
    level: float
    least: int
    acceptance: list[float]
    depth: int = 0

    @classmethod
    def of(cls, rows: Sequence[RowState], table: Table, model: AcceptanceModel, level: float, least: int) -> _View:
        """Of the batch `rows`."""
        depths = range(DEEPEST + 1)
        tokens = [0.0] * (DEEPEST + 1)
        for row in rows:
            chain = committed(model.of(row.request))
            for k in depths:
                tokens[k] += chain[min(k if row.fixed is None else row.fixed, row.cap)]
        seconds = [level * s for s in table.steady()]
        rates = [t / s for t, s in zip(tokens, seconds, strict=True)]
        requests = [r.request for r in rows]
        shares = [model.of(r) for r in requests]
        mean = [sum(s[i] for s in shares) / len(shares) for i in range(DEEPEST)]
        return cls(
            requests=requests, rows=len(rows), tokens=tokens, seconds=seconds, rates=rates, table=table,
            level=level, least=least, acceptance=mean,
        )  # fmt: skip

    def hopes(self, model: AcceptanceModel) -> list[float]:
        """Rates as good as they may well be."""
        off = model.deviations(self.requests)
        hopeful = committed([min(a + _OPTIMISM * d, 0.98) for a, d in zip(self.acceptance, off, strict=True)])
        expected = committed(self.acceptance)
        return [
            self.tokens[k] * hopeful[k] / expected[k] / (self.level * self.table.least(k, _OPTIMISM))
            for k in range(DEEPEST + 1)
        ]

    def min_chain(self, depth: int) -> float:
        """What a draft more must be likely to be worth its verification, which other rows share."""
        if depth < 2:
            return 0.0  # the first draft is always verified
        target = self.table.curve()
        further = self.level * (target[depth] - target[0]) / depth / self.rows
        worth = further * self.rates[depth]
        return min(worth, 0.9) if worth >= _LEAST_CHAIN else 0.0

    def describe(self) -> DepthChoice:
        """The choice in words and figures."""
        plain, shown = self.seconds[0], self.depth
        if shown == 0:
            other = max(range(1, DEEPEST + 1), key=self.rates.__getitem__)
            cost = self.seconds[other] / plain
            reason = f"parked: verify({other + 1}) costs {cost:.1f} steps, acceptance {self.acceptance[0]:.2f}"
        else:
            gain = self.rates[shown] / self.rates[0]
            reason = (
                f"{self.tokens[shown] / self.rows:.1f} tokens for {self.seconds[shown] / plain:.1f} steps: "
                f"{gain:.2f}x plain, acceptance {self.acceptance[0]:.2f}"
            )
        return DepthChoice(
            depth=shown,
            reason=reason,
            acceptance=tuple(round(a, 3) for a in self.acceptance),
            costs=tuple(round(s / plain, 3) for s in self.seconds),
        )


def parse_depth(depth: int | str, memory: DepthMemory | None = None) -> FixedDepth | AdaptiveDepth:
    """The policy for a caller's `depth`: a count, or "auto", which learns into `memory`. Raises ValueError."""
    if depth == "auto":
        return AdaptiveDepth(memory)
    if isinstance(depth, int) and not isinstance(depth, bool) and 0 <= depth <= DEEPEST:
        return FixedDepth(depth)
    raise ValueError(f'depth is {depth!r}, expected "auto" or a whole number from 0 to {DEEPEST}')
