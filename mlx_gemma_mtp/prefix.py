"""K/V of prompts and outputs that are over, kept for prompts that begin alike. Knows no models, requests or text.

Layers without a window can be cut anywhere. A ring knows only the last window: an entry therefore keeps its rings at
several lengths, and a prompt goes on from the longest that it shares (or from where rings still reach back to).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .cache import Held, KVCache
from .views import CacheSpec

MIN_REUSED = 16
"""Fewer tokens are computed anew: copying would cost as much."""


def common_prefix(a: npt.NDArray[np.int32], b: npt.NDArray[np.int32]) -> int:
    """How many tokens two sequences share at their beginning."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n


def as_tokens(tokens: Sequence[int]) -> npt.NDArray[np.int32]:
    """A sequence of token ids as an array."""
    return np.fromiter(tokens, np.int32, len(tokens))


@dataclass(eq=False)
class _Entry:
    """Tokens and what was held of them: `points` by length, the longest of which has the K/V without a window."""

    tokens: npt.NDArray[np.int32]
    points: dict[int, Held] = field(default_factory=dict)

    @property
    def whole(self) -> Held:
        return self.points[max(self.points)]

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + sum(p.nbytes for p in self.points.values())

    def reusable(self, shared: int, spec: CacheSpec) -> tuple[int, Held] | None:
        """The longest prefix of `shared` tokens that can be gone on from, and the point whose rings know it."""
        best: tuple[int, Held] | None = None
        for length, point in self.points.items():
            n = min(length, shared)
            if (best is None or n > best[0]) and point.reaches_back_to(n, spec):
                best = n, point
        return best

    def absorb(self, other: _Entry) -> None:
        """Take over the points of an entry whose tokens are the beginning of these."""
        for length, point in other.points.items():
            if length not in self.points:
                self.points[length] = Held(point.length, point.written, point.rings, ())


class PrefixCache:
    """At most `limit` bytes of such K/V, the least recently used given up first."""

    def __init__(self, spec: CacheSpec, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"prefix_cache is {limit}, expected a count of bytes of at least 0")
        self.spec, self.limit = spec, limit
        self.hits = 0
        self.reused_tokens = 0
        self._entries: list[_Entry] = []

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(e.nbytes for e in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def known(self, tokens: npt.NDArray[np.int32]) -> int:
        """How many of these tokens `reuse` would give."""
        found = self._best(tokens)
        return 0 if found is None else found[2]

    def reuse(self, tokens: npt.NDArray[np.int32], capacity: int) -> KVCache | None:
        """A cache of one row that holds the longest known prefix of a prompt, but not its last token; None: none known.

        `capacity`: tokens that it should have room for.
        """
        found = self._best(tokens)
        if found is None:
            return None
        entry, point, length = found
        self._entries.remove(entry)
        self._entries.append(entry)
        self.hits += 1
        self.reused_tokens += length
        held = Held(point.length, point.written, point.rings, entry.whole.full)
        return KVCache.from_held(self.spec, held, length, capacity)

    def keep(self, tokens: npt.NDArray[np.int32], held: Held, points: Iterable[Held] = ()) -> None:
        """Keep what a row held of `tokens` (held.length of them), and its rings at shorter `points`.

        What is a prefix of something kept is shared.
        """
        if held.length < MIN_REUSED or held.nbytes > self.limit:
            return
        shorter = {p.length: p for p in points if p.length < held.length}
        entry = _Entry(tokens[: held.length].copy(), {held.length: held, **shorter})
        for other in list(self._entries):
            shared = common_prefix(other.tokens, entry.tokens)
            if shared == len(entry.tokens):
                self._entries.remove(other)
                other.absorb(entry)
                entry = other
            elif shared == len(other.tokens):
                self._entries.remove(other)
                entry.absorb(other)
        self._entries.append(entry)
        self.shrink(self.limit)

    def shrink(self, limit: int) -> None:
        """Give up the least recently used entries (of a last one, points) until at most `limit` bytes are kept."""
        while self._entries and self.nbytes > limit:
            oldest = self._entries[0]
            spare = sorted(oldest.points)[:-1]
            if len(self._entries) == 1 and spare:
                del oldest.points[spare[0]]
            else:
                del self._entries[0]

    def _best(self, tokens: npt.NDArray[np.int32]) -> tuple[_Entry, Held, int] | None:
        best: tuple[_Entry, Held, int] | None = None
        for entry in reversed(self._entries):
            # The last token is computed in any case: its hidden state is what decoding goes on from.
            shared = common_prefix(entry.tokens, tokens[:-1])
            if shared < MIN_REUSED or (best is not None and shared <= best[2]):
                continue
            found = entry.reusable(shared, self.spec)
            if found is not None and found[0] >= MIN_REUSED and (best is None or found[0] > best[2]):
                best = entry, found[1], found[0]
        return best
