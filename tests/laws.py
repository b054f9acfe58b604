"""Chi-square tests of sampling: an independent computation of the law, and blocks of many rows to hold against it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_gemma_mtp import SamplingParams
from mlx_gemma_mtp.sampling import History, Proposal, Rows, Sampler

Array = npt.NDArray[np.float64]
DRAWS = 50_000


def chi_square(counts: Array, law: Array) -> tuple[float, int]:
    """The statistic and its degrees of freedom, rare outcomes pooled."""
    expected = law * counts.sum()
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    if expected[-1] < 1e-9:
        assert observed[-1] == 0, "an impossible token was drawn"
        observed, expected = observed[:-1], expected[:-1]
    statistic = float(((observed - expected) ** 2 / np.maximum(expected, 1e-12)).sum())
    return statistic, max(len(expected) - 1, 1)


def likelihood(statistic: float, freedom: int) -> float:
    """The probability of a statistic as large as this by chance (Wilson and Hilferty's approximation)."""
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def p_value(counts: Array, law: Array) -> float:
    """Chi-square p-value of counts (V,) under a law (V,)."""
    return likelihood(*chi_square(counts, law))


def law_of(
    logits: Array,
    params: SamplingParams,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    allowed: npt.NDArray[np.bool_] | None = None,
) -> Array:
    """The probabilities that the parameters make of logits (V,), computed one token at a time."""
    x = logits.astype(np.float64).copy()
    for token, value in params.logit_bias.items():
        x[token] += value
    for token in range(len(x)):
        count = list(output).count(token)
        if count or token in prompt:
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        x[token] -= params.presence_penalty * (count > 0) + params.frequency_penalty * count
    for token in params.suppress_tokens:
        x[token] = -np.inf
    if allowed is not None:
        x[~allowed] = -np.inf
    if params.temperature == 0:
        return np.asarray(np.arange(len(x)) == x.argmax(), np.float64)
    x = x / params.temperature
    order = np.argsort(-x, kind="stable")
    kept = order[: params.top_k] if params.top_k else order
    probs = np.exp(x[kept] - x[kept].max())
    probs /= probs.sum()
    before = np.cumsum(probs) - probs
    kept = kept[before < params.top_p]
    kept = kept[x[kept] >= x[kept].max() + np.log(max(params.min_p, 1e-300))]
    law = np.zeros(len(x))
    law[kept] = np.exp(x[kept] - x[kept].max())
    return np.asarray(law / law.sum())


def sampler_of(params: Sequence[SamplingParams], vocab: int, *, prompt: Sequence[int] = (), seed: int = 0) -> Sampler:
    rows = [History(p, prompt, [], frozenset()) for p in params]
    return Sampler(rows, vocab, mx.random.key(seed))


@dataclass(frozen=True)
class EarlyStop:
    """A chain ends behind its first draft of a probability below `least`. That draft is verified unless `drops_it`."""

    least: float
    drops_it: bool = False

    def offered(self, q: mx.array, drafts: mx.array) -> mx.array:
        """How many of drafts (R, K), drawn from q (R, K, V), are verified: (R,)."""
        confident = mx.take_along_axis(q, drafts[..., None], axis=-1)[..., 0] >= self.least
        run = mx.cumprod(confident.astype(mx.int32), axis=1).sum(axis=1)
        return run if self.drops_it else mx.minimum(run + 1, drafts.shape[1])


def packed(allowed: mx.array) -> mx.array:
    """Booleans (R, L, V) as bits, in the words that a round takes."""
    bits = np.packbits(np.array(allowed), axis=-1, bitorder="little")
    bits = np.pad(bits, [(0, 0), (0, 0), (0, -bits.shape[-1] % 4)])
    return mx.array(bits.view(np.uint32))


class Chain:
    """Drafts and verifies for many rows at once; scores depend on the position alone, so every law is known."""

    def __init__(
        self,
        params: Sequence[SamplingParams],
        p: Array,
        q: Array,
        *,
        prompt: Sequence[int] = (),
        ids: Array | None = None,
        rows_type: type[Rows] = Rows,
        offered: Sequence[int] | None = None,
        stop: EarlyStop | None = None,
        allowed: Callable[[mx.array], mx.array] | None = None,
    ) -> None:
        """p (K + 1, V): the target's logits; q (K, C): the drafter's, for tokens ids (K, C) or all.

        allowed(drafts (R, K)) -> (R, K + 1, V): the tokens that a grammar allows at each position.
        """
        depth, vocab = q.shape[0], p.shape[1]
        constrained = [replace(x, constraint="a grammar") for x in params] if allowed else params
        sampler = sampler_of(constrained, vocab, prompt=prompt)
        assert sampler.layout is not None
        rows = rows_type(sampler.layout, sampler.arrays)
        count = len(params)
        chain = mx.zeros((count, 0), mx.int32)
        kept, laws = [], []
        for step in range(depth):
            scores = mx.broadcast_to(mx.array(q[step], mx.float32), (count, q.shape[1]))
            named = None if ids is None else mx.broadcast_to(mx.array(ids[step], mx.int32), scores.shape)
            token, k, law = rows.propose(scores, named, chain, mx.full((count,), 10 + step, mx.int32))
            chain = mx.concatenate([chain, token[:, None]], axis=1)
            kept.append(k)
            laws.append(law)
        names = None if kept[0] is None else mx.concatenate([k for k in kept if k is not None], axis=1)
        logits = mx.broadcast_to(mx.array(p, mx.float32), (count, *p.shape))
        positions = mx.broadcast_to(10 + mx.arange(depth + 1)[None], (count, depth + 1))
        counts = mx.array([depth] * count if offered is None else list(offered), mx.int32)
        proposal = Proposal(names, mx.concatenate(laws, axis=1))
        if stop is not None:
            counts = mx.minimum(counts, stop.offered(proposal.spread(vocab), chain))
        if allowed is not None:
            rows = rows_type(sampler.layout, rows.flat(), packed(allowed(chain)))
        tokens, accepted = rows.accept(logits, chain, counts, proposal, positions)
        self.tokens, self.accepted, self.drafts = np.array(tokens), np.array(accepted), np.array(chain)
        self.offered = np.array(counts)

    def p_values(self, rows: slice, laws: Sequence[Array]) -> list[float]:
        """Of the token at each position, in the rows that got there, as long as they are 300 or more."""
        values = []
        for position, law in enumerate(laws):
            reached = self.accepted[rows] >= position
            drawn = self.tokens[rows][reached, position]
            if len(drawn) < 300:
                break
            values.append(p_value(np.bincount(drawn, minlength=len(law)).astype(np.float64), law))
        return values

    def conditional_p_values(self, rows: slice, law: Callable[[int, list[int]], Array]) -> list[float]:
        """Of the token at each position, given the tokens before it: law(position, those tokens) -> (V,).

        One value per position, of all the groups of 300 rows or more that share what is before it.
        """
        tokens, accepted, values = self.tokens[rows], self.accepted[rows], []
        for position in range(tokens.shape[1]):
            reached = tokens[accepted >= position, : position + 1]
            statistic, freedom = 0.0, 0
            codes = reached[:, :position] @ 1000 ** np.arange(position)
            for code in np.unique(codes):
                drawn = reached[codes == code, position]
                if len(drawn) >= 300:
                    expected = law(position, [int(code) // 1000**i % 1000 for i in range(position)])
                    one = chi_square(np.bincount(drawn, minlength=len(expected)).astype(np.float64), expected)
                    statistic, freedom = statistic + one[0], freedom + one[1]
            if freedom:
                values.append(likelihood(statistic, freedom))
        return values


def random_logits(seed: int, positions: int, vocab: int, spread: float) -> Array:
    return np.random.RandomState(seed).normal(0, spread, (positions, vocab))


MIXED = (
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.4, top_p=0.8),
    SamplingParams(temperature=1.0, top_k=9, top_p=0.9, min_p=0.05),
    SamplingParams(temperature=0.9, logit_bias={1: 2.0, 3: -4.0}, suppress_tokens=(2,)),
)


class WrongResidual(Rows):
    """Replaces a rejected draft by a draw from the target's whole law."""

    def residual(self, p: mx.array, q: mx.array) -> mx.array:
        return p
