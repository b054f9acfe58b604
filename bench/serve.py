"""Serving side by side, in one run and on one pair, in float32: our engine, mlx-lm's and mlx-vlm's batch generators.

    python bench/serve.py --pair DIR --peers-python PYTHON --blas mlx,openblas

Prompts of 25 to 331 tokens, 64 new tokens each: all together in batches of 1 to 16, arriving one after another, and
arriving at random (Poisson). Prefill is included everywhere. Every arm has a process of its own and is warmed up in
every scenario; then the arms take turns, forwards and backwards, so that noise hits all alike. Knows nothing of how
a library is called: see serving.py.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import common
from common import Pair, Spread, Worker, WorkerError
from rich.console import Console
from rich.table import Table

BLAS = {"mlx": "MLX's own BLAS", "openblas": "OpenBLAS preloaded"}
BATCHES = (1, 2, 4, 8, 16)
ROWS = 8
APART_S = 0.3
PERCENTILES = (50, 90, 99)
OURS, PLAIN, LM, VLM, VLM_MTP = "ours", "ours, plain", "mlx-lm, plain", "mlx-vlm, plain", "mlx-vlm, MTP"


@dataclass(frozen=True)
class Scenario:
    """Prompts that arrive at given times, at most `rows` of them at work."""

    name: str
    prompts: list[list[int]]
    arrivals: list[float]
    rows: int

    def request(self, new: int) -> dict[str, Any]:
        """For a worker."""
        return {"prompts": self.prompts, "new": new, "arrivals": self.arrivals, "rows": self.rows}


def scenarios(prompts: list[list[int]], args: argparse.Namespace) -> list[Scenario]:
    """Those that were asked for."""
    found = []
    if "batch" in args.scenarios:
        for rows in args.batches:
            found.append(Scenario(f"batch {rows}", cycled(prompts, rows), [0.0] * rows, rows))
    if "apart" in args.scenarios:
        found.append(Scenario("apart", prompts[:ROWS], [i * APART_S for i in range(ROWS)], ROWS))
    if "poisson" in args.scenarios:
        draw, now, arrivals = random.Random(0), 0.0, []
        for _ in range(args.poisson):
            now += draw.expovariate(args.rate)
            arrivals.append(now)
        found.append(Scenario("poisson", cycled(prompts, args.poisson), arrivals, ROWS))
    return found


def cycled(prompts: list[list[int]], count: int) -> list[list[int]]:
    """`count` prompts; where they run out, they come again."""
    return [prompts[i % len(prompts)] for i in range(count)]


@dataclass(frozen=True)
class Sample:
    """One arm in one scenario, once."""

    data: dict[str, Any]
    arrivals: list[float]

    @property
    def rate(self) -> float:
        """New tokens per second, from the first arrival to the last token."""
        end = max(marks[-1][0] for marks in self.data["marks"])
        return float(sum(map(len, self.data["tokens"])) / (end - self.arrivals[0]))

    @property
    def first(self) -> list[float]:
        """Seconds from each arrival to the first token."""
        return [m[0][0] - at for m, at in zip(self.data["marks"], self.arrivals, strict=True)]

    @property
    def latency(self) -> list[float]:
        """Seconds from each arrival to the last token."""
        return [m[-1][0] - at for m, at in zip(self.data["marks"], self.arrivals, strict=True)]

    @property
    def between(self) -> list[float]:
        """Seconds between tokens, as they reach a reader: those that come together have nothing between them."""
        gaps = []
        for marks in self.data["marks"]:
            for (before, _), (now, count) in pairwise(marks):
                gaps += [now - before] + [0.0] * (count - 1)
        return gaps

    def to_dict(self) -> dict[str, Any]:
        """What was measured, without the tokens."""
        rest = {k: v for k, v in self.data.items() if k not in ("marks", "tokens")}
        return rest | {
            "tokens_per_second": round(self.rate, 3),
            "first_token_s": [round(x, 4) for x in self.first],
            "latency_s": [round(x, 4) for x in self.latency],
        }


Samples = dict[str, list[Sample]]


@dataclass
class Run:
    """What was measured with one BLAS."""

    samples: dict[str, Samples] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    acceptance: dict[str, float] = field(default_factory=dict)
    http: dict[str, Any] = field(default_factory=dict)
    different: list[str] = field(default_factory=list)

    def median(self, scenario: str, arm: str, what: str) -> float | None:
        """The median over the repeats of a sample's mean; None if it wasn't measured."""
        values = [_mean(getattr(s, what)) for s in self.samples.get(scenario, {}).get(arm, [])]
        return statistics.median(values) if values else None


def _mean(value: float | list[float]) -> float:
    return value if isinstance(value, float) else statistics.fmean(value)


# --- measuring ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(pair: Pair, args: argparse.Namespace, preload: Path | None, run: Run) -> Iterator[dict[str, Worker]]:
    """A worker for each arm. Arms that can't start are left out, with the reason in `run`."""
    arms = {
        OURS: ("ours", args.depth),
        PLAIN: ("ours", "0"),
        LM: ("mlx-lm", "0"),
        VLM: ("mlx-vlm", "0"),
        VLM_MTP: ("mlx-vlm", str(args.peer_depth)),
    }
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        copies = {
            "ours": pair.target,
            "mlx-lm": common.copy_for_mlx_lm(pair.target, Path(scratch) / "mlx-lm"),
            "mlx-vlm": common.copy_for_mlx_vlm(pair.target, Path(scratch) / "mlx-vlm"),
        }
        try:
            for arm, (library, depth) in arms.items():
                if args.arms and library not in args.arms:
                    continue
                python = args.peers_python if library == "mlx-vlm" else sys.executable
                command = [python, str(Path(__file__).with_name("serving.py")), library]
                command += ["--target", str(copies[library]), "--drafter", str(pair.drafter), "--depth", depth]
                if arm == OURS and args.tune_seconds:
                    command += ["--tune-seconds", str(args.tune_seconds)]
                try:
                    workers[arm] = Worker(command, preload)
                    run.about.setdefault(library, workers[arm].about)
                except WorkerError as error:
                    run.left_out[arm] = str(error)
            yield workers
        finally:
            for worker in workers.values():
                worker.close()


def measure(workers: Mapping[str, Worker], scenario: Scenario, args: argparse.Namespace, run: Run) -> None:
    """Warm every arm up, then let them take turns: one computes at a time."""
    able = dict(workers)
    for arm, worker in workers.items():
        try:
            for _ in range(args.warmups):
                worker.ask(scenario.request(args.new))
        except WorkerError as error:
            run.left_out[f"{arm} ({scenario.name})"] = str(error)
            del able[arm]
    samples: Samples = {arm: [] for arm in able}
    for repeat in range(args.repeats):
        for arm in list(able) if repeat % 2 == 0 else reversed(able):
            samples[arm].append(Sample(able[arm].ask(scenario.request(args.new)), scenario.arrivals))
    run.samples[scenario.name] = samples


@contextlib.contextmanager
def started_ours(library: str, pair: Pair, args: argparse.Namespace, preload: Path | None) -> Iterator[Worker]:
    """A worker of ours at the peers' depth: one that doesn't change, so that what differs isn't the depth."""
    command = [sys.executable, str(Path(__file__).with_name("serving.py")), library]
    command += ["--target", str(pair.target), "--drafter", str(pair.drafter), "--depth", str(args.peer_depth)]
    worker = Worker(command, preload)
    try:
        yield worker
    finally:
        worker.close()


def measure_acceptance(
    pair: Pair, prompts: list[list[int]], args: argparse.Namespace, preload: Path | None
) -> dict[str, float]:
    """Tokens per target forward and row at a fixed depth: of the rows alone, and of the same rows together."""
    rows = prompts[:ROWS]
    with started_ours("ours", pair, args, preload) as worker:
        alone = [worker.ask(Scenario("", [p], [0.0], 1).request(args.new)) for p in rows]
        together = worker.ask(Scenario("", rows, [0.0] * len(rows), ROWS).request(args.new))
    rounds = sum(a["row_rounds"] for a in alone)
    single = sum(a["tokens_per_forward"] * a["row_rounds"] for a in alone) / rounds
    return {
        "depth": args.peer_depth,
        "alone": round(single, 5),
        "together": round(together["tokens_per_forward"], 5),
        "ratio": round(together["tokens_per_forward"] / single, 5),
    }


def measure_http(
    pair: Pair, prompts: list[list[int]], args: argparse.Namespace, preload: Path | None
) -> dict[str, Any]:
    """What HTTP and text cost: tokens per second of 8 streams through the server and straight from its engine.

    The two ways take turns in one process. Streams are as long as elsewhere, and four times as long: of short ones,
    much is their start, when requests that come one after the other take more steps than those submitted together.
    """
    scenario = Scenario("", cycled(prompts, ROWS), [0.0] * ROWS, ROWS)
    found: dict[str, Any] = {"depth": args.peer_depth, "repeats": args.http}
    with started_ours("ours-http", pair, args, preload) as worker:
        for new in (args.new, 4 * args.new):
            answers = [worker.ask(scenario.request(new)) for _ in range(args.warmups + args.http)][args.warmups :]
            found[f"{new} tokens"] = {
                "overhead": round(statistics.median(_overhead(a, scenario) for a in answers), 4),
                **{way: _way([a[way] for a in answers], scenario) for way in ("engine", "http")},
            }
    return found | {"overhead": found[f"{4 * args.new} tokens"]["overhead"]}


def _overhead(answer: Mapping[str, Any], scenario: Scenario) -> float:
    return 1 - Sample(answer["http"], scenario.arrivals).rate / Sample(answer["engine"], scenario.arrivals).rate


def _way(runs: Sequence[dict[str, Any]], scenario: Scenario) -> dict[str, Any]:
    """Throughput; medians of the engine's steps and of processor seconds: the process's, of which its server's thread
    took `loop_s`, and the client's, which is a user's affair but ran on the same cores.
    """
    rates = Spread.of([Sample(run, scenario.arrivals).rate for run in runs])
    whats = ("steps", "process_s", "loop_s", "client_s")
    return {
        "tokens_per_second": rates.to_dict(),
        **{what: round(float(statistics.median(run[what] for run in runs)), 4) for what in whats},
    }


def compare_tokens(run: Run) -> None:
    """Note which arms gave other tokens than our plain decoding: rounding may tip near ties."""
    for name, samples in run.samples.items():
        base = samples.get(PLAIN) or samples.get(OURS)
        if not base:
            continue
        wanted = base[0].data["tokens"]
        for arm, several in samples.items():
            rows = {i for s in several for i, t in enumerate(s.data["tokens"]) if t != wanted[i]}
            if rows:
                run.different.append(f"{arm} ({name}): {len(rows)} of {len(wanted)} outputs")


# --- reporting ---------------------------------------------------------------------------------------------------


def checks(runs: Mapping[str, Run]) -> list[dict[str, Any]]:
    """Each acceptance target with what was measured: medians of the repeats."""
    found: list[dict[str, Any]] = []

    def check(blas: str, what: str, value: float | None, limit: float, *, least: bool) -> None:
        met = None if value is None else value >= limit if least else value <= limit
        sign = "at_least" if least else "at_most"
        found.append({"blas": blas, "target": what, sign: limit, "measured": value, "met": met})

    for blas, run in runs.items():
        name = f"batch {ROWS}"
        mtp, plain = (3.0, 1.3) if blas == "mlx" else (5.0, 1.2)
        ours, peer = run.median(name, OURS, "rate"), run.median(name, VLM_MTP, "rate")
        check(blas, "8 together, throughput over mlx-vlm's MTP", _ratio(ours, peer), mtp, least=True)
        plains = [r for arm in (LM, VLM) if (r := run.median(name, arm, "rate")) is not None]
        best = max(plains) if len(plains) == 2 else None
        check(blas, "8 together, throughput over the better plain peer", _ratio(ours, best), plain, least=True)
        for what, title, limit in (
            ("latency", "8 arriving 0.3 s apart, mean latency over mlx-vlm's MTP", 0.5),
            ("first", "8 arriving 0.3 s apart, mean time to first token over mlx-vlm's MTP", 0.4),
        ):
            if blas == "mlx":
                pair = run.median("apart", OURS, what), run.median("apart", VLM_MTP, what)
                check(blas, title, _ratio(*pair), limit, least=False)
        if run.http:
            check(blas, "8 streams, share lost to HTTP and text", run.http["overhead"], 0.03, least=False)
        check(blas, "tokens per forward and row, together over alone", run.acceptance.get("ratio"), 0.98, least=True)
    return found


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def summary(samples: Samples) -> dict[str, Any]:
    """Medians and spreads of each arm; percentiles over all requests and repeats, in seconds."""
    found: dict[str, Any] = {}
    for arm, several in samples.items():
        first = [x for s in several for x in s.first]
        between = [x for s in several for x in s.between]
        found[arm] = {
            "tokens_per_second": Spread.of([s.rate for s in several]).to_dict(),
            "mean_first_token_s": Spread.of([_mean(s.first) for s in several]).to_dict(),
            "mean_latency_s": Spread.of([_mean(s.latency) for s in several]).to_dict(),
            "first_token_percentiles_s": percentiles(first),
            "between_tokens_percentiles_s": percentiles(between),
            "cpu_s": Spread.of([s.data["cpu_s"] for s in several]).to_dict(),
        }
    return found


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The nearest-rank percentiles of PERCENTILES."""
    ordered = sorted(values)
    return {f"p{p}": round(ordered[-(-p * len(ordered) // 100) - 1], 4) for p in PERCENTILES} if ordered else {}


def show(run: Run, blas: str, console: Console) -> None:
    """A table for every scenario."""
    for name, samples in run.samples.items():
        table = Table(title=f"{name}, {BLAS[blas]}", title_justify="left", title_style="bold")
        table.add_column("arm", no_wrap=True)
        titles = (
            "tokens/s",
            "(min-max)",
            "first token\nmean s",
            "p90 s",
            "latency\nmean s",
            "between\np50 ms",
            "p99 ms",
        )
        for title in titles:
            table.add_column(title, justify="right")
        for arm, row in summary(samples).items():
            rate, between = row["tokens_per_second"], row["between_tokens_percentiles_s"]
            table.add_row(
                arm,
                f"{rate['median']:.1f}",
                f"{rate['min']:.0f}-{rate['max']:.0f}",
                f"{row['mean_first_token_s']['median']:.2f}",
                f"{row['first_token_percentiles_s']['p90']:.2f}",
                f"{row['mean_latency_s']['median']:.2f}",
                f"{1000 * between['p50']:.1f}" if between else "",
                f"{1000 * between['p99']:.1f}" if between else "",
            )
        console.print(table)
    for name, reason in run.left_out.items():
        console.print(f"left out: {name}: {reason}", markup=False)
    for line in run.different:
        console.print(f"other tokens: {line}", markup=False, highlight=False)


def show_checks(found: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A line for each target."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    for check in found:
        limit = f"at least {check['at_least']}" if "at_least" in check else f"at most {check['at_most']}"
        value = "" if check["measured"] is None else f": {check['measured']:.3f}"
        line = f"{words[check['met']]}: {check['target']} ({BLAS[check['blas']]}){value}; target {limit}"
        console.print(line, markup=False, highlight=False)


def record(
    args: argparse.Namespace, pair: Pair, prompts: tuple[str, list[list[int]]], runs: Mapping[str, Run]
) -> dict[str, Any]:
    """All of it, ready for JSON."""
    kind, ids = prompts
    return {
        "benchmark": "serve",
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
        "rows": ROWS,
        "apart_s": APART_S,
        "poisson": {"requests": args.poisson, "per_second": args.rate, "seed": 0},
        "depth": {OURS: args.depth, VLM_MTP: args.peer_depth},
        "tune_seconds": args.tune_seconds,
        "repeats": args.repeats,
        "checks": checks(runs),
        "runs": {
            blas: {
                "environments": run.about,
                "left_out": run.left_out,
                "different_tokens": run.different,
                "tokens_per_forward": run.acceptance,
                "http": run.http,
                "summary": {name: summary(samples) for name, samples in run.samples.items()},
                "samples": {
                    name: {arm: [s.to_dict() for s in several] for arm, several in samples.items()}
                    for name, samples in run.samples.items()
                },
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
    add("--depth", default="auto", help="our drafts per round (default: %(default)s)")
    add("--tune-seconds", type=float, default=0.0, help="measure costs first, as `tune` does (default: not)")
    add("--peer-depth", type=int, default=3, help="mlx-vlm's drafts per round (default: %(default)s)")
    add("--blas", default="mlx,openblas", help="which to measure with (default: %(default)s)")
    add("--scenarios", default="batch,apart,poisson,acceptance", help="which to measure (default: %(default)s)")
    add("--batches", default=",".join(map(str, BATCHES)), help="batch sizes (default: %(default)s)")
    add("--arms", default="", help="libraries to run: ours,mlx-lm,mlx-vlm (default: all)")
    add("--poisson", type=int, default=24, help="requests that arrive at random (default: %(default)s)")
    add("--rate", type=float, default=1.0, help="of them per second (default: %(default)s)")
    add("--warmups", type=int, default=3, help="runs before the repeats, for compiling (default: %(default)s)")
    add("--http", type=int, default=0, metavar="N", help="measure the server's overhead, N times (default: not)")
    add("--repeats", type=int, default=3, help="times every arm takes its turn (default: %(default)s)")
    add("--new", type=int, default=64, help="new tokens per prompt (default: %(default)s)")
    add("--peers-python", default=sys.executable, help="the Python that has mlx-vlm (default: this one)")
    add("--out", type=Path, help="the record (default: bench/results/serve-<date>-<host class>.json)")
    add("--check", action="store_true", help="exit with 1 when a target is missed or not measured")
    args = parser.parse_args(argv)
    args.blas, args.scenarios = args.blas.split(","), args.scenarios.split(",")
    args.arms = args.arms.split(",") if args.arms else []
    try:
        args.batches = sorted({int(b) for b in args.batches.split(",")})
    except ValueError:
        parser.error(f"--batches is {args.batches!r}, expected numbers such as 1,8")
    for name, known in (("blas", set(BLAS)), ("scenarios", {"batch", "apart", "poisson", "acceptance"})):
        if not set(getattr(args, name)) <= known:
            parser.error(f"--{name} is {','.join(getattr(args, name))!r}, expected some of {', '.join(sorted(known))}")
    if args.new < 2 or args.repeats < 1 or args.batches[0] < 1:
        parser.error("expected --new of at least 2, --repeats of at least 1 and --batches of at least 1")
    return args


def main() -> int:
    """Measure, show, record."""
    args = parse()
    shown = Console(width=None if sys.stdout.isatty() else 140)
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
        with started(pair, args, preload, run) as workers:
            for scenario in scenarios(prompts[1], args):
                progress.print(f"{BLAS[blas]}: {scenario.name}")
                measure(workers, scenario, args, run)
        if "acceptance" in args.scenarios:
            progress.print(f"{BLAS[blas]}: tokens per forward")
            run.acceptance = measure_acceptance(pair, prompts[1], args, preload)
        if args.http:
            progress.print(f"{BLAS[blas]}: HTTP")
            run.http = measure_http(pair, prompts[1], args, preload)
        compare_tokens(run)
        show(run, blas, shown)
    data = record(args, pair, prompts, runs)
    show_checks(data["checks"], shown)
    out = args.out or common.result_file("serve")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(data, indent=1) + "\n")
    shown.print(f"record: {out}", markup=False, highlight=False)
    return 1 if args.check and not all(c["met"] for c in data["checks"]) else 0


if __name__ == "__main__":
    sys.exit(main())
