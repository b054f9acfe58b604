"""What is known before a round: what each depth is expected to give and to cost. Makes no choices, keeps nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .acceptance import AcceptanceModel, committed
from .costs import DEEPEST, Table
from .depth import DepthChoice, RowState

DEPTHS = (0, 1, 2, 3, 4, 5, 6, 8)
"""Few, as each is a shape to compile."""

_OPTIMISM = 1.0  # standard errors
_BEST, _FAR = 0.98, 0.9  # acceptance that may be hoped for; a rate that is not worth hoping for
_LONG = 1000  # tokens from which on a request's last round doesn't count


@dataclass(kw_only=True)
class View:
    """What is known before a round: for each depth, the batch's expected tokens, its seconds and their ratio."""

    requests: list[int]
    rows: int
    depths: list[int]
    tokens: list[float]
    seconds: list[float]
    rates: list[float]
    table: Table
    level: float
    least: int
    acceptance: list[float]
    unknown: bool
    depth: int = 0

    @classmethod
    def of(
        cls,
        rows: Sequence[RowState],
        table: Table,
        model: AcceptanceModel,
        level: float,
        least: int,
        asked_of: Mapping[int, int],
    ) -> View:
        """Of the batch `rows`; `asked_of`: drafts that could be of use to each when it joined."""
        shares, chains = [], []
        for row in rows:
            share, chain = model.of(row.request)
            most = row.cap if row.fixed is None else min(row.fixed, row.cap)
            if row.fixed is not None:
                chain = [chain[most]] * len(chain)
            elif most < DEEPEST:
                chain = chain[:most] + [chain[most]] * (len(chain) - most)
            elif (asked := asked_of.get(row.request, _LONG)) < _LONG:
                # The round that ends a request gives it half of its tokens on average.
                chain = [n * asked / (asked + 0.5 * (n - 1.0)) for n in chain]
            shares.append(share)
            chains.append(chain)
        tokens = [sum(at) for at in zip(*chains, strict=True)]
        seconds = [level * s for s in table.steady()]
        return cls(
            requests=[r.request for r in rows],
            rows=len(rows),
            depths=[k for k in range(least, DEEPEST + 1) if k in DEPTHS or k == least],
            tokens=tokens,
            seconds=seconds,
            rates=[t / s for t, s in zip(tokens, seconds, strict=True)],
            table=table,
            level=level,
            least=least,
            acceptance=[sum(at) / len(rows) for at in zip(*shares, strict=True)],
            unknown=model.unknown,
        )

    def hopes(self, model: AcceptanceModel) -> list[float]:
        """Rates as good as they may well be."""
        off = model.deviations(self.requests)
        return self._at([max(min(a + _OPTIMISM * d, _BEST), a) for a, d in zip(self.acceptance, off, strict=True)])

    def error(self, k: int, than: int) -> float:
        """Standard error (relative) of how the cost of `k` drafts compares with that of `than`."""
        return math.sqrt(self.table.joint.of_ratio(k, than))

    @property
    def hopeless(self) -> bool:
        """Whether no acceptance would make any drafts pay, by far."""
        return max(self._at([_BEST] * DEEPEST)[1:]) <= _FAR * self.rates[0]

    @property
    def best_hope(self) -> int:
        """The depth that comes nearest to paying."""
        return max(self.depths[1:], key=self._at([_BEST] * DEEPEST).__getitem__)

    def _at(self, acceptance: list[float]) -> list[float]:
        """Rates at another acceptance, and costs as low as they may well be."""
        hopeful, expected = committed(acceptance), committed(self.acceptance)
        return [
            self.tokens[k] * hopeful[k] / expected[k] / (self.level * self.table.least(k, _OPTIMISM, self.depth))
            for k in range(DEEPEST + 1)
        ]

    def worth(self, depth: int) -> float:
        """What a draft more must be likely to be worth its verification, which other rows share."""
        if depth < 2:
            return 0.0  # the first draft is always verified
        target = self.table.curve()
        further = self.level * (target[depth] - target[0]) / depth / self.rows
        return min(further * self.rates[depth], 0.9)

    def describe(self) -> DepthChoice:
        """The choice in words and figures."""
        plain, shown = self.seconds[0], self.depth
        accepted = "no draft verified yet" if self.unknown else f"acceptance {self.acceptance[0]:.2f}"
        if shown == 0:
            other = max(DEPTHS[1:], key=self.rates.__getitem__)
            reason = f"parked: verify({other + 1}) costs {self.seconds[other] / plain:.1f} steps, {accepted}"
        else:
            gain = self.rates[shown] / self.rates[0]
            reason = (
                f"{self.tokens[shown] / self.rows:.1f} tokens for {self.seconds[shown] / plain:.1f} steps: "
                f"{gain:.2f}x plain, {accepted}"
            )
        return DepthChoice(
            depth=shown,
            reason=reason,
            acceptance=tuple(round(a, 3) for a in self.acceptance),
            costs=tuple(round(s / plain, 3) for s in self.seconds),
        )
