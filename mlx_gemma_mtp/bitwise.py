"""Which shapes keep block and single-step logits equal, bit for bit: found by probing, or refused.

Kernels change with the number of rows that they multiply. Where a single step's differ from a block's, steps can be
padded into the kernels of short blocks, and blocks and batches kept within them. Knows nothing of requests or text.
"""

from __future__ import annotations

from collections.abc import Callable

from .probe import ProbeResult
from .speculative import Shapes

PADDINGS = (1, 2, 4)
"""Tokens that single steps are padded to, in the order in which they are tried."""


class BitwiseError(RuntimeError):
    """No decode path here is bitwise; says what differs on each that was tried."""


def choose_shapes(probe: Callable[[int], ProbeResult], *, drafts: bool) -> tuple[Shapes, ProbeResult]:
    """The decode path that leaves the most room, and what was found of it. Raises BitwiseError.

    probe(least) compares shapes with single steps that are padded to `least` tokens. With `drafts`, a path has to have
    room for one draft in one row at least.
    """
    found: list[tuple[Shapes, ProbeResult]] = []
    tried: list[str] = []
    for least in PADDINGS:
        result = probe(least)
        tried.append(f"steps of {least}: {result.describe()}")
        if any(reason.endswith("(time)") for reason in result.skipped):
            continue
        longest = _longest(result)
        free = least == 1 and result.bitwise and not result.skipped
        if longest.get(1, 0) >= (2 if drafts else 1):
            found.append((Shapes(least=least, longest=longest, free=free), result))
        if free:
            break
    if not found:
        raise BitwiseError(f"no decode path is bitwise here ({'; '.join(tried)})")
    # Of equals the first, which pads least.
    return max(found, key=lambda pair: sum(pair[0].longest.values()))


def _longest(result: ProbeResult) -> dict[int, int]:
    """For each count of rows, up to the first at which not even steps hold: the longest block up to which all hold."""
    places = {(w.keys, w.capacity) for w in result.widths}
    longest: dict[int, int] = {}
    for rows in sorted({w.rows for w in result.widths}):
        for block in sorted({w.block for w in result.widths}):
            where = {(w.keys, w.capacity) for w in result.widths if (w.rows, w.block) == (rows, block)}
            # A single step in one row is what all else is compared with.
            complete = where == places or rows == block == 1
            if not complete or not result.holds(rows, block):
                break
            longest[rows] = block
        if rows not in longest:
            break
    return longest
