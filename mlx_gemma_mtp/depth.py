"""How many tokens to draft next. Knows nothing of MLX, models or requests."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_DEPTH = 3


@dataclass(frozen=True)
class FixedDepth:
    """The same number of drafts in every round."""

    depth: int

    def next_depth(self) -> int:
        """Drafts per row for the next round."""
        return self.depth


def parse_depth(depth: int | str) -> FixedDepth:
    """The policy for a caller's `depth`: a count, or "auto" (so far: 3 drafts). Raises ValueError."""
    if depth == "auto":
        return FixedDepth(DEFAULT_DEPTH)
    if isinstance(depth, int) and not isinstance(depth, bool) and 0 <= depth <= 8:
        return FixedDepth(depth)
    raise ValueError(f'depth is {depth!r}, expected "auto" or a whole number from 0 to 8')
