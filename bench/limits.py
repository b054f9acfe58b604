"""How close decoding comes to what its parts cost on this machine, and where the rest goes.

    python bench/limits.py --pairs demo,random --blas mlx,openblas [--what ratios] [--under "nice -n -5"]

ideal = tokens per round / (verify forward alone + K x the marginal drafter step inside one graph), nothing waited for.
achieved: through the scheduler at a fixed depth. Both, and what lies between them (the round as one queued graph, the
same read every time), are measured in turns within each repeat: a ratio is of one repeat, and its median is shown.
`demo` decodes chats, `random` (60 million parameters) disordered ids. Times count, not what is accepted: the parts' K/V
are zeros, and a pair's acceptance is the same in ideal and achieved. `--check` exits with 1 unless all ratios of
rounds with drafts reach 0.92 and the host builds graphs fast enough. Every BLAS and pair has a process of its own,
which takes about a minute; what it found is shown and recorded before the next one begins.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import rounds
from rich.console import Console
from rich.table import Table

BLAS = {"mlx": "MLX's own BLAS", "openblas": "OpenBLAS preloaded"}
RATIO, STEP_MS, FORWARD_MS = 0.92, 0.25, 3.0
"""What is to be reached: achieved / ideal; host time of a drafter step and of a forward of 35 layers."""
WHAT = ("ratios", "parts", "host")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one process measures: `what` of a pair (none for `host`) with one BLAS."""

    what: str
    blas: str
    pair: str = ""

    def __str__(self) -> str:
        return f"{BLAS[self.blas]}: {self.what}" + (f" of {self.pair}" if self.pair else "")


def tasks(args: Any) -> list[Task]:
    """All that is asked for: first what says whether the limit is reached."""
    found = [Task(what=w, blas=b, pair=p) for w in WHAT[:2] if w in args.what for b in args.blas for p in args.pairs]
    return found + [Task(what="host", blas=b) for b in args.blas if "host" in args.what]


def in_process(task: Task, args: Any, argv: Sequence[str]) -> tuple[dict[str, Any], int]:
    """What a task asks for, measured in a process of its own, and its exit code: what was there before it failed."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.json"
        env = dict(os.environ)
        if task.blas == "openblas":
            env["LD_PRELOAD"] = str(common.find_openblas())
        one = ("--task", json.dumps(dataclasses.asdict(task)), "--out", str(out))
        command = [*shlex.split(args.under), sys.executable, __file__, *argv, *one]
        code = subprocess.run(command, env=env, check=False).returncode
        return json.loads(out.read_text()) if out.exists() else {}, code


def merged(runs: dict[str, Any], task: Task, found: Mapping[str, Any]) -> None:
    """Add what a task has found to the runs, which are by BLAS."""
    run = runs.setdefault(task.blas, {"pairs": {}, "host": None})
    if task.what == "host":
        run["host"] = found["host"]
    else:
        empty: dict[str, Any] = {"parameters": None, "configurations": [], "parts": {}, "memory": []}
        run["pairs"].setdefault(task.pair, empty).update(found)


# --- reporting ---------------------------------------------------------------------------------------------------


def checks(runs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was to be reached, and whether it was."""
    found = []
    for blas, run in runs.items():
        for name, pair in run["pairs"].items():
            for c in (c for c in pair["configurations"] if c["depth"]):
                where = {"blas": blas, "pair": name, "batch": c["batch"], "depth": c["depth"]}
                found.append({**where, "ratio": c["ratio"]["median"], "met": c["ratio"]["median"] >= RATIO})
        for what, limit in (("forward_35_layers_ms", FORWARD_MS), ("drafter_step_ms", STEP_MS)):
            if run["host"] is not None:
                found.append({"blas": blas, "host": what, "ms": run["host"][what], "met": run["host"][what] <= limit})
    return found


def show(task: Task, found: Mapping[str, Any], console: Console) -> None:
    """What a task has found, in a table or a line; parts are only recorded."""
    if "configurations" in found:
        console.print(table(found["configurations"], f"{task.pair}, {BLAS[task.blas]}"))
    if "host" in found:
        console.print(
            f"host, {BLAS[task.blas]}: {found['host']['forward_35_layers_ms']:.2f} ms for a forward of 35 layers, "
            f"{found['host']['drafter_step_ms']:.3f} ms for a drafter step",
            highlight=False,
        )


def table(configurations: Sequence[Mapping[str, Any]], title: str) -> Table:
    """A line for each batch and depth."""
    shown = Table(title=title, title_justify="left", title_style="bold")
    names = ("batch", "depth", "tokens\nper round", "forward\nms", "step\nms", "ideal\ntokens/s", "achieved\ntokens/s")
    rest = ("ratio", "rest: round\nms", "reading\nms", "scheduler\nms")
    for column in (*names, *rest):
        shown.add_column(column, justify="right")
    for c in configurations:
        gaps = c["rest_ms"]
        shown.add_row(
            str(c["batch"]),
            str(c["depth"]),
            f"{c['tokens_per_round']:.2f}",
            f"{c['ms']['forward']['median']:.2f}",
            f"{c['ms']['step']['median']:.2f}" if c["depth"] else "",
            f"{c['ideal_tokens_per_second']:.0f}",
            f"{c['achieved_tokens_per_second']:.0f}",
            f"{c['ratio']['median']:.2f} ({c['ratio']['min']:.2f}-{c['ratio']['max']:.2f})",
            f"{gaps['round_beyond_parts']:+.2f}",
            f"{gaps['reading']:+.2f}",
            f"{gaps['scheduler']:+.2f}",
        )
    return shown


def record(args: Any, machine: Mapping[str, Any], runs: Mapping[str, Any]) -> dict[str, Any]:
    """All of it, ready for JSON."""
    return {
        "benchmark": "limits",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": common.describe_commit(),
        "machine": machine,
        "versions": {name: version(name) for name in ("mlx", "mlx-gemma-mtp")},
        "dtype": "float32",
        "context": args.context,
        "repeats": args.repeats,
        "rounds": args.rounds,
        "under": args.under,
        "checks": checks(runs),
        "runs": runs,
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", default="demo,random", help="demo, random or directories (default: %(default)s)")
    add("--blas", default="mlx,openblas", help="which to measure with (default: %(default)s)")
    add("--batches", default="1,8")
    add("--depths", default="0,3")
    add("--what", default=",".join(WHAT), help="which of them to measure (default: %(default)s)")
    add("--context", type=int, default=32, help="tokens that rows begin with (default: %(default)s)")
    add("--contexts", default="1024,4000", help="for parts and memory (default: %(default)s)")
    add("--repeats", type=int, default=400, help="at most (default: %(default)s)")
    add("--seconds", type=float, default=40, help="of repeats, in each process (default: %(default)s)")
    add("--rounds", type=int, default=24, help="of the scheduler in a sample, at most (default: %(default)s)")
    add("--queue", type=int, default=24, help="runs of a part in a sample, at most (default: %(default)s)")
    add("--sample", type=float, default=0.05, help="seconds after which a sample has fewer (default: %(default)s)")
    add("--under", default="", metavar="CMD", help="run each measuring process by this command, e.g. nice -n -5")
    add("--out", type=Path, help="the record (default: bench/results/limits-<date>-<host class>.json)")
    add("--check", action="store_true", help="exit with 1 when a target is missed")
    add("--task", type=lambda text: Task(**json.loads(text)), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in ("pairs", "blas", "what"):
        setattr(args, name, getattr(args, name).split(","))
    for name in ("batches", "depths", "contexts"):
        setattr(args, name, [int(part) for part in getattr(args, name).split(",") if part])
    if not set(args.blas) <= BLAS.keys():
        parser.error(f"--blas is {','.join(args.blas)!r}, expected some of {', '.join(BLAS)}")
    if not set(args.what) <= set(WHAT):
        parser.error(f"--what is {','.join(args.what)!r}, expected some of {', '.join(WHAT)}")
    return args


def main() -> int:
    """Measure, show, record: after every process."""
    args, progress = parse(), Console(stderr=True, style="dim")
    if args.task:
        for found in rounds.measure(args.task.what, args.task.pair, args):
            args.out.write_text(json.dumps(found))
        return 0
    if "openblas" in args.blas and common.find_openblas() is None:
        progress.print("OpenBLAS skipped: it is not there (Debian, Ubuntu: apt-get install libopenblas0-pthread)")
        args.blas.remove("openblas")
    console, out = Console(width=None if sys.stdout.isatty() else 150), args.out or common.result_file("limits")
    machine, runs, failed = common.describe_machine(), dict[str, Any](), False
    out.parent.mkdir(parents=True, exist_ok=True)
    for task in tasks(args):
        progress.print(str(task), highlight=False)
        found, code = in_process(task, args, sys.argv[1:])
        if code:
            progress.print(f"  ended with status {code}", highlight=False)
            failed = True
        if found:
            merged(runs, task, found)
            show(task, found, console)
            out.write_text(json.dumps(record(args, machine, runs), indent=1) + "\n")
    console.print(f"record: {out}", markup=False, highlight=False)
    return int(failed or (args.check and not all(c["met"] for c in checks(runs))))


if __name__ == "__main__":
    sys.exit(main())
