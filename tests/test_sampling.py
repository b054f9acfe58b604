"""The laws of sampling: chi-square against an independent computation, in batches of mixed parameters."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp import SamplingParams
from mlx_gemma_mtp.sampling import History, Rows, Sampler, SamplerLayout, accept_greedy, greedy_choice

from .laws import DRAWS, MIXED, Chain, WrongResidual, law_of, p_value, random_logits, sampler_of


@pytest.mark.parametrize("vocab", [8, 24, 64])
@pytest.mark.parametrize("candidates", [False, True])
def test_the_target_law_holds_at_every_position_with_drafts_from_another_law(vocab: int, candidates: bool) -> None:
    p = random_logits(1, 4, vocab, 1.2)
    q, ids = p[:3] + random_logits(2, 3, vocab, 1.0), None
    if candidates:
        picked = np.random.RandomState(3)
        ids = np.stack([picked.permutation(vocab)[: vocab // 2] for _ in range(3)]).astype(np.float64)
        q = np.take_along_axis(q, ids.astype(np.int64), axis=1)
    each = DRAWS if vocab == 8 else DRAWS // len(MIXED)
    chain = Chain([p_ for p_ in MIXED for _ in range(each)], p, q, ids=ids)
    tested = 0
    for i, params in enumerate(MIXED):
        laws = [law_of(p[position], params) for position in range(3)]
        for position, value in enumerate(chain.p_values(slice(i * each, (i + 1) * each), laws)):
            assert value > 1e-4, f"{params} at position {position}"
            tested += 1
    assert tested >= 11, "too few rows got to the later positions"


def test_the_bonus_token_and_rows_with_fewer_drafts_follow_the_law() -> None:
    p = random_logits(4, 4, 10, 1.0)
    q = p[:3] + random_logits(5, 3, 10, 0.3)
    params = SamplingParams(temperature=1.0)
    offered = [i % 4 for i in range(DRAWS)]
    chain = Chain([params] * DRAWS, p, q, offered=offered)
    assert (chain.accepted <= np.array(offered)).all()
    for fewest in range(4):
        rows = np.array(offered) == fewest
        full = chain.accepted[rows] == fewest
        drawn = chain.tokens[rows][full, fewest]
        assert len(drawn) > 3000
        assert p_value(np.bincount(drawn, minlength=10).astype(np.float64), law_of(p[fewest], params)) > 1e-4


def test_penalties_count_the_draft_chain() -> None:
    vocab, prompt = 8, (1, 2)
    params = SamplingParams(
        temperature=1.0, repetition_penalty=1.8, presence_penalty=0.7, frequency_penalty=0.9, top_k=6
    )
    p, q = random_logits(6, 3, vocab, 1.0), random_logits(7, 2, vocab, 1.0)
    chain = Chain([params] * DRAWS, p, q, prompt=prompt)
    values = chain.conditional_p_values(slice(None), lambda at, before: law_of(p[at], params, prompt, before))
    assert len(values) == 3
    assert min(values) > 1e-4


def test_a_wrong_residual_is_noticed() -> None:
    p, q = random_logits(1, 4, 8, 1.5), random_logits(2, 3, 8, 1.5)
    params = SamplingParams(temperature=1.0)
    laws = [law_of(p[i], params) for i in range(3)]
    right = Chain([params] * DRAWS, p, q)
    wrong = Chain([params] * DRAWS, p, q, rows_type=WrongResidual)
    assert min(right.p_values(slice(None), laws)) > 1e-4
    assert min(wrong.p_values(slice(None), laws)) < 1e-9


def test_every_draft_is_kept_where_both_laws_are_one() -> None:
    p = random_logits(8, 4, 12, 1.0)
    chain = Chain([SamplingParams(temperature=0.8, top_k=7)] * 2000, p, p[:3])
    assert (chain.accepted == 3).mean() > 0.999


def test_seeded_rows_draw_the_same_tokens_alone_and_in_any_batch() -> None:
    p, q = random_logits(9, 4, 32, 1.0), random_logits(10, 3, 32, 1.0)
    seeded = [
        SamplingParams(temperature=t, top_k=k, top_p=top, seed=s)
        for s, (t, k, top) in enumerate([(0.3, 0, 1.0), (0.8, 5, 1.0), (1.0, 0, 0.9), (1.5, 20, 0.95)])
    ]
    crowd = [*seeded, *MIXED, SamplingParams()]
    together = Chain(crowd, p, q)
    for row, params in enumerate(seeded):
        alone = Chain([params], p, q)
        plain = Chain([params], p, q, offered=[0])
        assert (alone.tokens == together.tokens[row]).all()
        assert alone.accepted[0] == together.accepted[row]
        assert (alone.tokens[0] == plain.tokens[0]).all()
    assert (together.tokens[-1] == p.argmax(axis=1)).all()


def test_seeded_noise_follows_the_law_over_seeds_and_positions() -> None:
    p = random_logits(11, 1, 16, 1.2)
    params = [SamplingParams(temperature=1.0, top_k=10, seed=s) for s in range(DRAWS)]
    chain = Chain(params, np.repeat(p, 2, axis=0), p)
    laws = [law_of(p[0], SamplingParams(temperature=1.0, top_k=10))]
    assert min(chain.p_values(slice(None), laws)) > 1e-4
    pairs = chain.tokens[:, 0] * 16 + chain.tokens[:, 1]
    joint = np.outer(laws[0], laws[0]).reshape(-1)
    assert p_value(np.bincount(pairs, minlength=256).astype(np.float64), joint) > 1e-4


def test_shared_noise_accepts_more_than_independent_draws_would() -> None:
    p = random_logits(12, 2, 16, 1.0)
    q = p[:1] + random_logits(13, 1, 16, 0.5)
    chain = Chain([SamplingParams(temperature=1.0, seed=s) for s in range(5000)], p, q)
    a, b = law_of(p[0], SamplingParams(temperature=1.0)), law_of(q[0], SamplingParams(temperature=1.0))
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


def test_greedy_rows_without_edits_need_nosampler_of() -> None:
    assert sampler_of([SamplingParams(), SamplingParams(top_k=5)], 10).layout is None
    layout = sampler_of([SamplingParams(), SamplingParams(temperature=1, top_k=5)], 10).layout
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
