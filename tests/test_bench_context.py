"""bench/context.py measures a pair in all contexts, and judges what came out. Nothing here depends on times."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mlx_gemma_mtp.benchmark.plots import plots_of

from . import tiny
from .bench_modules import BENCH, bench_module

if not BENCH.is_dir():
    pytest.skip("a source distribution has no benchmarks", allow_module_level=True)

context = bench_module("context")
tables = bench_module("tables")


def options() -> argparse.Namespace:
    args: argparse.Namespace = context.parse(["--contexts", "1024,2048", "--repeats", "1", "--queue", "2"])
    return args


def test_a_pair_is_measured(tmp_path: Path) -> None:
    tiny.write_pair(tmp_path, "edge")
    found = context.measure(options(), tmp_path, Console(quiet=True))
    assert list(found["times_ms"]) == ["1024", "2048"]
    assert all(row[n]["median"] > 0 for row in found["times_ms"].values() for n in ("verify", "sliding", "full"))
    assert [(m["context"], m["depth"]) for m in found["memory"]] == [(1024, 0), (2048, 0), (1024, 3), (2048, 3)]
    assert all(m["peak_bytes"] >= m["held_bytes"] >= m["kv_bytes"] for m in found["memory"])
    assert [m["context"] for m in found["prefill_memory"]] == [0, 1024, 2048]
    added = found["loaded_bytes"]["pair"] - found["loaded_bytes"]["target"]
    assert added == pytest.approx(found["weights_bytes"]["drafter"], rel=0.05)


def run(**changes: Any) -> dict[str, Any]:
    """What a run measures where all is as it should be, but for `changes`."""
    row = {n: {"median": 1.0, "min": 1.0, "max": 1.0} for n in ("decode", "verify", "draft", "sliding")}
    full = {c: {"median": c / 1000, "min": c / 1000, "max": c / 1000} for c in (8192, 32768)}
    held = {"context": 8192, "kv_bytes": 40, "weights_bytes": 100, "held_bytes": 140, "peak_bytes": 143}
    found = {
        "times_ms": {str(c): {**row, "full": full[c]} for c in full},
        "weights_bytes": {"target": 100, "drafter": 10},
        "loaded_bytes": {"target": 100, "pair": 110},
        "memory": [{**held, "context": c, "depth": 0, "buffer_bytes": 10} for c in full],
        "prefill_memory": [{**held, "context": 0}, held],
        "prefill": {"one": {"ratio": {"median": 1.1}, "same_tokens": True}, "environments": {}},
    }
    return {**found, **changes}


def missed(run: dict[str, Any]) -> list[str]:
    return [c["what"].split(",")[0] for c in context.checks({"mlx": run}) if not c["met"]]


def test_what_was_reached() -> None:
    assert missed(run()) == []
    held = run()["memory"][0]
    copied = {**held, "peak_bytes": 160}
    assert missed(run(memory=[copied])) == ["peak over weights and K/V", "what a round takes"]
    assert missed(run(loaded_bytes={"target": 100, "pair": 111})) == ["what a drafter adds"]
    times = run()["times_ms"]
    slow = {**times, "32768": {**times["32768"], "sliding": {"min": 1.3}, "full": {"min": 60.0}}}
    assert missed(run(times_ms=slow)) == ["sliding layers", "full layers"]
    prefill = {"one": {"ratio": {"median": 0.99}, "same_tokens": False}}
    assert missed(run(prefill=prefill)) == ["prefill over mlx-lm's", "the same tokens as mlx-lm's"]


def test_prefill_that_grows_with_the_context() -> None:
    held = run()["memory"][0]
    grown = {**held, "peak_bytes": held["peak_bytes"] + (1 << 28)}
    assert missed(run(prefill_memory=[{**held, "context": 0}, grown])) == ["prefill's peak over weights"]


def test_plots_and_table() -> None:
    record = {"benchmark": "context", "block": 4, "runs": {"mlx": run()}}
    plots = {p.name: p.lines for p in plots_of(record)}
    assert plots["time-by-context-mlx"]["layers without a window"] == ([8192.0, 32768.0], [8.192, 32.768])
    assert plots["memory-by-context-mlx"]["peak, plain"] == ([8192.0, 32768.0], [143 / 1e6] * 2)
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in tables.context(record).splitlines()]
    assert rows[2][:4] == ["8,192, MLX's own BLAS", "1.0", "1.0", "1.0"]


@pytest.mark.parametrize("text", ["1024", "100,2048", "1024,999999"])
def test_contexts_that_cannot_be(text: str) -> None:
    with pytest.raises(SystemExit):
        context.parse(["--contexts", text])
