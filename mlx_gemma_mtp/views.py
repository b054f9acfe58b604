"""What one forward sees of the K/V cache: positions, masks, writes and attention, as pure functions of arrays.

Layers with a window keep a ring: position p lies in slot p mod C, whatever block it came in. Layers without one keep
position p in slot p. Rejected tokens are never erased: they lie behind the length, no mask lets them through, and
later writes replace them. Knows nothing of models, sampling, requests, or how caches grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from .config import KVSlotSpec


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


_MAX_SCORES = 1 << 24
"""Most attention scores held at once, 32 MB in bfloat16, but for blocks of few queries: they read each key once."""
_FEW_QUERIES = 32
_VECTOR_ROWS, _VECTOR_QUERIES, _VECTOR_DIM = 32, 8, 256
"""What Metal's vector kernel takes: queries times the heads of a group, queries, and their size."""
_LONGEST_BLOCK = 16
"""Queries of a block of drafts at most; more are a prompt's."""
_QUICK_QUERIES = 8
"""Queries of a group, all heads of it together, from which on a CPU makes scores the other way round."""


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
    queries = max(_MAX_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]), _FEW_QUERIES)
    if q.shape[2] > queries:
        # A chunk of a long prompt: some queries at a time, so that the scores don't grow with the context.
        parts: list[mx.array] = []
        for i in range(0, q.shape[2], queries):
            parts.append(attention(q[:, :, i : i + queries], k, v, mask[:, :, i : i + queries]))
            # MLX takes memory for whatever is queued: unevaluated, all parts' scores would exist at once.
            mx.eval(parts[-1])
        return mx.concatenate(parts, axis=2)
    if mx.default_device().type == mx.gpu and mx.metal.is_available():
        return _fused(q, k, v, mask)
    # The heads of a group as rows of one product: each key is read once, where the generic fallback repeats it.
    batch, heads, length, dim = q.shape
    groups = k.shape[1]
    scores = _scores(q.reshape(batch, groups, -1, dim), k)
    least = mx.array(mx.finfo(scores.dtype).min, scores.dtype)
    if length == 1:
        weights = mx.softmax(mx.where(mask, scores, least), axis=-1, precise=True)
    else:
        scores = mx.where(mask[:, :, None], scores.reshape(batch, groups, heads // groups, length, -1), least)
        weights = mx.softmax(scores, axis=-1, precise=True).reshape(batch, groups, -1, k.shape[2])
    return (weights @ v).reshape(batch, heads, length, dim)


def _fused(q: mx.array, k: mx.array, v: mx.array, mask: mx.array) -> mx.array:
    """MLX's own attention, a block in parts that are small enough for its vector kernel (mlx_small_m.md, D).

    That one skips keys that are masked. In one pass it gives a query the same bits in whatever company it comes; with
    many keys it takes two, which the probe compares as it finds them.
    """
    queries = min(max(_VECTOR_ROWS // (q.shape[1] // k.shape[1]), 1), _VECTOR_QUERIES)
    if not queries < q.shape[2] <= _LONGEST_BLOCK or q.shape[3] > _VECTOR_DIM:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)
    parts = []
    for i in range(0, q.shape[2], queries):
        some, seen = q[:, :, i : i + queries], mask[:, :, i : i + queries]
        parts.append(mx.fast.scaled_dot_product_attention(some, k, v, scale=1.0, mask=seen))
    return mx.concatenate(parts, axis=2)


def _scores(q: mx.array, k: mx.array) -> mx.array:
    """q @ k.T of each group: q (B, G, N, D), k (B, G, S, D); returns (B, G, N, S)."""
    if q.shape[2] < _QUICK_QUERIES or mx.default_device().type != mx.cpu:
        return q @ k.swapaxes(-1, -2)
    # The BLAS that MLX has on Linux is quicker where neither side is transposed: bench/NOTES.md. The sums are the same.
    return (k @ mx.contiguous(q.swapaxes(-1, -2))).swapaxes(-1, -2)


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


class CacheArrays:
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


class KVView(Protocol):
    """What one forward sees of the cache: its positions (R, L), and attention over a buffer of it."""

    positions: mx.array

    @property
    def runs(self) -> tuple[int, ...]:
        """Lengths of the runs of consecutive positions that L consists of."""

    def last(self, x: mx.array, axis: int) -> mx.array:
        """The entries of x, which has L of them along `axis`, that belong to the end of each run."""

    def attend(self, slot: int, q: mx.array, kv: tuple[mx.array, mx.array] | None = None) -> mx.array:
        """Attention of q (R, H, L, D) over K/V buffer `slot`, after writing kv (R, G, L, D) each, if given.

        q may also be `last` of all queries: then only these are answered.
        """


class _RowsView:
    """A view of the rows of one cache: positions, masks and places are made once and serve every layer.

    Subclasses say which keys a query sees.
    """

    positions: mx.array

    def __init__(self, spec: CacheSpec, layout: Layout, arrays: Sequence[mx.array]) -> None:
        self.spec = spec
        self._a = CacheArrays(spec, layout, arrays)
        self._ring_order = {slot: i for i, slot in enumerate(spec.rings)}
        self._full_order = {slot: i for i, slot in enumerate(spec.fulls)}

    @property
    def lengths(self) -> mx.array:
        """Tokens held by each row, (R,)."""
        return self._a.lengths

    @property
    def runs(self) -> tuple[int, ...]:
        """See `KVView`: one run in each row."""
        return (self.positions.shape[1],)

    def last(self, x: mx.array, axis: int) -> mx.array:
        """See `KVView`."""
        return mx.take(x, mx.array([x.shape[axis] - 1]), axis=axis)

    def attend(self, slot: int, q: mx.array, kv: tuple[mx.array, mx.array] | None = None) -> mx.array:
        """See `KVView`."""
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


class BlockView(_RowsView):
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


class HeldView(_RowsView):
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


class PackedView:
    """Chunks of several prompts in one forward, one behind the other, (1, sum of their lengths): no token is padding.

    Each part is the view of a cache of one row. What isn't attention is computed for all tokens together.
    """

    def __init__(self, parts: Sequence[BlockView]) -> None:
        self.parts = parts
        self.runs = tuple(p.block for p in parts)
        self.positions = mx.concatenate([p.positions for p in parts], axis=1)
        self._ends = [sum(self.runs[: i + 1]) for i in range(len(parts))]

    def last(self, x: mx.array, axis: int) -> mx.array:
        """See `KVView`."""
        return mx.take(x, mx.array([end - 1 for end in self._ends]), axis=axis)

    def attend(self, slot: int, q: mx.array, kv: tuple[mx.array, mx.array] | None = None) -> mx.array:
        """See `KVView`."""
        queries = self._split(q)
        pairs = [None] * len(self.parts) if kv is None else list(zip(*map(self._split, kv), strict=True))
        outputs = [p.attend(slot, x, pair) for p, x, pair in zip(self.parts, queries, pairs, strict=True)]
        return mx.concatenate(outputs, axis=2)

    def _split(self, x: mx.array) -> list[mx.array]:
        """x (1, H, L, D) part by part; where L is one for each part, it is `last` of something."""
        ends = self._ends if x.shape[2] == self._ends[-1] else list(range(1, len(self.parts) + 1))
        return list(mx.split(x, ends[:-1], axis=2))
