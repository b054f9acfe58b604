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
from .sampling import Proposal, Rows, Sampler, SamplerLayout, accept_greedy, greedy_choice
from .views import BlockView, CacheSpec, HeldView, KVView, Layout

T = TypeVar("T")
Choose = Callable[[mx.array, "mx.array | None"], mx.array]

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

    def draft(self, token: mx.array, hidden: mx.array, view: HeldView, depth: int, choose: Choose) -> mx.array:
        """Guesses (R, depth) after token (R,), given the target's hidden state (R, hidden) before it.

        choose(scores (R, C), ids (R, C) or None) makes each guess (R,).
        """


@dataclass(frozen=True)
class Block:
    """What each row verifies next: `tokens` (R, 1 + K), the row's last token and its drafts; offered[r] of them count.

    This is all that a row carries from one round to the next. None of its tokens are in the cache. `proposal` is the
    law that the drafts were drawn from, where a row needs it.
    """

    tokens: mx.array
    offered: tuple[int, ...]
    proposal: Proposal | None = None

    @property
    def depth(self) -> int:
        """K: drafts per row, those that don't count included."""
        return int(self.tokens.shape[1]) - 1

    @staticmethod
    def of_rows(rows: Sequence[tuple[Block, int] | None], vocab_size: int) -> Block:
        """A block whose rows are the given (block, row) pairs; None makes a free row."""
        depth = max((b.depth for b, _ in filter(None, rows)), default=0)
        parts, offered = [], []
        for pair in rows:
            tokens = mx.zeros((1, 1), mx.int32) if pair is None else pair[0].tokens[pair[1] : pair[1] + 1]
            parts.append(mx.pad(tokens, [(0, 0), (0, depth + 1 - tokens.shape[1])]))
            offered.append(0 if pair is None else pair[0].offered[pair[1]])
        laws = [None if pair is None else pair[0].law(pair[1]) for pair in rows]
        proposal = Proposal.of_rows(laws, depth, vocab_size) if any(laws) else None
        return Block(mx.concatenate(parts), tuple(offered), proposal)

    def law(self, row: int) -> Proposal | None:
        """The proposal of one row."""
        if self.proposal is None:
            return None
        ids, probs = self.proposal.ids, self.proposal.probs
        return Proposal(None if ids is None else ids[row : row + 1], probs[row : row + 1])


@dataclass(frozen=True)
class Round:
    """What a round gave: row r's new tokens are tokens[r][: counts[r]], all but the last of them accepted drafts."""

    tokens: list[list[int]]
    counts: list[int]
    block: Block


_Out = tuple[mx.array, mx.array, list[mx.array], list[mx.array], list[mx.array]]
_Key = tuple[int, int, Layout, "SamplerLayout | None", bool]


class Speculator:
    """Runs rounds of one target and drafter (None: plain decoding) over caches of one spec.

    A round is one pure function (arrays in, arrays out), compiled once per depth, kind of sampling and cache shape;
    `traces` counts how often Python built one.
    """

    def __init__(
        self, target: TargetModel, drafter: DrafterModel | None, spec: CacheSpec, *, compiled: bool = True
    ) -> None:
        if spec.max_block < MAX_DEPTH + 1:
            raise ValueError(f"max_block is {spec.max_block}, expected at least {MAX_DEPTH + 1}")
        self.target, self.drafter, self.spec = target, drafter, spec
        self.traces = 0
        self._compiled = compiled
        self._rounds: dict[_Key, Callable[..., _Out]] = {}
        self._firsts: dict[_Key, Callable[..., _Out]] = {}

    def prefill(self, cache: KVCache, tokens: Sequence[int]) -> mx.array:
        """Append a chunk of prompt to a cache of one row; returns the hidden state (1, hidden) of its last token.

        Nothing is fetched; the arrays are queued for evaluation.
        """
        cache.reserve(len(tokens))
        view = cache.view(len(tokens), start=cache.lengths[0])
        cache.arrays = []
        hidden = self.target(mx.array([tokens], mx.int32), view, last_only=True)[:, -1]
        cache.arrays = view.arrays_after(mx.array([len(tokens)], mx.int32))
        cache.advance([len(tokens)])
        mx.async_eval(hidden, *cache.arrays)  # type: ignore[no-untyped-call]
        return hidden

    def first(self, cache: KVCache, hidden: mx.array, depth: int, sampler: Sampler | None = None) -> Round:
        """The token after a prefill and the drafts behind it. hidden (R, hidden): of each row's last token held."""
        layout = None if sampler is None else sampler.layout
        key = 0, self._depth(depth), cache.layout, layout, False
        if key not in self._firsts:
            self._firsts[key] = self._compile(lambda *args: self._first(key, *args))
        out = self._firsts[key](hidden, [] if sampler is None else sampler.arrays, cache.arrays)
        return self._finish(out, cache, sampler, (key[1],) * cache.rows)

    def draft(
        self, cache: KVCache, token: mx.array, hidden: mx.array, depth: int, *, position: int | None = None
    ) -> mx.array:
        """Greedy drafts (R, depth) behind `token` (R,); `position` overrides the default, length - 1."""
        at = None if position is None else mx.full((cache.rows,), position, mx.int32)
        return self._drafts(None, token, hidden, cache.held(position=at), self._depth(depth))[0]

    def run_round(self, cache: KVCache, block: Block, depths: Sequence[int], sampler: Sampler | None = None) -> Round:
        """Verify `block` in every row, commit what is accepted, and draft depths[r] tokens more for row r.

        One host fetch: the new tokens and how many. Free rows compute along and come back with count 0.
        """
        depth = self._depth(max(depths))
        cache.reserve(block.depth + 1)
        layout, law = None if sampler is None else sampler.layout, block.proposal
        key = block.depth, depth, cache.layout, layout, law is not None and law.ids is not None
        if key not in self._rounds:
            self._rounds[key] = self._compile(lambda *args: self._round(key, *args))
        arrays, cache.arrays = cache.arrays, []
        laws = [] if law is None else [law.probs, *([] if law.ids is None else [law.ids])]
        states = [] if sampler is None else sampler.arrays
        out = self._rounds[key](block.tokens, mx.array(block.offered, mx.int32), laws, states, arrays)
        cache.arrays = out[4]
        del arrays
        return self._finish(out, cache, sampler, tuple(min(d, depth) for d in depths), advance=True)

    def _finish(
        self, out: _Out, cache: KVCache, sampler: Sampler | None, offered: tuple[int, ...], *, advance: bool = False
    ) -> Round:
        fetch, tokens, laws, states, _ = out
        mx.eval(*out)
        if sampler is not None:
            sampler.arrays = states
        rows: list[list[int]] = fetch.tolist()  # type: ignore[assignment]
        counts = [row[-1] for row in rows]
        if advance:
            cache.advance(counts)
        proposal = Proposal(laws[1] if len(laws) > 1 else None, laws[0]) if laws else None
        return Round(rows, counts, Block(tokens, offered, proposal))

    def _depth(self, depth: int) -> int:
        if not 0 <= depth <= MAX_DEPTH:
            raise ValueError(f"depth is {depth}, expected 0 to {MAX_DEPTH}")
        return depth if self.drafter is not None else 0

    def _compile(self, f: Callable[..., T]) -> Callable[..., T]:
        return mx.compile(f) if self._compiled else f

    def _drafts(
        self, rows: Rows | None, last: mx.array, hidden: mx.array, view: HeldView, depth: int
    ) -> tuple[mx.array, list[mx.array]]:
        """Drafts (R, depth) behind `last` (R,) and the law of each: [], [probs] or [probs, ids], (R, depth, C)."""
        if self.drafter is None or depth == 0:
            return mx.zeros((last.shape[0], 0), mx.int32), []
        if rows is None:
            return self.drafter.draft(last, hidden, view, depth, greedy_choice), []
        chain: list[mx.array] = []
        laws: list[tuple[mx.array, mx.array | None]] = []

        def choose(scores: mx.array, ids: mx.array | None) -> mx.array:
            so_far = mx.stack(chain, axis=1) if chain else mx.zeros((last.shape[0], 0), mx.int32)
            token, kept, probs = rows.propose(scores, ids, so_far, view.lengths + 1 + len(chain))
            chain.append(token)
            laws.append((probs, kept))
            return token

        drafts = self.drafter.draft(last, hidden, view, depth, choose)
        if not rows.layout.distribution:
            return drafts, []
        ids = [i for _, i in laws if i is not None]
        return drafts, [mx.concatenate(part, axis=1) for part in ([p for p, _ in laws], ids) if part]

    def _first(self, key: _Key, hidden: mx.array, states: list[mx.array], arrays: list[mx.array]) -> _Out:
        self.traces += 1
        _, depth, layout, sampling, _ = key
        rows = None if sampling is None else Rows(sampling, states)
        logits, none = self.target.unembed(hidden[:, None]), mx.zeros((hidden.shape[0], 0), mx.int32)
        view = HeldView(self.spec, layout, arrays)
        offered = mx.zeros((hidden.shape[0],), mx.int32)
        if rows is None:
            chosen, accepted = accept_greedy(logits, none, offered)
        else:
            chosen, accepted = rows.accept(logits, none, offered, None, view.lengths[:, None])
        drafts, laws = self._drafts(rows, chosen[:, 0], hidden, view, depth)
        fetch = mx.concatenate([chosen, accepted[:, None] + 1], axis=1)
        return fetch, mx.concatenate([chosen, drafts], axis=1), laws, [] if rows is None else rows.flat(), []

    def _round(
        self,
        key: _Key,
        tokens: mx.array,
        offered: mx.array,
        laws: list[mx.array],
        states: list[mx.array],
        arrays: list[mx.array],
    ) -> _Out:
        self.traces += 1
        _, depth, layout, sampling, _ = key
        rows = None if sampling is None else Rows(sampling, states)
        view = BlockView(self.spec, layout, arrays, tokens.shape[1])
        alive = arrays[1]
        hidden = self.target(tokens, view)
        logits, drafts = self.target.unembed(hidden), tokens[:, 1:]
        if rows is None:
            chosen, accepted = accept_greedy(logits, drafts, offered)
        else:
            law = Proposal(laws[1] if len(laws) > 1 else None, laws[0]) if laws else None
            chosen, accepted = rows.accept(logits, drafts, offered, law, view.positions + 1)
        counts = (accepted + 1) * alive
        after = view.arrays_after(counts)
        last = mx.take_along_axis(chosen, accepted[:, None], axis=1)
        anchor = mx.take_along_axis(hidden, accepted[:, None, None], axis=1)[:, 0]
        more, laws = self._drafts(rows, last[:, 0], anchor, HeldView(self.spec, layout, after), depth)
        fetch = mx.concatenate([chosen, counts[:, None]], axis=1)
        return fetch, mx.concatenate([last, more], axis=1), laws, [] if rows is None else rows.flat(), after
