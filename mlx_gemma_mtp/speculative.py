"""The speculative round: verify a block of drafts, accept, draft the next. Knows nothing of models, requests or text.

The order differs from the papers' (draft, verify, accept; Leviathan et al., arXiv 2211.17192) by half a turn: a round
ends with the drafts that the next one verifies. So its one fetch also tells the host what was drafted before a
verification is paid for, and every reader of the cache comes after the round's writes: no buffer that is read is
written in the same evaluation, which MLX would answer with a copy. Plain decoding is a round of depth 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import mlx.core as mx

from .cache import KVCache
from .sampling import accept_greedy
from .views import BlockView, CacheSpec, HeldView, KVView, Layout

T = TypeVar("T")

MAX_DEPTH = 8
"""Deepest draft: with the row's own token, a block is at most 9 tokens."""


class TargetModel(Protocol):
    """What a round asks of a target; see `models.target.Target`."""

    def __call__(self, tokens: mx.array, view: KVView, *, last_only: bool = False) -> mx.array:
        """Hidden states (R, L, hidden), after the final norm, of tokens (R, L)."""

    def unembed(self, hidden: mx.array) -> mx.array:
        """Logits (..., vocab) of hidden states (..., hidden)."""


class DrafterModel(Protocol):
    """What a round asks of a drafter, which is bound to its target's embedding; see `models.drafter.Drafter`."""

    def draft(self, token: mx.array, hidden: mx.array, view: HeldView, depth: int) -> mx.array:
        """Guesses (R, depth) after token (R,), given the target's hidden state (R, hidden) before it."""


@dataclass(frozen=True)
class Block:
    """What each row verifies next: `tokens` (R, 1 + K), the row's last token and its drafts; offered[r] of them count.

    This is all that a row carries from one round to the next. None of its tokens are in the cache.
    """

    tokens: mx.array
    offered: tuple[int, ...]

    @property
    def depth(self) -> int:
        """K: drafts per row, those that don't count included."""
        return int(self.tokens.shape[1]) - 1

    def cut(self, depth: int) -> Block:
        """The same block with at most `depth` drafts per row."""
        if depth >= self.depth:
            return self
        return Block(self.tokens[:, : depth + 1], tuple(min(n, depth) for n in self.offered))

    @staticmethod
    def of_rows(rows: Sequence[tuple[Block, int] | None]) -> Block:
        """A block whose rows are the given (block, row) pairs; None makes a free row."""
        depth = max((b.depth for b, _ in filter(None, rows)), default=0)
        parts, offered = [], []
        for pair in rows:
            tokens = mx.zeros((1, 1), mx.int32) if pair is None else pair[0].tokens[pair[1] : pair[1] + 1]
            parts.append(mx.pad(tokens, [(0, 0), (0, depth + 1 - tokens.shape[1])]))
            offered.append(0 if pair is None else pair[0].offered[pair[1]])
        return Block(mx.concatenate(parts), tuple(offered))


@dataclass(frozen=True)
class Round:
    """What a round gave: row r's new tokens are tokens[r][: counts[r]], all but the last of them accepted drafts."""

    tokens: list[list[int]]
    counts: list[int]
    block: Block


class Speculator:
    """Runs rounds of one target and drafter (None: plain decoding) over caches of one spec.

    A round is one pure function (arrays in, arrays out), compiled once per depth and cache shape; `traces` counts
    how often Python built one.
    """

    def __init__(
        self, target: TargetModel, drafter: DrafterModel | None, spec: CacheSpec, *, compiled: bool = True
    ) -> None:
        if spec.max_block < MAX_DEPTH + 1:
            raise ValueError(f"max_block is {spec.max_block}, expected at least {MAX_DEPTH + 1}")
        self.target, self.drafter, self.spec = target, drafter, spec
        self.traces = 0
        self._compiled = compiled
        self._rounds: dict[tuple[int, int, Layout], Callable[..., Sequence[mx.array]]] = {}
        self._drafts: dict[tuple[int, Layout], Callable[..., mx.array]] = {}

    def prefill(self, cache: KVCache, tokens: Sequence[int]) -> mx.array:
        """Append a chunk of prompt to a cache of one row; returns the hidden state (1, hidden) of its last token.

        It is evaluated before it returns: the next chunk's writes would otherwise copy buffers still being read.
        """
        cache.reserve(len(tokens))
        view = cache.view(len(tokens), start=cache.lengths[0])
        cache.arrays = []
        hidden = self.target(mx.array([tokens], mx.int32), view, last_only=True)[:, -1]
        cache.arrays = view.arrays_after(mx.array([len(tokens)], mx.int32))
        cache.advance([len(tokens)])
        mx.eval(hidden, *cache.arrays)
        # Every chunk's scores have a new size: kept for reuse, they would pile up.
        mx.clear_cache()
        return hidden

    def first(self, cache: KVCache, hidden: mx.array, depth: int) -> Round:
        """The token after a prefill and the drafts behind it. hidden (R, hidden): of each row's last token held."""
        token = mx.argmax(self.target.unembed(hidden), axis=-1).astype(mx.int32)
        block = self.draft(cache, token, hidden, depth)
        mx.async_eval(token, block.tokens)  # type: ignore[no-untyped-call]
        tokens: list[int] = token.tolist()  # type: ignore[assignment]
        return Round([[t] for t in tokens], [1] * cache.rows, block)

    def draft(
        self, cache: KVCache, token: mx.array, hidden: mx.array, depth: int, *, position: int | None = None
    ) -> Block:
        """Drafts behind `token` (R,) at each row's end; `position` overrides the default, length - 1."""
        depth = self._depth(depth)
        key = depth, cache.layout
        if position is not None:
            at = mx.full((cache.rows,), position, mx.int32)
            tokens = self._draft(token, hidden, cache.held(position=at), depth)
        else:
            if key not in self._drafts:
                self._drafts[key] = self._compile(
                    lambda t, h, *arrays: self._draft(t, h, HeldView(self.spec, key[1], arrays), depth)
                )
            tokens = self._drafts[key](token, hidden, *cache.arrays)
        return Block(tokens, (depth,) * cache.rows)

    def run_round(self, cache: KVCache, block: Block, depths: Sequence[int]) -> Round:
        """Verify `block` in every row, commit what is accepted, and draft depths[r] tokens more for row r.

        One host fetch: the new tokens and how many. Free rows compute along and come back with count 0.
        """
        depth = self._depth(max(depths))
        cache.reserve(block.depth + 1)
        key = block.depth, depth, cache.layout
        if key not in self._rounds:
            self._rounds[key] = self._compile(
                lambda tokens, offered, *arrays: self._round(tokens, offered, arrays, depth, key[2])
            )
        arrays, cache.arrays = cache.arrays, []
        out = self._rounds[key](block.tokens, mx.array(block.offered, mx.int32), *arrays)
        del arrays
        fetch, tokens, cache.arrays = out[0], out[1], list(out[2:])
        del out
        mx.eval(fetch, tokens, *cache.arrays)
        rows: list[list[int]] = fetch.tolist()  # type: ignore[assignment]
        counts = [row[-1] for row in rows]
        cache.advance(counts, block=block.depth + 1)
        return Round(rows, counts, Block(tokens, tuple(min(d, depth) for d in depths)))

    def _depth(self, depth: int) -> int:
        if not 0 <= depth <= MAX_DEPTH:
            raise ValueError(f"depth is {depth}, expected 0 to {MAX_DEPTH}")
        return depth if self.drafter is not None else 0

    def _compile(self, f: Callable[..., T]) -> Callable[..., T]:
        return mx.compile(f) if self._compiled else f

    def _draft(self, token: mx.array, hidden: mx.array, view: HeldView, depth: int) -> mx.array:
        self.traces += 1
        last = token[:, None]
        if self.drafter is None or depth == 0:
            return last
        return mx.concatenate([last, self.drafter.draft(token, hidden, view, depth)], axis=1)

    def _round(
        self, tokens: mx.array, offered: mx.array, arrays: Sequence[mx.array], depth: int, layout: Layout
    ) -> tuple[mx.array, ...]:
        self.traces += 1
        view = BlockView(self.spec, layout, arrays, tokens.shape[1])
        alive = arrays[1]
        hidden = self.target(tokens, view)
        chosen, accepted = accept_greedy(self.target.unembed(hidden), tokens[:, 1:], offered)
        counts = (accepted + 1) * alive
        after = view.arrays_after(counts)
        last = mx.take_along_axis(chosen, accepted[:, None], axis=1)
        fetch = mx.concatenate([chosen, counts[:, None]], axis=1)
        if self.drafter is None or depth == 0:
            return fetch, last, *after
        anchor = mx.take_along_axis(hidden, accepted[:, None, None], axis=1)[:, 0]
        drafts = self.drafter.draft(last[:, 0], anchor, HeldView(self.spec, layout, after), depth)
        return fetch, mx.concatenate([last, drafts], axis=1), *after
