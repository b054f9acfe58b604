"""Counters of speculative decoding that add up. Knows nothing of MLX, models or time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .request import Contract


@dataclass(kw_only=True)
class SpecStats:
    """What speculation did for one request or, summed, for many.

    `tokens == prefills + accepted + rounds - cut` holds at every moment: each prefill gives one token, each
    round the accepted drafts and one token of the target's own, and `cut` are tokens behind a stop or a limit.
    `contracts` counts the requests under each contract; of the prompts' tokens, `reused` were not computed, as a prefix
    cache had them.
    """

    prefills: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    cut: int = 0
    reused: int = 0
    drafted_per_position: list[int] = field(default_factory=list)
    accepted_per_position: list[int] = field(default_factory=list)
    contracts: dict[Contract, int] = field(default_factory=dict)

    @staticmethod
    def total(parts: Iterable[SpecStats]) -> SpecStats:
        """The sum of many, which stay as they are."""
        total = SpecStats()
        for part in parts:
            total.add(part)
        return total

    def add_round(self, *, drafted: int, accepted: int) -> None:
        """Count one round of a row: `drafted` tokens proposed, the first `accepted` of them kept."""
        if not 0 <= accepted <= drafted:
            raise ValueError(f"accepted is {accepted}, expected 0 to drafted = {drafted}")
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        for counts, n in ((self.drafted_per_position, drafted), (self.accepted_per_position, accepted)):
            counts.extend([0] * (drafted - len(counts)))
            for i in range(n):
                counts[i] += 1

    def add(self, other: SpecStats) -> None:
        """Add another's counters to these."""
        for name in ("prefills", "rounds", "drafted", "accepted", "cut", "reused"):
            self.__dict__[name] += other.__dict__[name]
        for mine, theirs in (
            (self.drafted_per_position, other.drafted_per_position),
            (self.accepted_per_position, other.accepted_per_position),
        ):
            mine.extend([0] * (len(theirs) - len(mine)))
            for i, n in enumerate(theirs):
                mine[i] += n
        for contract, n in other.contracts.items():
            self.contracts[contract] = self.contracts.get(contract, 0) + n

    @property
    def contract(self) -> str | None:
        """What all requests counted promise: a `Contract`, "mixed" where they differ, None for no request."""
        return "mixed" if len(self.contracts) > 1 else next(iter(self.contracts), None)

    @property
    def tokens(self) -> int:
        """Tokens given out."""
        return self.prefills + self.accepted + self.rounds - self.cut

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of the drafts offered at each position that were accepted (their prefix was, too)."""
        return [a / d if d else 0.0 for a, d in zip(self.accepted_per_position, self.drafted_per_position, strict=True)]

    @property
    def tokens_per_forward(self) -> float:
        """Mean number of tokens that a target forward gave, prefills left out."""
        return (self.tokens - self.prefills) / self.rounds if self.rounds else 0.0

    @property
    def accepted_per_round(self) -> float:
        """Mean number of accepted drafts per round."""
        return self.accepted / self.rounds if self.rounds else 0.0

    def to_dict(self) -> dict[str, object]:
        """The counters and the ratios made from them, ready for JSON."""
        return {
            "contract": self.contract,
            "requests": dict(self.contracts),
            "tokens": self.tokens,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "cut": self.cut,
            "reused": self.reused,
            "drafted_per_position": list(self.drafted_per_position),
            "accepted_per_position": list(self.accepted_per_position),
            "acceptance_per_position": [round(x, 4) for x in self.acceptance_per_position],
            "accepted_per_round": round(self.accepted_per_round, 4),
            "tokens_per_forward": round(self.tokens_per_forward, 4),
        }
