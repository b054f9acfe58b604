"""How often drafts are accepted, by request and position in the block. Knows no costs and makes no choices.

A rate is that of "accepted, given that all drafts before it were". Rows start from the rates of all requests together
and soon have their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

POSITIONS = 8
"""As many drafts as a block can have."""

_FIRST = 0.65  # of a pair that nothing is known of
_LOWEST, _HIGHEST = 0.01, 0.99
_START, _START_MOST = 4.0, 40.0  # what the other requests' rate is worth to a new one, in own samples,
_START_ALONE = 1.0  # and what _FIRST is worth where there were none
_OWN, _ALL = 40.0, 160.0  # samples that a rate remembers
_STALE = 2.0  # what an old rate is still worth
_NEIGHBOUR = 6.0  # samples below which a position's rate leans on the one before
_MOVED, _DOUBTED = 0.5, 2.0  # what a rate is worth that had to follow another, and at most where the text has changed
_LATEST = 8.0  # samples that can belie a rate
_ERRORS = 3.0 / math.sqrt(2.0 * _LATEST)  # by how many of a draft's spreads they then differ: 3 standard errors
_LEAST_SPREAD = math.sqrt(0.05 * 0.95)
_LEAST_JUMP = _ERRORS * _LEAST_SPREAD
_OTHERS = 0.25  # variance between requests, in that of a draft, as long as few have told it:
_OTHERS_WORTH, _OTHERS_KEPT = 3.0, 0.97  # requests that this is worth, and the share of the others that the next leaves
_LEAST_OTHERS, _MOST_OTHERS = 0.0025, 0.0225  # of a rate, what it is taken for where a position was never reached
_LEAST_VARIANCE = 0.01  # of a draft
_NONE = 0, 0.0, 0.0, 0.0  # drafts, excess, chance and lever of a request that has told nothing
_ENOUGH, _HALF, _TOLD = 8, 20, 60  # drafts from which a request tells it, with which it is worth half, and after which
# it has told enough: all requests' rates then follow its own
_DRIFT, _STALE_DRIFT, _MOST_DRIFT = (
    0.015,
    0.15,
    0.4,
)  # standard deviation that builds up while nothing is drafted, per root of a round
_RECENT = 16.0  # tokens that tell what a text is like
_LONGEST = 512  # of those that came since it was last asked
_CHANGED = 0.35
_FORGET = 0.98  # per round in which a position wasn't reached


class Rate:
    """A running mean of accepted or not. `weight`: samples that it stands for; it fades where none come."""

    __slots__ = ("_fast", "_memory", "_stamp", "_weight", "mean")

    def __init__(self, mean: float, weight: float, memory: float, now: int) -> None:
        self.mean, self._weight, self._memory, self._stamp = mean, weight, memory, now
        self._fast = mean

    def weight(self, now: int) -> float:
        """At round `now`."""
        if now == self._stamp or self._weight <= _STALE:
            return self._weight
        faded: float = self._weight * _FORGET ** (now - self._stamp)
        return max(_STALE, faded)

    def add(self, accepted: float, count: int, now: int) -> float:
        """As `add_mean`, but returns by how much the mean jumped, if the last few drafts belie it."""
        self.add_mean(accepted, count, now)
        self._fast += (accepted - self._fast) * (1.0 - (1.0 - 1.0 / _LATEST) ** count)
        jump = self._fast - self.mean
        # Most drafts end at the first comparison, which no spread could turn.
        if -_LEAST_JUMP < jump < _LEAST_JUMP or self._weight < 2.0 * _LATEST or abs(jump) < _ERRORS * self.spread():
            return 0.0
        self.mean, self._weight = self._fast, _LATEST
        return jump

    def add_mean(self, accepted: float, count: int, now: int) -> None:
        """Count `count` drafts, of which the share `accepted` was, whatever the last ones tell."""
        weight = self._weight
        if now != self._stamp:
            weight, self._stamp = self.weight(now), now
        self._weight = weight = min(weight + count, self._memory)
        self.mean += (accepted - self.mean) * (count / weight if count < weight else 1.0)

    def shift(self, by: float) -> None:
        """Move the mean, and trust it less."""
        self.mean = self._fast = min(max(self.mean + by, _LOWEST), _HIGHEST)
        self._weight = _MOVED

    def doubt(self) -> None:
        """What comes may have another rate."""
        self._weight = min(self._weight, _DOUBTED)

    def spread(self) -> float:
        """The standard deviation of one draft."""
        return max(math.sqrt(max(self.mean * (1.0 - self.mean), 0.0)), _LEAST_SPREAD)


class Spread:
    """How far requests lie apart: the variance of their rates, in that of one draft, which outlives each of them.

    So told, it holds for rates of any height: next to 1 no rate can lie far from another.
    """

    def __init__(self) -> None:
        self._weight, self.share = _OTHERS_WORTH, _OTHERS

    def add(self, drafts: int, excess: float, chance: float, lever: float) -> None:
        """A request is over: of its `drafts`, `excess` more were kept than all requests' rates say.

        `chance`: the variance that this would have if all requests were alike; `lever`: the sum of the drafts'
        standard deviations, by which the excess grows if all positions' rates are off by a share of theirs.
        """
        if drafts >= _ENOUGH:
            weight = drafts / (drafts + _HALF)
            self._weight = self._weight * _OTHERS_KEPT + weight
            told = min((excess**2 - chance) / lever**2, 1.0)
            self.share += (told - self.share) * weight / self._weight

    @property
    def start(self) -> float:
        """What the rate of all requests is worth to a new one, in own samples."""
        return min(max(1.0 / max(self.share, 1e-6), _START), _START_MOST)

    def variance(self, rate: float) -> float:
        """Of a request's rate, where all requests' is this."""
        return min(max(self.share * rate * (1.0 - rate), _LEAST_OTHERS), _MOST_OTHERS)


class AcceptanceModel:
    """Rates of all requests together (they outlive each), and of every living request."""

    def __init__(self, rates: Sequence[tuple[float, float]] = (), spread: Spread | None = None) -> None:
        self._now, self._spread = 0, Spread() if spread is None else spread
        self._sums: dict[int | None, tuple[int, float, float, float]] = {}
        self._all = [Rate(mean, weight, _ALL, 0) for mean, weight in rates]
        self._reached = [0] * POSITIONS
        self._told: dict[int | None, tuple[list[int], list[int]]] = {}
        self._own: dict[int, list[Rate]] = {}
        self._known: dict[int, tuple[list[float], list[float]]] = {}
        self._new: tuple[list[float], list[float]] | None = None

    @property
    def rates(self) -> list[tuple[float, float]]:
        """Means of all requests, and the samples they stand for, at the positions that any has reached."""
        return [(rate.mean, rate.weight(self._now)) for rate in self._all]

    def observe(self, request: int | None, offered: int, accepted: int) -> None:
        """Of `offered` drafts the first `accepted` were kept. Those behind the first rejection tell nothing.

        `request`: None when it has ended. It counts with the next `tick`.
        """
        tried = min(offered, accepted + 1, POSITIONS)
        if tried > 0:
            told = self._told.get(request)
            if told is None:
                told = self._told[request] = [0] * POSITIONS, [0] * POSITIONS
            told[0][tried - 1] += 1
            if accepted:
                told[1][min(accepted, tried) - 1] += 1

    def tick(self, rounds: int = 1) -> None:
        """So many rounds are over: the rates take them in, and what they told nothing of grows older."""
        self._known.clear()
        now, reaching, kept = self._now, [0] * POSITIONS, [0] * POSITIONS
        usual = [rate.mean for rate in self._all]
        chances = [max(mean * (1.0 - mean), _LEAST_VARIANCE) for mean in usual]
        levers = [math.sqrt(chance) for chance in chances]
        for request, (tried, accepted) in self._told.items():
            own = [] if request is None else self._own.setdefault(request, [])
            drafts, excess, chance, lever = self._sums.get(request, _NONE)
            _from_the_end(tried)
            _from_the_end(accepted)
            for i, count in enumerate(tried):
                if not count:
                    break
                right = accepted[i]
                if i == len(own):
                    guess = self._guess([r.mean for r in own], i)
                    start = self._spread.start if usual else _START_ALONE
                    own.append(Rate(guess, start, _OWN, now))
                if jump := own[i].add(right / count, count, now):
                    for rate in own[i + 1 :]:
                        rate.shift(jump)
                reaching[i] += count
                kept[i] += right
                if drafts < _TOLD and i < len(usual):
                    drafts += count
                    excess += right - count * usual[i]
                    chance += count * chances[i]
                    lever += count * levers[i]
            if request is not None:
                self._sums[request] = drafts, excess, chance, lever
        self._told.clear()
        for i, count in enumerate(reaching):
            if not count:
                break
            if i == len(self._all):
                self._all.append(Rate(self._guess([], i), 1.0, _ALL, now))
            self._all[i].add_mean(kept[i] / count, count, now)
            self._reached[i] = now
            self._new = None
        self._now += rounds

    def forget(self, request: int) -> None:
        """A request has ended."""
        if request in self._sums:
            self._spread.add(*self._sums.pop(request))
        self._own.pop(request, None)
        self._known.pop(request, None)

    def of(self, request: int) -> tuple[list[float], list[float]]:
        """The rate at each of the positions, and the tokens `committed` by them. Not to be changed."""
        own = self._own.get(request)
        if own is None:
            if self._new is None:
                guesses = [self._guess([], i) for i in range(POSITIONS)]
                self._new = guesses, committed(guesses)
            return self._new
        found = self._known.get(request)
        if found is None:
            known: list[float] = []
            last = 0.0
            for rate in own:
                mean = rate.mean
                if known and (weight := rate.weight(self._now)) < _NEIGHBOUR:
                    mean = (weight * mean + (_NEIGHBOUR - weight) * last) / _NEIGHBOUR
                last = _LOWEST if mean < _LOWEST else _HIGHEST if mean > _HIGHEST else mean
                known.append(last)
            if len(own) < POSITIONS:
                reached = known[:]
                known += [self._guess(reached, i) for i in range(len(own), POSITIONS)]
            found = self._known[request] = known, committed(known)
        return found

    @property
    def unknown(self) -> bool:
        """Whether no draft was ever verified."""
        return not self._all

    @property
    def stale(self) -> bool:
        """Whether rates are unknown, or may be others by now: nothing was drafted for long."""
        known = bool(self._all) and self._all[0].weight(self._now) > _STALE
        return not known or self._drift(0) > _STALE_DRIFT

    def doubt(self) -> None:
        """What is drafted next may be another kind of text."""
        self._reached = [min(r, self._now - int((_MOST_DRIFT / _DRIFT) ** 2)) for r in self._reached]
        for rates in self._own.values():
            for rate in rates:
                rate.doubt()

    def deviations(self, requests: Sequence[int]) -> list[float]:
        """By how much the mean rate of these requests may be off, at each position."""
        count, weights, spreads = [0] * POSITIONS, [1.0] * POSITIONS, [0.0] * POSITIONS
        for request in requests:
            for i, rate in enumerate(self._own.get(request, ())):
                count[i] += 1
                weights[i] += rate.weight(self._now)
                spreads[i] += rate.spread()
        found, spread = [], self._spread
        for i, of in enumerate(count):
            if of:
                variance = (spreads[i] / of) ** 2 / weights[i]
            elif i < len(self._all):
                everyone = self._all[i]
                variance = everyone.spread() ** 2 / max(everyone.weight(self._now), _START)
                variance += spread.variance(everyone.mean)
            else:
                variance = 0.25 / _START + spread.variance(0.5)
            found.append(math.sqrt(variance + self._drift(i) ** 2))
        return found

    def _drift(self, i: int) -> float:
        return min(_DRIFT * math.sqrt(self._now - self._reached[i]), _MOST_DRIFT)

    def _guess(self, own: Sequence[float], i: int) -> float:
        """Of a position that the request hasn't reached: all requests' rate, moved as far as its last one lies off."""
        known = self._all
        everyone = known[min(i, len(known) - 1)].mean if known else _FIRST
        if own and known:
            last = min(len(own), i) - 1
            everyone += own[last] - known[min(last, len(known) - 1)].mean
        return min(max(everyone, _LOWEST), _HIGHEST)


def _from_the_end(counts: list[int]) -> None:
    """How many reached each position, from how many went no further."""
    behind = 0
    for i in range(len(counts) - 1, -1, -1):
        behind += counts[i]
        counts[i] = behind


def committed(rates: Sequence[float]) -> list[float]:
    """Tokens that a round of 0, 1, … len(rates) drafts is expected to give a row."""
    out, chain, tokens = [1.0], 1.0, 1.0
    for rate in rates:
        chain *= rate
        tokens += chain
        out.append(tokens)
    return out


class Predictability:
    """How often the last two tokens of an output told the next, as they did earlier in it: no drafter is needed.

    It says that a text has become easier or harder to draft (code, repetition) while nothing is drafted.
    """

    def __init__(self) -> None:
        self._new: dict[int, list[int]] = {}
        self._next: dict[int, dict[int, int]] = {}
        self._tail: dict[int, tuple[int, int]] = {}
        self._hits: dict[int, float] = {}
        self._before: dict[int, float] = {}

    def observe(self, request: int, tokens: Sequence[int]) -> None:
        """What a request got next."""
        self._new.setdefault(request, []).extend(tokens)

    def forget(self, request: int) -> None:
        """A request has ended."""
        for kept in (self._new, self._next, self._tail, self._hits, self._before):
            kept.pop(request, None)

    def changed(self) -> bool:
        """Whether a request's text is another than when this was last true."""
        changed = False
        for request, tokens in self._new.items():
            self._read(request, tokens[-_LONGEST:])
            tokens.clear()
            hits = self._hits[request]
            if abs(hits - self._before.setdefault(request, 0.0)) > _CHANGED:
                self._before[request], changed = hits, True
        return changed

    def _read(self, request: int, tokens: Sequence[int]) -> None:
        follows = self._next.setdefault(request, {})
        hits, (before, last) = self._hits.get(request, 0.0), self._tail.get(request, (-1, -1))
        for token in tokens:
            if before >= 0:
                pair = before << 32 | last  # a quicker key than two
                hits += ((follows.get(pair) == token) - hits) / _RECENT
                follows[pair] = token
            before, last = last, token
        self._hits[request], self._tail[request] = hits, (before, last)
