"""Decode speed side by side, in one run and on one pair, in float32: ours, mlx-lm and mlx-vlm, plain and with drafts.

    python bench/decode.py --pair DIR --depths 0,1,3 --blas mlx,openblas

One request at a time over eight prompts, and all eight as one ragged batch. Every arm (a library at a depth) has a
process of its own for the whole run and is warmed up once; then the arms take turns at every prompt, forwards and
backwards, so that noise hits all alike. Knows nothing of how a library is called: see mlx_gemma_mtp/benchmark/arms.py.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
from common import Pair, Spread, Worker, WorkerError
from rich.console import Console
from rich.table import Table

MODES = {"one": "one request at a time", "batch": "all prompts as one ragged batch"}
BLAS = {"mlx": "MLX's own BLAS", "openblas": "OpenBLAS preloaded"}
NEAR_TIE = 1e-3
"""Logits that are closer than this may swap places between two correct programs."""


@dataclass(frozen=True, order=True)
class Arm:
    """A library at a depth; depth 0 is plain decoding."""

    library: str
    depth: int

    def __str__(self) -> str:
        drafts = "plain" if not self.depth else "1 draft" if self.depth == 1 else f"{self.depth} drafts"
        return f"{self.library}, {drafts}"

    def peers(self) -> tuple[Arm, ...]:
        """What to compare with: the peers at the same depth; drafts with the library's own plain decoding, too."""
        if self.library != "ours":
            return (Arm(self.library, 0),) if self.depth else ()
        if not self.depth:
            return Arm("mlx-lm", 0), Arm("mlx-vlm", 0)
        return Arm("mlx-vlm", self.depth), Arm("ours", 0)


@dataclass(frozen=True)
class Target:
    """An acceptance target: ours over the peer's in a mode, at least so many times as fast."""

    mode: str
    arm: Arm
    peer: Arm
    at_least: float

    def __str__(self) -> str:
        return f"{self.arm} over {self.peer}, {MODES[self.mode]}"


def targets(depths: Sequence[int]) -> list[Target]:
    """Plain 1.2 times mlx-lm, 2 times mlx-vlm in a ragged batch; drafts 1.5 and 6 times mlx-vlm's of the same depth."""
    found = []
    if 0 in depths:
        found.append(Target("one", Arm("ours", 0), Arm("mlx-lm", 0), 1.2))
        found.append(Target("batch", Arm("ours", 0), Arm("mlx-vlm", 0), 2.0))
    for depth in filter(None, depths):
        found.append(Target("one", Arm("ours", depth), Arm("mlx-vlm", depth), 1.5))
        found.append(Target("batch", Arm("ours", depth), Arm("mlx-vlm", depth), 6.0))
    return found


@dataclass(frozen=True)
class Sample:
    """One arm's work in one repeat: a part for each prompt, or one for the batch."""

    parts: list[dict[str, Any]]

    def total(self, name: str) -> float:
        """Sum over the parts."""
        return float(sum(part[name] for part in self.parts))

    @property
    def tokens(self) -> list[list[int]]:
        """New tokens of every prompt."""
        return [tokens for part in self.parts for tokens in part["tokens"]]

    @property
    def decode_rate(self) -> float:
        """Tokens per second once every prompt of a part has its first token."""
        return self.total("decode_tokens") / (self.total("wall_s") - self.total("prefill_s"))

    @property
    def rate(self) -> float:
        """Tokens per second, prefill included."""
        return sum(map(len, self.tokens)) / self.total("wall_s")

    def to_dict(self) -> dict[str, Any]:
        """All that was measured, without the tokens."""
        names = ("wall_s", "prefill_s", "cpu_s", "decode_tokens", "rounds", "accepted", "drafted")
        return {name: [round(part[name], 6) for part in self.parts] for name in names}


Samples = dict[Arm, list[Sample]]


@dataclass
class Run:
    """What was measured with one BLAS."""

    samples: dict[str, Samples] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    tokens: list[list[int]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)

    def outputs(self) -> Iterator[tuple[str, Arm, int, list[int]]]:
        """Mode, arm, prompt and new tokens of all samples."""
        for mode, samples in self.samples.items():
            for arm, several in samples.items():
                for sample in several:
                    for row, tokens in enumerate(sample.tokens):
                        yield mode, arm, row, tokens

    def ratio(self, mode: str, arm: Arm, peer: Arm) -> dict[str, Spread] | None:
        """Ratios of `arm` to `peer` in the repeats, without and with prefill; None when one of them didn't run."""
        pairs = list(zip(self.samples[mode].get(arm, []), self.samples[mode].get(peer, []), strict=False))
        if not pairs:
            return None
        return {
            "decode": Spread.of([a.decode_rate / b.decode_rate for a, b in pairs]),
            "with_prefill": Spread.of([a.rate / b.rate for a, b in pairs]),
        }


# --- measuring ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(pair: Pair, args: argparse.Namespace, preload: Path | None, run: Run) -> Iterator[dict[Arm, Worker]]:
    """A worker for each arm. Arms that can't start are left out, with the reason in `run`."""
    arms = [Arm("ours", d) for d in args.depths] + [Arm("mlx-lm", 0)] * (0 in args.depths)
    arms += [Arm("mlx-vlm", d) for d in args.depths]
    workers: dict[Arm, Worker] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        copies = {
            "ours": pair.target,
            "mlx-lm": common.copy_for_mlx_lm(pair.target, Path(scratch) / "mlx-lm"),
            "mlx-vlm": common.copy_for_mlx_vlm(pair.target, Path(scratch) / "mlx-vlm"),
        }
        try:
            for arm in arms:
                python = args.peers_python if arm.library == "mlx-vlm" else sys.executable
                command = [python, str(common.ARMS), arm.library]
                command += ["--target", str(copies[arm.library]), "--drafter", str(pair.drafter)]
                command += ["--depth", str(arm.depth), "--dtype", "float32"]
                try:
                    workers[arm] = Worker(command, preload)
                    run.about[arm.library] = workers[arm].about
                except WorkerError as error:
                    run.left_out[str(arm)] = str(error)
            yield workers
        finally:
            for worker in workers.values():
                worker.close()


def measure(
    workers: Mapping[Arm, Worker], prompts: list[list[int]], args: argparse.Namespace, run: Run, console: Console
) -> None:
    """Warm every arm up in both modes, then let them take turns, prompt by prompt: one computes at a time."""
    for mode in MODES:
        parts = [[p] for p in prompts] if mode == "one" else [prompts]
        requests = [{"op": mode, "prompts": part, "new": args.new} for part in parts]
        able = dict(workers)
        for arm, worker in workers.items():
            console.print(f"  warming up {arm}, {MODES[mode]}")
            try:
                for request in requests:
                    worker.ask(request)
            except WorkerError as error:
                run.left_out[f"{arm} ({mode})"] = str(error)
                del able[arm]
        run.samples[mode] = {arm: [] for arm in able}
        for repeat in range(args.repeats):
            console.print(f"  repeat {repeat + 1} of {args.repeats}, {MODES[mode]}")
            found: dict[Arm, list[dict[str, Any]]] = {arm: [] for arm in able}
            for i, request in enumerate(requests):
                for arm in list(able) if (repeat + i) % 2 == 0 else reversed(able):
                    found[arm] += able[arm].ask(request)["parts"]
            for arm, measured in found.items():
                run.samples[mode][arm].append(Sample(measured))


def compare_tokens(workers: Mapping[Arm, Worker], prompts: Sequence[list[int]], run: Run) -> None:
    """Compare every sample's tokens with our own plain ones; the first difference of each prompt goes to `run`."""
    ours = next((worker for arm, worker in workers.items() if arm.library == "ours"), None)
    first = next((arm for arm in run.samples["one"] if run.samples["one"][arm]), None)
    if first is None:
        return
    run.tokens = run.samples["one"][first][0].tokens
    seen = set()
    for mode, arm, row, tokens in run.outputs():
        if tokens == run.tokens[row] or (mode, arm, row) in seen:
            continue
        seen.add((mode, arm, row))
        about = _difference(tokens, run.tokens[row], prompts[row], ours)
        counts = arm.library == "ours" or arm.depth == 0
        run.differences.append({"mode": mode, "arm": str(arm), "prompt": row, "counts": counts, **about})


def _difference(tokens: list[int], expected: list[int], prompt: list[int], ours: Worker | None) -> dict[str, Any]:
    at = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), None)
    if at is None:
        return {"at": min(len(tokens), len(expected)), "near_tie": False}
    found: dict[str, Any] = {"at": at, "token": tokens[at], "expected": expected[at], "near_tie": False}
    if ours is not None:
        request = {"op": "margin", "tokens": prompt + expected[:at], "a": expected[at], "b": tokens[at]}
        found["margin"] = ours.ask(request)["margin"]
        found["near_tie"] = abs(found["margin"]) < NEAR_TIE
    return found


# --- reporting ---------------------------------------------------------------------------------------------------


def summary(run: Run, mode: str) -> dict[str, Any]:
    """Medians of each arm, and its ratios to its peers."""
    found: dict[str, Any] = {}
    for arm, samples in run.samples[mode].items():
        rounds = sum(s.total("rounds") for s in samples)
        tokens = sum(len(t) for s in samples for t in s.tokens)
        found[str(arm)] = {
            "decode_tokens_per_second": Spread.of([s.decode_rate for s in samples]).to_dict(),
            "tokens_per_second_with_prefill": Spread.of([s.rate for s in samples]).to_dict(),
            "prefill_seconds": Spread.of([s.total("prefill_s") for s in samples]).to_dict(),
            "cpu_ms_per_token": round(1000 * sum(s.total("cpu_s") for s in samples) / tokens, 3),
            "rounds": rounds,
            "accepted_per_round": sum(s.total("accepted") for s in samples) / max(rounds, 1),
            "drafted_per_round": sum(s.total("drafted") for s in samples) / max(rounds, 1),
            "ratios": {
                str(peer): {name: spread.to_dict() for name, spread in ratio.items()}
                for peer in arm.peers()
                if (ratio := run.ratio(mode, arm, peer)) is not None
            },
        }
    return found


def checks(runs: Mapping[str, Run], depths: Sequence[int]) -> list[dict[str, Any]]:
    """Each acceptance target with what was measured. Met: the medians of both ratios, without and with prefill."""
    found = []
    for blas, run in runs.items():
        for target in targets(depths):
            check: dict[str, Any] = {"blas": blas, "target": str(target), "at_least": target.at_least, "met": None}
            if (ratio := run.ratio(target.mode, target.arm, target.peer)) is not None:
                check |= {name: spread.to_dict() for name, spread in ratio.items()}
                check["met"] = all(spread.median >= target.at_least for spread in ratio.values())
            found.append(check)
        wrong = [d for d in run.differences if d["counts"] and not d["near_tie"]]
        same = "identical tokens of all plain arms and of ours at every depth"
        found.append({"blas": blas, "target": same, "met": not wrong if run.tokens else None})
    return found


def show(run: Run, blas: str, console: Console) -> None:
    """One table per mode, then what differs and what was left out."""
    for mode, title in MODES.items():
        table = Table(title=f"{title}, {BLAS[blas]}", title_justify="left", title_style="bold")
        table.add_column("arm", no_wrap=True)
        for name in (
            "decode\ntokens/s",
            "with\nprefill",
            "prefill\nseconds",
            "CPU ms\nper token",
            "accepted\nper round",
        ):
            table.add_column(name, justify="right")
        table.add_column("ratio: decode (with prefill)", no_wrap=True)
        for arm, row in summary(run, mode).items():
            drafts = f"{row['accepted_per_round']:.2f} of {row['drafted_per_round']:.2f}"
            ratios = [f"{_span(r['decode'])} ({_span(r['with_prefill'])}) {p}" for p, r in row["ratios"].items()]
            table.add_row(
                arm,
                f"{row['decode_tokens_per_second']['median']:.1f}",
                f"{row['tokens_per_second_with_prefill']['median']:.1f}",
                f"{row['prefill_seconds']['median']:.2f}",
                f"{row['cpu_ms_per_token']:.2f}",
                drafts if row["drafted_per_round"] else "",
                "\n".join(ratios),
            )
        console.print(table)
    for name, reason in run.left_out.items():
        console.print(f"left out: {name}: {reason}", markup=False)
    if not run.differences and run.tokens:
        console.print(f"All arms gave the same tokens, {BLAS[blas]}.")
    for d in run.differences:
        what = "near tie" if d["near_tie"] else "DIFFERENT TOKENS"
        which = f"{d['token']}, expected {d['expected']}" if "token" in d else "one output ends"
        gap = f" (logits {d['margin']:.1e} apart)" if "margin" in d else ""
        line = f"{what}: {d['arm']} ({d['mode']}), prompt {d['prompt']} at {d['at']}: {which}{gap}"
        console.print(line, markup=False, highlight=False)


def _span(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f}x {spread['min']:.2f}-{spread['max']:.2f}"


def show_checks(found: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A line for each target."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    for check in found:
        line = f"{words[check['met']]}: {check['target']} ({BLAS[check['blas']]})"
        if "decode" in check:
            line += f": {_span(check['decode'])} decode, {_span(check['with_prefill'])} with prefill"
        if "at_least" in check:
            line += f"; target {check['at_least']:.1f}x"
        console.print(line, markup=False, highlight=False)


def record(
    args: argparse.Namespace, pair: Pair, prompts: tuple[str, list[list[int]]], runs: Mapping[str, Run]
) -> dict[str, Any]:
    """All of it, ready for JSON."""
    kind, ids = prompts
    return {
        "benchmark": "decode",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": common.describe_commit(),
        "machine": args.machine,
        "dtype": "float32",
        "pair": {
            "target": common.describe_checkpoint(pair.target),
            "drafter": common.describe_checkpoint(pair.drafter),
        },
        "prompts": {"kind": kind, "lengths": [len(p) for p in ids]},
        "new_tokens": args.new,
        "batch": len(ids),
        "depths": args.depths,
        "repeats": args.repeats,
        "checks": checks(runs, args.depths),
        "runs": {
            blas: {
                "environments": run.about,
                "left_out": run.left_out,
                "differences": run.differences,
                "summary": {mode: summary(run, mode) for mode in MODES},
                "samples": {
                    mode: {str(arm): [s.to_dict() for s in several] for arm, several in samples.items()}
                    for mode, samples in run.samples.items()
                },
                "tokens": run.tokens,
            }
            for blas, run in runs.items()
        },
    }


# --- command line ------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pair", metavar="DIR", help="the target, or a directory with target/ (default: the demo pair)")
    add("--drafter", metavar="DIR", help="the drafter (default: beside the target)")
    add("--depths", default="0,1,2,3", help="drafts per round, 0 is plain (default: %(default)s)")
    add("--blas", default="mlx,openblas", help="which to measure with (default: %(default)s)")
    add("--repeats", type=int, default=5, help="times every arm takes its turn (default: %(default)s)")
    add("--new", type=int, default=64, help="new tokens per prompt (default: %(default)s)")
    add("--peers-python", default=sys.executable, help="the Python that has mlx-vlm (default: this one)")
    add("--out", type=Path, help="the record (default: bench/results/decode-<date>-<host class>.json)")
    add("--json", action="store_true", help="print the record on stdout, the tables on stderr")
    add("--check", action="store_true", help="exit with 1 when a target is missed or not measured, or tokens differ")
    args = parser.parse_args(argv)
    try:
        args.depths = sorted({int(d) for d in args.depths.split(",")})
    except ValueError:
        parser.error(f"--depths is {args.depths!r}, expected numbers such as 0,1,3")
    args.blas = args.blas.split(",")
    if not set(args.blas) <= BLAS.keys():
        parser.error(f"--blas is {','.join(args.blas)!r}, expected some of {', '.join(BLAS)}")
    if args.new < 2 or args.repeats < 1 or not 0 <= args.depths[0] <= args.depths[-1] <= 8:
        parser.error("expected --new of at least 2, --repeats of at least 1 and --depths from 0 to 8")
    return args


def main() -> int:
    """Measure, show, record."""
    args = parse()
    shown = Console(stderr=args.json, width=None if sys.stdout.isatty() else 140)
    progress = Console(stderr=True, style="dim")
    try:
        pair = common.find_pair(args.pair, args.drafter)
    except ValueError as error:
        shown.print(str(error), markup=False)
        return 2
    args.machine = common.describe_machine()
    if (load := args.machine["load_at_start"]) > 0.3:
        shown.print(f"Others use this machine (load {load}): the figures will be noisy.")
    prompts = common.make_prompts(pair.target)
    runs: dict[str, Run] = {}
    for blas in args.blas:
        preload = common.find_openblas() if blas == "openblas" else None
        if blas == "openblas" and preload is None:
            shown.print("OpenBLAS skipped: it is not there (Debian, Ubuntu: apt-get install libopenblas0-pthread)")
            continue
        run = runs[blas] = Run()
        progress.print(BLAS[blas])
        with started(pair, args, preload, run) as workers:
            measure(workers, prompts[1], args, run, progress)
            compare_tokens(workers, prompts[1], run)
        show(run, blas, shown)
    data = record(args, pair, prompts, runs)
    show_checks(data["checks"], shown)
    out = args.out or common.result_file("decode")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(data, indent=1) + "\n")
    shown.print(f"record: {out}", markup=False, highlight=False)
    if args.json:
        print(json.dumps(data, indent=1))
    return 1 if args.check and not all(c["met"] for c in data["checks"]) else 0


if __name__ == "__main__":
    sys.exit(main())
