"""What each round took, where the next one may be launched before the last one is over. Knows no models or policies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .depth import RoundShape, RowOutcome


class Timed(NamedTuple):
    """A round that is over. `seconds` is worth learning from if it is `fair`.

    `behind`: it was launched before the round before it was over; `ahead`: the one after it was, too.
    """

    shape: RoundShape
    outcomes: Sequence[RowOutcome]
    seconds: float
    behind: bool
    ahead: bool
    fair: bool = True


class RoundClock:
    """Times rounds by `clock` (seconds, never falling), and keeps them until they are asked for.

    A CPU runs a round that is launched ahead at once: in a chain of such rounds the first seems to take twice its time
    and the last one none, and only together they tell what each took.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._begun: deque[float] = deque()
        self._over: list[tuple[RoundShape, Sequence[RowOutcome], float, bool, bool]] = []  # fields of Timed
        self._last, self._behind = 0.0, False

    def __len__(self) -> int:
        return len(self._over)

    def clear(self) -> None:
        """Rounds on their way have failed: nothing will be told of them."""
        if self._over:
            shape, outcomes, seconds, _, ahead = self._over[-1]
            if ahead:
                # The end of its chain, as far as it goes.
                self._over[-1] = shape, outcomes, seconds, True, False
        self._begun.clear()
        self._behind = False

    def begin(self) -> None:
        """A round is launched."""
        self._begun.append(self._clock())

    def end(self, shape: RoundShape, outcomes: Sequence[RowOutcome]) -> None:
        """The oldest round on its way is over."""
        now, last, behind = self._clock(), self._last, self._behind
        begun = self._begun.popleft() if self._begun else now
        # From the end of the last round, unless there was a pause or a prefill between.
        seconds = now - (last if 2.0 * (begun - last) < now - begun else begun)
        ahead = bool(self._begun)
        self._last, self._behind = now, ahead
        self._over.append((shape, outcomes, seconds, behind, ahead))

    def take(self) -> list[Timed]:
        """The rounds that are over; the first of a chain stays until the next one is, too."""
        told, self._over = self._over, []
        over = [Timed(*fields) for fields in told]
        if over and over[-1].ahead and not over[-1].behind:
            over.pop()
            self._over = told[-1:]
        taken: list[Timed] = []
        chain: list[Timed] = []
        for timed in over:
            if not (timed.behind or timed.ahead or chain):
                taken.append(timed)
                continue
            chain.append(timed)
            if not timed.ahead:
                taken += _shared(chain)
                chain = []
        return taken + _shared(chain)


def _shared(chain: list[Timed]) -> list[Timed]:
    """A chain, or a part of one: what each took, and whether that is worth learning from."""
    kinds = {(t.shape.rows, t.shape.verified, t.shape.drafted) for t in chain}
    if len(chain) > 1 and not chain[0].behind and not chain[-1].ahead:
        if len(kinds) > 1 or not all(t.shape.settled for t in chain):
            return [t._replace(fair=False) for t in chain]
        mean = sum(t.seconds for t in chain) / len(chain)
        return [t._replace(seconds=mean) for t in chain]
    return [t if t.behind == t.ahead else t._replace(fair=False) for t in chain]
