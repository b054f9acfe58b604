"""What a conversion costs, and what it does to a pair.

    python bench/make_e2b_layout.py /tmp/e2b && python bench/convert.py cost /tmp/e2b [--repeats 3] [--check]
    python bench/convert.py acceptance [PAIR]

`cost`: time and memory of a conversion to 4 bits, ours and mlx-lm's, on the same input in one run. Each conversion is
a process of its own; they take turns. Time is the process's wall clock, memory its peak resident set as the kernel
counts it (mapped pages included). Ours also copies vision and audio, hashes input and output and makes everything
durable, which mlx-lm doesn't. Before each, earlier writes are flushed and the load is recorded. For shared machines:
`--pause S` waits in between, `--prefix CMD` runs each under CMD, and `--note` says in the record what CMD does.
`--check` exits with 1 unless ours takes less than 3.5 GB, at most half of mlx-lm's memory, and no more time (medians).

`acceptance`: fidelity and acceptance of the demo pair (or PAIR) for every combination of target and drafter recipe, on
the chats in prompts.json and on the converter's built-in prompts. `-g32` are affine groups of 32, for widths that 64
doesn't divide.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
from tables import accepted

from mlx_gemma_mtp.convert import convert

LIMIT = 3_500_000_000
RECIPES = ("8bit", "4bit", "mxfp4", "nvfp4")
NARROW = {f"{bits}bit-g32": f"default = {{ bits = {bits}, group_size = 32 }}\n" for bits in (8, 4)}


def run(command: Sequence[str], log: Path) -> dict[str, float]:
    """Wall seconds, processor seconds and peak resident bytes of a command. Raises SystemExit if it fails."""
    begin = time.perf_counter()
    with log.open("w") as f:
        process = os.posix_spawn(
            command[0],
            list(command),
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, f.fileno(), 1), (os.POSIX_SPAWN_DUP2, f.fileno(), 2)],
        )
        _, status, usage = os.wait4(process, 0)
    wall = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "wall_s": round(wall, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_bytes": usage.ru_maxrss * unit,
    }


def commands(source: Path, out: Path) -> dict[str, list[str]]:
    """What is compared."""
    python = sys.executable
    ours = [python, "-m", "mlx_gemma_mtp", "convert", str(source), "--drafter", "none", "--no-measure", "-q", "4bit"]
    theirs = [python, "-m", "mlx_lm", "convert", "--hf-path", str(source), "-q", "--q-bits", "4", "--mlx-path"]
    return {"ours": [*ours, "--out", str(out / "ours")], "mlx-lm": [*theirs, str(out / "mlx-lm")]}


def size_of(directory: Path) -> int:
    return sum(f.stat().st_size for f in directory.glob("*.safetensors"))


def measure(source: Path, repeats: int, pause: float, prefix: Sequence[str]) -> dict[str, Any]:
    """All samples and their summary; outputs are deleted."""
    samples: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        for repeat in range(repeats):
            order = list(commands(source, Path(scratch)).items())
            for name, command in order if repeat % 2 == 0 else reversed(order):
                os.sync()
                time.sleep(pause)
                load = os.getloadavg()[0]
                sample = run([*prefix, *command], Path(scratch) / "log") | {"load_before": round(load, 2)}
                sample["output_bytes"] = size_of(Path(scratch) / name)
                shutil.rmtree(Path(scratch) / name)
                samples.setdefault(name, []).append(sample)
                print(name, json.dumps(sample), flush=True)
    return {"samples": samples, "median": {name: medians(rows) for name, rows in samples.items()}}


def medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def cost(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both conversions in turns."""
    source = arguments.source.resolve()
    prefix = shlex.split(arguments.prefix)
    found = measure(source, arguments.repeats, arguments.pause, prefix)
    ours, theirs = found["median"]["ours"], found["median"]["mlx-lm"]
    return {
        "input": {"layout": "gemma-4-E2B-it", "bytes": size_of(source), "values": "random"},
        "recipe": "4 bits, affine, groups of 64",
        "repeats": arguments.repeats,
        "pause_s": arguments.pause,
        "prefix": arguments.prefix,
        "note": arguments.note,
        **found,
        "met": {
            "peak_below_3.5_gb": ours["peak_rss_bytes"] < LIMIT,
            "at_most_half_the_memory": ours["peak_rss_bytes"] * 2 <= theirs["peak_rss_bytes"],
            "no_slower": ours["wall_s"] <= theirs["wall_s"],
        },
    }


def acceptance(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every combination of recipes, on both sets of prompts."""
    pair = arguments.source.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for name, text in NARROW.items():
            (place / f"{name}.toml").write_text(text)
        narrow = [str(place / f"{name}.toml") for name in NARROW]

        def measured(prompts: Path | None) -> dict[str, Any]:
            record = convert(
                pair,
                place / "out",
                quantize=RECIPES[0],
                drafter_quantize=RECIPES[0],
                compare=[*RECIPES[1:], *narrow],
                compare_drafter=RECIPES[1:],
                prompts=prompts,
                force=True,
            )
            return dict(record["measured"])

        unquantized = {
            Path(name).stem: {role: sorted(plan[role]["unquantized"]) for role in ("target", "drafter")}
            for name in (*RECIPES, *narrow)
            for plan in [convert(pair, place / "none", quantize=name, drafter_quantize=name, dry_run=True)]
        }
        return {
            "pair": common.describe_checkpoint(pair),
            "drafter": common.describe_checkpoint(pair / "drafter"),
            "measured": measured(common.ROOT / "bench" / "prompts.json"),
            "measured_built_in": measured(None),
            "unquantized": unquantized,
        }


def main() -> None:
    """Measure, write the record, check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    kinds = parser.add_subparsers(dest="kind", required=True)
    costing = kinds.add_parser("cost")
    costing.add_argument("source", type=Path)
    costing.add_argument("--repeats", type=int, default=1)
    costing.add_argument("--check", action="store_true")
    costing.add_argument("--pause", type=float, default=0)
    costing.add_argument("--prefix", default="", help="a command that runs the command behind it")
    costing.add_argument("--note", default="", help="goes into the record")
    accepting = kinds.add_parser("acceptance")
    accepting.add_argument("source", type=Path, nargs="?", default=common.DEMO)
    for each in (costing, accepting):
        each.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    name = {"cost": "convert", "acceptance": "acceptance"}[arguments.kind]
    record: dict[str, Any] = {
        "benchmark": name,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": common.describe_commit(),
        "machine": common.describe_machine(),
        "versions": {package: version(package) for package in ("mlx", "mlx-lm", "mlx-gemma-mtp")},
    }
    record |= cost(arguments) if arguments.kind == "cost" else acceptance(arguments)
    out = arguments.out or common.result_file(name)
    out.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.kind == "cost":
        print(json.dumps(record["met"]))
    else:
        print(accepted(record["measured"]), accepted(record["measured_built_in"]), sep="\n\n")
    print(out)
    if arguments.kind == "cost" and arguments.check and not all(record["met"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
