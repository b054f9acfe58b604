"""How the cost of products grows with the tokens that share them: where costs start from. Knows no models or rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import mlx.core as mx

from .costs import rising

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
_LEAST = 4  # sizes that are measured however long they take
_SAMPLE = 0.003  # seconds that a sample of one token is to take: a device takes a while to wake
_LONG = 0.03  # seconds of a sample behind which no larger ones are taken
_TURNS, _MOST_TURNS, _ENOUGH = 2, 4, 0.15  # behind the first; seconds of all from which there are no more than needed

Block = Callable[[mx.array], mx.array]


def product_costs(
    blocks: Sequence[Block], width: int, dtype: mx.Dtype, *, clock: Callable[[], float] = time.perf_counter
) -> tuple[tuple[int, float], ...]:
    """(tokens, cost in that of one token), rising in both, of a chain of some of `blocks`: (n, width) to (n, width).

    Of as many blocks as tell the time, spread over all: one's weights alone might stay in a cache. Takes some tenths of
    a second, or five times what 15 tokens take where that is more. Sizes from one that is slow on are left out.
    """
    begin = clock()

    def seconds(chosen: Sequence[Block], n: int) -> float:
        x = mx.ones((n, width), dtype)
        mx.eval(x)
        before = clock()
        for block in chosen:
            x = block(x)
        mx.eval(x)
        return clock() - before

    some = blocks[:1]
    while len(some) < len(blocks):
        seconds(some, 1)  # brings in weights
        if seconds(some, 1) >= _SAMPLE:
            break
        count = min(2 * len(some), len(blocks))
        some = [blocks[i * len(blocks) // count] for i in range(count)]
    best: dict[int, float] = {}
    for n in TOKENS:
        seconds(some, n)  # loads kernels
        best[n] = seconds(some, n)
        if best[n] > _LONG:
            # Unless it was chance.
            best[n] = min(best[n], seconds(some, n))
            if best[n] > _LONG and len(best) >= _LEAST:
                break
    for turn in range(_MOST_TURNS):
        if turn >= _TURNS and clock() - begin > _ENOUGH:
            break
        best = {n: min(took, seconds(some, n)) for n, took in best.items()}
    mx.clear_cache()
    smooth = rising(list(best.values()), [1.0] * len(best))
    return tuple((n, took / smooth[0] if smooth[0] > 0.0 else 1.0) for n, took in zip(best, smooth, strict=True))
