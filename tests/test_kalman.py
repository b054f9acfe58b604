"""The filter of costs and their level, against the textbook's formulas on whole matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.kalman import LevelFilter

COSTS = 4


class Reference:
    """The same on one matrix: costs first, the level last."""

    def __init__(self, variances: list[float], level: float) -> None:
        self.p = np.diag([*variances, level])

    def observe(self, weights: list[tuple[int, float]], noise: float, *, moving: bool) -> np.ndarray:
        """The best gains; the covariance behind them (Joseph's form), or where only the level is moved."""
        seen = np.zeros(len(self.p))
        seen[-1] = 1.0
        for i, weight in weights:
            seen[i] = weight
        shared = self.p @ seen
        gains: np.ndarray = shared / (seen @ shared + noise)
        used = gains if moving else np.array([*[0.0] * COSTS, gains[-1]])
        left = np.eye(len(self.p)) - np.outer(used, seen)
        self.p = left @ self.p @ left.T + noise * np.outer(used, used)
        return gains


samples = st.lists(
    st.one_of(
        st.integers(0, COSTS - 1).map(lambda i: [(i, 1.0)]),
        st.tuples(st.integers(0, COSTS - 2), st.floats(0.1, 0.9)).map(
            lambda at: [(at[0], 1.0 - at[1]), (COSTS - 1, at[1])]
        ),
    ),
    min_size=1,
    max_size=30,
)


@settings(deadline=None)
@given(
    samples=samples,
    variances=st.lists(st.floats(1e-3, 0.1), min_size=COSTS, max_size=COSTS),
    level=st.floats(1e-3, 0.1),
    drift=st.floats(0.0, 0.01),
)
def test_it_is_the_textbooks(
    samples: list[list[tuple[int, float]]], variances: list[float], level: float, drift: float
) -> None:
    """But that samples which would move no cost in them by a fiftieth move none at all."""
    filtered, reference = LevelFilter(variances), Reference(variances, level)
    for weights in samples:
        level += drift
        reference.p[-1, -1] += drift
        gains, gain, level = filtered.observe(weights, level, 0.01)
        expected = reference.observe(weights, 0.01, moving=gains is not None)
        assert gain == pytest.approx(expected[-1], rel=1e-6)
        assert level == pytest.approx(reference.p[-1, -1], rel=1e-6)
        assert [filtered.variance(i) for i in range(COSTS)] == pytest.approx(np.diag(reference.p)[:-1], rel=1e-6)
        assert np.linalg.eigvalsh(reference.p).min() > -1e-12
        most = max(abs(expected[i]) for i, _ in weights)
        if gains is None:
            assert most < 0.0201
            continue
        assert most > 0.0199
        assert gains == pytest.approx(expected[:-1], rel=1e-6, abs=1e-12)


def test_a_long_run_of_one_cost_moves_the_level_alone() -> None:
    filtered, level = LevelFilter([0.01] * COSTS), 1e-4
    for _ in range(50):
        level += 1e-3
        gains, gain, level = filtered.observe([(1, 1.0)], level, 0.01)
    assert gains is None
    assert gain > 0.1


def test_what_tells_a_cost_from_another_tells_both() -> None:
    """The level is known by cost 1 alone: where cost 2 misses it, 1 may be as wrong as 2."""
    filtered, level = LevelFilter([0.01] * COSTS), 1e-4
    for _ in range(50):
        level += 1e-3
        level = filtered.observe([(1, 1.0)], level, 0.01)[2]
    gains, _, _ = filtered.observe([(2, 1.0)], level, 0.01)
    assert gains is not None
    assert gains[2] > 0.1
    assert gains[1] < -0.1
    assert gains[0] == 0.0


def test_what_changed_together_is_corrected_together() -> None:
    filtered = LevelFilter([1e-4] * COSTS)
    filtered.grow_together([(0, 1.0), (2, 1.0)], 0.09)
    gains, _, _ = filtered.observe([(2, 1.0)], 1e-4, 0.01)
    assert gains is not None
    assert gains[0] == pytest.approx(gains[2], rel=0.01)
    assert gains[2] > 0.85
    assert gains[1] == 0.0


def test_a_reset_forgets_what_was_seen_of_a_cost() -> None:
    filtered, level = LevelFilter([0.01] * COSTS), 0.01
    for i in (0, 1, 2):
        level = filtered.observe([(i, 1.0)], level, 0.01)[2]
    filtered.reset(1, 0.05)
    gains, _, _ = filtered.observe([(0, 1.0)], level, 0.01)
    assert gains is not None
    assert gains[1] == 0.0
    assert filtered.variance(1) == 0.05


def test_a_level_told_elsewhere_has_nothing_in_common_any_more() -> None:
    filtered, level = LevelFilter([0.01] * COSTS), 0.01
    level = filtered.observe([(0, 1.0)], level, 0.01)[2]
    filtered.fade(0.0)
    gains, _, _ = filtered.observe([(1, 1.0)], level, 0.01)
    assert gains is not None
    assert gains[0] == pytest.approx(0.0, abs=1e-12)
