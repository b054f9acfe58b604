"""The law of chains that end early: whatever made them end, the tokens are drawn as without a drafter.

A chain ends behind its first draft that the drafter itself gave little probability. How many drafts are verified then
depends on the drafts, and only verifying that last one, too, keeps the law.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp import SamplingParams
from mlx_gemma_mtp.sampling import Rows

from .laws import MIXED, Array, Chain, EarlyStop, WrongResidual, law_of, random_logits

VOCAB, DEPTH, DRAWS = 8, 3, 20_000
PENALISED = SamplingParams(
    temperature=1.1, repetition_penalty=1.5, presence_penalty=0.4, frequency_penalty=0.6, top_k=6, top_p=0.95
)
PROMPT = (1, 2)
P = random_logits(21, DEPTH + 1, VOCAB, 1.3)
Q = P[:DEPTH] + random_logits(22, DEPTH, VOCAB, 1.2)


def allowed(drafts: mx.array) -> mx.array:
    """A grammar: a token and the one before it never add up to a multiple of 3; the output begins with any but 1."""
    before = mx.pad(drafts, [(0, 0), (1, 0)], constant_values=2)
    return (before[..., None] + mx.arange(VOCAB)) % 3 != 0


def law_after(params: SamplingParams, position: int, before: Sequence[int], *, grammar: bool) -> Array:
    after = before[-1] if before else 2
    mask = (after + np.arange(VOCAB)) % 3 != 0 if grammar else None
    return law_of(P[position], params, PROMPT, before, mask)


def p_values(
    crowd: Sequence[SamplingParams], stop: EarlyStop | None, *, grammar: bool, rows_type: type[Rows] = Rows
) -> list[float]:
    """Of every position of every kind of row, DRAWS rows of each kind in one batch."""
    params = [p for p in crowd for _ in range(DRAWS)]
    mask = allowed if grammar else None
    chain = Chain(params, P, Q, prompt=PROMPT, rows_type=rows_type, stop=stop, allowed=mask)
    if stop is not None:
        assert len(np.unique(chain.offered)) >= DEPTH
    values = []
    for i, p in enumerate(crowd):
        rows = slice(i * DRAWS, (i + 1) * DRAWS)
        found = chain.conditional_p_values(rows, partial(law_after, p, grammar=grammar))
        assert len(found) >= 3, f"too few rows of {p} got to the later positions"
        values += found
    return values


@pytest.mark.parametrize(("least", "grammar"), [(None, True), (0.3, False), (0.3, True)])
def test_the_law_holds_at_every_position_in_a_mixed_batch(least: float | None, grammar: bool) -> None:
    stop = None if least is None else EarlyStop(least)
    assert min(p_values([*MIXED[2:], PENALISED], stop, grammar=grammar)) > 1e-4


def test_a_chain_cut_before_the_draft_that_ended_it_is_noticed() -> None:
    for params in (MIXED[0], PENALISED):
        assert min(p_values([params], EarlyStop(0.3), grammar=False)) > 1e-4
        assert min(p_values([params], EarlyStop(0.3, drops_it=True), grammar=False)) < 1e-9


@pytest.mark.parametrize("grammar", [False, True])
def test_a_wrong_residual_is_noticed_in_chains_that_end_early(grammar: bool) -> None:
    assert min(p_values([MIXED[1]], EarlyStop(0.3), grammar=grammar, rows_type=WrongResidual)) < 1e-9


def test_seeded_rows_give_the_same_tokens_wherever_their_chains_end() -> None:
    params = [SamplingParams(temperature=t, top_k=6, seed=s) for s in range(500) for t in (0.3, 0.8, 1.0, 1.5)]
    plain = Chain(params, P, Q, offered=[0] * len(params))
    whole, early = Chain(params, P, Q), Chain(params, P, Q, stop=EarlyStop(0.4))
    assert (whole.tokens[:, 0] == plain.tokens[:, 0]).all()
    assert (whole.tokens == early.tokens).all()
    assert (early.accepted == np.minimum(whole.accepted, early.offered)).all()
    assert (early.accepted < whole.accepted).any()
