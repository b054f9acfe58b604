"""The speculative round: verify a block of drafts, accept, draft the next. Knows nothing of models, requests or text.

The order differs from the papers' (draft, verify, accept; Leviathan et al., arXiv 2211.17192) by half a turn: a round
ends with the drafts that the next one verifies. So its one fetch also tells the host what was drafted before a
verification is paid for, and every reader of the cache comes after the round's writes: no buffer that is read is
written in the same evaluation, which MLX would answer with a copy. Plain decoding is a round of depth 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import mlx.core as mx

from .cache import KVCache
from .request import TokenLogprob
from .sampling import Proposal, Rows, Sampler, SamplerLayout, accept_greedy, greedy_choice, logprobs
from .views import BlockView, CacheSpec, HeldView, KVView, Layout, PackedView

T = TypeVar("T")
Choose = Callable[[mx.array, "mx.array | None"], mx.array]

MAX_DEPTH = 8
"""Deepest draft: with the row's own token, a block is at most 9 tokens."""


class TargetModel(Protocol):
    """What a round asks of a target; see `models.target.Target`."""

    def __call__(self, tokens: mx.array, view: KVView, *, last_only: bool = False) -> mx.array:
        """Hidden states (R, L, hidden), after the final norm, of tokens (R, L); `last_only`: of the view's last."""

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
    """What a round gave: row r's new tokens are tokens[r][: counts[r]], all but the last of them accepted drafts.

    `logprobs`, where asked for, is parallel to `tokens`.
    """

    tokens: list[list[int]]
    counts: list[int]
    block: Block
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)


@dataclass(frozen=True)
class _Key:
    """What a compiled round is built for, besides the shapes of its arrays."""

    depth: int
    layout: Layout
    sampling: SamplerLayout | None


_Out = tuple[mx.array, mx.array, list[mx.array], list[mx.array], list[mx.array], list[mx.array]]
"""Fetch (R, L + 1), next tokens (R, 1 + K), their law, sampling state, log-probabilities, cache arrays."""

Masks = Callable[[], mx.array]
"""Makes the bits (R, L, ceil(V / 32)) of the tokens that the rows' constraints allow in the block."""


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
        self._functions: dict[tuple[str, _Key], Callable[..., Any]] = {}

    def prefill(self, cache: KVCache, tokens: Sequence[int]) -> mx.array:
        """Append a chunk of prompt to a cache of one row; returns the hidden state (1, hidden) of its last token."""
        return self.prefill_together([(cache, tokens)])

    def prefill_together(self, chunks: Sequence[tuple[KVCache, Sequence[int]]]) -> mx.array:
        """Append to each cache (of one row) its chunk of prompt, all in one forward without padding.

        Returns the hidden states (number of chunks, hidden) of their last tokens. All is evaluated before it
        returns: the next chunk's writes would otherwise copy buffers still being read.
        """
        parts = []
        for cache, tokens in chunks:
            cache.reserve(len(tokens))
            parts.append(cache.view(len(tokens), start=cache.lengths[0]))
            cache.arrays = []
        view: KVView = parts[0] if len(parts) == 1 else PackedView(parts)
        everything = [token for _, tokens in chunks for token in tokens]
        hidden = self.target(mx.array([everything], mx.int32), view, last_only=True)[0]
        for (cache, tokens), part in zip(chunks, parts, strict=True):
            cache.arrays = part.arrays_after(mx.array([len(tokens)], mx.int32))
            cache.advance([len(tokens)])
        mx.eval(hidden, *(cache.arrays for cache, _ in chunks))
        # Every chunk's scores have a new size: kept for reuse, they would pile up.
        mx.clear_cache()
        return hidden

    def first(
        self,
        cache: KVCache,
        hidden: mx.array,
        depths: Sequence[int],
        sampler: Sampler | None = None,
        masks: Masks | None = None,
    ) -> Round:
        """The token after a prefill and depths[r] drafts behind it. hidden (R, hidden): of the last token held."""
        key = _Key(self._depth(max(depths)), cache.layout, None if sampler is None else sampler.layout)
        states = [] if sampler is None else sampler.arrays
        out = self._function("first", self._first, key)(hidden, states, [masks()] if masks else [], cache.arrays)
        return self._finish(out, cache, sampler, tuple(min(d, key.depth) for d in depths))

    def draft(
        self, cache: KVCache, token: mx.array, hidden: mx.array, depth: int, *, position: int | None = None
    ) -> mx.array:
        """Greedy drafts (R, depth) behind `token` (R,); `position` overrides the default, length - 1."""
        at = None if position is None else mx.full((cache.rows,), position, mx.int32)
        return self._drafts(None, token, hidden, cache.held(position=at), self._depth(depth))[0]

    def run_round(
        self,
        cache: KVCache,
        block: Block,
        depths: Sequence[int],
        sampler: Sampler | None = None,
        masks: Masks | None = None,
    ) -> Round:
        """Verify `block` in every row, commit what is accepted, and draft depths[r] tokens more for row r.

        One host fetch: the new tokens and how many. Free rows compute along and come back with count 0. With `masks`
        (rows under a constraint) the verification is queued first, and they are made while it runs.
        """
        cache.reserve(block.depth + 1)
        key = _Key(self._depth(max(depths)), cache.layout, None if sampler is None else sampler.layout)
        law = [] if block.proposal is None else block.proposal.arrays
        states, offered = [] if sampler is None else sampler.arrays, mx.array(block.offered, mx.int32)
        arrays, cache.arrays = cache.arrays, []
        out: _Out
        if masks is None:
            out = self._function("round", self._round, key)(block.tokens, offered, law, states, arrays)
        else:
            hidden, logits, arrays = self._function("verify", self._verify, key)(block.tokens, arrays)
            mx.async_eval(logits, hidden, *arrays)  # type: ignore[no-untyped-call]
            commit = self._function("commit", self._commit, key)
            out = commit(block.tokens, offered, law, states, [masks()], hidden, logits, arrays)
        del arrays
        cache.arrays = out[-1]
        return self._finish(out, cache, sampler, tuple(min(d, key.depth) for d in depths), block=block.depth + 1)

    def _finish(
        self, out: _Out, cache: KVCache, sampler: Sampler | None, offered: tuple[int, ...], *, block: int = 0
    ) -> Round:
        fetch, tokens, law, states, reported, _ = out
        mx.eval(*out)
        if sampler is not None:
            sampler.arrays = states
        rows: list[list[int]] = fetch.tolist()  # type: ignore[assignment]
        counts = [row[-1] for row in rows]
        if block:
            cache.advance(counts, block=block)
        following = Block(tokens, offered, Proposal.of_arrays(law))
        return Round(rows, counts, following, _readable(rows, reported) if reported else [])

    def _function(self, name: str, f: Callable[..., T], key: _Key) -> Callable[..., T]:
        """`f` bound to `key`, compiled once."""
        if (name, key) not in self._functions:
            bound = partial(f, key)
            self._functions[name, key] = mx.compile(bound) if self._compiled else bound
        return self._functions[name, key]

    def _depth(self, depth: int) -> int:
        if not 0 <= depth <= MAX_DEPTH:
            raise ValueError(f"depth is {depth}, expected 0 to {MAX_DEPTH}")
        return depth if self.drafter is not None else 0

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

    def _first(
        self, key: _Key, hidden: mx.array, states: list[mx.array], masks: list[mx.array], arrays: list[mx.array]
    ) -> _Out:
        self.traces += 1
        rows = Rows(key.sampling, states, *masks) if key.sampling else None
        logits, none = self.target.unembed(hidden[:, None]), mx.zeros((hidden.shape[0], 0), mx.int32)
        view = HeldView(self.spec, key.layout, arrays)
        offered = mx.zeros((hidden.shape[0],), mx.int32)
        if rows is None:
            chosen, accepted = accept_greedy(logits, none, offered)
        else:
            chosen, accepted = rows.accept(logits, none, offered, None, view.lengths[:, None])
        drafts, law = self._drafts(rows, chosen[:, 0], hidden, view, key.depth)
        fetch = mx.concatenate([chosen, accepted[:, None] + 1], axis=1)
        return fetch, mx.concatenate([chosen, drafts], axis=1), law, *_reported(rows, logits, chosen), []

    def _round(
        self,
        key: _Key,
        tokens: mx.array,
        offered: mx.array,
        law: list[mx.array],
        states: list[mx.array],
        arrays: list[mx.array],
    ) -> _Out:
        hidden, logits, arrays = self._verify(key, tokens, arrays)
        return self._commit(key, tokens, offered, law, states, [], hidden, logits, arrays)

    def _verify(self, key: _Key, tokens: mx.array, arrays: list[mx.array]) -> tuple[mx.array, mx.array, list[mx.array]]:
        """The target over a block: hidden states, logits, and the cache with the block written, not yet counted."""
        self.traces += 1
        view = BlockView(self.spec, key.layout, arrays, tokens.shape[1])
        hidden = self.target(tokens, view)
        return hidden, self.target.unembed(hidden), view.arrays_after(mx.zeros_like(view.lengths))

    def _commit(
        self,
        key: _Key,
        tokens: mx.array,
        offered: mx.array,
        law: list[mx.array],
        states: list[mx.array],
        masks: list[mx.array],
        hidden: mx.array,
        logits: mx.array,
        arrays: list[mx.array],
    ) -> _Out:
        """Acceptance, the new lengths, and the next drafts."""
        rows = Rows(key.sampling, states, *masks) if key.sampling else None
        drafts, (lengths, alive, *rest) = tokens[:, 1:], arrays
        if rows is None:
            chosen, accepted = accept_greedy(logits, drafts, offered)
        else:
            positions = lengths[:, None] + 1 + mx.arange(tokens.shape[1])[None]
            chosen, accepted = rows.accept(logits, drafts, offered, Proposal.of_arrays(law), positions)
        counts = (accepted + 1) * alive
        after = [lengths + counts, alive, *rest]
        last = mx.take_along_axis(chosen, accepted[:, None], axis=1)
        anchor = mx.take_along_axis(hidden, accepted[:, None, None], axis=1)[:, 0]
        more, law = self._drafts(rows, last[:, 0], anchor, HeldView(self.spec, key.layout, after), key.depth)
        fetch = mx.concatenate([chosen, counts[:, None]], axis=1)
        return fetch, mx.concatenate([last, more], axis=1), law, *_reported(rows, logits, chosen), after


def _reported(rows: Rows | None, logits: mx.array, chosen: mx.array) -> tuple[list[mx.array], list[mx.array]]:
    """The sampling state afterwards, and log-probabilities if a row wants them."""
    if rows is None:
        return [], []
    wanted = rows.layout.logprobs >= 0
    return rows.flat(), logprobs(logits, chosen, rows.layout.logprobs) if wanted else []


def _readable(tokens: list[list[int]], reported: list[mx.array]) -> list[list[TokenLogprob]]:
    values: list[list[list[float]]] = reported[0].tolist()  # type: ignore[assignment]
    ids: list[list[list[int]]] = reported[1].tolist()  # type: ignore[assignment]
    return [
        [TokenLogprob(t, v[0], tuple(zip(best, v[1:], strict=True))) for t, v, best in zip(row, vs, bs, strict=False)]
        for row, vs, bs in zip(tokens, values, ids, strict=True)
    ]
