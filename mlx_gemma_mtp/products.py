"""What matrix products cost by the tokens that share them: where the cost of verifying starts from. Knows no rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import mlx.core as mx

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
_SAMPLE = 0.003  # seconds of one token's products in a sample: a device takes a while to wake
_LONG = 0.1  # seconds of a sample behind which no larger ones are taken
_TURNS, _ENOUGH = 5, 0.1  # of all sizes, of which the quickest counts; seconds of all behind which two have to do

Product = Callable[[mx.array], Sequence[mx.array]]


def product_costs(
    products: Sequence[Product], inputs: int, dtype: mx.Dtype, *, clock: Callable[[], float] = time.perf_counter
) -> tuple[tuple[int, float], ...]:
    """(tokens, cost in that of one token), rising in both, of `products` of x (tokens, inputs).

    Of many products, as one's weights alone might stay in a cache, but no more than tell the time; some tenths of a
    second for all. Tokens for which a sample would be long are left out.
    """
    begin = clock()
    many = {n: mx.ones((n, inputs), dtype) for n in TOKENS}
    mx.eval(*many.values())
    _seconds(products[:1], many[1], clock)  # loads kernels and pages
    alone = min(_seconds(products[:1], many[1], clock) for _ in range(2))
    some = products[: max(int(_SAMPLE / max(alone, 1e-9)), 1)]
    best: dict[int, float] = {}
    for n, x in many.items():
        best[n] = _seconds(some, x, clock)
        if best[n] > _LONG:
            break
    for turn in range(1, _TURNS):
        for n in best:
            # The first turn loaded kernels, too.
            took = _seconds(some, many[n], clock)
            best[n] = took if turn == 1 else min(best[n], took)
        if clock() - begin > _ENOUGH and turn > 1:
            break
    costs: list[tuple[int, float]] = []
    for n, seconds in best.items():
        share = seconds / max(best[1], 1e-9)
        costs.append((n, max(share, costs[-1][1]) if costs else 1.0))
    return tuple(costs)


def _seconds(products: Sequence[Product], x: mx.array, clock: Callable[[], float]) -> float:
    before = clock()
    mx.eval([product(x) for product in products])
    return clock() - before
