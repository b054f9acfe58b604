"""Libraries that decode the same prompts in turns, each in a process of its own. Knows no terminals and no files.

Heat and other programs change speed, so every repeat runs the entrants in the other order, with pauses in between.
Where all entrants fit into half of the memory their processes live for the whole race, else one at a time is loaded.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep
from typing import Any

from .peers import copy_for_mlx_lm, copy_for_mlx_vlm, weights_of
from .workers import Spread, Worker, WorkerError

ARMS = Path(__file__).resolve().with_name("arms.py")
Progress = Callable[[str, float], None]
Depth = int | str


@dataclass(frozen=True)
class Entrant:
    """A library at a depth: 0 is plain decoding, "auto" chooses by itself (ours only)."""

    library: str
    depth: Depth

    def __str__(self) -> str:
        how = {0: "plain", 1: "1 draft", "auto": "auto"}.get(self.depth, f"{self.depth} drafts")
        return f"{self.library}, {how}"

    @property
    def process(self) -> tuple[str, Depth]:
        """Entrants with the same one share a process: ours can change its depth from request to request."""
        return (self.library, 0 if self.library == "ours" else self.depth)


def entrants(libraries: Sequence[str], drafts: int, *, drafter: bool) -> list[Entrant]:
    """All that can be compared: plain decoding, and with a drafter `drafts` per round, and ours as it chooses."""
    found = []
    for library in libraries:
        found.append(Entrant(library, 0))
        if drafter and library != "mlx-lm":
            found.append(Entrant(library, drafts))
        if drafter and library == "ours":
            found.append(Entrant(library, "auto"))
    return found


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run. `together`: all processes live at once. `pause`: seconds before each turn.

    `prompts`: token ids; a batch takes its first ones. One row decodes `singles` of them, one after another.
    """

    target: Path
    drafter: Path | None
    dtype: str
    prompts: list[list[int]]
    entrants: Sequence[Entrant]
    batches: Sequence[int]
    new_tokens: int
    repeats: int
    pause: float
    together: bool
    singles: int = 2
    peers_python: str = sys.executable

    def request(self, entrant: Entrant, batch: int) -> dict[str, Any]:
        """For a worker: see `arms.answer`."""
        count = self.singles if batch == 1 else batch
        asked = [self.prompts[i % len(self.prompts)] for i in range(count)]
        found: dict[str, Any] = {"op": "one" if batch == 1 else "batch", "prompts": asked, "new": self.new_tokens}
        return found | ({"depth": entrant.depth} if entrant.library == "ours" else {})


@dataclass
class Outcome:
    """What was measured: by batch and entrant, the parts of every repeat. `left_out`: who couldn't run, and why."""

    samples: dict[int, dict[str, list[list[dict[str, Any]]]]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def fit_together(target: Path, drafter: Path | None, processes: int, memory_gb: float) -> bool:
    """Whether so many copies of a pair take at most half of the memory, in float32 if stored in half of that."""
    files = [*weights_of(target), *(weights_of(drafter) if drafter else [])]
    return 2 * processes * sum(f.stat().st_size for f in files) <= memory_gb * 2**30 / 2


def race(plan: Plan, progress: Progress | None = None) -> Outcome:
    """Run every entrant in every batch, `repeats` times; the first time in a process is not counted."""
    outcome, turns = Outcome(), plan.repeats * len(plan.entrants) * len(plan.batches)
    done = 0
    with _Stable(plan, outcome) as stable:
        for repeat in range(plan.repeats):
            for entrant in plan.entrants if repeat % 2 == 0 else list(reversed(plan.entrants)):
                if str(entrant) in outcome.left_out:
                    done += len(plan.batches)
                    continue
                if done:
                    sleep(plan.pause)
                for batch in plan.batches:
                    if progress is not None:
                        what = f"repeat {repeat + 1} of {plan.repeats}: {entrant}, batch {batch}"
                        progress(what, max(done / turns, 1e-6))
                    done += 1
                    parts = stable.run(entrant, batch)
                    if parts is not None:
                        outcome.samples.setdefault(batch, {}).setdefault(str(entrant), []).append(parts)
    return outcome


class _Stable:
    """The processes: started when first asked for, all kept or one at a time."""

    def __init__(self, plan: Plan, outcome: Outcome) -> None:
        self._plan, self._outcome = plan, outcome
        self._workers: dict[tuple[str, Depth], Worker] = {}
        self._warm: set[tuple[Entrant, int]] = set()
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> _Stable:
        scratch = Path(self._exit.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        target = self._plan.target
        self._targets = {"ours": target, "mlx-lm": copy_for_mlx_lm(target, scratch / "mlx-lm")}
        self._targets["mlx-vlm"] = copy_for_mlx_vlm(target, scratch / "mlx-vlm")
        self._exit.callback(self._close)
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def run(self, entrant: Entrant, batch: int) -> list[dict[str, Any]] | None:
        """The parts of one turn; None where it can't run, with the reason noted."""
        name = str(entrant)
        if not {name, f"{name}, batch {batch}"}.isdisjoint(self._outcome.left_out):
            return None
        try:
            worker = self._worker(entrant)
        except WorkerError as error:
            self._outcome.left_out[name] = str(error)
            return None
        request = self._plan.request(entrant, batch)
        try:
            if (entrant, batch) not in self._warm:
                worker.ask(request)
                self._warm.add((entrant, batch))
            parts: list[dict[str, Any]] = worker.ask(request)["parts"]
        except WorkerError as error:
            self._outcome.left_out[f"{name}, batch {batch}"] = str(error)
            return None
        return parts

    def _worker(self, entrant: Entrant) -> Worker:
        key = entrant.process
        if key not in self._workers:
            if not self._plan.together:
                self._close()
            library, depth = key
            python = self._plan.peers_python if library == "mlx-vlm" else sys.executable
            command = [python, str(ARMS), library, "--target", str(self._targets[library]), "--depth", str(depth)]
            command += ["--dtype", self._plan.dtype]
            command += ["--drafter", str(self._plan.drafter)] if self._plan.drafter else []
            # Ours is this very package, wherever it lies; the peers' environment need not have it.
            own = {"PYTHONPATH": os.pathsep.join([str(ARMS.parents[2]), os.environ.get("PYTHONPATH", "")])}
            self._workers[key] = Worker(command, env=own if library == "ours" else None)
            self._outcome.about[library] = self._workers[key].about
        return self._workers[key]

    def _close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        self._warm.clear()


# --- what it comes to ---------------------------------------------------------------------------------------------


def summary(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """By batch and entrant: speed, time to the first token, peak memory, and what became of drafts."""
    return {
        str(batch): {name: _summary(samples) for name, samples in entered.items()}
        for batch, entered in sorted(outcome.samples.items())
    }


def _summary(samples: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    rates = [
        sum(p["decode_tokens"] for p in parts) / sum(p["wall_s"] - p["prefill_s"] for p in parts) for parts in samples
    ]
    first = [sum(p["prefill_s"] for p in parts) / len(parts) for parts in samples]
    everything = [p for parts in samples for p in parts]
    rounds, drafted = sum(p["rounds"] for p in everything), sum(p["drafted"] for p in everything)
    return {
        "decode_tokens_per_second": Spread.of(rates).to_dict(),
        "first_token_s": Spread.of(first).to_dict(),
        "peak_bytes": max(p["peak_bytes"] for p in everything),
        "accepted_per_round": round(sum(p["accepted"] for p in everything) / rounds, 4) if drafted else None,
        "acceptance_by_position": _shares([p["by_position"] for p in everything if p["by_position"]]),
    }


def _shares(counters: Sequence[Sequence[Sequence[int]]]) -> list[float]:
    """Share of the drafts at each position that were accepted, of [accepted, drafted] of several generations."""
    most = max((len(drafted) for _, drafted in counters), default=0)
    totals = [[sum(c[which][i] for c in counters if i < len(c[which])) for i in range(most)] for which in (0, 1)]
    return [round(a / d, 4) for a, d in zip(*totals, strict=True) if d]


def same_tokens(outcome: Outcome, plain: str = "ours, plain") -> dict[str, bool]:
    """Whether each entrant always gave the tokens of our plain decoding in the same batch; near ties may differ."""
    found: dict[str, bool] = {}
    for entered in outcome.samples.values():
        if plain not in entered:
            continue
        expected = [p["tokens"] for p in entered[plain][0]]
        for name, samples in entered.items():
            same = all([p["tokens"] for p in parts] == expected for parts in samples)
            found[name] = found.get(name, True) and same
    return found


def without_tokens(outcome: Outcome) -> dict[str, Any]:
    """All samples, ready for JSON."""

    def part(p: Mapping[str, Any]) -> dict[str, Any]:
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in p.items() if k != "tokens"}

    return {
        str(batch): {name: [[part(p) for p in parts] for parts in samples] for name, samples in entered.items()}
        for batch, entered in outcome.samples.items()
    }
