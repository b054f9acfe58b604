"""Models with no weights whose every token proves which keys they saw.

The fake target's next token depends on the sum of all earlier tokens (read from a buffer without a window), on the
parity of the sum of the last WINDOW (read from a ring) and on the position. One key too many, too few or of the wrong
row changes the output. `expected` computes the same from the plain list of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_gemma_mtp.config import KVSlotSpec
from mlx_gemma_mtp.speculative import MAX_DEPTH, Choose, Speculator
from mlx_gemma_mtp.views import CacheSpec, HeldView, KVView

VOCAB = 11
WINDOW = 6
SPEC = CacheSpec(
    slots=(
        KVSlotSpec(layer=0, window=WINDOW, kv_heads=1, head_dim=1),
        KVSlotSpec(layer=1, window=None, kv_heads=1, head_dim=1),
    ),
    max_block=MAX_DEPTH + 1,
    dtype=mx.float32,
)


def expected(prompt: Sequence[int], count: int) -> list[int]:
    """The `count` tokens that the fake target gives after `prompt`."""
    history = list(prompt)
    for _ in range(count):
        history.append(_next(sum(history), sum(history[-WINDOW:]), len(history) - 1))
    return history[len(prompt) :]


def _next(total: int, recent: int, position: int) -> int:
    return (3 * total + 5 * position + recent % 2) % VOCAB


def _next_array(total: mx.array, recent: mx.array, position: mx.array) -> mx.array:
    return mx.remainder(3 * total + 5 * position + mx.remainder(recent, 2), VOCAB)


def _read(view: KVView, slot: int, shape: tuple[int, ...], kv: mx.array | None, seen: mx.array) -> mx.array:
    """The sum of the values seen: equal scores make attention their mean, `seen` is how many they are.

    Exact after rounding up to about 3,000 keys.
    """
    queries = mx.zeros((shape[0], 1, shape[1], 1))
    mean = view.attend(slot, queries, None if kv is None else (mx.zeros_like(kv), kv))[:, 0, :, 0]
    return mx.round(mean * seen.astype(mx.float32)).astype(mx.int32)


class FakeTarget:
    """Hidden states are (sum of all, sum of the window, position)."""

    def __call__(self, tokens: mx.array, view: KVView, *, last_only: bool = False) -> mx.array:
        kv, seen = tokens[:, None, :, None].astype(mx.float32), view.positions + 1
        recent = _read(view, 0, tokens.shape, kv, mx.minimum(seen, WINDOW))
        total = _read(view, 1, tokens.shape, kv, seen)
        hidden = mx.stack([total, recent, view.positions], axis=-1)
        return view.last(hidden, 1) if last_only else hidden

    def unembed(self, hidden: mx.array) -> mx.array:
        chosen = _next_array(hidden[..., 0], hidden[..., 1], hidden[..., 2])
        return (mx.arange(VOCAB) == chosen[..., None]).astype(mx.float32)


class FakeDrafter:
    """Guesses right about half of the time, and never when what it reads from the cache isn't what it should be."""

    def draft(self, token: mx.array, hidden: mx.array, view: HeldView, depth: int, choose: Choose) -> mx.array:
        held, shape = view.lengths[:, None], (token.shape[0], 1)
        total = _read(view, 1, shape, None, held)[:, 0]
        recent = _read(view, 0, shape, None, mx.minimum(held, WINDOW))[:, 0]
        wrong = (total != hidden[:, 0]) | (recent != hidden[:, 1]) | (view.positions[:, 0] != hidden[:, 2])
        chain = []
        for step in range(depth):
            total = total + token
            token = _next_array(total, mx.zeros_like(total), view.lengths + step)
            token = mx.where(wrong, (token + 3) % VOCAB, token)
            token = choose((mx.arange(VOCAB)[None] == token[:, None]).astype(mx.float32), None)
            chain.append(token)
        return mx.stack(chain, axis=1)


def fake_speculator(*, drafter: bool = True, compiled: bool = False) -> Speculator:
    """A speculator of the fakes. Compiling is for tests that count traces."""
    return Speculator(FakeTarget(), FakeDrafter() if drafter else None, SPEC, compiled=compiled)
