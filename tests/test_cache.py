"""Invariants of the cache: capacities, groups, moves of rows, rewinds, and that a round copies no buffer."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp import views
from mlx_gemma_mtp.cache import KVCache, capacity_step, planned_bytes, row_bucket
from mlx_gemma_mtp.config import KVSlotSpec
from mlx_gemma_mtp.speculative import Block
from mlx_gemma_mtp.views import CacheSpec

from .fakes import SPEC, WINDOW, expected, fake_speculator


@given(st.integers(1, 300_000))
def test_capacity_holds_the_length_and_wastes_little(length: int) -> None:
    capacity = capacity_step(length)
    assert length <= capacity <= max(length + 512, length * 1.25)
    assert capacity % 512 == 0
    assert capacity_step(capacity) == capacity


@given(st.integers(1, 1000))
def test_row_buckets_hold_the_rows_and_waste_at_most_half(rows: int) -> None:
    assert rows <= row_bucket(rows) <= max(1.5 * rows, rows + 63)


def test_a_ring_is_the_window_and_a_whole_block_more() -> None:
    for window in (1, 8, 23, 24, 512, 1024):
        slot = KVSlotSpec(layer=0, window=window, kv_heads=1, head_dim=1)
        spec = CacheSpec(slots=(slot,), max_block=9, dtype=mx.float32)
        assert spec.ring(slot) % 32 == 0
        assert window + 9 <= spec.ring(slot) < window + 9 + 32


def _filled(length: int) -> KVCache:
    speculator, cache = fake_speculator(), KVCache.with_row(SPEC, length)
    tokens = [1 + i % 7 for i in range(length)]
    for start in range(0, length, 64):
        speculator.prefill(cache, tokens[start : start + 64])
    return cache


def test_a_prompt_outgrows_its_row() -> None:
    prompt, speculator, cache = [(3 * i) % 11 for i in range(1100)], fake_speculator(), KVCache.with_row(SPEC, 20)
    speculator.prefill(cache, prompt[:20])
    hidden = speculator.prefill(cache, prompt[20:])
    assert hidden.tolist() == [[sum(prompt), sum(prompt[-WINDOW:]), 1099]]


def test_bytes_follow_each_rows_own_length() -> None:
    cache = KVCache(SPEC)
    cache.admit([_filled(20) for _ in range(3)])
    short = cache.nbytes
    cache.admit([_filled(6000)])
    long = KVCache.with_row(SPEC, 6000).nbytes
    assert cache.nbytes - short <= long
    assert cache.capacity(0) == 512
    assert cache.capacity(3) >= 6000


def test_rows_of_like_capacity_share_a_group() -> None:
    cache = KVCache(SPEC)
    cache.admit([_filled(n) for n in (20, 500, 700, 900)])
    assert cache.layout.groups == 1
    cache.admit([_filled(4000)])
    assert cache.layout.groups == 2
    assert cache.layout.mapped


def test_a_row_admitted_into_a_free_place_disturbs_no_array_size() -> None:
    cache = KVCache(SPEC)
    cache.admit([_filled(n) for n in (20, 30, 40)])
    cache.close_row(1)
    before = cache.nbytes
    assert cache.admit([_filled(50)]) == [1]
    assert cache.nbytes == before
    assert cache.lengths == [20, 50, 40]


def test_compact_keeps_the_living_rows_in_order() -> None:
    cache = KVCache(SPEC)
    cache.admit([_filled(n) for n in (10, 20, 30, 40, 50)])
    for row in (0, 2, 3):
        cache.close_row(row)
    assert cache.compact() == [1, 4]
    assert (cache.rows, cache.lengths) == (2, [20, 50])
    for row in (0, 1):
        cache.close_row(row)
    assert cache.compact() == []
    assert (cache.rows, cache.nbytes) == (0, 0)


def test_closing_a_row_twice_or_admitting_another_kind_is_an_error() -> None:
    cache = KVCache(SPEC)
    cache.admit([_filled(5), _filled(6)])
    cache.close_row(1)
    with pytest.raises(ValueError, match="row 1"):
        cache.close_row(1)
    with pytest.raises(ValueError, match="same spec"):
        KVCache(_WIDE).admit([cache])


def test_a_batch_is_admitted_with_its_open_rows() -> None:
    batch, cache = KVCache(SPEC), KVCache(SPEC)
    batch.admit([_filled(n) for n in (5, 6, 700)])
    batch.close_row(1)
    cache.admit([_filled(9)])
    assert cache.admit([batch]) == [1, 2]
    assert cache.lengths[:3] == [9, 5, 700]
    assert batch.rows == 0


@given(lengths=st.lists(st.integers(1, 5000), min_size=1, max_size=9))
def test_planned_bytes_are_the_bytes_that_are_allocated(lengths: list[int]) -> None:
    cache = KVCache(SPEC)
    rows = []
    for n in lengths:
        rows.append(KVCache.with_row(SPEC, n))
        rows[-1].advance([n])
    cache.admit(rows)
    assert cache.nbytes == planned_bytes(SPEC, lengths)


def test_what_was_held_goes_on_from_any_length_that_its_rings_reach_back_to() -> None:
    prompt, speculator = [(7 * i) % 11 for i in range(60)], fake_speculator()
    cache = KVCache.with_row(SPEC, 60)
    for start in range(0, 60, 20):
        speculator.prefill(cache, prompt[start : start + 20])
    held = cache.hold(0, 60)
    reachable = [n for n in range(1, 61) if held.reaches_back_to(n, SPEC)]
    # The last 32 positions are known, and a row sees WINDOW of them.
    assert reachable == list(range(60 - 32 + WINDOW, 61))
    for n in reachable:
        again = KVCache.from_held(SPEC, held, n, 60)
        hidden = speculator.prefill(again, [*prompt[n:], 3])
        assert hidden.tolist() == [[sum(prompt) + 3, sum(prompt[60 - WINDOW + 1 :]) + 3, 60]]
    for n in (28, 61):
        with pytest.raises(ValueError, match=f"at 60 tokens can't be reused at {n}"):
            KVCache.from_held(SPEC, held, n, 60)
    assert cache.hold(0, 60, rings_only=True).full == ()
    with pytest.raises(ValueError, match="doesn't hold 61"):
        cache.hold(0, 61)


@settings(max_examples=30, deadline=None)
@given(chunks=st.lists(st.lists(st.integers(0, 45), min_size=3, max_size=3), min_size=1, max_size=4))
def test_prompts_prefilled_together_hold_what_they_hold_alone(chunks: list[list[int]]) -> None:
    speculator, counter = fake_speculator(), iter(range(10_000))
    caches, seen = [KVCache.with_row(SPEC, 200) for _ in range(3)], [[0] * 0 for _ in range(3)]
    for sizes in chunks:
        new = [[next(counter) % 11 for _ in range(n)] for n in sizes]
        pieces = [(c, t) for c, t in zip(caches, new, strict=True) if t]
        if not pieces:
            continue
        hidden: list[list[int]] = speculator.prefill_together(pieces).tolist()  # type: ignore[assignment]
        for i, tokens in enumerate(new):
            seen[i] += tokens
        grown = [s for s, t in zip(seen, new, strict=True) if t]
        assert hidden == [[sum(s), sum(s[-WINDOW:]), len(s) - 1] for s in grown]
        assert [c.lengths[0] for c in caches] == [len(s) for s in seen]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    steps=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    data=st.data(),
)
def test_rewinding_rows_by_different_numbers_forgets_exactly_those_tokens(
    lengths: list[int], steps: list[int], data: st.DataObject
) -> None:
    speculator, cache = fake_speculator(drafter=False), KVCache(SPEC)
    prompts = [[1 + (i * 5 + n) % 9 for i in range(n)] for n in lengths]
    caches = []
    for prompt in prompts:
        caches.append(KVCache.with_row(SPEC, len(prompt)))
        speculator.prefill(caches[-1], prompt)
    cache.admit(caches)
    histories = [list(p) for p in prompts]
    for step in steps:
        blocks = [[(3 * r + i) % 7 for i in range(step + 1)] for r in range(len(lengths))]
        rows = blocks + [[0] * (step + 1)] * (cache.rows - len(lengths))
        view = cache.view(step + 1)
        speculator.target(mx.array(rows, mx.int32), view)
        cache.arrays = view.arrays_after(mx.full((cache.rows,), step + 1, mx.int32))
        cache.advance([step + 1] * cache.rows)
        undo = [data.draw(st.integers(0, step + 1)) for _ in lengths]
        cache.rewind(undo + [0] * (cache.rows - len(lengths)))
        for history, block, n in zip(histories, blocks, undo, strict=True):
            history += block[: step + 1 - n]
    tokens = mx.array([[2]] * cache.rows, mx.int32)
    result = speculator.run_round(cache, Block(tokens, mx.zeros((cache.rows,), mx.int32)), [0] * cache.rows)
    for row, history in enumerate(histories):
        assert result.tokens[row][:1] == expected([*history, 2], 1)
    assert max(lengths) + 9 > WINDOW


def test_rewinding_beyond_what_a_ring_remembers_is_an_error() -> None:
    cache, slack = _filled(400), SPEC.ring(SPEC.slots[0]) - WINDOW
    cache.rewind([slack - 1])
    cache.rewind([1])
    with pytest.raises(ValueError, match="rewind row 0"):
        cache.rewind([1])
    short = _filled(5)
    short.rewind([5])
    with pytest.raises(ValueError, match="rewind row 0"):
        short.rewind([1])


def test_a_row_that_shrank_leaves_its_group_while_another_joins() -> None:
    cache = KVCache(SPEC)
    cache.admit([_filled(1020), _filled(506)])
    cache.rewind([0, 9])
    cache.admit([_filled(1020)])
    assert cache.lengths[:3] == [1020, 497, 1020]
    tokens = mx.array([[2]] * cache.rows, mx.int32)
    result = fake_speculator().run_round(cache, Block(tokens, mx.zeros((cache.rows,), mx.int32)), [0] * cache.rows)
    prompts = [[1 + i % 7 for i in range(n)] for n in (1020, 497, 1020)]
    assert [row[0] for row in result.tokens[:3]] == [expected([*p, 2], 1)[0] for p in prompts]


_WIDE = CacheSpec(
    slots=(
        KVSlotSpec(layer=0, window=8192, kv_heads=8, head_dim=64),
        KVSlotSpec(layer=1, window=None, kv_heads=8, head_dim=64),
    ),
    max_block=9,
    dtype=mx.float32,
)


@pytest.mark.parametrize("compiled", [False, True])
def test_no_buffer_is_copied_by_a_round(compiled: bool) -> None:
    speculator = fake_speculator(compiled=compiled)
    speculator.spec = _WIDE
    speculator.target, speculator.drafter = _WideTarget(), _WideDrafter()
    caches = [KVCache.with_row(_WIDE, 8000) for _ in range(2)]
    for filled in caches:
        filled.advance([8000])
        filled.rewind([0])
    cache = KVCache(_WIDE)
    cache.admit(caches)
    buffer = min(a.nbytes for a in cache.arrays[2:])
    block = Block(mx.zeros((2, 4), mx.int32), mx.array([3, 3]))
    for _ in range(3):
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        block = speculator.run_round(cache, block, [3, 3]).block
        extra = mx.get_peak_memory() - before
        assert extra < buffer / 2, f"a round took {extra} bytes beyond what it started with; a buffer has {buffer}"


def test_no_buffer_is_copied_by_a_prefill() -> None:
    speculator = fake_speculator()
    speculator.spec = _WIDE
    speculator.target = _WideTarget()
    cache = KVCache.with_row(_WIDE, 20_000)
    mx.eval(*cache.arrays)
    ring, buffer = (f(a.nbytes for a in cache.arrays[2:]) for f in (min, max))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(6):
        speculator.prefill(cache, [1] * 16)
    extra = mx.get_peak_memory() - before
    # A long block joins K and V of a ring to its own, and writes a new ring: never more than one layer's at a time.
    assert extra < 4 * ring + buffer / 2


def test_scores_of_a_long_chunk_are_made_some_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (mx.random.normal((1, heads, n, 16)) for heads, n in ((4, 256), (2, 4096), (2, 4096)))
    mask = mx.arange(4096)[None, None, None] <= (3840 + mx.arange(256))[:, None]
    mx.eval(q, k, v, mask)
    whole = views.attention(q, k, v, mask)
    mx.eval(whole)
    scores = 4 * 256 * 4096 * 4
    monkeypatch.setattr(views, "_MAX_SCORES", scores // 4 // 8)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    parts = views.attention(q, k, v, mask)
    mx.eval(parts)
    assert mx.get_peak_memory() - before < scores / 2
    assert mx.allclose(whole, parts, atol=1e-5)


class _WideTarget:
    def __call__(self, tokens: mx.array, view: object, *, last_only: bool = False) -> mx.array:
        rows, length = tokens.shape
        kv = mx.ones((rows, 8, length, 64))
        out = sum(view.attend(slot, kv, (kv, kv)).sum(axis=(1, 3)) for slot in (0, 1))  # type: ignore[attr-defined]
        return out[:, :, None]  # type: ignore[index, no-any-return]

    def unembed(self, hidden: mx.array) -> mx.array:
        return mx.concatenate([hidden, -hidden], axis=-1)


class _WideDrafter:
    def draft(self, token: mx.array, hidden: mx.array, view: object, depth: int, choose: object) -> mx.array:
        chain = []
        for _ in range(depth):
            q = mx.ones((token.shape[0], 8, 1, 64)) * token[:, None, None, None]
            out = sum(view.attend(slot, q).sum(axis=(1, 2, 3)) for slot in (0, 1))  # type: ignore[attr-defined]
            token = mx.array(out > 1e9).astype(mx.int32)
            chain.append(token)
        return mx.stack(chain, axis=1)


def test_what_is_held_keeps_nothing_else_alive() -> None:
    cache = KVCache(_WIDE)
    rows = [KVCache.with_row(_WIDE, 3000) for _ in range(4)]
    for row in rows:
        row.advance([40])
    cache.admit(rows)
    with_batch, whole = mx.get_active_memory(), cache.nbytes
    held = cache.hold(2, 40)
    del cache
    assert held.nbytes < whole / 4
    # A slice would have shared the batch's buffers.
    assert mx.get_active_memory() <= with_batch - whole + held.nbytes + 10_000
