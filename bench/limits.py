"""How close decoding comes to what its parts cost on this machine, and where the rest goes.

    python bench/limits.py --pairs demo,random --blas mlx,openblas

ideal = tokens per round / (verify forward alone + K x the marginal drafter step inside one graph), nothing waited for.
achieved: through the scheduler at a fixed depth. Both, and what lies between them (the round as one queued graph, the
same read every time), are measured in turns within each repeat: a ratio is of one repeat, and its median is shown.
`demo` decodes chats, `random` (60 million parameters) disordered ids. Times count, not what is accepted: the parts' K/V
are zeros, and a pair's acceptance is the same in ideal and achieved. `--check` exits with 1 unless all ratios at the
batches 1 and 8 reach 0.92 and the host builds graphs fast enough.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import mlx.core as mx
import pairs
from common import Spread
from parts import Parts, counts
from rich.console import Console
from rich.table import Table

from mlx_gemma_mtp.cache import KVCache
from mlx_gemma_mtp.depth import FixedDepth
from mlx_gemma_mtp.loading import Loaded, load_pair
from mlx_gemma_mtp.prefix import PrefixCache
from mlx_gemma_mtp.request import Request
from mlx_gemma_mtp.scheduler import Scheduler
from mlx_gemma_mtp.speculative import Block

BLAS = {"mlx": "MLX's own BLAS", "openblas": "OpenBLAS preloaded"}
RATIO, STEP_MS, FORWARD_MS = 0.92, 0.25, 3.0
"""What is to be reached: achieved / ideal; host time of a drafter step and of a forward of 35 layers."""
_LONGEST = 16  # tokens of a forward in one row; rounds' are at most 9
_WARM = 3


class Decoding:
    """One batch at one depth, decoding without end through a scheduler."""

    def __init__(self, parts: Parts, prefixes: PrefixCache, prompts: list[list[int]], depth: int) -> None:
        self._parts, self._prefixes, self._prompts, self._depth = parts, prefixes, prompts, depth
        self.tokens = self.rounds = 0

    def sample(self, rounds: int) -> float:
        """Seconds per round of `rounds` rounds of all rows, behind some that warm up."""
        config = self._parts.loaded.config
        scheduler = Scheduler(
            self._parts.speculator,
            vocab_size=config.vocab_size,
            max_positions=config.max_positions,
            depth=FixedDepth(self._depth),
            max_batch=len(self._prompts),
            prefix_cache=self._prefixes,
        )
        new = (rounds + _WARM + 4) * (self._depth + 1)
        stats = [scheduler.add(Request(prompt=tuple(p), max_tokens=new, ignore_eos=True))[1] for p in self._prompts]
        while scheduler.running < len(self._prompts) or scheduler.next_is_prefill:
            scheduler.step()
        for _ in range(_WARM):
            scheduler.step()
        before, tokens, begin = sum(s.rounds for s in stats), sum(s.tokens for s in stats), time.perf_counter()
        for _ in range(rounds):
            scheduler.step()
        spent = time.perf_counter() - begin
        done = sum(s.rounds for s in stats) - before
        self.tokens += sum(s.tokens for s in stats) - tokens
        self.rounds += done
        for number in range(len(self._prompts)):
            scheduler.cancel(number)
        return spent * len(self._prompts) / done


def configuration(parts: Parts, decoding: Decoding, rows: int, depth: int, context: int, args: Any) -> dict[str, Any]:
    """Ideal and achieved rounds of one batch at one depth, and what lies between them."""
    samples: dict[str, list[float]] = {name: [] for name in ("forward", "step", "queued", "read", "achieved")}
    for repeat in range(args.repeats + 1):
        forward = parts.forward(rows, depth + 1, context)
        one = {
            "forward": forward,
            "step": parts.step(rows, context) if depth else 0.0,
            "queued": parts.queued_round(rows, depth, context),
            "read": parts.read_round(rows, depth, context),
            "achieved": decoding.sample(max(min(args.rounds, 2 * parts.count(forward)), 4)),
        }
        if repeat:  # the first one compiles
            for name, seconds in one.items():
                samples[name].append(seconds)
    ideal = [f + depth * s for f, s in zip(samples["forward"], samples["step"], strict=True)]
    ratios = [i / a for i, a in zip(ideal, samples["achieved"], strict=True)]
    per_round = decoding.tokens / decoding.rounds
    return {
        "batch": rows,
        "depth": depth,
        "context": context,
        "tokens_per_round": round(per_round, 4),
        "ideal_ms": _ms(ideal),
        "achieved_ms": _ms(samples["achieved"]),
        "ideal_tokens_per_second": round(rows * per_round / Spread.of(ideal).median, 2),
        "achieved_tokens_per_second": round(rows * per_round / Spread.of(samples["achieved"]).median, 2),
        "ratio": Spread.of(ratios).to_dict(),
        "ms": {name: _ms(values) for name, values in samples.items()},
        "rest_ms": {
            "round_beyond_parts": _gap(samples["queued"], ideal),
            "reading": _gap(samples["read"], samples["queued"]),
            "scheduler": _gap(samples["achieved"], samples["read"]),
        },
    }


def _ms(seconds: Sequence[float]) -> dict[str, float]:
    return Spread.of([1000 * s for s in seconds]).to_dict()


def _gap(more: Sequence[float], less: Sequence[float]) -> float:
    """Median difference in milliseconds: negative where rounds are launched before the last one is read."""
    return round(Spread.of([1000 * (a - b) for a, b in zip(more, less, strict=True)]).median, 4)


def part_costs(parts: Parts, args: Any) -> dict[str, Any]:
    """Milliseconds of each part by rows, by tokens of a block, and by context."""

    def best(measure: Any, *shape: int) -> dict[str, float]:
        measure(*shape)
        return _ms([measure(*shape) for _ in range(args.repeats)])

    near = args.context
    return {
        "forward_by_rows": {n: best(parts.forward, n, 1, near) for n in counts(_LONGEST)},
        "forward_by_block": {n: best(parts.forward, 1, n, near) for n in range(1, _LONGEST + 1)},
        "forward_by_context": {
            c: {n: best(parts.forward, 1, n, c) for n in (1, 4)} for c in _reached(parts, args.contexts)
        },
        "step_by_rows": {n: best(parts.step, n, near) for n in counts(_LONGEST)},
        "step_by_context": {c: best(parts.step, 1, c) for c in _reached(parts, args.contexts)},
        "head_by_block": {n: best(parts.head, 1, n) for n in (1, 4, 8, 16)},
        "write_by_block": {n: best(parts.write, 1, n, near) for n in (1, 4, 8)},
        "write_of_8_rows": best(parts.write, 8, 4, near),
    }


def _reached(parts: Parts, contexts: Sequence[int]) -> list[int]:
    return [c for c in contexts if c + 64 <= parts.loaded.config.max_positions]


def memory(parts: Parts, args: Any) -> list[dict[str, Any]]:
    """Bytes at the peak of plain rounds and of rounds with 3 drafts, by context, beside what they need."""
    found = []
    for context in _reached(parts, args.contexts):
        for depth in (0, 3):
            gc.collect()
            mx.clear_cache()
            cache = parts.filled(1, context)
            held, kv = mx.get_active_memory(), cache.nbytes
            mx.reset_peak_memory()
            _rounds(parts, cache, depth)
            found.append(
                {"context": context, "depth": depth, "kv_bytes": kv, "held_bytes": held}
                | {"peak_bytes": mx.get_peak_memory()}
            )
    return found


def _rounds(parts: Parts, cache: KVCache, depth: int) -> None:
    block = Block.empty(1)
    for _ in range(4):
        block = parts.speculator.run_round(cache, block, [depth]).block


def host(args: Any) -> dict[str, float]:
    """Milliseconds for which Python builds a round's parts: 35 layers, so narrow that they cost nothing else."""
    with pairs.random_pair(pairs.SHAPE_35_LAYERS, window=64) as path:
        parts = Parts(load_pair(str(path), dtype="float32"), queue=args.queue, sample_s=args.sample)
        found = [parts.host(1, 4, args.context) for _ in range(args.repeats)]
    return {
        "forward_35_layers_ms": round(1000 * Spread.of([f["forward"] for f in found]).median, 4),
        "drafter_step_ms": round(1000 * Spread.of([f["step"] for f in found]).median, 4),
    }


@contextmanager
def opened(name: str, args: Any) -> Iterator[tuple[Loaded, list[list[int]]]]:
    """A pair, and eight prompts for it of at most args.context tokens."""
    if name == "random":
        with pairs.random_pair(pairs.SHAPE_60M) as path:
            loaded, draw = load_pair(str(path), dtype="float32"), random.Random(7)
        vocab = loaded.config.vocab_size
        yield loaded, [[draw.randrange(5, vocab) for _ in range(args.context)] for _ in range(8)]
        return
    pair = common.find_pair(None if name == "demo" else name, None)
    loaded = load_pair(str(pair.target), drafter=str(pair.drafter), dtype="float32")
    yield loaded, [p[-args.context :] for p in common.make_prompts(pair.target)[1]]


def measure(args: Any, console: Console) -> dict[str, Any]:
    """All pairs, in this process."""
    found: dict[str, Any] = {}
    for name in args.pairs:
        with opened(name, args) as (loaded, prompts):
            parts = Parts(loaded, queue=args.queue, sample_s=args.sample)
            prefixes, rows = PrefixCache(parts.spec, 1 << 30), []
            for batch in args.batches:
                for depth in args.depths:
                    console.print(f"  {name}: batch {batch}, depth {depth}", highlight=False)
                    asked = [prompts[i % len(prompts)] for i in range(batch)]
                    decoding = Decoding(parts, prefixes, asked, depth)
                    rows.append(configuration(parts, decoding, batch, depth, args.context, args))
            console.print(f"  {name}: parts", highlight=False)
            found[name] = {
                "parameters": {"target": loaded.target.parameters, "drafter": _parameters(loaded)},
                "configurations": rows,
                "parts": part_costs(parts, args),
                "memory": memory(parts, args),
            }
    console.print("  host", highlight=False)
    return {"pairs": found, "host": host(args), "preload": os.environ.get("LD_PRELOAD")}


def _parameters(loaded: Loaded) -> int:
    return 0 if loaded.drafter is None else loaded.drafter.parameters


def in_process(blas: str, preload: Path | None, argv: Sequence[str]) -> dict[str, Any]:
    """The same in a process with this BLAS. Raises SystemExit where it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run.json"
        env = dict(os.environ) | ({"LD_PRELOAD": str(preload)} if preload else {})
        command = [sys.executable, __file__, *argv, "--only", blas, "--out", str(out)]
        if code := subprocess.run(command, env=env, check=False).returncode:
            raise SystemExit(code)
        found: dict[str, Any] = json.loads(out.read_text())
        return found


# --- reporting ---------------------------------------------------------------------------------------------------


def checks(runs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was to be reached, and whether it was."""
    found = []
    for blas, run in runs.items():
        for name, pair in run["pairs"].items():
            for c in pair["configurations"]:
                where = {"blas": blas, "pair": name, "batch": c["batch"], "depth": c["depth"]}
                found.append({**where, "ratio": c["ratio"]["median"], "met": c["ratio"]["median"] >= RATIO})
        for what, limit in (("forward_35_layers_ms", FORWARD_MS), ("drafter_step_ms", STEP_MS)):
            found.append({"blas": blas, "host": what, "ms": run["host"][what], "met": run["host"][what] <= limit})
    return found


def show(runs: Mapping[str, Any], console: Console) -> None:
    """A table for each BLAS and pair."""
    for blas, run in runs.items():
        for name, pair in run["pairs"].items():
            console.print(table(pair["configurations"], f"{name}, {BLAS[blas]}"))
        console.print(
            f"host, {BLAS[blas]}: {run['host']['forward_35_layers_ms']:.2f} ms for a forward of 35 layers, "
            f"{run['host']['drafter_step_ms']:.3f} ms for a drafter step",
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
    add("--depths", default="0,1,2,3,4")
    add("--context", type=int, default=64, help="tokens that rows begin with (default: %(default)s)")
    add("--contexts", default="1024,4000", help="for parts and memory (default: %(default)s)")
    add("--repeats", type=int, default=5)
    add("--rounds", type=int, default=16, help="of the scheduler in a sample, at most (default: %(default)s)")
    add("--queue", type=int, default=12, help="runs of a part in a sample (default: %(default)s)")
    add("--sample", type=float, default=0.5, help="seconds after which a sample has fewer (default: %(default)s)")
    add("--out", type=Path, help="the record (default: bench/results/limits-<date>-<host class>.json)")
    add("--check", action="store_true", help="exit with 1 when a target is missed")
    add("--only", choices=list(BLAS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.pairs, args.blas = args.pairs.split(","), args.blas.split(",")
    for name in ("batches", "depths", "contexts"):
        setattr(args, name, [int(part) for part in getattr(args, name).split(",") if part])
    if not set(args.blas) <= BLAS.keys():
        parser.error(f"--blas is {','.join(args.blas)!r}, expected some of {', '.join(BLAS)}")
    return args


def main() -> int:
    """Measure, show, record."""
    args, progress = parse(), Console(stderr=True, style="dim")
    if args.only:
        args.out.write_text(json.dumps(measure(args, progress)))
        return 0
    machine, runs = common.describe_machine(), dict[str, Any]()
    for blas in args.blas:
        preload = common.find_openblas() if blas == "openblas" else None
        if blas == "openblas" and preload is None:
            progress.print("OpenBLAS skipped: it is not there (Debian, Ubuntu: apt-get install libopenblas0-pthread)")
            continue
        progress.print(BLAS[blas])
        runs[blas] = in_process(blas, preload, sys.argv[1:])
    console = Console(width=None if sys.stdout.isatty() else 150)
    show(runs, console)
    data, out = record(args, machine, runs), args.out or common.result_file("limits")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(data, indent=1) + "\n")
    console.print(f"record: {out}", markup=False, highlight=False)
    return 1 if args.check and not all(c["met"] for c in data["checks"]) else 0


if __name__ == "__main__":
    sys.exit(main())
