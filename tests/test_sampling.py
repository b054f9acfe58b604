"""The laws of sampling: chi-square against an independent computation, in batches of mixed parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from mlx_gemma_mtp import SamplingParams
from mlx_gemma_mtp.sampling import History, Proposal, Rows, Sampler, SamplerLayout, accept_greedy, greedy_choice

Array = npt.NDArray[np.float64]
DRAWS = 60_000


def _p_value(counts: Array, law: Array) -> float:
    """Chi-square p-value (Wilson and Hilferty's approximation), rare outcomes pooled."""
    expected = law * counts.sum()
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    if expected[-1] < 1e-9:
        assert observed[-1] == 0, "an impossible token was drawn"
        observed, expected = observed[:-1], expected[:-1]
    freedom = max(len(expected) - 1, 1)
    statistic = float(((observed - expected) ** 2 / np.maximum(expected, 1e-12)).sum())
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def _law(logits: Array, params: SamplingParams, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> Array:
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


def _sampler(params: Sequence[SamplingParams], vocab: int, *, prompt: Sequence[int] = (), seed: int = 0) -> Sampler:
    rows = [History(p, prompt, [], frozenset()) for p in params]
    return Sampler(rows, vocab, mx.random.key(seed))


class _Chain:
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
    ) -> None:
        """p (K + 1, V): the target's logits; q (K, C): the drafter's, for tokens ids (K, C) or all."""
        depth, vocab = q.shape[0], p.shape[1]
        sampler = _sampler(params, vocab, prompt=prompt)
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
        tokens, accepted = rows.accept(logits, chain, counts, proposal, positions)
        self.tokens, self.accepted, self.drafts = np.array(tokens), np.array(accepted), np.array(chain)

    def p_values(self, rows: slice, laws: Sequence[Array]) -> list[float]:
        """Of the token at each position, in the rows that got there, as long as they are 300 or more."""
        values = []
        for position, law in enumerate(laws):
            reached = self.accepted[rows] >= position
            drawn = self.tokens[rows][reached, position]
            if len(drawn) < 300:
                break
            values.append(_p_value(np.bincount(drawn, minlength=len(law)).astype(np.float64), law))
        return values


def _logits(seed: int, positions: int, vocab: int, spread: float) -> Array:
    return np.random.RandomState(seed).normal(0, spread, (positions, vocab))


MIXED = (
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.7, top_k=5),
    SamplingParams(temperature=1.4, top_p=0.8),
    SamplingParams(temperature=1.0, top_k=9, top_p=0.9, min_p=0.05),
    SamplingParams(temperature=0.9, logit_bias={1: 2.0, 3: -4.0}, suppress_tokens=(2,)),
)


@pytest.mark.parametrize("vocab", [8, 24, 64])
@pytest.mark.parametrize("candidates", [False, True])
def test_the_target_law_holds_at_every_position_with_drafts_from_another_law(vocab: int, candidates: bool) -> None:
    p = _logits(1, 4, vocab, 1.2)
    q, ids = p[:3] + _logits(2, 3, vocab, 1.0), None
    if candidates:
        picked = np.random.RandomState(3)
        ids = np.stack([picked.permutation(vocab)[: vocab // 2] for _ in range(3)]).astype(np.float64)
        q = np.take_along_axis(q, ids.astype(np.int64), axis=1)
    each = DRAWS // len(MIXED)
    chain = _Chain([p_ for p_ in MIXED for _ in range(each)], p, q, ids=ids)
    tested = 0
    for i, params in enumerate(MIXED):
        laws = [_law(p[position], params) for position in range(3)]
        for position, value in enumerate(chain.p_values(slice(i * each, (i + 1) * each), laws)):
            assert value > 1e-4, f"{params} at position {position}"
            tested += 1
    assert tested >= 11, "too few rows got to the later positions"


def test_the_bonus_token_and_rows_with_fewer_drafts_follow_the_law() -> None:
    p = _logits(4, 4, 10, 1.0)
    q = p[:3] + _logits(5, 3, 10, 0.3)
    params = SamplingParams(temperature=1.0)
    offered = [i % 4 for i in range(DRAWS)]
    chain = _Chain([params] * DRAWS, p, q, offered=offered)
    assert (chain.accepted <= np.array(offered)).all()
    for fewest in range(4):
        rows = np.array(offered) == fewest
        full = chain.accepted[rows] == fewest
        drawn = chain.tokens[rows][full, fewest]
        assert len(drawn) > 3000
        assert _p_value(np.bincount(drawn, minlength=10).astype(np.float64), _law(p[fewest], params)) > 1e-4


def test_penalties_count_the_draft_chain() -> None:
    vocab, prompt = 8, (1, 2)
    params = SamplingParams(
        temperature=1.0, repetition_penalty=1.8, presence_penalty=0.7, frequency_penalty=0.9, top_k=6
    )
    p, q = _logits(6, 3, vocab, 1.0), _logits(7, 2, vocab, 1.0)
    chain = _Chain([params] * DRAWS, p, q, prompt=prompt)
    first = np.bincount(chain.tokens[:, 0], minlength=vocab).astype(np.float64)
    assert _p_value(first, _law(p[0], params, prompt)) > 1e-4
    for token in range(vocab):
        after = (chain.accepted >= 1) & (chain.tokens[:, 0] == token)
        if after.sum() > 1000:
            second = np.bincount(chain.tokens[after, 1], minlength=vocab).astype(np.float64)
            assert _p_value(second, _law(p[1], params, prompt, [token])) > 1e-4


class _WrongResidual(Rows):
    def residual(self, p: mx.array, q: mx.array) -> mx.array:
        return p


def test_a_wrong_residual_is_noticed() -> None:
    p, q = _logits(1, 4, 8, 1.5), _logits(2, 3, 8, 1.5)
    params = SamplingParams(temperature=1.0)
    laws = [_law(p[i], params) for i in range(3)]
    right = _Chain([params] * DRAWS, p, q)
    wrong = _Chain([params] * DRAWS, p, q, rows_type=_WrongResidual)
    assert min(right.p_values(slice(None), laws)) > 1e-4
    assert min(wrong.p_values(slice(None), laws)) < 1e-9


def test_every_draft_is_kept_where_both_laws_are_one() -> None:
    p = _logits(8, 4, 12, 1.0)
    chain = _Chain([SamplingParams(temperature=0.8, top_k=7)] * 2000, p, p[:3])
    assert (chain.accepted == 3).mean() > 0.999


def test_seeded_rows_draw_the_same_tokens_alone_and_in_any_batch() -> None:
    p, q = _logits(9, 4, 32, 1.0), _logits(10, 3, 32, 1.0)
    seeded = [
        SamplingParams(temperature=t, top_k=k, top_p=top, seed=s)
        for s, (t, k, top) in enumerate([(0.3, 0, 1.0), (0.8, 5, 1.0), (1.0, 0, 0.9), (1.5, 20, 0.95)])
    ]
    crowd = [*seeded, *MIXED, SamplingParams()]
    together = _Chain(crowd, p, q)
    for row, params in enumerate(seeded):
        alone = _Chain([params], p, q)
        plain = _Chain([params], p, q, offered=[0])
        assert (alone.tokens == together.tokens[row]).all()
        assert alone.accepted[0] == together.accepted[row]
        assert (alone.tokens[0] == plain.tokens[0]).all()
    assert (together.tokens[-1] == p.argmax(axis=1)).all()


def test_seeded_noise_follows_the_law_over_seeds_and_positions() -> None:
    p = _logits(11, 1, 16, 1.2)
    params = [SamplingParams(temperature=1.0, top_k=10, seed=s) for s in range(DRAWS)]
    chain = _Chain(params, np.repeat(p, 2, axis=0), p)
    laws = [_law(p[0], SamplingParams(temperature=1.0, top_k=10))]
    assert min(chain.p_values(slice(None), laws)) > 1e-4
    pairs = chain.tokens[:, 0] * 16 + chain.tokens[:, 1]
    joint = np.outer(laws[0], laws[0]).reshape(-1)
    assert _p_value(np.bincount(pairs, minlength=256).astype(np.float64), joint) > 1e-4


def test_shared_noise_accepts_more_than_independent_draws_would() -> None:
    p = _logits(12, 2, 16, 1.0)
    q = p[:1] + _logits(13, 1, 16, 0.5)
    chain = _Chain([SamplingParams(temperature=1.0, seed=s) for s in range(5000)], p, q)
    a, b = _law(p[0], SamplingParams(temperature=1.0)), _law(q[0], SamplingParams(temperature=1.0))
    assert (chain.accepted >= 1).mean() > 1.5 * (a * b).sum()


def test_min_tokens_holds_stop_ids_back_in_the_middle_of_a_block() -> None:
    vocab, stop = 6, 3
    params = SamplingParams(temperature=1.0, min_tokens=3, seed=1)
    sampler = Sampler([History(params, [0], [1], frozenset([stop]))], vocab, mx.random.key(0))
    assert sampler.layout is not None
    rows = Rows(sampler.layout, sampler.arrays)
    logits = mx.zeros((1, 4, vocab)).at[:, :, stop].add(50.0)
    drafts = mx.array([[0, 0, 0]], mx.int32)
    best = np.array(mx.argmax(rows.edit(logits, drafts), axis=-1))[0].tolist()
    assert best[2:] == [stop, stop]
    assert stop not in best[:2]


def test_greedy_rows_without_edits_need_no_sampler() -> None:
    assert _sampler([SamplingParams(), SamplingParams(top_k=5)], 10).layout is None
    layout = _sampler([SamplingParams(), SamplingParams(temperature=1, top_k=5)], 10).layout
    assert layout == SamplerLayout(
        vocab_size=10,
        candidates=8,
        distribution=True,
        min_p=False,
        edited=False,
        penalised=False,
        constrained=False,
        logprobs=-1,
    )


def test_greedy_acceptance_stops_at_the_first_difference_and_at_what_was_offered() -> None:
    logits = mx.zeros((3, 4, 5)).at[:, mx.arange(4), mx.array([1, 2, 3, 4])].add(1.0)
    drafts = mx.array([[1, 2, 3], [1, 0, 3], [1, 2, 3]], mx.int32)
    chosen, accepted = accept_greedy(logits, drafts, mx.array([3, 3, 1]))
    assert chosen.tolist() == [[1, 2, 3, 4]] * 3
    assert accepted.tolist() == [3, 1, 1]
    scores, ids = mx.array([[0.1, 0.9]]), mx.array([[7, 4]], mx.int32)
    assert greedy_choice(scores, ids).tolist() == [4]
    assert greedy_choice(scores, None).tolist() == [1]
