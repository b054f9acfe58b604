"""A Kalman filter of a few costs and of a level that all of them share, as relative errors. Knows no rounds.

What was seen together is uncertain together: when the level moves during a long run of one cost only the level follows,
and what tells another cost from that one tells both.
"""

from __future__ import annotations

from collections.abc import Sequence

_LEAST = 1e-9
_NOTHING = 0.02  # gain below which a sample says nothing of the costs in it


class LevelFilter:
    """Covariances of costs with each other and with the level, whose own variance is the caller's."""

    def __init__(self, variances: Sequence[float]) -> None:
        count = len(variances)
        self._costs = [[0.0] * count for _ in range(count)]
        self._level = [0.0] * count
        for i, variance in enumerate(variances):
            self._costs[i][i] = variance

    def copy(self) -> LevelFilter:
        """As uncertain, for costs of which the level knows nothing yet."""
        copied = LevelFilter([0.0] * len(self._level))
        copied._costs = [row[:] for row in self._costs]
        return copied

    def variance(self, i: int) -> float:
        """Of one cost."""
        return self._costs[i][i]

    def of_ratio(self, i: int, j: int) -> float:
        """Variance of how two costs compare."""
        return max(self._costs[i][i] + self._costs[j][j] - 2.0 * self._costs[i][j], 0.0)

    def grow(self, i: int, by: float) -> None:
        """A cost may have changed: by this variance."""
        self._costs[i][i] += by

    def grow_together(self, weights: Sequence[tuple[int, float]], by: float) -> None:
        """Costs may have changed by an error that they share: by its variance times their weights, squared."""
        for i, a in weights:
            for j, b in weights:
                self._costs[i][j] += by * a * b

    def reset(self, i: int, variance: float) -> None:
        """Nothing that was seen of a cost counts any more."""
        for row in self._costs:
            row[i] = 0.0
        self._costs[i] = [0.0] * len(self._level)
        self._costs[i][i], self._level[i] = variance, 0.0

    def fade(self, share: float) -> None:
        """Costs elsewhere have told the level meanwhile: so much is left of what it had in common with these."""
        self._level = [x * share for x in self._level]

    def observe(
        self, weights: Sequence[tuple[int, float]], level_variance: float, noise: float
    ) -> tuple[list[float] | None, float, float]:
        """Take in a sample of level x (weighted sum of costs): the gains of all costs, the level's, its new variance.

        `weights`: the costs in the sum, and their shares of it, which add up to 1. A mean should move by its gain times
        (sample / expected - 1). Gains are None where those of the costs in the sum are next to nothing: then
        no cost moves.
        """
        costs, level = self._costs, self._level
        with_level, shared = level_variance, level
        for i, weight in weights:
            with_level += weight * level[i]
            shared = [s + weight * c for s, c in zip(shared, costs[i], strict=True)]
        whole = max(with_level + sum(weight * shared[i] for i, weight in weights), _LEAST) + noise
        gain = with_level / whole
        told = max(level_variance - gain * with_level, _LEAST)
        if all(abs(shared[i]) < _NOTHING * whole for i, _ in weights):
            # A long run of one kind: only the level moves.
            self._level = [x - gain * s for x, s in zip(level, shared, strict=True)]
            return None, gain, told
        gains = [s / whole for s in shared]
        for i, g in enumerate(gains):
            if g:
                row = costs[i] = [c - g * s for c, s in zip(costs[i], shared, strict=True)]
                row[i] = max(row[i], _LEAST)
        self._level = [x - g * with_level for x, g in zip(level, gains, strict=True)]
        return gains, gain, told
