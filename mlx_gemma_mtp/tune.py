"""Measures what rounds of a pair cost on this machine, by rows, depth and context. Knows no requests, text or files.

Keys and values are zeros: how long a round takes does not depend on them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from .acceptance import committed
from .cache import KVCache
from .costs import DEEPEST, CostFacts, CostModel
from .scheduler import Pipelined
from .speculative import Block, Speculator
from .views import CacheSpec

BATCHES = (1, 2, 4, 8)
CONTEXTS = (256, 3000)
_FEWEST, _ROUNDS = 3, 6  # timed at least, behind one that compiles; the first where a shape's share of time is over,
_QUICK, _MOST = 12.0, 120  # and up to so many within these seconds: a small pair's rounds are soon disturbed
_QUIET = 3  # one in so many times of a round is shorter than the one that counts: other work only ever adds
_AHEAD = 2  # rounds timed together where they are launched ahead
_ROOM = 200  # tokens that come in each turn at most
_SPLIT = 8  # drafts of the rounds that tell the drafter's share

Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Seconds of rounds of 0, 1, … drafts for one number of rows in one context."""

    rows: int
    context: int
    seconds: tuple[float, ...]

    def rate(self, depth: int, acceptance: float) -> float:
        """Tokens per second of the batch at an acceptance that is the same at all positions."""
        return self.rows * committed([acceptance] * depth)[-1] / self.seconds[depth]

    def best(self, acceptance: float) -> int:
        """The depth of the highest rate."""
        return max(range(len(self.seconds)), key=lambda k: self.rate(k, acceptance))


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was measured. `left_out`: shapes (rows, context) for which there was no time."""

    costs: CostModel
    curves: tuple[Curve, ...]
    left_out: tuple[tuple[int, int], ...]
    seconds: float


def tune(
    speculator: Speculator,
    facts: CostFacts,
    *,
    vocab_size: int,
    max_positions: int,
    pipelined: Pipelined = "plain",
    batches: Sequence[int] = BATCHES,
    contexts: Sequence[int] = CONTEXTS,
    seconds: float = 110.0,
    progress: Progress | None = None,
) -> Tuning:
    """Measure all batches in all contexts within `seconds`: short contexts and small batches first.

    The shapes share the time. The first is measured however long it takes; later ones are left out where the time that
    is left won't do, by what earlier ones took. `pipelined`: rounds that the scheduler will launch ahead; they are
    measured so. Raises ValueError where there is no drafter.
    """
    if speculator.drafter is None:
        raise ValueError("there is no drafter: plain decoding is all that there is to choose")
    begin, costs = time.perf_counter(), CostModel(facts)
    room = max_positions - (DEEPEST + 1) * (_ROUNDS + 1) * (DEEPEST + 2)
    shapes = [(rows, c) for c in sorted({max(min(n, room), 1) for n in contexts}) for rows in sorted(batches)]
    curves: list[Curve] = []
    left_out: list[tuple[int, int]] = []
    end, needed = begin + seconds, dict[int, float]()
    for i, (rows, context) in enumerate(shapes):
        # Costs grow no faster than the rows.
        expected = max((took * max(rows / other, 1.0) for other, took in needed.items() if other <= rows), default=0.0)
        if curves and time.perf_counter() + expected > end:
            left_out.append((rows, context))
            continue

        def told(share: float, rows: int = rows, context: int = context, done: int = i) -> None:
            if progress is not None:
                what = f"{rows} row{'s' if rows > 1 else ''}, {context} tokens"
                progress(what, max((done + share) / len(shapes), 1e-6))

        now = time.perf_counter()
        until = now + (end - now) / (len(shapes) - i)
        steady, step, needed[rows] = _measure(speculator, rows, context, vocab_size, pipelined, until, told)
        costs.store(rows, context, steady, step)
        curves.append(Curve(rows=rows, context=context, seconds=tuple(costs.table(rows, context).steady())))
    took = time.perf_counter() - begin
    return Tuning(costs=costs, curves=tuple(curves), left_out=tuple(left_out), seconds=took)


def _measure(
    speculator: Speculator,
    rows: int,
    context: int,
    vocab_size: int,
    pipelined: Pipelined,
    until: float,
    told: Callable[[float], None],
) -> tuple[list[float], float, float]:
    """Seconds of rounds that verify and draft 0, 1, … tokens, of one draft, and of the fewest rounds that will do.

    These are run even where they end behind `until`. All kinds of rounds take turns, so that a machine that slows down
    does so for each.
    """
    shapes = [*((k, k) for k in range(DEEPEST + 1)), (0, _SPLIT), (0, 0)]
    spent: list[list[float]] = [[] for _ in shapes]
    draw = random.Random(0)
    begin, needed = time.perf_counter(), 0.0
    for turn in range(_MOST + 1):
        now = time.perf_counter()
        needed = now - begin if turn <= _FEWEST + 1 else needed
        if turn > _ROUNDS and now - begin > _QUICK:
            break
        if turn > _FEWEST and now + (now - begin) / turn > until:
            break
        cache = filled(speculator.spec, rows, context)
        for i, (verified, drafted) in enumerate(shapes):
            told(min(turn * len(shapes) + i, _ROUNDS * len(shapes)) / ((_ROUNDS + 1) * len(shapes)))
            tokens = [[draw.randrange(vocab_size) for _ in range(verified + 1)] for _ in range(rows)]
            block = Block(mx.array(tokens, mx.int32), mx.full((rows,), verified, mx.int32))
            mx.eval(block.tokens, block.offered)
            # The last shape is a plain round that waits for its tokens, as the one that tells the drafter's share does.
            ahead = i < DEEPEST + 1 and pipelined == ("all" if verified else pipelined) and pipelined != "none"
            spent[i].append((_ahead if ahead else _alone)(speculator, cache, block, drafted))
    quiet = [sorted(times[1:])[(len(times) - 1) // _QUIET - 1] for times in spent]
    return quiet[: DEEPEST + 1], max(quiet[-2] - quiet[-1], 0.0) / _SPLIT, needed


def _alone(speculator: Speculator, cache: KVCache, block: Block, drafted: int) -> float:
    """Seconds of a round that is over before anything else begins."""
    begin = time.perf_counter()
    speculator.run_round(cache, block, [drafted] * cache.rows, exact=True)
    return time.perf_counter() - begin


def _ahead(speculator: Speculator, cache: KVCache, block: Block, drafted: int) -> float:
    """Seconds from one round's tokens to the next one's, where each is launched before the last one's are read."""
    depths = [drafted] * cache.rows
    flight = speculator.launch(cache, block, depths)
    begin = 0.0
    for i in range(_AHEAD + 1):
        following = speculator.launch(cache, flight.block, depths, ahead=flight.verified)
        speculator.land(flight, cache)
        begin, flight = begin if i else time.perf_counter(), following
    seconds = (time.perf_counter() - begin) / _AHEAD
    speculator.land(flight, cache)
    return seconds


def filled(spec: CacheSpec, rows: int, context: int, room: int = _ROOM) -> KVCache:
    """A cache of rows that hold `context` tokens each, with room for `room` more."""
    cache, others = KVCache(spec), []
    for _ in range(rows):
        row = KVCache.with_row(spec, context + room)
        row.advance([context])
        row.rewind([0])  # the device's lengths follow the host's
        others.append(row)
    cache.admit(others)
    mx.eval(cache.arrays)
    return cache
