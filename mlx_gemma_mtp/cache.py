"""The K/V cache that target and drafter share, on the host's side. Knows nothing of models, sampling or requests.

A row is a length; everything else is computed from it (`views`). Rows open, close, move and grow here, between
forwards. In layers without a window a row's capacity follows its own length: rows of like capacity form a group and
share an array. The device's side is a flat list of arrays that a pure, compiled function takes and gives back
(`KVCache.arrays`). One cache is used by one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .views import BlockView, CacheArrays, CacheSpec, HeldView, Layout

_ROW_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_STEP = 512


def row_bucket(rows: int) -> int:
    """Smallest array size (in rows) that holds `rows`: few sizes, so that compiled rounds are reused."""
    return next((b for b in _ROW_BUCKETS if b >= rows), -(-rows // 64) * 64)


def capacity_step(length: int) -> int:
    """Capacity, in positions, of a buffer without window for `length`: steps of 512, later of a quarter octave."""
    step = max(_STEP, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-max(length, 1) // step) * step


def planned_bytes(spec: CacheSpec, lengths: Sequence[int]) -> int:
    """Bytes of K/V that a batch of rows of these lengths is given (-1: a free row)."""
    if not lengths:
        return 0
    rows = row_bucket(len(lengths))
    plan = _plan(spec, lengths)
    places = plan[0][0] * rows if len(plan) == 1 else sum(size * len(members) for size, members in plan)
    return rows * spec.ring_bytes() + places * spec.bytes_per_token()


def _plan(spec: CacheSpec, lengths: Sequence[int], block: int = 0) -> list[tuple[int, list[int]]]:
    """Groups as (capacity, rows): the longest row sets one, rows up to one step shorter ride along.

    Every row has room for `block` more tokens, and for any block of a round.
    """
    steps = {r: capacity_step(n + max(spec.max_block, block)) for r, n in enumerate(lengths) if n >= 0}
    plan = []
    while steps:
        top = max(steps.values())
        members = [r for r, s in steps.items() if capacity_step(s + 1) >= top]
        plan.append((top, members))
        for r in members:
            del steps[r]
    return plan


@dataclass(frozen=True)
class Held:
    """What a row held at `length` tokens, outside of any batch: rings (1, G, C, D) and full (1, G, length, D), K and V
    by slot. `written` is the furthest position that its rings were written to.
    """

    length: int
    written: int
    rings: tuple[mx.array, ...]
    full: tuple[mx.array, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(a.nbytes for a in (*self.rings, *self.full))

    def reaches_back_to(self, length: int, spec: CacheSpec) -> bool:
        """Whether its rings still know all that a row of `length` tokens sees."""
        return length <= self.length and _remembered(spec, self.written, length)


def _remembered(spec: CacheSpec, written: int, length: int) -> bool:
    """Whether rings written up to position `written` hold the windows of a row of `length` tokens."""
    rings = [(spec.ring(s), s.window) for s in spec.slots if s.window is not None]
    return not any(written > ring and written - length > ring - window for ring, window in rings)


_Place = tuple[list[mx.array], int]
_GONE = mx.array(0)


@dataclass
class _Source:
    """Where one row's K/V lie: `rings` and `full` are lists of arrays (K, V by slot), with the row's index in each."""

    length: int
    written: int
    rings: list[mx.array]
    ring_row: int
    full: list[mx.array]
    full_row: int


def _ring_place(source: _Source | None) -> _Place | None:
    return None if source is None else (source.rings, source.ring_row)


def _full_place(source: _Source | None) -> _Place | None:
    return None if source is None else (source.full, source.full_row)


def _drop(places: Sequence[_Place | None], j: int) -> None:
    """Let go of array `j` at the old places, so that its memory is free before the next slot is laid out."""
    for place in places:
        if place is not None:
            place[0][j] = _GONE


class KVCache:
    """The cache of a batch: rows open, close and grow on the host, between forwards.

    `lengths` and `alive` mirror the device's values. `rows` is the size of the arrays in rows, free rows included;
    a row is an index below it, stable until `compact`. `shape` is (rows, capacity) of each group.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self.spec = spec
        self.lengths: list[int] = []
        self.alive: list[bool] = []
        self._written: list[int] = []
        self.layout = Layout(groups=0, mapped=False)
        self.shape: tuple[tuple[int, int], ...] = ()
        self.arrays: list[mx.array] = []
        self._groups: list[list[int]] = []

    @classmethod
    def with_row(cls, spec: CacheSpec, capacity: int) -> KVCache:
        """A cache of one open, empty row with room for `capacity` tokens."""
        cache = cls(spec)
        cache.lengths, cache.alive, cache._written = [0], [True], [0]
        rings = [cache._zeros(1, i, spec.ring(spec.slots[i])) for i in spec.rings for _ in (0, 1)]
        room = capacity_step(capacity + spec.max_block)
        full = [cache._zeros(1, i, room) for i in spec.fulls for _ in (0, 1)]
        cache._install(rings, [[0]], [full])
        return cache

    @classmethod
    def from_held(cls, spec: CacheSpec, held: Held, length: int, capacity: int) -> KVCache:
        """A cache of one row with the first `length` tokens of `held` and room for `capacity`. `held` stays as it is.

        Raises ValueError where its rings have forgotten some of what such a row sees.
        """
        if not held.reaches_back_to(length, spec):
            raise ValueError(f"what was held at {held.length} tokens can't be reused at {length}")
        cache = cls(spec)
        cache.lengths, cache.alive, cache._written = [length], [True], [held.written]
        room = capacity_step(max(capacity, length) + spec.max_block)
        full = []
        for i, slot in enumerate(spec.fulls):
            for j in (2 * i, 2 * i + 1):
                rest = cache._zeros(1, slot, room - length)
                full.append(mx.concatenate([held.full[j][:, :, :length], rest], axis=2))
        cache._install(list(held.rings), [[0]], [full])
        mx.eval(cache.arrays)
        return cache

    def hold(self, row: int, length: int, *, rings_only: bool = False) -> Held:
        """A copy of what `row` holds, of its first `length` tokens at most; without its K/V if `rings_only`."""
        source = self._sources()[row]
        if source is None or not 0 < length <= source.length:
            raise ValueError(f"row {row} doesn't hold {length} tokens")
        # Gathered: a slice could share, and keep alive, the whole batch's buffer.
        rings = [mx.take(a, mx.array([source.ring_row]), axis=0) for a in source.rings]
        full, places = [], mx.arange(length)
        if not rings_only:
            full = [mx.take(a[source.full_row : source.full_row + 1], places, axis=2) for a in source.full]
        mx.eval(rings, full)
        return Held(length, source.written, tuple(rings), tuple(full))

    @property
    def rows(self) -> int:
        """Rows in the arrays, free ones included."""
        return len(self.alive)

    @property
    def nbytes(self) -> int:
        """Bytes of K/V allocated."""
        if not self.arrays:
            return 0
        parts = CacheArrays(self.spec, self.layout, self.arrays)
        return sum(a.nbytes for a in [*parts.rings, *(a for group in parts.groups for a in group)])

    def capacity(self, row: int) -> int:
        """Positions that `row` has room for in layers without a window (0 if there are none)."""
        return next(self.shape[g][1] for g, members in enumerate(self._groups) if row in members)

    def admit(self, others: Sequence[KVCache]) -> list[int]:
        """Move the open rows of `others` into this cache (they are empty afterwards); returns their rows here."""
        if any(other.spec != self.spec for other in others):
            raise ValueError("admit expects caches with the same spec")
        free = [r for r, alive in enumerate(self.alive) if not alive]
        sources, rows = self._sources(), []
        for other in others:
            for source in filter(None, other._sources()):
                row = free.pop(0) if free else len(sources)
                sources[row : row + 1] = [source]
                rows.append(row)
            other._clear()
        self._rebuild(sources)
        return rows

    def close_row(self, row: int) -> None:
        """Free a row at once; nothing is copied or erased, and no other row is disturbed."""
        if not self.alive[row]:
            raise ValueError(f"row {row} is not open")
        self.alive[row], self.lengths[row], self._written[row] = False, 0, 0
        self._sync()

    def compact(self) -> list[int] | None:
        """Give freed rows back if the arrays can shrink; returns the old indices of the rows kept, in order."""
        kept = [r for r, alive in enumerate(self.alive) if alive]
        if self.rows == 0 or (kept and row_bucket(len(kept)) >= self.rows):
            return None
        self._rebuild([s for s in self._sources() if s is not None])
        return kept

    def bytes_after(self, block: int) -> int:
        """Bytes of K/V allocated once every open row has room for `block` more tokens."""
        if not self._short(block):
            return self.nbytes
        return self._planned()

    def tighten(self) -> None:
        """Give back what is allocated for rows that are over, if the rest can be laid out in less."""
        if self._planned() < self.nbytes:
            self._rebuild(self._sources())

    def has_room(self, block: int) -> bool:
        """Whether every open row has room for `block` more tokens."""
        return not self._short(block)

    def reserve(self, block: int) -> None:
        """Make room for `block` more tokens in every open row; copies only rows that outgrow their capacity."""
        if self._short(block):
            self._rebuild(self._sources(), block)

    def advance(self, counts: Sequence[int], *, block: int = 0) -> None:
        """Note on the host that a forward wrote `block` tokens and made each open row counts[row] tokens longer."""
        for row, n in enumerate(counts):
            if self.alive[row]:
                self._written[row] = max(self._written[row], self.lengths[row] + max(n, block))
                self.lengths[row] += n

    def rewind(self, counts: Sequence[int]) -> None:
        """Forget each row's last counts[row] tokens: a subtraction.

        A ring has forgotten what lies further back than its slack behind the furthest position ever written: a row
        that has outgrown its windows can't be rewound beyond that.
        """
        for row, n in enumerate(counts):
            length = self.lengths[row] - n
            if n < 0 or length < 0 or (n and not _remembered(self.spec, self._written[row], length)):
                raise ValueError(f"can't rewind row {row} of length {self.lengths[row]} by {n}")
        self.lengths = [length - n for length, n in zip(self.lengths, counts, strict=True)]
        self._sync()

    def view(self, block: int, *, start: int | None = None) -> BlockView:
        """A view of the next `block` tokens, outside of a compiled function."""
        return BlockView(self.spec, self.layout, self.arrays, block, start=start)

    def held(self, *, position: mx.array | None = None) -> HeldView:
        """A drafter's view, outside of a compiled function."""
        return HeldView(self.spec, self.layout, self.arrays, position=position)

    def _planned(self) -> int:
        """Bytes of K/V that the rows would be given now."""
        return planned_bytes(self.spec, [n if a else -1 for n, a in zip(self.lengths, self.alive, strict=True)])

    def _short(self, block: int) -> bool:
        """Whether a row outgrows its capacity with `block` more tokens."""
        return any(a and 0 < self.capacity(r) < self.lengths[r] + block for r, a in enumerate(self.alive))

    def _zeros(self, rows: int, slot: int, capacity: int) -> mx.array:
        spec = self.spec.slots[slot]
        return mx.zeros((rows, spec.kv_heads, capacity, spec.head_dim), self.spec.dtype)

    def _sync(self) -> None:
        self.arrays[0] = mx.array(self.lengths, mx.int32)
        self.arrays[1] = mx.array([int(a) for a in self.alive], mx.int32)

    def _sources(self) -> list[_Source | None]:
        """Where each row lies now (None: a free row). Rows of one array share its list."""
        sources: list[_Source | None] = [None] * self.rows
        if not sources:
            return sources
        parts = CacheArrays(self.spec, self.layout, self.arrays)
        for group, members in zip(parts.groups, self._groups, strict=True):
            for place, row in enumerate(members):
                if self.alive[row]:
                    sources[row] = _Source(self.lengths[row], self._written[row], parts.rings, row, group, place)
        return sources

    def _clear(self) -> None:
        self.lengths, self.alive, self._written, self.arrays, self._groups = [], [], [], [], []
        self.layout = Layout(groups=0, mapped=False)

    def _rebuild(self, sources: list[_Source | None], block: int = 0) -> None:
        """Lay rows out anew with room for `block` tokens; keep what doesn't change.

        A slot at a time, so that no more than one exists twice.
        """
        self._clear()
        if all(s is None for s in sources):
            return
        sources = sources + [None] * (row_bucket(len(sources)) - len(sources))
        plan = _plan(self.spec, [-1 if s is None else s.length for s in sources], block)
        if len(plan) == 1:
            plan = [(plan[0][0], list(range(len(sources))))]
        rings = []
        for i, slot in enumerate(self.spec.rings):
            size = self.spec.ring(self.spec.slots[slot])
            places = [_ring_place(s) for s in sources]
            for j in (2 * i, 2 * i + 1):
                rings.append(self._gather(places, j, slot, size, places))
                _drop(places, j)
        full: list[list[mx.array]] = [[] for _ in plan]
        for i, slot in enumerate(self.spec.fulls):
            for j in (2 * i, 2 * i + 1):
                everyone = [_full_place(s) for s in sources]
                for g, (size, members) in enumerate(plan):
                    full[g].append(self._gather([everyone[r] for r in members], j, slot, size, everyone))
                _drop(everyone, j)
        self.lengths = [0 if s is None else s.length for s in sources]
        self._written = [0 if s is None else s.written for s in sources]
        self.alive = [s is not None for s in sources]
        self._install(rings, [members for _, members in plan], full)

    def _gather(
        self, places: Sequence[_Place | None], j: int, slot: int, size: int, everyone: Sequence[_Place | None]
    ) -> mx.array:
        """One array (rows, G, size, D) from the rows at `places` (None: a free row), K or V number `j`.

        An old array becomes the new one, in place, if no row of it (`everyone`: of the whole batch) goes elsewhere.
        """
        shape = (len(places), self.spec.slots[slot].kv_heads, size, self.spec.slots[slot].head_dim)
        at_home = (p[0] for n, p in enumerate(places) if p is not None and p[1] == n and p[0][j].shape == shape)
        if (home := next(at_home, None)) is not None:
            strangers = [(n, p) for n, p in enumerate(places) if p is not None and (p[0] is not home or p[1] != n)]
            ours, all_of_it = (sum(p is not None and p[0] is home for p in ps) for ps in (places, everyone))
            if ours == all_of_it and not any(p[0] is home for _, p in strangers):
                made = home[j]
                home[j] = _GONE
                for n, p in strangers:
                    held = min(size, p[0][j].shape[2])
                    made[n : n + 1, :, :held] = p[0][j][p[1] : p[1] + 1, :, :held]
                mx.eval(made)
                return made
        parts = []
        for place in places:
            part = self._zeros(1, slot, size) if place is None else place[0][j][place[1] : place[1] + 1, :, :size]
            if part.shape[2] < size:
                part = mx.concatenate([part, self._zeros(1, slot, size - part.shape[2])], axis=2)
            parts.append(part)
        made = mx.concatenate(parts)
        mx.eval(made)
        return made

    def _install(self, rings: list[mx.array], groups: list[list[int]], full: list[list[mx.array]]) -> None:
        self._groups = groups
        self.shape = tuple((len(g), a[0].shape[2] if a else 0) for g, a in zip(groups, full, strict=True))
        mapped = len(groups) > 1
        self.layout = Layout(groups=len(groups), mapped=mapped)
        maps = []
        if mapped:
            order = [r for members in groups for r in members]
            maps = [mx.array(members, mx.int32) for members in groups]
            # Free rows are in no group; they borrow the first place's output.
            maps.append(mx.array([order.index(r) if r in order else 0 for r in range(self.rows)], mx.int32))
        self.arrays = [mx.array(0), mx.array(0), *rings, *(a for group in full for a in group), *maps]
        self._sync()
