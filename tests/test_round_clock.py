"""Times of rounds: alone, in chains that a CPU runs while they are launched, and behind a pause."""

from __future__ import annotations

import pytest

from mlx_gemma_mtp.adaptive import AdaptiveDepth, DepthMemory
from mlx_gemma_mtp.costs import CostModel
from mlx_gemma_mtp.depth import RoundShape, RowState
from mlx_gemma_mtp.round_clock import RoundClock

from .simulator import Clock


def _shape(verified: int = 0, *, context: int = 100, settled: bool = True) -> RoundShape:
    return RoundShape(rows=1, verified=verified, drafted=verified, context=context, settled=settled)


def _chain(rounds: RoundClock, clock: Clock, count: int, seconds: float) -> None:
    """Rounds launched ahead by a device that runs them while they are launched: all but the first are over at once."""
    rounds.begin()
    clock.now += seconds
    for i in range(count):
        if i < count - 1:
            rounds.begin()
            clock.now += seconds
        rounds.end(_shape(context=100 + i), [])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_whole_chain_tells_what_each_of_its_rounds_took(count: int) -> None:
    clock = Clock(now=3.0)
    rounds = RoundClock(clock)
    _chain(rounds, clock, count, 0.5)
    found = rounds.take()
    assert [t.seconds for t in found] == pytest.approx([0.5] * count)
    assert all(t.fair for t in found)
    assert len(rounds) == 0


def test_a_part_of_a_chain_leaves_out_its_ends() -> None:
    clock = Clock(now=3.0)
    rounds = RoundClock(clock)
    rounds.begin()
    clock.now += 0.5
    found = []
    for i in range(6):
        if i < 5:
            rounds.begin()
            clock.now += 0.5
        rounds.end(_shape(), [])
        if i in (0, 2):
            found.append(rounds.take())
    found.append(rounds.take())
    assert found[0] == [], "the first alone says nothing yet"
    assert [t.fair for t in found[1]] == [False, True, True]
    assert [t.fair for t in found[2]] == [True, True, False]
    assert all(t.seconds == pytest.approx(0.5) for part in found for t in part if t.fair)


def test_what_was_compiled_in_a_chain_spoils_it() -> None:
    clock = Clock()
    rounds = RoundClock(clock)
    rounds.begin()
    rounds.begin()
    clock.now += 1.0
    rounds.end(_shape(settled=False), [])
    rounds.end(_shape(), [])
    assert not any(t.fair for t in rounds.take())


def test_a_pause_between_rounds_belongs_to_none() -> None:
    clock = Clock()
    rounds = RoundClock(clock)
    for _ in range(2):
        clock.now += 100.0
        _chain(rounds, clock, 1, 0.5)
    assert [t.seconds for t in rounds.take()] == [0.5, 0.5]


def test_rounds_that_failed_are_not_waited_for() -> None:
    clock = Clock()
    rounds = RoundClock(clock)
    rounds.begin()
    rounds.begin()
    clock.now += 0.5
    rounds.end(_shape(), [])
    rounds.clear()
    rounds.begin()
    clock.now += 0.25
    rounds.end(_shape(), [])
    (first, second) = rounds.take()
    assert (second.seconds, second.fair, second.behind) == (0.25, True, False)
    assert not first.fair


@pytest.mark.parametrize("wrong", [0.5, 2.0])
def test_pairs_of_plain_rounds_mend_a_wrong_cost(wrong: float) -> None:
    """As they come between rounds with drafts: the first takes all the time of both, as it seems."""
    costs = CostModel()
    costs.store(1, 100, [0.01 * wrong] + [0.02 + 0.001 * k for k in range(8)], 0.001)
    clock, memory = Clock(), DepthMemory(costs)
    policy = AdaptiveDepth(memory, clock=clock)
    rows = [RowState(request=0, cap=8)]

    def plan() -> None:
        policy.plan(rows, width=1, context=100, compiled=lambda _: True)

    plan()
    for _ in range(12):
        for _ in range(2):  # the first of a kind is no sample
            policy.begin()
            clock.now += 0.023
            policy.observe(_shape(3), [])
            plan()
        policy.begin()
        clock.now += 0.01
        policy.begin()
        clock.now += 0.01
        policy.observe(_shape(), [])
        policy.observe(_shape(), [])
        plan()
    policy.forget(0)
    assert costs.seconds(1, 0, 0, 100) == pytest.approx(0.01, rel=0.1)
    assert costs.seconds(1, 3, 3, 100) == pytest.approx(0.023, rel=0.1)
