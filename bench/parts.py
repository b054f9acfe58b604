"""What the parts of a round cost, each as a compiled function queued behind itself: the device never waits.

Keys and values are zeros: how long a part takes does not depend on them. Knows no requests, records or tables.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_gemma_mtp.cache import KVCache, row_bucket
from mlx_gemma_mtp.loading import Loaded
from mlx_gemma_mtp.speculative import MAX_DEPTH, Block, Speculator
from mlx_gemma_mtp.tune import filled
from mlx_gemma_mtp.views import BlockView, CacheSpec, HeldView

ROOM = 256
"""Tokens of room behind the context."""
_FEW, _MANY = 1, 5  # drafts of the two graphs whose difference is the marginal step

State = list[mx.array]


@dataclass
class Parts:
    """The parts of one pair's rounds. A measurement is of up to `queue` runs, fewer where they take over `sample_s`."""

    loaded: Loaded
    queue: int = 12
    sample_s: float = 0.5
    functions: dict[tuple[object, ...], Callable[[State], State]] = field(default_factory=dict)
    states: dict[tuple[object, ...], State] = field(default_factory=dict)
    last: dict[tuple[object, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        slots = self.loaded.config.kv_slots
        self.spec = CacheSpec(slots=slots, max_block=MAX_DEPTH + 1, dtype=self.loaded.dtype)
        self.speculator = Speculator(self.loaded.target, self.loaded.drafter, self.spec)

    def forward(self, rows: int, block: int, context: int) -> float:
        """Seconds of the target over `block` tokens per row, its head and its K/V writes included."""
        key = ("forward", rows, block, context)
        if key not in self.functions:
            cache, target, spec = self.filled(rows, context), self.loaded.target, self.spec
            tokens, layout = self._tokens(rows, block), cache.layout

            def run(state: State) -> State:
                view = BlockView(spec, layout, state[1:], block)
                logits = target.unembed(target(tokens, view))
                return [logits, *view.arrays_after(mx.zeros_like(view.lengths))]

            self.functions[key] = mx.compile(run)
            self.states[key] = [mx.zeros(1), *cache.arrays]
        return self._timed(key)

    def head(self, rows: int, block: int) -> float:
        """Seconds of the target's head alone."""
        key = ("head", rows, block)
        if key not in self.functions:
            target = self.loaded.target

            def run(state: State) -> State:
                logits = target.unembed(state[0])
                return [state[0] + 0.0 * logits[..., :1], logits]

            self.functions[key] = mx.compile(run)
            self.states[key] = [self._hidden(rows, block), mx.zeros(1)]
        return self._timed(key)

    def write(self, rows: int, block: int, context: int) -> float:
        """Seconds of writing all layers' keys and values of a block, and nothing else."""
        key = ("write", rows, block, context)
        if key not in self.functions:
            cache, spec = self.filled(rows, context), self.spec
            layout = cache.layout
            fresh = [mx.ones((rows, s.kv_heads, block, s.head_dim), spec.dtype) for s in spec.slots]
            asks = [mx.ones((rows, s.kv_heads, 1, s.head_dim), spec.dtype) for s in spec.slots]

            def run(state: State) -> State:
                view = BlockView(spec, layout, state, block)
                for i, (kv, q) in enumerate(zip(fresh, asks, strict=True)):
                    view.attend(i, q, (kv, kv))  # what it attends to is not asked for, hence never computed
                return view.arrays_after(mx.zeros_like(view.lengths))

            self.functions[key] = mx.compile(run)
            self.states[key] = list(cache.arrays)
        return self._timed(key)

    def attention(self, block: int, context: int, *, windows: bool) -> float:
        """Seconds of one row's K/V writes and attention alone, in all layers with a window or in all without one."""
        key = ("attention", block, context, windows)
        if key not in self.functions:
            cache, spec = self.filled(1, context), self.spec
            layout, slots = cache.layout, self.spec.slots
            layers = [x for x in self.loaded.config.layers if (slots[x.kv_slot].window is not None) == windows]
            fresh = {x.kv_slot: mx.ones((1, slots[x.kv_slot].kv_heads, block, x.head_dim), spec.dtype) for x in layers}
            asks = [mx.ones((1, x.heads, block, x.head_dim), spec.dtype) for x in layers]

            def run(state: State) -> State:
                view, total = BlockView(spec, layout, state[1:], block), mx.zeros((1,))
                for x, q in zip(layers, asks, strict=True):
                    kv = (fresh[x.kv_slot], fresh[x.kv_slot]) if x.writes_kv else None
                    # One layer behind the other, as in a forward.
                    total = view.attend(x.kv_slot, q + 0.0 * total, kv).sum(keepdims=True).reshape(1)
                return [total, *view.arrays_after(mx.zeros_like(view.lengths))]

            self.functions[key] = mx.compile(run)
            self.states[key] = [mx.zeros((1,)), *cache.arrays]
        return self._timed(key)

    def step(self, rows: int, context: int) -> float:
        """Seconds that one more drafter step costs inside one graph."""
        few, many = (self._drafts(rows, n, context) for n in (_FEW, _MANY))
        return max(many - few, 0.0) / (_MANY - _FEW)

    def host(self, rows: int, block: int, context: int) -> dict[str, float]:
        """Seconds for which building a part keeps the host, at fixed shapes: nothing is waited for."""
        self.forward(rows, block, context)
        self.step(rows, context)
        few, many = (("drafts", rows, n, context) for n in (_FEW, _MANY))
        step = (self._built(many) - self._built(few)) / (_MANY - _FEW)
        return {"forward": self._built(("forward", rows, block, context)), "step": max(step, 0.0)}

    def queued_round(self, rows: int, depth: int, context: int) -> float:
        """Seconds of a whole round (verify, accept, draft) of which nobody reads the tokens. Behind `forward`."""
        cache, block = self.filled(rows, context), self._block(rows, depth)
        count = self._rounds(rows, depth, context)
        for n in range(count + 1):
            if n == 1:
                mx.eval(block.tokens, cache.arrays)
                begin = time.perf_counter()
            block = self.speculator.launch(cache, block, [depth] * rows).block
        mx.eval(block.tokens, cache.arrays)
        return (time.perf_counter() - begin) / count

    def read_round(self, rows: int, depth: int, context: int) -> float:
        """Seconds of a whole round whose tokens are read before the next one is launched. Behind `forward`."""
        cache, block, spent = self.filled(rows, context), self._block(rows, depth), []
        for _ in range(self._rounds(rows, depth, context) + 1):
            begin = time.perf_counter()
            block = self.speculator.run_round(cache, block, [depth] * rows).block
            spent.append(time.perf_counter() - begin)
        return statistics.fmean(spent[1:])

    def filled(self, rows: int, context: int) -> KVCache:
        """A cache of rows that hold `context` tokens each, with room for `ROOM` more."""
        return filled(self.spec, rows, context, ROOM)

    def _drafts(self, rows: int, count: int, context: int) -> float:
        key = ("drafts", rows, count, context)
        if key not in self.functions:
            cache, drafter, spec = self.filled(rows, context), self.loaded.drafter, self.spec
            if drafter is None:
                raise ValueError("there is no drafter: its step can't be measured")
            hidden, arrays, layout = self._hidden(rows, 1)[:, 0], list(cache.arrays), cache.layout

            def run(state: State) -> State:
                view = HeldView(spec, layout, arrays)
                return [drafter.draft(state[0], hidden, view, count, _best)[:, -1]]

            self.functions[key] = mx.compile(run)
            self.states[key] = [mx.zeros((rows,), mx.int32)]
        return self._timed(key)

    def count(self, seconds: float) -> int:
        """How many runs of so many seconds make a sample."""
        return max(min(self.queue, int(self.sample_s / max(seconds, 1e-9))), 1)

    def _rounds(self, rows: int, depth: int, context: int) -> int:
        return min(self.count(self.last["forward", rows, depth + 1, context]), ROOM // (depth + 1) - 2)

    def _timed(self, key: tuple[object, ...]) -> float:
        """Seconds of one run of a function, of a queue of them."""
        run, state = self.functions[key], self.states.pop(key)
        mx.eval(state)
        if key not in self.last:
            for _ in range(2):  # the first run compiles
                begin = time.perf_counter()
                state = run(state)
                mx.eval(state)
            self.last[key] = time.perf_counter() - begin
        count = self.count(self.last[key])
        begin = time.perf_counter()
        for _ in range(count):
            state = run(state)
            mx.async_eval(state)  # type: ignore[no-untyped-call]
        mx.eval(state)
        self.last[key] = (time.perf_counter() - begin) / count
        self.states[key] = state
        return self.last[key]

    def _built(self, key: tuple[object, ...]) -> float:
        run, state, spent = self.functions[key], self.states[key], []
        for _ in range(4 * self.queue):
            begin = time.perf_counter()
            run(state)  # never evaluated: what is dropped costs nothing
            spent.append(time.perf_counter() - begin)
        return statistics.median(spent)

    def _tokens(self, rows: int, block: int) -> mx.array:
        draw, top = random.Random(0), self.loaded.config.vocab_size
        return mx.array([[draw.randrange(top) for _ in range(block)] for _ in range(rows)], mx.int32)

    def _block(self, rows: int, depth: int) -> Block:
        block = Block(self._tokens(rows, depth + 1), mx.full((rows,), depth, mx.int32))
        mx.eval(block.tokens, block.offered)
        return block

    def _hidden(self, rows: int, block: int) -> mx.array:
        return mx.random.normal((rows, block, self.loaded.config.hidden_size), key=mx.random.key(0)).astype(
            self.spec.dtype
        )


def _best(scores: mx.array, ids: mx.array | None) -> mx.array:
    best = mx.argmax(scores, axis=-1, keepdims=True)
    return (best if ids is None else mx.take_along_axis(ids, best, axis=1))[:, 0].astype(mx.int32)


def counts(most: int) -> Sequence[int]:
    """Counts of rows that batches come in, up to `most`."""
    return sorted({row_bucket(n) for n in range(1, most + 1)})
