"""What a long context costs: rounds, their peak memory, and prefill beside mlx-lm's, with both BLAS.

    python bench/context.py --check

The pair has random weights in 31B's order of layers, narrow, so that 128k tokens of K/V fit anywhere. A cache is filled
with zeros instead of being prefilled: neither time nor memory depend on values. Contexts, and the libraries that
prefill, take turns, forwards and backwards. `--check` exits with 1 unless layers with a window cost the same in every
context, layers without one grow with it and no faster, no buffer is copied by a round, memory is weights, K/V and
little more, and prefill is as fast as mlx-lm's with the same tokens.
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
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import mlx.core as mx
import pairs
from common import Spread, Worker
from parts import ROOM, Parts
from rich.console import Console
from rich.table import Table

from mlx_gemma_mtp.cache import KVCache
from mlx_gemma_mtp.loading import load_pair
from mlx_gemma_mtp.speculative import Block

BLAS = {"mlx": "MLX's own BLAS", "openblas": "OpenBLAS preloaded"}
WINDOW, POSITIONS = 1024, 131072
BLOCK = 4
"""Tokens of a verification: 3 drafts and the row's own."""
CHUNK = 512
PREFILL = {"mlx": (512, 8, 32), "openblas": (4096, 16, 64)}
"""By BLAS: tokens of the long prompt; how many short ones, and the tokens of each. MLX's own BLAS is slow."""
_SLOW = 8192
CONSTANT, LINEAR, EXTRA, PREFILLED = 1.25, 1.35, 1.05, 1.0
"""What is to be reached: sliding layers' longest over shortest time; a full layer's cost per token, longest context
over the one before; peak over weights and K/V; speed of prefill over mlx-lm's.
"""


def measure(args: Any, path: Path, console: Console) -> dict[str, Any]:
    """All that is measured in this process, where the BLAS is chosen: everything but prefill's speed."""
    gc.collect()
    before = mx.get_active_memory()
    alone = load_pair(str(path), drafter=None, dtype="float32")
    bare = mx.get_active_memory() - before
    plain = memory(Parts(alone), args.contexts, 0, console)
    del alone
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    loaded = load_pair(str(path), dtype="float32")
    both = mx.get_active_memory() - before
    assert loaded.drafter is not None
    weights = {
        name: sum(a.nbytes for part in model.arrays for a in part)
        for name, model in (("target", loaded.target), ("drafter", loaded.drafter))
    }
    drafting = memory(Parts(loaded), args.contexts, BLOCK - 1, console)
    return {
        "weights_bytes": weights,
        "loaded_bytes": {"target": bare, "pair": both},
        "memory": plain + drafting,
        "prefill_memory": prefill_memory(Parts(loaded), _prefilled(args.contexts)),
        "times_ms": times(Parts(loaded, queue=args.queue, sample_s=args.sample), args, console),
        "preload": os.environ.get("LD_PRELOAD"),
    }


def _prefilled(contexts: Sequence[int]) -> list[int]:
    """Contexts at which a chunk is prefilled to see its memory: MLX's own BLAS takes minutes for one at 128k."""
    return [c for c in contexts if "LD_PRELOAD" in os.environ or c <= _SLOW]


def times(parts: Parts, args: Any, console: Console) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of a round's parts by context: medians, and minima, which noise leaves alone."""
    found: dict[str, dict[str, list[float]]] = {}
    for repeat in range(args.repeats):
        console.print(f"  times, repeat {repeat + 1} of {args.repeats}", highlight=False)
        for context in args.contexts if repeat % 2 == 0 else reversed(args.contexts):
            held = context - ROOM
            measured = {
                "decode": parts.forward(1, 1, held),
                "verify": parts.forward(1, BLOCK, held),
                "draft": parts.step(1, held),
                "sliding": parts.attention(BLOCK, held, windows=True),
                "full": parts.attention(BLOCK, held, windows=False),
            }
            for name, seconds in measured.items():
                found.setdefault(str(context), {}).setdefault(name, []).append(1000 * seconds)
    ordered = sorted(found, key=int)
    return {c: {name: Spread.of(values).to_dict() for name, values in found[c].items()} for c in ordered}


def memory(parts: Parts, contexts: Sequence[int], depth: int, console: Console) -> list[dict[str, Any]]:
    """Bytes held before rounds and at their peak, by context. `buffer_bytes`: of one layer's keys, the smallest."""
    found = []
    for context in contexts:
        console.print(f"  memory, {context} tokens, depth {depth}", highlight=False)
        cache, weights = _fresh(parts, context - ROOM, 0)
        buffer = min(a.nbytes for a in cache.arrays[2:] if a.shape[2] >= context - ROOM)
        held, block = mx.get_active_memory(), Block.empty(1)
        mx.reset_peak_memory()
        for _ in range(3):
            block = parts.speculator.run_round(cache, block, [depth]).block
        about = {"context": context, "depth": depth, "kv_bytes": cache.nbytes, "buffer_bytes": buffer}
        found.append(about | {"weights_bytes": weights, "held_bytes": held, "peak_bytes": mx.get_peak_memory()})
        del cache
    return found


def prefill_memory(parts: Parts, contexts: Sequence[int]) -> list[dict[str, Any]]:
    """The same of a prompt's chunk: of the first one (context 0), and of those that end at each context."""
    found = []
    for context in (0, *contexts):
        cache, weights = _fresh(parts, max(context - ROOM - CHUNK, 0), CHUNK)
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        parts.speculator.prefill(cache, [7] * CHUNK)
        about = {"context": context, "kv_bytes": cache.nbytes, "weights_bytes": weights}
        found.append(about | {"held_bytes": held, "peak_bytes": mx.get_peak_memory()})
        del cache
    return found


def _fresh(parts: Parts, held: int, more: int) -> tuple[KVCache, int]:
    """A row that holds so many tokens, with room for `more`, and the bytes of all that was there before it."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    cache = KVCache.with_row(parts.spec, held + more)
    cache.advance([held])
    cache.rewind([0])  # the device's lengths follow the host's
    mx.eval(cache.arrays)
    return cache, before


def prefill(args: Any, path: Path, blas: str, preload: Path | None, console: Console) -> dict[str, Any]:
    """Seconds until the first token (of all prompts), ours and mlx-lm's in turns, and whether the tokens are equal."""
    draw, (tokens, rows, each) = random.Random(3), PREFILL[blas]
    if args.quick:
        tokens, rows, each = 64, 2, 16
    work = {"one long prompt": [tokens], "short prompts together": [each] * rows}
    asked = {name: [[draw.randrange(5, 500) for _ in range(n)] for n in lengths] for name, lengths in work.items()}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        copies = {"ours": path, "mlx-lm": common.copy_for_mlx_lm(path, Path(scratch) / "mlx-lm")}
        workers: dict[str, Worker] = {}
        try:
            for name, directory in copies.items():
                command = [sys.executable, str(common.ARMS), name, "--target", str(directory), "--dtype", "float32"]
                workers[name] = Worker([*command, "--drafter", str(path / "drafter")], preload)
            for what, prompts in asked.items():
                console.print(f"  prefill, {what}", highlight=False)
                request = {"op": "one" if len(prompts) == 1 else "batch", "prompts": prompts, "new": 2}
                warm = {**request, "prompts": [p[:24] for p in prompts]}
                samples: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
                for worker in workers.values():
                    worker.ask(warm)
                for repeat in range(args.repeats):
                    for name in list(workers) if repeat % 2 == 0 else reversed(workers):
                        samples[name] += workers[name].ask(request)["parts"]
                found[what] = _compared(prompts, samples)
            found["environments"] = {name: worker.about for name, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.close()
    return found


def _compared(prompts: Sequence[Sequence[int]], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    seconds = {name: [float(s["prefill_s"]) for s in several] for name, several in samples.items()}
    ours, theirs = seconds["ours"], seconds["mlx-lm"]
    tokens = {json.dumps(s["tokens"]) for several in samples.values() for s in several}
    return {
        "lengths": [len(p) for p in prompts],
        "seconds": {name: Spread.of(values).to_dict() for name, values in seconds.items()},
        "peak_bytes": {name: max(int(s["peak_bytes"]) for s in several) for name, several in samples.items()},
        "ratio": Spread.of([b / a for a, b in zip(ours, theirs, strict=True)]).to_dict(),
        "same_tokens": len(tokens) == 1,
    }


# --- reporting ---------------------------------------------------------------------------------------------------


def checks(runs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each criterion with what was measured, what is allowed, and whether it was met."""
    found: list[dict[str, Any]] = []
    for blas, run in runs.items():

        def add(what: str, measured: float, limit: float, *, least: bool = False, blas: str = blas) -> None:
            met = measured >= limit if least else measured <= limit
            about = {"blas": blas, "what": what, "measured": round(measured, 4)}
            found.append(about | {"at_least" if least else "at_most": round(limit, 4), "met": met})

        best = {int(c): {name: row["min"] for name, row in parts.items()} for c, parts in run["times_ms"].items()}
        sliding = [row["sliding"] for row in best.values()]
        add("sliding layers, longest over shortest time", max(sliding) / min(sliding), CONSTANT)
        *_, before, last = sorted(best)
        growth = (best[last]["full"] / last) / (best[before]["full"] / before)
        add(f"full layers, time per token held at {last} over {before}", growth, LINEAR)
        weights = run["weights_bytes"]
        for m in run["memory"]:
            where = f"{m['context']} tokens, {'plain' if not m['depth'] else str(m['depth']) + ' drafts'}"
            ideal = m["kv_bytes"] + weights["target"] + (weights["drafter"] if m["depth"] else 0)
            add(f"peak over weights and K/V, {where}", m["peak_bytes"] / ideal, EXTRA)
            if m["context"] >= 8 * WINDOW:
                moved = (m["peak_bytes"] - m["held_bytes"]) / m["buffer_bytes"]
                add(f"what a round takes, in buffers of keys, {where}", moved, 0.75)
        added = run["loaded_bytes"]["pair"] - run["loaded_bytes"]["target"]
        add("what a drafter adds, over its weights", added / weights["drafter"], 1.01)
        first, *others = run["prefill_memory"]
        chunk = first["peak_bytes"] - first["held_bytes"]
        for m in others:
            # Scores of some queries at a time, and a mask of a byte for each token of the chunk and each key.
            allowed = m["weights_bytes"] + m["kv_bytes"] + chunk + (4 << 24) + CHUNK * m["context"]
            add(
                f"prefill's peak over weights, K/V and a chunk, {m['context']} tokens", m["peak_bytes"] / allowed, EXTRA
            )
        for what, p in run["prefill"].items():
            if what != "environments":
                add(f"prefill over mlx-lm's, {what}", p["ratio"]["median"], PREFILLED, least=True)
                add(f"the same tokens as mlx-lm's, {what}", float(p["same_tokens"]), 1.0, least=True)
    return found


def show(runs: Mapping[str, Any], found: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A table for each BLAS, then a line for each criterion."""
    for blas, run in runs.items():
        shown = Table(title=f"ms, medians, {BLAS[blas]}", title_justify="left", title_style="bold")
        names = ("decode", "verify", "draft", "sliding", "full")
        for column in ("context", *names, "peak MB, plain", f"peak MB, {BLOCK - 1} drafts"):
            shown.add_column(column, justify="right")
        for context, row in run["times_ms"].items():
            peaks = [f"{m['peak_bytes'] / 1e6:.1f}" for m in run["memory"] if m["context"] == int(context)]
            shown.add_row(context, *(f"{row[n]['median']:.2f}" for n in names), *peaks)
        console.print(shown)
    for check in found:
        limit = f"at least {check['at_least']}" if "at_least" in check else f"at most {check['at_most']}"
        line = f"{'met' if check['met'] else 'MISSED'}: {check['what']} ({BLAS[check['blas']]}): {check['measured']}"
        console.print(f"{line}; {limit}", markup=False, highlight=False)


def record(args: Any, machine: Mapping[str, Any], runs: Mapping[str, Any]) -> dict[str, Any]:
    """All of it, ready for JSON."""
    return {
        "benchmark": "context",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": common.describe_commit(),
        "machine": machine,
        "versions": {name: version(name) for name in ("mlx", "mlx-lm", "mlx-gemma-mtp")},
        "dtype": "float32",
        "shape": vars(pairs.SHAPE_LONG),
        "window": WINDOW,
        "block": BLOCK,
        "chunk": CHUNK,
        "contexts": args.contexts,
        "room": ROOM,
        "repeats": args.repeats,
        "checks": checks(runs),
        "runs": runs,
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--blas", default="mlx,openblas", help="which to measure with (default: %(default)s)")
    add("--contexts", default="1024,8192,32768,131072", help="positions there is room for (default: %(default)s)")
    add("--repeats", type=int, default=3)
    add("--queue", type=int, default=8, help="runs of a part in a sample (default: %(default)s)")
    add("--sample", type=float, default=0.3, help="seconds after which a sample has fewer (default: %(default)s)")
    add("--quick", action="store_true", help="short prompts: does it all run?")
    add("--out", type=Path, help="the record (default: bench/results/context-<date>-<host class>.json)")
    add("--check", action="store_true", help="exit with 1 when a criterion is missed")
    add("--only", type=Path, metavar="PAIR", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.blas, args.contexts = args.blas.split(","), sorted({int(c) for c in args.contexts.split(",")})
    if not set(args.blas) <= BLAS.keys():
        parser.error(f"--blas is {','.join(args.blas)!r}, expected some of {', '.join(BLAS)}")
    if len(args.contexts) < 2 or not ROOM + CHUNK <= args.contexts[0] <= args.contexts[-1] <= POSITIONS:
        parser.error(f"--contexts: expected two or more, from {ROOM + CHUNK} to {POSITIONS}")
    return args


def main() -> int:
    """Measure, show, record."""
    args, progress = parse(), Console(stderr=True, style="dim")
    if args.only:
        args.out.write_text(json.dumps(measure(args, args.only, progress)))
        return 0
    machine, runs = common.describe_machine(), dict[str, Any]()
    with pairs.random_pair(pairs.SHAPE_LONG, window=WINDOW, positions=POSITIONS) as path:
        for blas in args.blas:
            preload = common.find_openblas() if blas == "openblas" else None
            if blas == "openblas" and preload is None:
                progress.print(
                    "OpenBLAS skipped: it is not there (Debian, Ubuntu: apt-get install libopenblas0-pthread)"
                )
                continue
            progress.print(BLAS[blas])
            out = path / f"run-{blas}.json"
            env = os.environ | ({"LD_PRELOAD": str(preload)} if preload else {})
            command = [sys.executable, __file__, *sys.argv[1:], "--only", str(path), "--out", str(out)]
            if code := subprocess.run(command, env=env, check=False).returncode:
                return code
            runs[blas] = json.loads(out.read_text())
            runs[blas]["prefill"] = prefill(args, path, blas, preload, progress)
    console = Console(width=None if sys.stdout.isatty() else 150)
    data, out = record(args, machine, runs), args.out or common.result_file("context")
    show(runs, data["checks"], console)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(data, indent=1) + "\n")
    console.print(f"record: {out}", markup=False, highlight=False)
    return 1 if args.check and not all(c["met"] for c in data["checks"]) else 0


if __name__ == "__main__":
    sys.exit(main())
