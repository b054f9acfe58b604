"""All benchmarks, one after the other, each in a process of its own; records go to bench/results.

    python bench/run_all.py --peers-python ~/vlm/bin/python [--e2b /tmp/e2b] [--only limits,decode] [--dry-run]

Ours and the peers' take turns inside each benchmark, which also sees to both BLAS. What fails is told at the end and
doesn't keep the others from running. Then README.md's tables and the plots are made anew. The cost of a conversion
needs a checkpoint of 10 GB: python bench/make_e2b_layout.py /tmp/e2b.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import common

BENCH = Path(__file__).resolve().parent
ENVIRONMENTS = {"mlx": "MLX's own BLAS", "openblas": "OpenBLAS"}
DEPTH = {
    ("demo", "mlx"): ("--repeats", "128,16,12"),
    ("demo", "openblas"): (),
    ("random", "mlx"): ("--repeats", "8,4,4", "--new", "24", "--slice", "150"),
    ("random", "openblas"): ("--repeats", "16,8,6", "--warmups", "2", "--slice", "150"),
}
"""How long `depth.py` measures, by pair and BLAS: 6 to 25 minutes each."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command. `name` is what --only takes; `preload`: a BLAS, for those that don't see to it themselves."""

    name: str
    command: tuple[str, ...]
    preload: Path | None = None

    def __str__(self) -> str:
        before = f"LD_PRELOAD={self.preload} " if self.preload else ""
        return before + shlex.join(self.command)


def jobs(args: argparse.Namespace) -> list[Job]:
    """All that --only lets through, in order: short ones first where they say what the others suffer from."""
    openblas = common.find_openblas() if "openblas" in args.blas else None
    blas = [b for b in args.blas if b != "openblas" or openblas]
    both, peers = ("--blas", ",".join(blas)), ("--peers-python", args.peers_python)
    few = {
        "limits": ("--repeats", "2", "--batches", "1", "--depths", "0,3", "--contexts", "1024"),
        "decode": ("--repeats", "1", "--new", "16"),
        "context": ("--repeats", "1", "--contexts", "1024,8192", "--quick"),
        "serve": ("--repeats", "1", "--new", "16", "--warmups", "1", "--scenarios", "batch", "--batches", "1,4"),
        "depth": (
            *("--repeats", "2", "--new", "32", "--batches", "1", "--depths", "0,1,2", "--warmups", "1"),
            *("--tune-seconds", "20"),
        ),
        "shared-noise": ("--repeats", "1", "--temperatures", "0.8", "--tokens", "32"),
    }

    def job(name: str, script: str, *options: str, record: str = "", preload: Path | None = None) -> Job:
        out = args.out / common.result_file(record or name).name
        more = few.get(name, ()) if args.quick else ()
        command = (sys.executable, str(BENCH / script), *options, *more, "--out", str(out))
        return Job(name=name, command=command, preload=preload)

    found = [job("limits", "limits.py", *both), job("decode", "decode.py", "--depths", "0,1,2,3,4", *both, *peers)]
    found.append(job("context", "context.py", *both))
    for pair in ("demo", "random"):
        for b in blas:
            preload = openblas if b == "openblas" else None
            options = ("--pair", pair, "--tune", *DEPTH[pair, b])
            found.append(job("depth", "depth.py", *options, record=f"depth-{pair}-{b}", preload=preload))
    found.append(job("serve", "serve.py", *both, *peers))
    found.append(job("acceptance", "convert.py", "acceptance"))
    found.append(job("shared-noise", "acceptance.py"))
    if args.e2b:
        found.append(job("convert", "convert.py", "cost", str(args.e2b), "--repeats", "1" if args.quick else "3"))
    if args.out == common.RESULTS and not args.quick:
        found.append(Job(name="tables", command=(sys.executable, str(BENCH / "tables.py"))))
        found.append(Job(name="plots", command=(sys.executable, str(BENCH / "plot.py"))))
    return [j for j in found if not args.only or j.name in args.only]


def run(job: Job) -> int:
    """The exit code of a job; it uses this checkout, wherever the package is installed."""
    path = os.pathsep.join([str(common.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    preload = {"LD_PRELOAD": str(job.preload)} if job.preload else {}
    return subprocess.run(job.command, env={**os.environ, "PYTHONPATH": path, **preload}, check=False).returncode


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--only",
        default="",
        help="limits, decode, context, depth, serve, acceptance, shared-noise, convert, tables, plots",
    )
    add("--blas", default="mlx,openblas", help="which to measure with (default: %(default)s)")
    add("--peers-python", default=sys.executable, help="the Python that has mlx-vlm (default: this one)")
    add("--e2b", type=Path, metavar="DIR", help="the checkpoint to convert; without it that benchmark is left out")
    add("--out", type=Path, default=common.RESULTS, help="where records go (default: bench/results)")
    add("--quick", action="store_true", help="few repeats and tokens: does it all run? Records are no good")
    add("--dry-run", action="store_true", help="only print the commands")
    args = parser.parse_args(argv)
    args.blas, args.only = args.blas.split(","), args.only.split(",") if args.only else []
    if not set(args.blas) <= ENVIRONMENTS.keys():
        parser.error(f"--blas is {','.join(args.blas)!r}, expected some of {', '.join(ENVIRONMENTS)}")
    if args.quick and args.out == common.RESULTS:
        parser.error("--quick needs --out: its records don't belong in bench/results")
    return args


def main() -> int:
    """Run all; 1 if any failed."""
    args = parse()
    chosen, failed = jobs(args), list[Job]()
    args.out.mkdir(parents=True, exist_ok=True)
    if unknown := set(args.only) - {j.name for j in chosen}:
        print(f"nothing to run for --only {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    for number, job in enumerate(chosen, start=1):
        print(f"[{number}/{len(chosen)}] {job}", flush=True)
        if args.dry_run:
            continue
        begin = time.perf_counter()
        if run(job):
            failed.append(job)
        print(f"{'FAILED' if job in failed else 'done'} after {time.perf_counter() - begin:.0f} s", flush=True)
    for job in failed:
        print(f"failed: {job}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
