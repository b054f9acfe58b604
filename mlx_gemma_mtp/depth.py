"""How many tokens to draft next. Knows nothing of MLX, models, text or how rounds are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

# Rows, outcomes and shapes are tuples, as each round makes and reads some for every row.


class RowState(NamedTuple):
    """A living row before a round.

    `cap`: the most drafts that could be of use to it (0: the next round ends it). `fixed`: the depth it asked for.
    """

    request: int
    cap: int
    fixed: int | None = None


class RowOutcome(NamedTuple):
    """What became of a row's drafts in a round: of `offered`, the first `accepted` were kept.

    Drafts behind a stop or a limit are in neither. `tokens`: all that the row got.
    """

    request: int
    offered: int
    accepted: int
    tokens: tuple[int, ...] = ()


class RoundShape(NamedTuple):
    """What a round cost depends on: `rows` of the arrays (free ones compute along), drafts `verified` per row in its
    first half and `drafted` per row in its second, `context`: mean tokens held by the living rows.

    `settled` is false for a round that is no fair sample (something was compiled, moved or admitted in it).
    """

    rows: int
    verified: int
    drafted: int
    context: int
    settled: bool = True


@dataclass(frozen=True, kw_only=True)
class DepthChoice:
    """What a policy chose, and why: `acceptance` by position, and `costs` of rounds of 0, 1, … drafts in plain ones."""

    depth: int
    reason: str
    acceptance: tuple[float, ...] = ()
    costs: tuple[float, ...] = ()

    def __str__(self) -> str:
        drafts = {0: "no drafts", 1: "1 draft"}.get(self.depth, f"{self.depth} drafts")
        return f"{drafts} ({self.reason})"


class DepthPolicy(Protocol):
    """Chooses the depth of every round; owned by the scheduler's caller, told everything by the scheduler.

    For each round: `plan`, then `begin` when it is handed to the device, then `observe` when its tokens are known. A
    later round may be planned and begun before an earlier one is observed; rounds are observed in their order.
    `meanwhile` comes between `begin` and `observe`: what takes time is best done there.
    """

    @property
    def min_chain(self) -> float:
        """The least probability of a chain of drafts that is worth verifying, in the block planned last.

        A row's block may end behind the first draft at which its chain falls under it. 0: no block is cut.
        """

    def plan(self, rows: Sequence[RowState], *, width: int, context: int, compiled: Callable[[int], bool]) -> list[int]:
        """Drafts to draw for each row, to be verified in the round behind. `width`: rows of the arrays.

        A row gets its `fixed` where it has one, and 0 where its cap is 0. compiled(K): whether rounds that verify and
        draft K tokens are there already.
        """

    def begin(self) -> None:
        """A round is handed to the device now."""

    def meanwhile(self) -> None:
        """A round is on its way, and nothing waits for the policy."""

    def observe(self, shape: RoundShape, outcomes: Sequence[RowOutcome]) -> None:
        """The oldest round begun and not observed is over."""

    def forget(self, request: int) -> None:
        """A request has ended, or is taken out."""

    def abort(self) -> None:
        """Rounds begun and not observed have failed: none of them will be."""


@dataclass(frozen=True)
class FixedDepth:
    """The same number of drafts in every round."""

    depth: int

    @property
    def min_chain(self) -> float:
        """See `DepthPolicy`."""
        return 0.0

    def plan(self, rows: Sequence[RowState], *, width: int, context: int, compiled: Callable[[int], bool]) -> list[int]:
        """See `DepthPolicy`."""
        # Not cut to the cap: another depth is another shape, and each costs a compilation.
        return [0 if r.cap == 0 else self.depth if r.fixed is None else r.fixed for r in rows]

    def begin(self) -> None:
        """Nothing to note."""

    def meanwhile(self) -> None:
        """Nothing to learn."""

    def observe(self, shape: RoundShape, outcomes: Sequence[RowOutcome]) -> None:
        """Nothing to learn."""

    def forget(self, request: int) -> None:
        """Nothing to forget."""

    def abort(self) -> None:
        """Nothing to note."""

    def describe(self) -> DepthChoice:
        """What was asked for."""
        return DepthChoice(depth=self.depth, reason="fixed")
