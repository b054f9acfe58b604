"""A machine and a text made of numbers: scripted costs and acceptances, with noise, stalls and compilations.

Policies are scored by the expected tokens and seconds of the depths that they chose, so that luck counts only where it
led them astray.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mlx_gemma_mtp.depth import DepthPolicy, RoundShape, RowOutcome, RowState

Cost = Callable[[int, int, int], float]
"""Seconds of the target's share: rows, drafts verified, context."""
Rates = Callable[[int, int], Sequence[float]]
"""Acceptance by position, given that the ones before were accepted: row, round."""


def flat(rows: int, verified: int, context: int) -> float:
    """Weights are read once, whatever the block's length."""
    return 0.020 + 0.0001 * rows * (verified + 1)


def linear(rows: int, verified: int, context: int) -> float:
    """x86 without a threaded BLAS: each token costs as much as the first."""
    return 0.002 + 0.004 * rows * (verified + 1)


def stepped(rows: int, verified: int, context: int) -> float:
    """Metal: each five rows of a matmul read the weights again; above ten, another kernel."""
    tokens = rows * (verified + 1)
    return 0.025 * (1.0 if tokens <= 5 else 1.7 if tokens <= 10 else 3.2)


def experts(rows: int, verified: int, context: int) -> float:
    """A MoE: of 128 experts each token uses 8, and only their weights are read."""
    tokens = rows * (verified + 1)
    return 0.006 + 0.080 * (1.0 - (1.0 - 8 / 128) ** tokens) + 0.0005 * tokens


def steady(*rates: float) -> Rates:
    """The same at all times, and in all rows; the last rate goes on."""
    chain = [*rates, *[rates[-1]] * (8 - len(rates))]
    return lambda row, round_: chain


@dataclass(frozen=True, kw_only=True)
class World:
    """What a policy is put into. `lag`: rounds begun before an earlier one is observed.

    `pace`: how many times longer a round takes than it should, which no policy can help: a run's seconds leave it out.
    """

    cost: Cost
    rates: Rates
    draft: float = 0.0015
    rows: int = 1
    rounds: int = 2000
    context: int = 300
    growth: float = 0.0
    noise: float = 0.15
    stall_every: int = 0
    trace: float = 0.0
    lag: int = 0
    request_rounds: int = 0
    tokens: Callable[[int], int] = lambda round_: round_
    pace: Callable[[int], float] = lambda round_: 1.0

    def seconds(self, verified: int, drafted: int, round_: int) -> float:
        """A round's, without noise."""
        return self.cost(self.rows, verified, self._context(round_)) + drafted * self.draft

    def expected(self, depth: int, round_: int) -> float:
        """Tokens of a round that verifies `depth` drafts."""
        total = 0.0
        for row in range(self.rows):
            chain = 1.0
            total += 1.0
            for rate in self.rates(row, round_)[:depth]:
                chain *= rate
                total += chain
        return total

    def fixed(self, depth: int, first: int = 0) -> float:
        """Tokens per second of a fixed depth from round `first` on."""
        rounds = range(first, self.rounds)
        seconds = sum(self.seconds(depth, depth, t) for t in rounds)
        return sum(self.expected(depth, t) for t in rounds) / seconds

    def best(self, first: int = 0) -> tuple[int, float]:
        """The best fixed depth in hindsight and its tokens per second."""
        rates = {k: self.fixed(k, first) for k in range(9)}
        best = max(rates, key=rates.__getitem__)
        return best, rates[best]

    def _context(self, round_: int) -> int:
        return self.context + int(self.growth * round_)

    def run(
        self, policy: DepthPolicy, clock: Clock, *, seed: int = 0, compiled: set[tuple[int, int]] | None = None
    ) -> Run:
        """Drive a policy through all rounds. `compiled`: shapes that need no compilation; it grows."""
        draw, run = random.Random(seed), Run(self)
        seen = set() if compiled is None else compiled
        wanted: Counter[tuple[int, int]] = Counter()
        waiting: deque[tuple[float, RoundShape, list[RowOutcome]]] = deque()
        block, device = 0, 0.0
        for t in range(self.rounds):
            generation = t // self.request_rounds if self.request_rounds else 0
            if self.request_rounds and t and t % self.request_rounds == 0:
                while waiting:
                    _deliver(waiting, policy, clock)
                for row in range(self.rows):
                    policy.forget((generation - 1) * self.rows + row)
            ids = [generation * self.rows + row for row in range(self.rows)]
            states = [RowState(request=i, cap=1000) for i in ids]
            depths = policy.plan(
                states, width=self.rows, context=self._context(t), compiled=lambda k: not self.trace or (k, k) in seen
            )
            depth = max(depths)
            policy.begin()
            shape = self._shape(block, depth, seen, wanted)
            seconds = self.seconds(*shape, t) * self.pace(t) * (1.0 + self.noise * draw.uniform(-1.0, 1.0))
            run.add(block, shape, t, traced=shape not in seen)
            seconds += 0.0 if shape in seen else self.trace
            if self.stall_every and t % self.stall_every == self.stall_every - 1:
                seconds += 10 * self.seconds(0, 0, t)
            outcomes = [self._outcome(i, row, block, t, draw) for row, i in enumerate(ids)]
            settled = shape in seen or not self.trace
            seen.add(shape)
            device = max(device, clock.now) + seconds
            told = RoundShape(
                rows=self.rows, verified=shape[0], drafted=shape[1], context=self._context(t), settled=settled
            )
            policy.meanwhile()
            waiting.append((device, told, outcomes))
            if len(waiting) > self.lag:
                _deliver(waiting, policy, clock)
            block = depth
        while waiting:
            _deliver(waiting, policy, clock)
        for request in ids if self.rounds else ():
            policy.forget(request)
        return run

    def _shape(
        self, block: int, depth: int, seen: set[tuple[int, int]], wanted: Counter[tuple[int, int]]
    ) -> tuple[int, int]:
        """Drafts verified and drafted: where that isn't compiled, those of a deeper round, as `Speculator` does it."""
        deeper = max(block, depth)
        if not self.trace or (block, depth) in seen or (block > depth and (deeper, deeper) not in seen):
            return block, depth
        wanted[block, depth] += 1
        return (block, depth) if wanted[block, depth] > 8 else (deeper, deeper)

    def _outcome(self, request: int, row: int, block: int, t: int, draw: random.Random) -> RowOutcome:
        accepted, rates = 0, self.rates(row, t)
        while accepted < block and draw.random() < rates[accepted]:
            accepted += 1
        return RowOutcome(request=request, offered=block, accepted=accepted, tokens=(self.tokens(t),))

    def after(self, first: int) -> World:
        """This world from round `first` on, for what is best there."""
        return replace(self, rates=lambda row, t: self.rates(row, t + first), rounds=self.rounds - first)


def _deliver(waiting: deque[tuple[float, RoundShape, list[RowOutcome]]], policy: DepthPolicy, clock: Clock) -> None:
    done, shape, outcomes = waiting.popleft()
    clock.now = max(clock.now, done)
    policy.observe(shape, outcomes)


@dataclass
class Clock:
    """Seconds that pass when the simulator says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Run:
    """What a policy did: the blocks verified in each round, and the tokens and seconds expected of it."""

    world: World
    depths: list[int] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, block: int, shape: tuple[int, int], t: int, *, traced: bool) -> None:
        """Note a round that verified `block` drafts in arrays of a `shape`."""
        self.depths.append(shape[1])
        self.tokens.append(self.world.expected(block, t))
        self.seconds.append(self.world.seconds(*shape, t) + (self.world.trace if traced else 0.0))

    def rate(self, first: int = 0, last: int | None = None) -> float:
        """Tokens per second of the rounds from `first` to `last`."""
        return sum(self.tokens[first:last]) / sum(self.seconds[first:last])
