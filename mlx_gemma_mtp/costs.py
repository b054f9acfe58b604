"""What rounds cost: seconds by rows, depth and context, learned from measured rounds. Knows no acceptance, no MLX.

A round verifies the block before it and drafts the next, so it costs target(rows, drafts verified, context) plus
drafted x draft(rows, context). The shares of all depths, the drafter's and a level that all share are learned together
(a Kalman filter, `kalman.py`): a machine that gets slower does so at every depth, and not at the one of the day.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any

from .kalman import LevelFilter

DEEPEST = 8
_STEP = DEEPEST + 1  # of the joint errors, the drafter's
_BLOCKS = range(1, DEEPEST + 1)

_STORED = 0.0012  # relative variance of a share measured at rest, some rounds each,
_STORED_TOKEN = 0.01  # and of what a further token of a block costs, at all depths alike
_NOISE = 0.01  # relative variance of one round
_UNKNOWN = 0.09  # of a share never measured
_UNKNOWN_STEP = 0.25  # of the drafter's share before any round told it
_MOVED, _MOVED_TOGETHER = 0.01, 0.5  # added when a table is carried over to other rows or another context, and its
# share that all depths have in common
_AGE, _AGE_TOKEN, _OLD = 2e-6, 1e-5, 0.02  # added in each round to both, and up to where,
_AGING = 32  # taken in at intervals of so many rounds
_DOUBTFUL = 0.023  # more than age makes of it: it was carried over twice, or once after long disuse
_LEVEL_AGE = 1e-4
_WINDOW = 16.0  # rounds that tell whether the level moves:
_RELATED, _FOLLOW = 0.3, 1.0  # correlation of neighbours that noise may have, and what more of it adds
_USUAL, _RAISED = 0.002, 1.15  # what a round says of the usual level, and how far above it counts
_CLAMP, _CLAMP_ERRORS, _CLAMP_MOST = 0.25, 2.0, 0.6  # of a round's expected seconds: what one sample may say at most
_STREAK = 8  # rounds of one depth after which a change is the machine's
_SURE = 4  # samples after which a cost is taken for what it seems
_SURPRISES, _LASTING = 2, 6  # clamped samples in a row after which all costs, or one depth's, have changed
_FIRST_LEVEL = 1e-4  # variance of what the first round is measured by
_LEAST_DOUBT = 5e-4  # variance of how the cost best known compares with others
_JUMP = 0.5  # of what was expected: what a sample of a cost that changed may say upwards, as a stall looks alike
_FIRST, _ALIKE, _ALIKE_PLAIN, _BELIED = 3, 3, 2, 8.0  # see `Table._check`


_GUESSED = (1, 1.0), (32, 4.1), (4096, 4.1)


@dataclass(frozen=True, kw_only=True)
class CostFacts:
    """What a forward has to read, in any one unit: where the costs start from before anything is measured.

    `dense`: weights that every forward reads. `experts`: all experts' weights, of which each token uses `used` of
    `count`. `kv`: K/V of one token held, in layers without a window. `drafter`: weights of a draft step. `products`:
    (tokens, cost of the target's products in that of one token), lines between them. Where it wasn't measured: a tenth
    more for each token up to 32, and nothing more behind (mlx_small_m.md).
    """

    dense: float = 1.0
    experts: float = 0.0
    count: int = 1
    used: int = 1
    kv: float = 0.0
    drafter: float = 0.06
    products: tuple[tuple[int, float], ...] = _GUESSED

    def __post_init__(self) -> None:
        points = self.products
        rise = all(n < m and a <= b < math.inf for (n, a), (m, b) in pairwise(points))
        if not (rise and len(points) > 1 and points[0] == (1, 1.0)):
            raise ValueError(f"products are {points}, expected (1, 1.0) and others, tokens and finite costs rising")

    def target(self, rows: int, verified: int, context: int) -> float:
        """Of the first half of a round, in the unit of the facts times one."""
        tokens = rows * (verified + 1)
        distinct = 1.0 - (1.0 - self.used / self.count) ** tokens
        each = tokens * self.used / (self.count * distinct)  # tokens that share an expert
        work = self.dense * self._product(tokens) + self.experts * distinct * self._product(each)
        return work + self.kv * rows * context

    def step(self, rows: int, context: int) -> float:
        """Of one draft in each row."""
        return self.drafter * self._product(rows) + 0.05 * self.kv * rows * context

    def _product(self, tokens: float) -> float:
        points = self.products
        i = min(max(bisect_left(points, tokens, key=itemgetter(0)), 1), len(points) - 1)
        (few, a), (many, b) = points[i - 1], points[i]
        slope = (b - a) / (many - few)
        if tokens > many:
            # One sample that was too slow isn't to make all that lies behind it free.
            slope = max(slope, 0.5 * (b - 1.0) / (many - 1))
        return b + slope * (tokens - many)


def context_bucket(context: int) -> int:
    """Contexts of one bucket share a table: below 512 tokens 0, then one per doubling."""
    return (max(context, 0) // 512).bit_length()


def contexts(bucket: int) -> range:
    """The contexts of a bucket."""
    return range(0 if bucket == 0 else 256 << bucket, 512 << bucket)


def _middle(bucket: int) -> int:
    return 256 if bucket == 0 else 384 << bucket


@dataclass
class _Visit:
    """The first rounds of a depth after others: by how much they missed, and what the depth's variance was.

    `alike`: visits in a row that missed by more than can be expected, in the same direction (its sign).
    """

    number: int = 0
    rounds: int = 0
    off: float = 0.0
    variance: float = 0.0
    alike: int = 0


class Table:
    """Costs of one number of rows in one bucket of contexts, in seconds at level 1.

    `target[k]` is None where k drafts were never verified; the curve goes through what is known, in the shape of the
    prior, and never falls with k.
    """

    def __init__(self, facts: CostFacts, rows: int, bucket: int) -> None:
        context = _middle(bucket)
        self.rows, self.bucket = rows, bucket
        self.prior = [facts.target(rows, k, context) for k in range(DEEPEST + 1)]
        self.target: list[float | None] = [None] * (DEEPEST + 1)
        self.joint = LevelFilter([_UNKNOWN] * (DEEPEST + 1) + [_UNKNOWN_STEP])
        self.faded = 0.0
        self.samples = [0] * (DEEPEST + 1)
        self.step, self._timed = facts.step(rows, context), facts.products != _GUESSED
        self.seen: set[tuple[int, int]] = set()
        self._surprises = [0] * (DEEPEST + 1)
        self.carried = False
        """Whether it started from what was measured for other rows or another context."""
        self.belied = False
        """Whether the last plain round was cheaper by far than expected, and only a part of that was believed."""
        self._last, self._streak, self._visit, self._age = -1, 0, 0, 0
        self._visits = [_Visit() for _ in range(DEEPEST + 1)]
        self._curve: list[float] | None = None

    def carry(self, other: Table) -> None:
        """Start from the other's measured shares, as the priors say how they differ."""
        self.joint, self.carried = other.joint.copy(), True
        moved = [(_STEP, 1.0)]
        for k, seconds in enumerate(other.target):
            if seconds is None:
                self.joint.reset(k, _UNKNOWN)
                continue
            self.target[k] = seconds * self.prior[k] / other.prior[k]
            # Whether drafts pay at all is seen here soon, whatever was seen there.
            self.samples[k] = min(other.samples[k], _SURE) if k == 0 else other.samples[k]
            moved.append((k, 1.0))
        # The priors are off by about the same at all depths.
        self.joint.grow_together(moved, _MOVED_TOGETHER * _MOVED)
        for k, _ in moved:
            self.joint.grow(k, (1.0 - _MOVED_TOGETHER) * _MOVED)
            most = _UNKNOWN_STEP if k == _STEP else _UNKNOWN
            if self.joint.variance(k) > most:
                self.joint.reset(k, most)

    @property
    def variance(self) -> list[float]:
        """Relative, of each depth's share."""
        return [self.joint.variance(k) for k in range(DEEPEST + 1)]

    def changed(self) -> None:
        """Shares were set from outside."""
        self._curve = None

    def known(self, k: int) -> bool:
        """Whether verifying k drafts was ever measured, here or where this table was carried from."""
        return self.target[k] is not None

    def measured(self, k: int) -> bool:
        """Whether verifying k drafts is known well enough to choose it without another trial."""
        return self.known(k) and self.joint.variance(k) < _DOUBTFUL

    def curve(self) -> list[float]:
        """Seconds of the target's share for 0, 1, … drafts, at level 1."""
        if self._curve is None:
            known = [seconds for seconds in self.target if seconds is not None]
            if len(known) == DEEPEST + 1 and all(a <= b for a, b in pairwise(known)):
                self._curve = known
                return known
            # What all depths' errors have in common doesn't say which of two has to give way to the other.
            most = max(range(DEEPEST + 1), key=self.samples.__getitem__)
            variance = [self.joint.of_ratio(k, most) + _LEAST_DOUBT for k in range(DEEPEST + 1)]
            self._curve = _through(self.target, variance, self.prior, timed=self._timed)
        return self._curve

    def steady(self) -> list[float]:
        """Seconds of rounds that verify and draft 0, 1, … tokens, at level 1."""
        return [seconds + k * self.step for k, seconds in enumerate(self.curve())]

    def further(self) -> list[tuple[int, float]]:
        """The share of each depth's cost that its drafts add to plain decoding."""
        curve = self.curve()
        return [(k, max(1.0 - curve[0] / curve[k], 0.05)) for k in _BLOCKS]

    def seconds(self, verified: int, drafted: int) -> float:
        """Of one round, at level 1."""
        target = self.target[verified]
        return (self.curve()[verified] if target is None else target) + drafted * self.step

    def least(self, k: int, errors: float, than: int) -> float:
        """What a round of k drafts costs at least, at level 1: `errors` standard errors below what is known.

        Errors of how it compares with `than` drafts, as those that both share don't matter.

        Of a depth hardly ever verified nothing is known but that it costs no less than shallower ones.
        """
        base = k
        while base and not (self.samples[base] >= _SURE and self.known(base)):
            base -= 1
        off = math.sqrt(self.joint.of_ratio(base, than)) if self.known(than) else math.sqrt(self.joint.variance(base))
        return self.curve()[base] * max(1.0 - errors * off, 0.3) + k * self.step

    def age(self, verified: int) -> None:
        """A round is over: how the other depths compare with the one of this round may have changed meanwhile."""
        if verified == self._last:
            self._streak += 1
        else:
            self._streak, self._last, self._visit = 0, verified, self._visit + 1
        self._age += 1
        if self._age < _AGING:
            return
        self._age, joint = 0, self.joint
        for k in range(DEEPEST + 1):
            if k != verified and joint.of_ratio(k, verified) < _OLD:
                joint.grow(k, _AGING * _AGE)
        others = [k for k in range(DEEPEST + 1) if k != verified and self.known(k)]
        if others and joint.of_ratio(max(others, key=self.samples.__getitem__), verified) < _OLD:
            further = dict(self.further())
            here = further.get(verified, 0.0)
            joint.grow_together([(k, further.get(k, 0.0) - here) for k in others], _AGING * _AGE_TOKEN)

    def surprise(self, verified: int, clamped: float, residual: float, *, raised: bool) -> str:
        """Whether costs have changed: "no", "depth" (only this one's) or "all".

        They have when the clamp cut several samples in a row the same way. After many rounds of one depth it is the
        machine; else the other depths would have told. `raised`: the machine was slower than usual.
        """
        sign = (residual > clamped) - (residual < clamped)
        count = self._surprises[verified]
        self._surprises[verified] = count + sign if sign and count * sign >= 0 else sign
        count, sure = self._surprises[verified], self.samples[verified] >= _SURE
        if self._streak >= _STREAK and sure:
            return "all" if abs(count) >= _SURPRISES else "no"
        # Other work on the machine makes rounds dearer for a while, and never cheaper than they were.
        if count <= -_SURPRISES:
            return "all" if raised and sure else "depth"
        return "depth" if count >= (_LASTING if sure else _SURPRISES) else "no"

    def doubt(self, verified: int) -> None:
        """A depth's share has changed: so have those of other blocks measured when it was, and never since."""
        self.joint.reset(verified, _OLD)
        alike = {verified}
        if verified:
            alike |= {
                k
                for k in range(1, DEEPEST + 1)
                if self.known(k) and self.samples[k] <= _SURE and self.joint.variance(k) < _UNKNOWN
            }
        self.joint.grow_together([(k, 1.0) for k in alike], _UNKNOWN)

    def learn(
        self, verified: int, drafted: int, expected: float, off: float, level_variance: float
    ) -> tuple[float, float, float]:
        """Share out by what is least sure how far a round was off: the level's gain, correction and variance.

        `expected`: its seconds at level 1, `off`: a share of them.
        """
        self.samples[verified] += 1
        if self.target[verified] is None:
            self.target[verified] = self.curve()[verified]
        drafts = drafted * self.step / expected
        weights = [(verified, 1.0 - drafts), (_STEP, drafts)] if drafted else [(verified, 1.0)]
        if self._streak < _FIRST:
            self._check(verified, off)
        gains, gain, level_variance = self.joint.observe(weights, level_variance, _NOISE)
        if gains is not None:
            self.target = [
                s if s is None else s * max(1.0 + g * off, 0.1) for s, g in zip(self.target, gains, strict=False)
            ]
            self.step *= max(1.0 + gains[_STEP] * off, 0.1)
            self._curve = None
        return gain, gain * off, level_variance

    def _check(self, k: int, off: float) -> None:
        """What the first rounds of a depth say each time that it comes is not chance: then it is less known."""
        visit = self._visits[k]
        if visit.number != self._visit:
            if visit.rounds:
                error = visit.off / visit.rounds / math.sqrt(visit.variance + _NOISE / visit.rounds)
                sign = (error > 1.0) - (error < -1.0)
                visit.alike = visit.alike + sign if visit.alike * sign >= 0 and sign else sign
                if abs(visit.alike) >= (_ALIKE if k else _ALIKE_PLAIN):
                    self.joint.grow(k, _BELIED * self.joint.variance(k))
            visit.number, visit.rounds, visit.off, visit.variance = self._visit, 0, 0.0, 2.0 * self.joint.variance(k)
        visit.rounds, visit.off = visit.rounds + 1, visit.off + off

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "rows": self.rows,
            "context": _middle(self.bucket),
            "target": self.target,
            "target_variance": [float(f"{v:.6g}") for v in self.variance],
            "draft": self.step,
            "draft_variance": float(f"{self.joint.variance(_STEP):.6g}"),
        }


class CostModel:
    """Tables by rows and context, and the level of the machine: what a runtime learns, and `tune` stores."""

    def __init__(self, facts: CostFacts | None = None) -> None:
        self.facts = CostFacts() if facts is None else facts
        self.level, self._level_variance, self._usual = 1.0, math.inf, 1.0
        self._drift = _Drift()
        self._faded = 0.0
        self.stored = False
        """Whether it started from what was measured before."""
        self._tables: dict[tuple[int, int], Table] = {}

    @property
    def measured(self) -> bool:
        """Whether any round was."""
        return self._level_variance < math.inf

    def table(self, rows: int, context: int) -> Table:
        """The table of a shape: made from the nearest one that is there."""
        key = rows, context_bucket(context)
        found = self._tables.get(key)
        if found is None:
            found = Table(self.facts, *key)
            near = min(self._tables.values(), key=lambda t: _distance((t.rows, t.bucket), key), default=None)
            if near is not None:
                found.carry(near)
                found.step = (
                    near.step
                    * self.facts.step(rows, _middle(key[1]))
                    / max(self.facts.step(near.rows, _middle(near.bucket)), 1e-30)
                )
            self._tables[key] = found
        return found

    def seconds(self, rows: int, verified: int, drafted: int, context: int) -> float:
        """What a round is expected to take now."""
        return self.level * self.table(rows, context).seconds(verified, drafted)

    def observe(
        self, rows: int, verified: int, drafted: int, context: int, seconds: float, *, settled: bool = True
    ) -> bool:
        """Learn from one round; whether it counted. It doesn't where it isn't settled or its shape is new."""
        return self.observe_in(self.table(rows, context), verified, drafted, seconds, settled=settled)

    def observe_in(self, table: Table, verified: int, drafted: int, seconds: float, *, settled: bool) -> bool:
        """As `observe`, where the table of its shape is at hand."""
        shape = verified, drafted
        repeats = shape in table.seen
        table.seen.add(shape)
        table.age(verified)
        if not (settled and repeats and seconds > 0):
            return False
        if not self.measured:
            # The prior has no unit: the first round gives it one.
            self.level = self._usual = seconds / table.seconds(*shape)
            self._level_variance = _FIRST_LEVEL
        self._learn(table, verified, drafted, seconds)
        return True

    def _learn(self, table: Table, verified: int, drafted: int, seconds: float) -> None:
        """From a round of a shape that was seen before."""
        rested = table.seconds(verified, drafted)
        expected = self.level * rested
        missed = seconds - expected
        self._level_variance += _LEVEL_AGE + self._drift.variance(missed / expected)
        spread = math.sqrt(_NOISE + self._level_variance + table.joint.variance(verified))
        most = min(max(_CLAMP, _CLAMP_ERRORS * spread), _CLAMP_MOST) * expected
        residual = min(max(missed, -most), most)
        if not table.known(verified):
            # A guess may be far off: clamped as usual, it would take many rounds to leave.
            residual = min(missed, expected)
        changed = table.surprise(verified, residual, missed, raised=self.level > _RAISED * self._usual)
        if changed != "no":
            residual = max(residual, min(missed, _JUMP * expected)) if missed > 0.0 else missed
        if changed == "all":
            self._level_variance += _UNKNOWN
        elif changed == "depth":
            table.doubt(verified)
        if verified == drafted == 0:
            table.belied = residual > missed
        self._usual += _USUAL * (min(self.level, 2.0 * self._usual) - self._usual)
        if table.faded != self._faded:
            # Other tables have told the level meanwhile.
            table.joint.fade(math.exp(self._faded - table.faded))
        gain, by, self._level_variance = table.learn(
            verified, drafted, rested, residual / expected, self._level_variance
        )
        self._faded += math.log(max(1.0 - gain, 1e-6))
        table.faded = self._faded
        self.level *= max(1.0 + by, 0.1)

    def store(self, rows: int, context: int, steady: Sequence[float], step: float) -> None:
        """Take over the seconds of rounds of 0, 1, … drafts as measured at rest; `step`: of one draft.

        For a model that has observed nothing.
        """
        self.level, self._level_variance, self._usual, self.stored = 1.0, _STORED, 1.0, True
        table = self.table(rows, context)
        table.step = step
        table.target = [max(seconds - k * step, 0.1 * seconds) for k, seconds in enumerate(steady)]
        table.joint, table.samples = LevelFilter([_STORED] * (len(steady) + 1)), [_SURE] * len(steady)
        table.changed()
        table.joint.grow_together(table.further(), _STORED_TOKEN)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; `from_dict` reads it."""
        tables = [t.to_dict() for _, t in sorted(self._tables.items()) if any(t.known(k) for k in range(DEEPEST + 1))]
        facts = {**asdict(self.facts), "products": [list(point) for point in self.facts.products]}
        return {"facts": facts, "level": self.level, "tables": tables}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostModel:
        """The model that was dumped. Raises KeyError, TypeError, ValueError or ArithmeticError where `data` is else."""
        products = tuple((int(tokens), float(cost)) for tokens, cost in data["facts"]["products"])
        model = cls(CostFacts(**{**data["facts"], "products": products}))
        model.level = model._usual = float(data["level"])
        model._level_variance, model.stored = 0.01, True
        for entry in data["tables"]:
            table = Table(model.facts, int(entry["rows"]), context_bucket(int(entry["context"])))
            table.target = [None if s is None else float(s) for s in entry["target"]]
            variances = [float(v) for v in entry["target_variance"]]
            table.samples = [0 if t is None else _SURE for t in table.target]
            table.step = float(entry["draft"])
            if len(table.target) != DEEPEST + 1 or len(variances) != DEEPEST + 1:
                raise ValueError(f"target has {len(table.target)} depths, expected {DEEPEST + 1}")
            step_variance = float(entry["draft_variance"])
            if not all(0.0 <= v < math.inf for v in [*variances, step_variance]):
                raise ValueError(f"variances are {[*variances, step_variance]}, expected numbers that are not negative")
            # What depths have in common isn't stored: as much of it as a profile starts with.
            further = table.further()
            common = min(0.7 * min(variances[k] / weight**2 for k, weight in further), _STORED_TOKEN)
            for k, weight in further:
                variances[k] -= common * weight**2
            table.joint = LevelFilter([*variances, step_variance])
            table.joint.grow_together(further, common)
            table.changed()
            model._tables[table.rows, table.bucket] = table
        return model


class _Drift:
    """How fast the level moves: it does where rounds miss what is expected of them the same way, one after another."""

    def __init__(self) -> None:
        self._last = self._square = self._product = 0.0

    def variance(self, residual: float) -> float:
        """What the last rounds, of which this one was off by `residual` (relative), add to the level's variance."""
        residual = min(max(residual, -_CLAMP), _CLAMP)
        self._square += (residual * residual - self._square) / _WINDOW
        self._product += (residual * self._last - self._product) / _WINDOW
        self._last = residual
        return _FOLLOW * max(self._product - _RELATED * self._square, 0.0)


def _distance(a: tuple[int, int], b: tuple[int, int]) -> float:
    return abs(math.log2(a[0] / b[0])) + 0.5 * abs(a[1] - b[1])


def _through(
    known: Sequence[float | None], variance: Sequence[float], prior: Sequence[float], *, timed: bool
) -> list[float]:
    """A curve through known points, rising; between and behind them in the shape of the prior (`timed`: no guess)."""
    at = [k for k, s in enumerate(known) if s is not None]
    if not at:
        return list(prior)
    values = dict(zip(at, rising([known[k] or 0.0 for k in at], [1.0 / variance[k] for k in at]), strict=True))
    curve: list[float] = []
    for k in range(len(prior)):
        below = max((j for j in at if j <= k), default=None)
        above = min((j for j in at if j >= k), default=None)
        if below is None:
            assert above is not None
            guess = min(values[above] * prior[k] / prior[above], values[above])
        elif above is None:
            guess = _beyond(values, prior, at, k, timed=timed)
        elif below == above:
            guess = values[k]
        else:
            share = (k - below) / (above - below)
            ratio = (1 - share) * values[below] / prior[below] + share * values[above] / prior[above]
            guess = min(max(prior[k] * ratio, values[below]), values[above])
        curve.append(max(guess, curve[-1] if curve else 0.0))
    return curve


def _beyond(values: Mapping[int, float], prior: Sequence[float], at: Sequence[int], k: int, *, timed: bool) -> float:
    """Behind the last known point: in the shape of the prior.

    If that is a guess, on the line from the first point where it is more.
    """
    first, last = at[0], at[-1]
    shaped = values[last] * prior[k] / prior[last]
    if timed or first == last:
        return shaped
    return max(shaped, values[last] + (values[last] - values[first]) / (last - first) * (k - last))


def rising(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest values that never fall (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, v, n), (b, w, m) = pools[-2:]
            pools[-2:] = [((a * v + b * w) / (v + w), v + w, n + m)]
    return [value for value, _, count in pools for _ in range(count)]
