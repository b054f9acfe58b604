"""Counters that add up, whatever the rounds were."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.stats import SpecStats

ROUNDS = st.lists(st.integers(0, 8).flatmap(lambda d: st.tuples(st.just(d), st.integers(0, d))), max_size=30)
# However busy the machine is.
UNHURRIED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def counted(rounds: list[tuple[int, int]], prefills: int = 0, cut: int = 0) -> SpecStats:
    stats = SpecStats(prefills=prefills, cut=cut)
    for drafted, accepted in rounds:
        stats.add_round(drafted=drafted, accepted=accepted)
    return stats


@UNHURRIED
@given(ROUNDS, st.integers(0, 3), st.integers(0, 5))
def test_tokens_and_positions_add_up(rounds: list[tuple[int, int]], prefills: int, cut: int) -> None:
    stats = counted(rounds, prefills, cut)
    assert stats.rounds == len(rounds)
    assert stats.drafted == sum(d for d, _ in rounds) == sum(stats.drafted_per_position)
    assert stats.accepted == sum(a for _, a in rounds) == sum(stats.accepted_per_position)
    assert stats.tokens == prefills + sum(a + 1 for _, a in rounds) - cut
    deepest = max((d for d, _ in rounds), default=0)
    assert len(stats.drafted_per_position) == len(stats.accepted_per_position) == deepest
    for i in range(deepest):
        assert stats.drafted_per_position[i] == sum(d > i for d, _ in rounds)
        assert stats.accepted_per_position[i] == sum(a > i for _, a in rounds)
    for i, share in enumerate(stats.acceptance_per_position):
        assert share == stats.accepted_per_position[i] / stats.drafted_per_position[i]
        assert 0 <= share <= 1
    # A draft is accepted only if all before it were.
    assert stats.accepted_per_position == sorted(stats.accepted_per_position, reverse=True)


@UNHURRIED
@given(ROUNDS, ROUNDS, st.integers(0, 3), st.integers(0, 3))
def test_a_sum_equals_counting_both(
    first: list[tuple[int, int]], second: list[tuple[int, int]], prefills: int, cut: int
) -> None:
    total, other = counted(first, prefills, cut), counted(second, 1, 2)
    before = counted(second, 1, 2)
    total.add(other)
    assert total == counted(first + second, prefills + 1, cut + 2)
    assert other == before
    # What was added is not kept: later rounds of the one don't show in the other.
    other.add_round(drafted=8, accepted=8)
    assert total == counted(first + second, prefills + 1, cut + 2)


@UNHURRIED
@given(ROUNDS)
def test_nothing_is_added_by_nothing(rounds: list[tuple[int, int]]) -> None:
    stats = counted(rounds)
    stats.add(SpecStats())
    assert stats == counted(rounds)
    empty = SpecStats()
    empty.add(stats)
    assert empty == stats


@pytest.mark.parametrize(("drafted", "accepted"), [(2, 3), (0, 1), (2, -1), (-1, 0), (-1, -1)])
def test_impossible_rounds_are_refused(drafted: int, accepted: int) -> None:
    stats = counted([(3, 1)])
    with pytest.raises(ValueError, match=f"accepted is {accepted}, expected 0 to drafted = {drafted}"):
        stats.add_round(drafted=drafted, accepted=accepted)
    assert stats == counted([(3, 1)])


def test_ratios_without_rounds() -> None:
    stats = SpecStats()
    assert (stats.tokens, stats.accepted_per_round, stats.acceptance_per_position) == (0, 0.0, [])
    assert stats.to_dict()["tokens_per_forward"] == 0.0
    plain = counted([(0, 0)] * 3, prefills=1)
    assert (plain.tokens, plain.accepted_per_round) == (4, 0.0)
    assert plain.to_dict()["tokens_per_forward"] == 1.0


def test_the_report() -> None:
    stats = counted([(3, 3), (3, 1), (2, 0)], prefills=1, cut=1)
    stats.contracts = {"exact": 1}
    assert json.loads(json.dumps(stats.to_dict())) == {
        "contract": "exact",
        "requests": {"exact": 1},
        "tokens": 7,
        "rounds": 3,
        "drafted": 8,
        "accepted": 4,
        "cut": 1,
        "reused": 0,
        "drafted_per_position": [3, 3, 2],
        "accepted_per_position": [2, 1, 1],
        "acceptance_per_position": [0.6667, 0.3333, 0.5],
        "accepted_per_round": 1.3333,
        "tokens_per_forward": 2.0,
    }


def test_contracts_are_counted() -> None:
    one, other = SpecStats(contracts={"exact": 1}), SpecStats(contracts={"distribution": 1})
    total = SpecStats.total([one, other, one])
    assert (one.contract, other.contract, total.contract, SpecStats().contract) == (
        "exact", "distribution", "mixed", None
    )  # fmt: skip
    assert total.to_dict()["requests"] == {"exact": 2, "distribution": 1}
    assert one.contracts == {"exact": 1}


@UNHURRIED
@given(ROUNDS)
def test_a_report_is_a_copy(rounds: list[tuple[int, int]]) -> None:
    stats = counted(rounds)
    positions = stats.to_dict()["drafted_per_position"]
    assert isinstance(positions, list)
    positions.append(1)
    assert stats == counted(rounds)
