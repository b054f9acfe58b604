"""The speculative round: verify a block of drafts, accept, draft the next. Knows nothing of models, requests or text.

The order differs from the papers' (draft, verify, accept; Leviathan et al., arXiv 2211.17192) by half a turn: a round
ends with the drafts that the next one verifies. So its one fetch also tells the host what was drafted before a
verification is paid for, and every reader of the cache comes after the round's writes: no buffer that is read is
written in the same evaluation, which MLX would answer with a copy. Plain decoding is a round of depth 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import mlx.core as mx

from .cache import KVCache
from .request import TokenLogprob
from .sampling import Proposal, Rows, Sampler, SamplerLayout, accept_greedy, greedy_choice, log_confidence, logprobs
from .views import BlockView, CacheSpec, HeldView, KVView, Layout, PackedView

T = TypeVar("T")
Choose = Callable[[mx.array, "mx.array | None"], mx.array]

_COMPILED = 96
"""Most compiled functions kept: each holds some megabytes, more in deep models."""

_RARE = 8
"""Changes between two depths that are done by other functions, before they get one of their own."""

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
    """What each row verifies next: `tokens` (R, 1 + K), its last token and its drafts; offered (R,) of them count.

    This is all that a row carries from one round to the next. None of its tokens are in the cache. `proposal` is the
    law that the drafts were drawn from, where a row needs it.
    """

    tokens: mx.array
    offered: mx.array
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
            offered.append(mx.zeros((1,), mx.int32) if pair is None else pair[0].offered[pair[1] : pair[1] + 1])
        laws = [None if pair is None else pair[0].law(pair[1]) for pair in rows]
        proposal = Proposal.of_rows(laws, depth, vocab_size) if any(laws) else None
        return Block(mx.concatenate(parts), mx.concatenate(offered), proposal)

    @staticmethod
    def empty(rows: int) -> Block:
        """A block without drafts."""
        return Block(mx.zeros((rows, 1), mx.int32), mx.zeros((rows,), mx.int32))

    def resized(self, width: int) -> Block:
        """The block in `width` tokens per row: drafts beyond are dropped, and what is missing doesn't count."""
        if width == self.depth + 1:
            return self
        tokens = mx.pad(self.tokens[:, :width], [(0, 0), (0, max(0, width - self.depth - 1))])
        proposal = None if self.proposal is None or width == 1 else self.proposal.resized(width - 1)
        return Block(tokens, mx.minimum(self.offered, width - 1), proposal)

    def law(self, row: int) -> Proposal | None:
        """The proposal of one row."""
        if self.proposal is None:
            return None
        ids, probs = self.proposal.ids, self.proposal.probs
        return Proposal(None if ids is None else ids[row : row + 1], probs[row : row + 1])


@dataclass(frozen=True)
class Round:
    """What a round gave: row r's new tokens are tokens[r][: counts[r]], all but the last of them accepted drafts.

    `block` is what the next round verifies, of which row r offers `offered[r]` drafts. `logprobs`, where asked for, is
    parallel to `tokens`.
    """

    tokens: list[list[int]]
    counts: list[int]
    block: Block
    offered: list[int]
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Which shapes forwards may have, so that their arithmetic is that of single steps (see `bitwise`).

    Blocks have at least `least` tokens per row (shorter ones are padded, single steps too) and at most `longest[rows]`,
    where the arrays have so many rows; other counts of rows don't occur. `free`: nothing was left out.
    """

    least: int
    longest: Mapping[int, int]
    free: bool

    @property
    def max_rows(self) -> int:
        """Rows of the largest batch."""
        return max(self.longest)

    def width(self, rows: int, wanted: int) -> int:
        """Tokens per row that a block gets in arrays of `rows` rows, where `wanted` would do."""
        return min(max(wanted, self.least), self.longest[rows])


@dataclass(frozen=True)
class _Key:
    """What a compiled round is built for, besides the shapes of its arrays."""

    depth: int
    layout: Layout
    sampling: SamplerLayout | None
    cut: bool
    """Whether a row offers no drafts behind one that makes its chain improbable."""


_Out = tuple[mx.array, mx.array, mx.array, list[mx.array], list[mx.array], list[mx.array], list[mx.array]]
"""Fetch (R, L + 2), next tokens (R, 1 + K), drafts offered (R,), their law, sampling state, logprobs, cache."""


@dataclass(frozen=True)
class Flight:
    """A round that the device has been given. `block` is what the next one verifies, known or not.

    `verified`: tokens of its block. `drafted`: drafts that it makes, of which `block` may leave some out.
    """

    block: Block
    verified: int
    drafted: int
    fetch: mx.array
    reported: list[mx.array]


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
        self.shapes: Shapes | None = None
        self.traces = 0
        self._compiled = compiled
        self._functions: dict[tuple[str, _Key, tuple[object, ...]], Callable[..., Any]] = {}
        self._wanted: Counter[tuple[str, _Key, tuple[object, ...]]] = Counter()
        self._steady: set[tuple[object, ...]] = set()

    def forget(self) -> None:
        """Drop what was compiled, and the weights in it. For the thread that called it: MLX keeps it by thread."""
        self._functions.clear()
        self._wanted.clear()
        self._steady.clear()

    @property
    def alone(self) -> bool:
        """Whether prompts are to be prefilled each by itself, in whole chunks."""
        return self.shapes is not None and not self.shapes.free

    def fitted(self, block: Block) -> Block:
        """The block in a width that it may have."""
        if self.shapes is None:
            return block
        return block.resized(self.shapes.width(int(block.tokens.shape[0]), block.depth + 1))

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
        *,
        min_chain: float = 0.0,
    ) -> Round:
        """The token after a prefill and depths[r] drafts behind it. hidden (R, hidden): of the last token held."""
        key, limits = self._next(cache, depths, sampler, min_chain)
        states = [] if sampler is None else sampler.arrays
        run = self._function("first", self._first, key, cache.shape)
        return self._read(self._flight(run(hidden, limits, states, [masks()] if masks else [], cache.arrays), sampler))

    def draft(
        self, cache: KVCache, token: mx.array, hidden: mx.array, depth: int, *, position: int | None = None
    ) -> mx.array:
        """Greedy drafts (R, depth) behind `token` (R,); `position` overrides the default, length - 1."""
        at = None if position is None else mx.full((cache.rows,), position, mx.int32)
        key, limits = self._next(cache, [depth] * cache.rows, None, 0.0)
        return self._drafts(None, token, hidden, cache.held(position=at), key, limits)[0]

    def run_round(
        self,
        cache: KVCache,
        block: Block,
        depths: Sequence[int],
        sampler: Sampler | None = None,
        masks: Masks | None = None,
        *,
        min_chain: float = 0.0,
        exact: bool = False,
    ) -> Round:
        """Verify `block` in every row, commit what is accepted, and draft depths[r] tokens more for row r.

        One host fetch: the new tokens and how many. Free rows compute along and come back with count 0. With `masks`
        (rows under a constraint) the verification is queued first, and they are made while it runs. A row offers its
        drafts up to the first at which the drafter's probability of its chain falls under `min_chain`: this one is
        offered, too (Leviathan's law would be broken by dropping what has been looked at).
        """
        flight = self.launch(cache, block, depths, sampler, masks, min_chain=min_chain, exact=exact)
        return self.land(flight, cache)

    def launch(
        self,
        cache: KVCache,
        block: Block,
        depths: Sequence[int],
        sampler: Sampler | None = None,
        masks: Masks | None = None,
        *,
        min_chain: float = 0.0,
        ahead: int = 0,
        exact: bool = False,
    ) -> Flight:
        """Hand a round to the device without waiting for it: see `run_round`. Every flight is landed, in their order.

        `ahead`: tokens that flights not landed yet may add to a row. `exact`: no deeper round may do for a rare one.
        """
        if ahead == 0:
            cache.reserve(block.depth + 1)
        elif not cache.has_room(ahead + block.depth + 1):
            raise ValueError("a round can't be launched ahead into rows that have to grow for it")
        key, limits = self._next(cache, depths, sampler, min_chain)
        wanted = key.depth
        if masks is None and block.depth != wanted and not exact:
            block, key = self._covered(cache, block, key, ahead)
        law = [] if block.proposal is None else block.proposal.arrays
        shapes = (cache.shape, block.depth, *(a.shape for a in law))
        states = [] if sampler is None else sampler.arrays
        arrays, cache.arrays = cache.arrays, []
        out: _Out
        if masks is None:
            run = self._function("round", self._round, key, *shapes)
            out = run(block.tokens, block.offered, limits, law, states, arrays)
        else:
            hidden, logits, arrays = self._function("verify", self._verify, key, *shapes)(block.tokens, arrays)
            mx.async_eval(logits, hidden, *arrays)  # type: ignore[no-untyped-call]
            commit = self._function("commit", self._commit, key, *shapes)
            out = commit(block.tokens, block.offered, limits, law, states, [masks()], hidden, logits, arrays)
        del arrays
        cache.arrays = out[-1]
        return self._flight(out, sampler, verified=block.depth + 1, wanted=wanted)

    def land(self, flight: Flight, cache: KVCache) -> Round:
        """Wait for a flight, and note what it did to the rows."""
        result = self._read(flight)
        cache.advance(result.counts, block=flight.verified)
        return result

    def has_round(self, cache: KVCache, sampler: Sampler | None, depth: int) -> bool:
        """Whether rounds that verify and draft `depth` tokens per row of this cache are compiled."""
        block = depth if self.shapes is None else self.shapes.width(cache.rows, depth + 1) - 1
        layout = None if sampler is None else sampler.layout
        return (cache.layout, layout, cache.shape, block, min(depth, block)) in self._steady

    def _covered(self, cache: KVCache, block: Block, key: _Key, ahead: int) -> tuple[Block, _Key]:
        """What does the work of a round between two depths: a round of the deeper one, while that saves compiling.

        Its surplus isn't offered. A change that comes often gets a function of its own.
        """
        place = ("round", key, (cache.shape, block.depth))
        deeper = max(block.depth, key.depth)
        law = key.sampling is not None and key.sampling.distribution
        if not self._compiled or place in self._functions or law or self.shapes is not None:
            return block, key
        if not cache.has_room(ahead + deeper + 1):
            return block, key
        covering = replace(key, depth=deeper)
        # Going up, the deeper function is what the next round needs.
        if block.depth > key.depth and ("round", covering, (cache.shape, deeper)) not in self._functions:
            return block, key
        self._wanted[place] += 1
        if self._wanted[place] > _RARE:
            del self._wanted[place]
            return block, key
        return block.resized(deeper + 1), covering

    def _next(
        self, cache: KVCache, depths: Sequence[int], sampler: Sampler | None, min_chain: float
    ) -> tuple[_Key, list[mx.array]]:
        """What a round is compiled for, and the limits of its drafts: [depths (R,)], and [min_chain] if any are cut."""
        depth = self._deepest(depths, cache.rows)
        cut = min_chain > 0 and depth > 0
        key = _Key(depth, cache.layout, None if sampler is None else sampler.layout, cut)
        limits = [mx.array([min(d, depth) for d in depths], mx.int32)]
        return key, [*limits, mx.array(min_chain, mx.float32)] if cut else limits

    def _flight(self, out: _Out, sampler: Sampler | None, *, verified: int = 0, wanted: int | None = None) -> Flight:
        """`wanted`: drafts of the block that follows; default all that were made."""
        fetch, tokens, offered, law, states, reported, _ = out
        mx.async_eval(*out)  # type: ignore[no-untyped-call]
        if sampler is not None:
            sampler.arrays = states
        made = Block(tokens, offered, Proposal.of_arrays(law))
        block = made if wanted is None else made.resized(wanted + 1)
        return Flight(block, verified, made.depth, fetch, reported)

    def _read(self, flight: Flight) -> Round:
        rows: list[list[int]] = flight.fetch.tolist()  # type: ignore[assignment]
        counts, offered = [row[-2] for row in rows], [row[-1] for row in rows]
        reported = _readable(rows, flight.reported) if flight.reported else []
        return Round(rows, counts, flight.block, offered, reported)

    def _function(self, name: str, f: Callable[..., T], key: _Key, *shapes: object) -> Callable[..., T]:
        """`f` bound to `key`, compiled once for arrays of the `shapes`; what was used last is kept."""
        place = (name, key, shapes)
        function = self._functions.pop(place, None)
        if function is None:
            bound = partial(f, key)
            function = mx.compile(bound) if self._compiled else bound
            if len(self._functions) >= _COMPILED:
                _, rare, sizes = oldest = next(iter(self._functions))
                del self._functions[oldest]
                self._steady.discard((rare.layout, rare.sampling, *sizes[:2], rare.depth))
                self._wanted.clear()
            if name in ("round", "commit"):
                self._steady.add((key.layout, key.sampling, *shapes[:2], key.depth))
        self._functions[place] = function
        return function

    def _deepest(self, depths: Sequence[int], rows: int) -> int:
        """Drafts per row to draw where depths[r] are wanted for row r."""
        depth = self._depth(max(depths))
        return depth if self.shapes is None else min(depth, self.shapes.longest[rows] - 1)

    def _depth(self, depth: int) -> int:
        if not 0 <= depth <= MAX_DEPTH:
            raise ValueError(f"depth is {depth}, expected 0 to {MAX_DEPTH}")
        return depth if self.drafter is not None else 0

    def _drafts(
        self, rows: Rows | None, last: mx.array, hidden: mx.array, view: HeldView, key: _Key, limits: list[mx.array]
    ) -> tuple[mx.array, mx.array, list[mx.array]]:
        """Drafts (R, K) behind `last` (R,), how many of them are offered (R,), and the law of each.

        The law is [], [probs] or [probs, ids], each (R, K, C).
        """
        if self.drafter is None or key.depth == 0:
            return mx.zeros((last.shape[0], 0), mx.int32), limits[0], []
        chain: list[mx.array] = []
        laws: list[tuple[mx.array, mx.array | None]] = []
        confidence: list[mx.array] = []

        def choose(scores: mx.array, ids: mx.array | None) -> mx.array:
            if rows is None:
                token = greedy_choice(scores, ids)
            else:
                so_far = mx.stack(chain, axis=1) if chain else mx.zeros((last.shape[0], 0), mx.int32)
                token, kept, probs = rows.propose(scores, ids, so_far, view.lengths + 1 + len(chain))
                laws.append((probs, kept))
            chain.append(token)
            if key.cut:
                confidence.append(log_confidence(scores, ids, token))
            return token

        drafts = self.drafter.draft(last, hidden, view, key.depth, choose)
        offered = limits[0]
        if key.cut:
            likely = mx.cumsum(mx.stack(confidence, axis=1), axis=1) >= mx.log(limits[1])
            offered = mx.minimum(offered, 1 + likely[:, :-1].sum(axis=1).astype(mx.int32))
        if rows is None or not rows.layout.distribution:
            return drafts, offered, []
        ids = [i for _, i in laws if i is not None]
        return drafts, offered, [mx.concatenate(part, axis=1) for part in ([p for p, _ in laws], ids) if part]

    def _first(
        self,
        key: _Key,
        hidden: mx.array,
        limits: list[mx.array],
        states: list[mx.array],
        masks: list[mx.array],
        arrays: list[mx.array],
    ) -> _Out:
        self.traces += 1
        rows = Rows(key.sampling, states, *masks) if key.sampling else None
        logits, none = self.target.unembed(hidden[:, None]), mx.zeros((hidden.shape[0], 0), mx.int32)
        view, zero = HeldView(self.spec, key.layout, arrays), mx.zeros((hidden.shape[0],), mx.int32)
        if rows is None:
            chosen, accepted = accept_greedy(logits, none, zero)
        else:
            chosen, accepted = rows.accept(logits, none, zero, None, view.lengths[:, None])
        drafts, offered, law = self._drafts(rows, chosen[:, 0], hidden, view, key, limits)
        fetch = mx.concatenate([chosen, accepted[:, None] + 1, offered[:, None]], axis=1)
        return fetch, mx.concatenate([chosen, drafts], axis=1), offered, law, *_reported(rows, logits, chosen), []

    def _round(
        self,
        key: _Key,
        tokens: mx.array,
        offered: mx.array,
        limits: list[mx.array],
        law: list[mx.array],
        states: list[mx.array],
        arrays: list[mx.array],
    ) -> _Out:
        hidden, logits, arrays = self._verify(key, tokens, arrays)
        return self._commit(key, tokens, offered, limits, law, states, [], hidden, logits, arrays)

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
        limits: list[mx.array],
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
        view = HeldView(self.spec, key.layout, after)
        more, following, law = self._drafts(rows, last[:, 0], anchor, view, key, limits)
        fetch = mx.concatenate([chosen, counts[:, None], following[:, None]], axis=1)
        return fetch, mx.concatenate([last, more], axis=1), following, law, *_reported(rows, logits, chosen), after


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
