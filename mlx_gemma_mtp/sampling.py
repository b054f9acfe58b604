"""How tokens are chosen and drafts accepted, for rows with different parameters at once. Knows no models or caches.

Two contracts. `exact`: greedy rows, and rows with a seed. Their noise is a hash of (seed, choice, position, token), the
same for draft and target, and a draft is accepted if it is the target's own choice: the tokens are those of plain
decoding. `distribution`: sampled rows without a seed. Drafts are accepted with probability min(1, p / q) and replaced
from the residual (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318): the law is the target's.

Everything here is a pure function of arrays; `Sampler` holds those of a batch between rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .request import SamplingParams

_NEVER = -1e30
_ENDLESS = 2**31 - 1
"""A logit that stands for "impossible": finite, so that no arithmetic on it makes a NaN."""


def accept_greedy(logits: mx.array, drafts: mx.array, offered: mx.array) -> tuple[mx.array, mx.array]:
    """Greedy acceptance: the longest prefix of drafts that the target would have chosen itself.

    logits (R, K + 1, V) are the target's after the last token and after each draft; drafts (R, K), of which the
    first offered (R,) count. Returns the target's own choices (R, K + 1), of which the first accepted + 1 are the
    row's new tokens, and accepted (R,).
    """
    chosen = mx.argmax(logits, axis=-1).astype(mx.int32)
    return chosen, _prefix(chosen[:, : drafts.shape[1]] == drafts, offered)


def greedy_choice(scores: mx.array, ids: mx.array | None) -> mx.array:
    """The token (R,) with the highest of scores (R, C), which belong to ids (R, C) (None: C is the vocabulary)."""
    best = mx.argmax(scores, axis=-1, keepdims=True)
    return (best if ids is None else mx.take_along_axis(ids, best, axis=-1))[:, 0].astype(mx.int32)


def log_confidence(scores: mx.array, ids: mx.array | None, token: mx.array) -> mx.array:
    """Log-probability (R,) of token (R,) under a softmax of scores (R, C), which belong to ids (R, C) (None: all)."""
    x = scores.astype(mx.float32)
    if ids is None:
        own = mx.take_along_axis(x, token[:, None], axis=-1)[:, 0]
    else:
        own = mx.where(ids == token[:, None], x, -mx.inf).max(axis=-1)
    return own - mx.logsumexp(x, axis=-1)


def _prefix(right: mx.array, offered: mx.array) -> mx.array:
    """Length (R,) of the run of true values at the start of right (R, K), of which the first offered (R,) count."""
    counted = right & (mx.arange(right.shape[1])[None] < offered[:, None])
    return mx.cumprod(counted.astype(mx.int32), axis=1).sum(axis=1).astype(mx.int32)


@dataclass(frozen=True, kw_only=True)
class SamplerLayout:
    """What the rows of a batch use, together: the static half of a sampler, part of a compiled round's key.

    `candidates`: how many of the most likely tokens are kept before anything is drawn (0: the whole vocabulary, not
    sorted). `logprobs`: how many are reported beside the one given (-1: nothing is reported).
    """

    vocab_size: int
    candidates: int
    distribution: bool
    min_p: bool
    edited: bool
    penalised: bool
    constrained: bool
    logprobs: int


@dataclass(frozen=True)
class Proposal:
    """The law that drafts were drawn from: probs (R, K, C) of the tokens ids (R, K, C), or of the whole vocabulary."""

    ids: mx.array | None
    probs: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        """[probs] or [probs, ids], for a compiled function."""
        return [self.probs] if self.ids is None else [self.probs, self.ids]

    @staticmethod
    def of_arrays(arrays: Sequence[mx.array]) -> Proposal | None:
        """The reverse of `arrays`; None for none."""
        return Proposal(arrays[1] if len(arrays) > 1 else None, arrays[0]) if arrays else None

    @staticmethod
    def of_rows(rows: Sequence[Proposal | None], depth: int, vocab_size: int) -> Proposal:
        """One proposal of `depth` steps from rows' own (R = 1 each), which may know different candidates."""
        known = [r for r in rows if r is not None]
        dense = any(r.ids is None for r in known)
        size = vocab_size if dense else max(r.probs.shape[-1] for r in known)
        ids, probs = [], []
        for row in rows:
            law = mx.zeros((1, 0, size)) if row is None else (row.spread(vocab_size) if dense else row.probs)
            pads = [(0, 0), (0, depth - law.shape[1]), (0, size - law.shape[2])]
            probs.append(mx.pad(law, pads))
            if not dense:
                names = mx.zeros((1, 0, size), mx.int32) if row is None or row.ids is None else row.ids
                ids.append(mx.pad(names, [(0, 0), (0, depth - names.shape[1]), (0, size - names.shape[2])]))
        return Proposal(mx.concatenate(ids) if ids else None, mx.concatenate(probs))

    def resized(self, depth: int) -> Proposal:
        """The first `depth` steps, or more of them, which no draft was drawn from."""
        more = [(0, 0), (0, max(0, depth - self.probs.shape[1])), (0, 0)]
        ids = None if self.ids is None else mx.pad(self.ids[:, :depth], more)
        return Proposal(ids, mx.pad(self.probs[:, :depth], more))

    def spread(self, vocab_size: int) -> mx.array:
        """The probabilities over the whole vocabulary, (R, K, V). Ids that fill up a row have probability 0."""
        if self.ids is None:
            return self.probs
        rows, depth, _ = self.ids.shape
        at = mx.arange(rows)[:, None, None], mx.arange(depth)[None, :, None], self.ids
        return mx.zeros((rows, depth, vocab_size)).at[at].add(self.probs)


@dataclass(frozen=True)
class History:
    """One row's parameters and what it has seen: its prompt and the tokens it was given so far."""

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    stop_ids: frozenset[int]
    choice: int = 0


_ARRAYS = ("temperature", "top_k", "top_p", "min_p", "seed", "exact", "key")
_EDITS = ("bias", "held_back", "min_tokens", "given")
_PENALTIES = ("penalties", "in_prompt", "counts")


def array_names(layout: SamplerLayout) -> tuple[str, ...]:
    """Names of a sampler's arrays, in their order."""
    return _ARRAYS + (_EDITS if layout.edited else ()) + (_PENALTIES if layout.penalised else ())


class Constraint(Protocol):
    """Which tokens may come next, step by step, for one output. Lives on the host; made anew for every request.

    Both methods raise `request.ConstraintError` where the output can't go on.
    """

    def masks(self, drafts: Sequence[int]) -> npt.NDArray[np.uint32]:
        """Tokens allowed before each of `drafts` and behind the last: (len(drafts) + 1, ceil(vocab / 32)).

        Token t is bit t % 32 of word t // 32.
        Where a draft is itself forbidden, what is said of the positions behind it doesn't matter. Raises
        ConstraintError when no token could follow.
        """

    def advance(self, tokens: Sequence[int]) -> None:
        """Note the tokens that the output was given. Raises ConstraintError at one that was not allowed."""


class Rows:
    """The arrays of a sampler by name, inside a pure function."""

    temperature: mx.array
    top_k: mx.array
    top_p: mx.array
    min_p: mx.array
    seed: mx.array
    exact: mx.array
    key: mx.array
    bias: mx.array
    held_back: mx.array
    min_tokens: mx.array
    given: mx.array
    penalties: mx.array
    in_prompt: mx.array
    counts: mx.array

    def __init__(self, layout: SamplerLayout, arrays: Sequence[mx.array], masks: mx.array | None = None) -> None:
        """`masks` (R, L, ceil(V / 32)), uint32: the tokens that constraints allow at each position, as bits."""
        self.layout = layout
        self._masks = masks
        self._names = array_names(layout)
        for name, array in zip(self._names, arrays, strict=True):
            self.__dict__[name] = array

    def flat(self) -> list[mx.array]:
        """The arrays in the order in which they came."""
        return [self.__dict__[name] for name in self._names]

    def next_key(self) -> mx.array:
        """A fresh key for random numbers; each is used once."""
        self.key, key = mx.random.split(self.key)
        return key

    def edit(self, logits: mx.array, chain: mx.array, ids: mx.array | None = None) -> mx.array:
        """Logits (R, L, C) after bias, penalties and held-back tokens, where chain (R, L - 1) leads to each.

        ids (R, L, C) name the tokens scored (None: all). `counts` and `given` hold what a row was given before.
        """
        logits = logits.astype(mx.float32)
        if not self.layout.edited:
            return logits
        length = logits.shape[1]
        logits = logits + self._at(self.bias, ids)
        if self.layout.penalised:
            counts = self._at(self.counts, ids) + _occurrences(chain, ids, logits.shape)
            seen = self._at(self.in_prompt, ids) | (counts > 0)
            repetition, presence, frequency = (self.penalties[:, i, None, None] for i in range(3))
            weaker = mx.where(logits > 0, logits / repetition, logits * repetition)
            logits = mx.where(seen, weaker, logits)
            logits = logits - presence * (counts > 0) - frequency * counts
        early = self.given[:, None] + mx.arange(length)[None] < self.min_tokens[:, None]
        return mx.where(early[:, :, None] & self._at(self.held_back, ids), _NEVER, logits)

    def filtered(self, logits: mx.array, ids: mx.array | None = None) -> tuple[mx.array, mx.array | None]:
        """Log-weights (R, L, C) of the tokens that may be drawn, impossible ones at -1e30, and their ids.

        Order: temperature, top-k, top-p over what top-k left, min-p. Rows at temperature 0 keep their order.
        """
        warm = self.temperature > 0
        x = logits / mx.where(warm, self.temperature, 1.0)[:, None, None]
        count = min(self.layout.candidates, x.shape[-1])
        if count:
            best = mx.argpartition(-x, count - 1, axis=-1)[..., :count] if count < x.shape[-1] else None
            if best is not None:
                x = mx.take_along_axis(x, best, axis=-1)
            order = mx.argsort(-x, axis=-1)
            x = mx.take_along_axis(x, order, axis=-1)
            best = order if best is None else mx.take_along_axis(best, order, axis=-1)
            ids = best.astype(mx.int32) if ids is None else mx.take_along_axis(ids, best, axis=-1)
            size = mx.where(self.top_k > 0, self.top_k, count)[:, None, None]
            x = mx.where(mx.arange(count) < size, x, _NEVER)
            probs = mx.softmax(x, axis=-1, precise=True)
            before = mx.cumsum(probs, axis=-1) - probs
            x = mx.where(before < self.top_p[:, None, None], x, _NEVER)
        if self.layout.min_p:
            least = x.max(axis=-1, keepdims=True) + mx.log(mx.maximum(self.min_p, 1e-30))[:, None, None]
            x = mx.where(x >= least, x, _NEVER)
        return x, ids

    def noise(self, positions: mx.array, ids: mx.array | None, size: int) -> mx.array:
        """Gumbel noise (R, L, C) of exact rows for tokens ids (R, L, C) at positions (R, L); 0 for greedy rows."""
        token = mx.arange(size, dtype=mx.uint32)[None, None] if ids is None else ids.astype(mx.uint32)
        state = _mix(self.seed[:, 0][:, None] ^ _mix(positions.astype(mx.uint32) + self.seed[:, 1][:, None]))
        bits = _mix(_mix(state[:, :, None] + token * mx.array(0x9E3779B1, mx.uint32)) ^ state[:, :, None])
        gumbel = _gumbel(bits)
        return mx.where((self.exact & (self.temperature > 0))[:, None, None], gumbel, 0.0)

    def draw(self, log_weights: mx.array) -> mx.array:
        """Places (R, L) drawn with probabilities proportional to exp(log_weights (R, L, C)), afresh."""
        gumbel = mx.random.gumbel(log_weights.shape, key=self.next_key())
        return mx.argmax(log_weights + gumbel, axis=-1)

    def propose(
        self, scores: mx.array, ids: mx.array | None, chain: mx.array, position: mx.array
    ) -> tuple[mx.array, mx.array | None, mx.array]:
        """One draft (R,) from a drafter's scores (R, C), and the law it was drawn from, as `Proposal` has it.

        `chain` (R, j) are the drafts so far, `position` (R,) is the one that this draft would take.
        """
        steps = chain.shape[1]
        padded = (
            mx.broadcast_to(scores[:, None], (scores.shape[0], steps + 1, scores.shape[1]))
            if steps
            else scores[:, None]
        )
        spread = None if ids is None else mx.broadcast_to(ids[:, None], padded.shape)
        edited = self.edit(padded, chain, spread)[:, -1:]
        x, kept = self.filtered(edited, None if ids is None else ids[:, None])
        place = mx.argmax(x + self.noise(position[:, None], kept, x.shape[-1]), axis=-1)
        if self.layout.distribution:
            place = mx.where(self.exact[:, None], place, self.draw(x))
        token = place if kept is None else mx.take_along_axis(kept, place[..., None], axis=-1)[..., 0]
        return token[:, 0].astype(mx.int32), kept, mx.softmax(x, axis=-1, precise=True)

    def accept(
        self, logits: mx.array, drafts: mx.array, offered: mx.array, proposal: Proposal | None, positions: mx.array
    ) -> tuple[mx.array, mx.array]:
        """As `accept_greedy`, for rows of any parameters. positions (R, K + 1) are those of the tokens chosen.

        Every replacement and the bonus token are drawn here, at all positions: nothing depends on a fetched value.
        """
        depth = drafts.shape[1]
        edited = self.edit(logits, drafts)
        if self._masks is not None:
            edited = mx.where(unpacked(self._masks, logits.shape[-1]), edited, _NEVER)
        x, ids = self.filtered(edited)
        place = mx.argmax(x + self.noise(positions, ids, x.shape[-1]), axis=-1)
        chosen = _named(place, ids)
        accepted = _prefix(chosen[:, :depth] == drafts, offered)
        if self.layout.distribution:
            tokens, kept = self._reject(x, ids, drafts, offered, proposal)
            exact = self.exact[:, None]
            chosen, accepted = mx.where(exact, chosen, tokens), mx.where(self.exact, accepted, kept)
        self._remember(chosen, accepted)
        return chosen, accepted

    def _reject(
        self, x: mx.array, ids: mx.array | None, drafts: mx.array, offered: mx.array, proposal: Proposal | None
    ) -> tuple[mx.array, mx.array]:
        """Rejection sampling: (tokens (R, K + 1), accepted (R,)) for log-weights x (R, K + 1, C)."""
        depth = drafts.shape[1]
        p = mx.softmax(x, axis=-1, precise=True)
        if depth == 0 or proposal is None:
            return _named(self.draw(x), ids), mx.zeros_like(offered)
        hit = (mx.arange(p.shape[-1]) if ids is None else ids[:, :depth]) == drafts[:, :, None]
        p_draft = mx.where(hit, p[:, :depth], 0.0).sum(axis=-1)
        q = proposal.spread(self.layout.vocab_size)
        q_draft = mx.take_along_axis(q, drafts[:, :, None], axis=-1)[..., 0]
        uniform = mx.random.uniform(shape=drafts.shape, key=self.next_key())
        accepted = _prefix(uniform * q_draft < p_draft, offered)
        q_here = q if ids is None else mx.take_along_axis(q, ids[:, :depth], axis=-1)
        # Behind the last draft offered there was no proposal to correct for: the residual is p itself.
        was_offered = (mx.arange(depth)[None] < offered[:, None])[:, :, None]
        residual = self.residual(p[:, :depth], mx.where(was_offered, q_here, 0.0))
        weights = mx.concatenate([residual, p[:, depth:]], axis=1)
        # Where rounding leaves nothing of the residual, p equals q and a rejection can't happen but by rounding.
        weights = mx.where(weights.sum(axis=-1, keepdims=True) > 0, weights, p)
        replaced = _named(self.draw(mx.where(weights > 0, mx.log(mx.maximum(weights, 1e-38)), _NEVER)), ids)
        taken = mx.arange(depth + 1)[None] < accepted[:, None]
        return mx.where(taken, mx.pad(drafts, [(0, 0), (0, 1)]), replaced), accepted

    def residual(self, p: mx.array, q: mx.array) -> mx.array:
        """Weights of what replaces a rejected draft: the part of p that q doesn't cover."""
        return mx.maximum(p - q, 0.0)

    def _remember(self, chosen: mx.array, accepted: mx.array) -> None:
        """Note the tokens given out: chosen[:, : accepted + 1]."""
        if not self.layout.edited:
            return
        self.given = self.given + accepted + 1
        if self.layout.penalised:
            new = mx.arange(chosen.shape[1])[None] <= accepted[:, None]
            rows = mx.broadcast_to(mx.arange(chosen.shape[0])[:, None], chosen.shape)
            self.counts = self.counts.at[rows, chosen].add(new.astype(mx.float32))

    def _at(self, table: mx.array, ids: mx.array | None) -> mx.array:
        """Entries of a per-row table (R, V) for ids (R, L, C): (R, L, C), or (R, 1, V) for the whole vocabulary."""
        return table[:, None] if ids is None else mx.take_along_axis(table[:, None], ids, axis=-1)


def _occurrences(chain: mx.array, ids: mx.array | None, shape: tuple[int, ...]) -> mx.array:
    """How often each token scored occurs in the chain before position l: (R, L, C) for chain (R, L - 1)."""
    rows, length, size = shape
    if length == 1:
        return mx.zeros((rows, 1, size))
    scored = mx.arange(size)[None, None] if ids is None else ids[:, :1]
    each = (chain[:, :, None] == scored).astype(mx.float32)
    return mx.concatenate([mx.zeros((rows, 1, size)), mx.cumsum(each, axis=1)], axis=1)


def _named(place: mx.array, ids: mx.array | None) -> mx.array:
    """Token ids of places (R, L) among candidates ids (R, L, C)."""
    return (place if ids is None else mx.take_along_axis(ids, place[..., None], axis=-1)[..., 0]).astype(mx.int32)


def _mix(x: mx.array) -> mx.array:
    """A bijective hash of 32 bits (the constants are C. Wellons' "lowbias32")."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return x ^ (x >> 16)


def _gumbel(bits: mx.array) -> mx.array:
    """Gumbel noise from the upper 24 of 32 random bits: -log(-log(u)), u strictly between 0 and 1."""
    uniform = ((bits >> 8).astype(mx.float32) + 0.5) * (1.0 / (1 << 24))
    return -mx.log(-mx.log(uniform))


class Sampler:
    """The sampling state of a batch between rounds. `layout` None: all rows are greedy and unedited.

    Rebuilt from the rows' histories whenever rows come, go or move; a round takes and gives back `arrays`.
    """

    def __init__(self, rows: Sequence[History | None], vocab_size: int, key: mx.array) -> None:
        params = [SamplingParams() if r is None else r.params for r in rows]
        self.arrays: list[mx.array] = []
        self.layout: SamplerLayout | None = None
        if all(p.greedy for p in params):
            return
        sampled = [p for p in params if p.temperature > 0]
        penalised = any(p.penalties != (1.0, 0.0, 0.0) for p in params)
        self.layout = SamplerLayout(
            vocab_size=vocab_size,
            candidates=_candidates(sampled, vocab_size),
            distribution=any(p.contract == "distribution" for p in params),
            min_p=any(p.min_p > 0 for p in sampled),
            edited=penalised or any(p.logit_bias or p.suppress_tokens or p.min_tokens for p in params),
            penalised=penalised,
            constrained=any(p.constraint is not None for p in params),
            logprobs=max(-1 if p.logprobs is None else p.logprobs for p in params),
        )
        seeds = [_seed_words(p, r.choice if r else 0) for p, r in zip(params, rows, strict=True)]
        values: dict[str, mx.array] = {
            "temperature": mx.array([_single(p.temperature) for p in params], mx.float32),
            "top_k": mx.array([min(p.top_k, vocab_size) for p in params], mx.int32),
            "top_p": mx.array([_single(p.top_p) for p in params], mx.float32),
            "min_p": mx.array([p.min_p for p in params], mx.float32),
            "seed": mx.array(seeds, mx.uint32),
            "exact": mx.array([p.contract == "exact" for p in params]),
            "key": key,
        }
        if self.layout.edited:
            values |= _edit_arrays(rows, params, vocab_size)
        if penalised:
            values |= _penalty_arrays(rows, params, vocab_size)
        self.arrays = [values[name] for name in array_names(self.layout)]


def unpacked(masks: mx.array, vocab_size: int) -> mx.array:
    """Bits (..., ceil(V / 32)) as booleans (..., V)."""
    token = mx.arange(vocab_size, dtype=mx.uint32)
    return ((masks[..., token >> 5] >> (token & 31)) & 1) > 0


def logprobs(logits: mx.array, chosen: mx.array, count: int) -> list[mx.array]:
    """Log-probabilities (R, L, 1 + count) of chosen (R, L) and of the `count` likeliest tokens, and those tokens."""
    x = logits.astype(mx.float32)
    x = x - mx.logsumexp(x, axis=-1, keepdims=True)
    own = mx.take_along_axis(x, chosen[..., None], axis=-1)
    if count == 0:
        return [own, mx.zeros((*chosen.shape, 0), mx.int32)]
    best = mx.argpartition(-x, count - 1, axis=-1)[..., :count]
    values = mx.take_along_axis(x, best, axis=-1)
    order = mx.argsort(-values, axis=-1)
    values, best = mx.take_along_axis(values, order, axis=-1), mx.take_along_axis(best, order, axis=-1)
    return [mx.concatenate([own, values], axis=-1), best.astype(mx.int32)]


def _candidates(sampled: Sequence[SamplingParams], vocab_size: int) -> int:
    """How many of the most likely tokens must be kept: few sizes, so that compiled rounds are reused."""
    if all(p.top_k == 0 and p.top_p == 1 for p in sampled):
        return 0
    if any(p.top_k == 0 for p in sampled):
        return vocab_size
    largest = max(p.top_k for p in sampled)
    return min(vocab_size, max(8, 1 << (largest - 1).bit_length()))


def _single(value: float) -> float:
    """A value that single precision doesn't round to 0 or infinity, nor what is divided by it."""
    return min(max(value, 1e-30), 1e30) if value > 0 else value


def _seed_words(params: SamplingParams, choice: int) -> list[int]:
    seed = params.seed or 0
    return [seed & 0xFFFFFFFF, ((seed >> 32) ^ (choice * 0x9E3779B9)) & 0xFFFFFFFF]


def _table(rows: Sequence[dict[int, float]], vocab_size: int) -> mx.array:
    """A dense (R, V) table from sparse rows."""
    table = mx.zeros((len(rows), vocab_size))
    places = [(r, token, value) for r, row in enumerate(rows) for token, value in row.items()]
    if places:
        at = mx.array([p[0] for p in places]), mx.array([p[1] for p in places])
        table = table.at[at].add(mx.array([p[2] for p in places], mx.float32))
    return table


def _edit_arrays(
    rows: Sequence[History | None], params: Sequence[SamplingParams], vocab_size: int
) -> dict[str, mx.array]:
    bias = [dict(p.logit_bias) | dict.fromkeys(p.suppress_tokens, _NEVER) for p in params]
    # A checkpoint may name ends of outputs that its vocabulary hasn't got.
    held = [{t: 1.0 for t in r.stop_ids if 0 <= t < vocab_size} if r else {} for r in rows]
    return {
        "bias": _table(bias, vocab_size),
        "held_back": _table(held, vocab_size) > 0,
        "min_tokens": mx.array([min(p.min_tokens, _ENDLESS) for p in params], mx.int32),
        "given": mx.array([len(r.output) if r else 0 for r in rows], mx.int32),
    }


def _penalty_arrays(
    rows: Sequence[History | None], params: Sequence[SamplingParams], vocab_size: int
) -> dict[str, mx.array]:
    counts: list[dict[int, float]] = []
    for row in rows:
        counts.append({})
        for token in row.output if row else ():
            counts[-1][token] = counts[-1].get(token, 0.0) + 1.0
    return {
        "penalties": mx.array([(_single(p.repetition_penalty), *p.penalties[1:]) for p in params], mx.float32),
        "in_prompt": _table([dict.fromkeys(r.prompt, 1.0) if r else {} for r in rows], vocab_size) > 0,
        "counts": _table(counts, vocab_size),
    }
