"""The K/V cache that target and drafter share. Knows nothing of models, sampling or requests.

A row is a length; everything else is computed from it. Layers with a window keep a ring: position p lies in slot
p mod C, whatever block it came in. Layers without one keep position p in slot p of a buffer whose capacity follows
the row's own length: rows of like capacity form a group and share an array. Rejected tokens are never erased: they
lie behind the length, no mask lets them through, and later writes replace them.

The device side of a cache is a flat list of arrays that a pure, compiled function takes and gives back
(`KVCache.arrays`); rows open, close and grow between such calls. One cache is used by one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from .config import KVSlotSpec

_ROW_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_STEP = 512


def row_bucket(rows: int) -> int:
    """Smallest array size (in rows) that holds `rows`: few sizes, so that compiled rounds are reused."""
    return next((b for b in _ROW_BUCKETS if b >= rows), -(-rows // 64) * 64)


def capacity_step(length: int) -> int:
    """Capacity, in positions, of a buffer without window for `length`: steps of 512, later of a quarter octave."""
    step = max(_STEP, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-max(length, 1) // step) * step


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What a row keeps: one K and one V buffer per slot. `max_block` is the longest block written over a ring."""

    slots: tuple[KVSlotSpec, ...]
    max_block: int
    dtype: mx.Dtype

    def ring(self, slot: KVSlotSpec) -> int:
        """Slots of a ring: the window and a whole block more, so that a rejected key never aliases into a window."""
        assert slot.window is not None
        return -(-(slot.window + self.max_block) // 32) * 32

    @property
    def rings(self) -> tuple[int, ...]:
        """Indices of the slots with a window, in the order of `KVCache.arrays`."""
        return tuple(i for i, s in enumerate(self.slots) if s.window is not None)

    @property
    def fulls(self) -> tuple[int, ...]:
        """Indices of the slots without a window."""
        return tuple(i for i, s in enumerate(self.slots) if s.window is None)

    def bytes_per_token(self) -> int:
        """Bytes that one more token of a row costs once its rings are full."""
        return sum(2 * self.slots[i].kv_heads * self.slots[i].head_dim for i in self.fulls) * self.dtype.size

    def ring_bytes(self) -> int:
        """Bytes of the rings of one row, whatever its length."""
        slots = [self.slots[i] for i in self.rings]
        return sum(2 * s.kv_heads * s.head_dim * self.ring(s) for s in slots) * self.dtype.size


@dataclass(frozen=True)
class Layout:
    """The static half of a cache's shape: how many groups, and whether rows map to them by index arrays."""

    groups: int
    mapped: bool


def attention(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    """Softmax attention with scale 1 (Gemma 4's queries are normed).

    q (B, H, L, D), k and v (B, G, S, D) with H a multiple of G, mask (B or 1, 1, L, S) true where a key is seen
    (at least one for each query); returns (B, H, L, D).
    """
    if mx.default_device().type == mx.gpu and mx.metal.is_available():
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)
    # The heads of a group as rows of one product: each key is read once, where the generic fallback repeats it.
    batch, heads, length, dim = q.shape
    groups = k.shape[1]
    scores = q.reshape(batch, groups, -1, dim) @ k.swapaxes(-1, -2)
    scores = scores.reshape(batch, groups, heads // groups, length, -1)
    scores = mx.where(mask[:, :, None], scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
    weights = mx.softmax(scores, axis=-1, precise=True).reshape(batch, groups, -1, k.shape[2])
    return (weights @ v).reshape(batch, heads, length, dim)


def _write(buffer: mx.array, index: mx.array, x: mx.array) -> mx.array:
    """`buffer` (R, G, C, D) with x (R, G, n, D) at the flat places `index` (R * G * n,)."""
    flat = buffer.reshape(-1, buffer.shape[-1])
    flat[index] = x.reshape(-1, x.shape[-1])
    return flat.reshape(buffer.shape)


def _places(slots: mx.array, heads: int, capacity: int) -> mx.array:
    """Flat places in an (R, heads, capacity) grid of the slots (R, n) of each row."""
    rows = mx.arange(slots.shape[0])[:, None, None] * heads + mx.arange(heads)[None, :, None]
    return (rows * capacity + slots[:, None, :]).reshape(-1)


def _ring_positions(end: mx.array, capacity: int) -> mx.array:
    """Position held by each ring slot, (R, C), when positions up to `end` - 1 were written (negative: none)."""
    last = end[:, None] - 1
    return last - mx.remainder(last - mx.arange(capacity)[None], capacity)


class _Arrays:
    """A cache's flat list of arrays, taken apart by name."""

    def __init__(self, spec: CacheSpec, layout: Layout, arrays: Sequence[mx.array]) -> None:
        self.lengths, self.alive = arrays[0], arrays[1]
        rings, fulls = len(spec.rings), len(spec.fulls)
        self.rings = list(arrays[2 : 2 + 2 * rings])
        rest = list(arrays[2 + 2 * rings :])
        self.groups = [rest[2 * fulls * g : 2 * fulls * (g + 1)] for g in range(layout.groups)]
        maps = rest[2 * fulls * layout.groups :]
        self.rows: list[mx.array] = maps[:-1]
        self.place: mx.array | None = maps[-1] if layout.mapped else None

    def flat(self) -> list[mx.array]:
        maps = [] if self.place is None else [*self.rows, self.place]
        return [self.lengths, self.alive, *self.rings, *(a for g in self.groups for a in g), *maps]


class KVView:
    """What one forward sees of the cache: positions, masks and places are made once and serve every layer.

    `positions` is (R, L). Subclasses say which keys a query sees; `attend` writes, if the layer does, and reads.
    """

    positions: mx.array

    def __init__(self, spec: CacheSpec, layout: Layout, arrays: Sequence[mx.array]) -> None:
        self.spec = spec
        self._a = _Arrays(spec, layout, arrays)
        self._ring_order = {slot: i for i, slot in enumerate(spec.rings)}
        self._full_order = {slot: i for i, slot in enumerate(spec.fulls)}

    @property
    def lengths(self) -> mx.array:
        """Tokens held by each row, (R,)."""
        return self._a.lengths

    def attend(self, slot: int, q: mx.array, kv: tuple[mx.array, mx.array] | None = None) -> mx.array:
        """Attention of q (R, H, L, D) over K/V buffer `slot`, after writing kv (R, G, L, D) each, if given."""
        if slot in self._ring_order:
            return self._attend_ring(self._ring_order[slot], self.spec.slots[slot], q, kv)
        return self._attend_full(self._full_order[slot], self.spec.slots[slot], q, kv)

    def arrays_after(self, advance: mx.array) -> list[mx.array]:
        """The cache's arrays after this forward, each living row's length `advance` (R,) longer."""
        self._a.lengths = self._a.lengths + advance * self._a.alive
        return self._a.flat()

    def _attend_ring(self, i: int, spec: KVSlotSpec, q: mx.array, kv: tuple[mx.array, mx.array] | None) -> mx.array:
        raise NotImplementedError

    def _attend_full(self, i: int, spec: KVSlotSpec, q: mx.array, kv: tuple[mx.array, mx.array] | None) -> mx.array:
        outputs = []
        for g, group in enumerate(self._a.groups):
            if self._a.place is None:
                out = self._attend_group(g, group, i, spec, q, kv)
            else:
                rows = self._a.rows[g]
                ours = None if kv is None else (kv[0][rows], kv[1][rows])
                out = self._attend_group(g, group, i, spec, q[rows], ours)
            outputs.append(out)
        if self._a.place is None:
            return outputs[0]
        return mx.concatenate(outputs)[self._a.place]

    def _group_positions(self, g: int) -> mx.array:
        return self.positions if self._a.place is None else self.positions[self._a.rows[g]]

    def _attend_group(
        self,
        g: int,
        group: list[mx.array],
        i: int,
        spec: KVSlotSpec,
        q: mx.array,
        kv: tuple[mx.array, mx.array] | None,
    ) -> mx.array:
        raise NotImplementedError


class BlockView(KVView):
    """The next `block` tokens of every row: written at its length, each seeing itself and what came before.

    `start`, where known, is the common length of all rows: then only keys that exist are read (a prefill chunk, not
    compiled, has no reason to keep shapes fixed).
    """

    def __init__(
        self,
        spec: CacheSpec,
        layout: Layout,
        arrays: Sequence[mx.array],
        block: int,
        *,
        start: int | None = None,
    ) -> None:
        super().__init__(spec, layout, arrays)
        self.block = block
        self._start = start
        self.positions = self._a.lengths[:, None] + mx.arange(block)[None]
        self._ring_cache: dict[tuple[int, int], tuple[mx.array, mx.array, bool]] = {}
        self._full_cache: dict[tuple[int, int], tuple[mx.array, mx.array]] = {}
        # Keys and values of this chunk, the ring before it included, of the last layer that wrote a long block:
        # later layers that share its buffer read them, as the ring has forgotten some by then.
        self._chunk: tuple[int, mx.array, mx.array] | None = None

    def _ring_plan(self, spec: KVSlotSpec) -> tuple[mx.array, mx.array, bool]:
        """(places, mask, whether the ring is written before it is read), made once per kind of layer."""
        assert spec.window is not None
        capacity = self.spec.ring(spec)
        key = (spec.window, spec.kv_heads)
        if key not in self._ring_cache:
            fits = self.block <= self.spec.max_block
            query = self.positions[:, :, None]
            if fits:
                held = _ring_positions(self._a.lengths + self.block, capacity)
            else:
                # Writing first would overwrite keys that the chunk's first tokens still see.
                held = self.positions
                if self._start != 0:
                    held = mx.concatenate([_ring_positions(self._a.lengths, capacity), held], axis=1)
            held = held[:, None, :]
            mask = (held >= 0) & (held <= query) & (held > query - spec.window)
            kept = self.positions[:, -min(self.block, capacity) :]
            places = _places(mx.remainder(kept, capacity), spec.kv_heads, capacity)
            self._ring_cache[key] = places, mask[:, None], fits
        return self._ring_cache[key]

    def _attend_ring(self, i: int, spec: KVSlotSpec, q: mx.array, kv: tuple[mx.array, mx.array] | None) -> mx.array:
        places, mask, fits = self._ring_plan(spec)
        rings, mask = self._a.rings, mask[:, :, -q.shape[2] :]
        if not fits and kv is not None:
            k, v = kv
            if self._start != 0:
                k, v = (mx.concatenate([rings[2 * i + j], kv[j]], axis=2) for j in (0, 1))
            self._chunk = i, k, v
            kv = tuple(x[:, :, -self.spec.ring(spec) :] for x in kv)  # type: ignore[assignment]
        if kv is not None:
            rings[2 * i], rings[2 * i + 1] = (_write(rings[2 * i + j], places, kv[j]) for j in (0, 1))
        if fits:
            return attention(q, rings[2 * i], rings[2 * i + 1], mask)
        if self._chunk is None or self._chunk[0] != i:
            raise ValueError(f"K/V buffer {i} is shared by a layer that doesn't follow its writer's kind")
        return attention(q, self._chunk[1], self._chunk[2], mask)

    def _attend_group(
        self,
        g: int,
        group: list[mx.array],
        i: int,
        spec: KVSlotSpec,
        q: mx.array,
        kv: tuple[mx.array, mx.array] | None,
    ) -> mx.array:
        capacity = group[2 * i].shape[2]
        end = capacity if self._start is None else self._start + self.block
        if (g, spec.kv_heads) not in self._full_cache:
            positions = self._group_positions(g)
            places = _places(positions, spec.kv_heads, capacity)
            mask = mx.arange(end)[None, None, None, :] <= positions[:, None, :, None]
            self._full_cache[g, spec.kv_heads] = places, mask
        places, mask = self._full_cache[g, spec.kv_heads]
        if kv is not None:
            group[2 * i], group[2 * i + 1] = (_write(group[2 * i + j], places, kv[j]) for j in (0, 1))
        keys, values = group[2 * i], group[2 * i + 1]
        if end < capacity:
            keys, values = keys[:, :, :end], values[:, :, :end]
        return attention(q, keys, values, mask[:, :, -q.shape[2] :])


class HeldView(KVView):
    """What a drafter reads: the keys held, nothing written, one query per row at a constant position.

    Layers with a window see the last `window` keys held, whatever position is passed. Default: length - 1.
    """

    def __init__(
        self, spec: CacheSpec, layout: Layout, arrays: Sequence[mx.array], *, position: mx.array | None = None
    ) -> None:
        super().__init__(spec, layout, arrays)
        # A row that holds nothing (a free one) sees one meaningless key rather than none: no NaN arises.
        self._last = mx.maximum(self._a.lengths, 1) - 1
        self.positions = (self._last if position is None else position)[:, None]
        self._masks: dict[int, mx.array] = {}
        self._group_masks: dict[int, mx.array] = {}

    def _attend_ring(self, i: int, spec: KVSlotSpec, q: mx.array, kv: tuple[mx.array, mx.array] | None) -> mx.array:
        assert kv is None
        assert spec.window is not None
        if spec.window not in self._masks:
            held = _ring_positions(self._last + 1, self.spec.ring(spec))
            self._masks[spec.window] = ((held >= 0) & (held > self._last[:, None] - spec.window))[:, None, None, :]
        return attention(q, self._a.rings[2 * i], self._a.rings[2 * i + 1], self._masks[spec.window])

    def _attend_group(
        self,
        g: int,
        group: list[mx.array],
        i: int,
        spec: KVSlotSpec,
        q: mx.array,
        kv: tuple[mx.array, mx.array] | None,
    ) -> mx.array:
        assert kv is None
        if g not in self._group_masks:
            last = self._last if self._a.place is None else self._last[self._a.rows[g]]
            capacity = group[2 * i].shape[2]
            self._group_masks[g] = mx.arange(capacity)[None, None, None, :] <= last[:, None, None, None]
        return attention(q, group[2 * i], group[2 * i + 1], self._group_masks[g])


_Place = tuple[list[mx.array], int]
_GONE = mx.array(0)


@dataclass
class _Source:
    """Where one row's K/V lie: `rings` and `full` are lists of arrays (K, V by slot), with the row's index in each."""

    length: int
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
    a row is an index below it, stable until `compact`.
    """

    def __init__(self, spec: CacheSpec) -> None:
        self.spec = spec
        self.lengths: list[int] = []
        self.alive: list[bool] = []
        self.layout = Layout(groups=0, mapped=False)
        self.arrays: list[mx.array] = []
        self._groups: list[list[int]] = []

    @classmethod
    def with_row(cls, spec: CacheSpec, capacity: int) -> KVCache:
        """A cache of one open, empty row with room for `capacity` tokens."""
        cache = cls(spec)
        cache.lengths, cache.alive = [0], [True]
        rings = [cache._zeros(1, i, spec.ring(spec.slots[i])) for i in spec.rings for _ in (0, 1)]
        room = capacity_step(capacity + spec.max_block)
        full = [cache._zeros(1, i, room) for i in spec.fulls for _ in (0, 1)]
        cache._install(rings, [[0]], [full])
        return cache

    @property
    def rows(self) -> int:
        """Rows in the arrays, free ones included."""
        return len(self.alive)

    @property
    def nbytes(self) -> int:
        """Bytes of K/V allocated."""
        if not self.arrays:
            return 0
        parts = _Arrays(self.spec, self.layout, self.arrays)
        return sum(a.nbytes for a in [*parts.rings, *(a for group in parts.groups for a in group)])

    def capacity(self, row: int) -> int:
        """Positions that `row` has room for in layers without a window (0 if there are none)."""
        group = next(g for g, members in enumerate(self._groups) if row in members)
        arrays = _Arrays(self.spec, self.layout, self.arrays).groups[group]
        return int(arrays[0].shape[2]) if arrays else 0

    def admit(self, others: Sequence[KVCache]) -> list[int]:
        """Move the single rows of `others` into this cache (they are empty afterwards); returns their rows here."""
        for other in others:
            if other.spec != self.spec or len(other.lengths) != 1:
                raise ValueError("admit expects caches of one row with the same spec")
        free = [r for r, alive in enumerate(self.alive) if not alive]
        sources, rows = self._sources(), []
        for other in others:
            row = free.pop(0) if free else len(sources)
            sources[row : row + 1] = other._sources()
            rows.append(row)
            other._clear()
        self._rebuild(sources)
        return rows

    def close_row(self, row: int) -> None:
        """Free a row at once; nothing is copied or erased, and no other row is disturbed."""
        if not self.alive[row]:
            raise ValueError(f"row {row} is not open")
        self.alive[row], self.lengths[row] = False, 0
        self._sync()

    def compact(self) -> list[int] | None:
        """Give freed rows back if the arrays can shrink; returns the old indices of the rows kept, in order."""
        kept = [r for r, alive in enumerate(self.alive) if alive]
        if self.rows == 0 or (kept and row_bucket(len(kept)) >= self.rows):
            return None
        self._rebuild([s for s in self._sources() if s is not None])
        return kept

    def reserve(self, block: int) -> None:
        """Make room for `block` more tokens in every open row; copies only rows that outgrow their capacity."""
        short = [r for r, a in enumerate(self.alive) if a and 0 < self.capacity(r) < self.lengths[r] + block]
        if short:
            self._rebuild(self._sources())

    def advance(self, counts: Sequence[int]) -> None:
        """Note on the host that a forward made each open row counts[row] tokens longer."""
        for row, n in enumerate(counts):
            self.lengths[row] += n if self.alive[row] else 0

    def rewind(self, counts: Sequence[int]) -> None:
        """Forget each row's last counts[row] tokens: a subtraction. A ring only remembers `max_block` of them."""
        for row, n in enumerate(counts):
            if not 0 <= n <= min(self.lengths[row], self.spec.max_block):
                raise ValueError(f"can't rewind row {row} of length {self.lengths[row]} by {n}")
            self.lengths[row] -= n
        self._sync()

    def view(self, block: int, *, start: int | None = None) -> BlockView:
        """A view of the next `block` tokens, outside of a compiled function."""
        return BlockView(self.spec, self.layout, self.arrays, block, start=start)

    def held(self, *, position: mx.array | None = None) -> HeldView:
        """A drafter's view, outside of a compiled function."""
        return HeldView(self.spec, self.layout, self.arrays, position=position)

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
        parts = _Arrays(self.spec, self.layout, self.arrays)
        for group, members in zip(parts.groups, self._groups, strict=True):
            for place, row in enumerate(members):
                if self.alive[row]:
                    sources[row] = _Source(self.lengths[row], parts.rings, row, group, place)
        return sources

    def _clear(self) -> None:
        self.lengths, self.alive, self.arrays, self._groups = [], [], [], []
        self.layout = Layout(groups=0, mapped=False)

    def _plan(self, lengths: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Groups as (capacity, rows): the longest row sets one, rows up to one step shorter ride along."""
        steps = {r: capacity_step(n + self.spec.max_block) for r, n in enumerate(lengths) if n >= 0}
        plan = []
        while steps:
            top = max(steps.values())
            members = [r for r, s in steps.items() if capacity_step(s + 1) >= top]
            plan.append((top, members))
            for r in members:
                del steps[r]
        return plan

    def _rebuild(self, sources: list[_Source | None]) -> None:
        """Lay rows out anew, a slot at a time so that no more than one exists twice; keep what doesn't change."""
        self._clear()
        if all(s is None for s in sources):
            return
        sources = sources + [None] * (row_bucket(len(sources)) - len(sources))
        plan = self._plan([-1 if s is None else s.length for s in sources])
        if len(plan) == 1:
            plan = [(plan[0][0], list(range(len(sources))))]
        rings = []
        for i, slot in enumerate(self.spec.rings):
            size = self.spec.ring(self.spec.slots[slot])
            places = [_ring_place(s) for s in sources]
            for j in (2 * i, 2 * i + 1):
                rings.append(self._gather(places, j, slot, size))
                _drop(places, j)
        full: list[list[mx.array]] = [[] for _ in plan]
        for i, slot in enumerate(self.spec.fulls):
            for j in (2 * i, 2 * i + 1):
                for g, (size, members) in enumerate(plan):
                    full[g].append(self._gather([_full_place(sources[r]) for r in members], j, slot, size))
                _drop([_full_place(s) for s in sources], j)
        self.lengths = [0 if s is None else s.length for s in sources]
        self.alive = [s is not None for s in sources]
        self._install(rings, [members for _, members in plan], full)

    def _gather(self, places: Sequence[_Place | None], j: int, slot: int, size: int) -> mx.array:
        """One array (rows, G, size, D) from the rows at `places` (None: a free row), K or V number `j`."""
        shape = (len(places), self.spec.slots[slot].kv_heads, size, self.spec.slots[slot].head_dim)
        at_home = (p[0] for n, p in enumerate(places) if p is not None and p[1] == n and p[0][j].shape == shape)
        if (home := next(at_home, None)) is not None:
            strangers = [(n, p) for n, p in enumerate(places) if p is not None and (p[0] is not home or p[1] != n)]
            if not any(p[0] is home for _, p in strangers):
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
