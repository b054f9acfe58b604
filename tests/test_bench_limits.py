"""bench/limits.py measures all parts of a tiny pair, and says what was reached. Nothing here depends on times."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from rich.console import Console

from . import tiny
from .bench_modules import BENCH, bench_module

if not BENCH.is_dir():
    pytest.skip("a source distribution has no benchmarks", allow_module_level=True)

limits = bench_module("limits")


def options(**more: object) -> argparse.Namespace:
    given = ["--batches", "1,2", "--depths", "0,2", "--repeats", "1", "--rounds", "2", "--queue", "2"]
    args: argparse.Namespace = limits.parse([*given, "--context", "8", "--contexts", "40,9000000"])
    for name, value in more.items():
        setattr(args, name, value)
    return args


def test_a_pair_is_measured(tmp_path: Path) -> None:
    tiny.write_pair(tmp_path, "edge")
    console = Console(quiet=True)
    found = limits.measure(options(pairs=[str(tmp_path)]), console)
    pair = found["pairs"][str(tmp_path)]
    rows = pair["configurations"]
    assert [(r["batch"], r["depth"]) for r in rows] == [(1, 0), (1, 2), (2, 0), (2, 2)]
    for row in rows:
        ms, depth = {name: spread["median"] for name, spread in row["ms"].items()}, row["depth"]
        assert row["ideal_ms"]["median"] == pytest.approx(ms["forward"] + depth * ms["step"], abs=2e-3)
        assert row["ratio"]["median"] == pytest.approx(row["ideal_ms"]["median"] / ms["achieved"], rel=0.01)
        assert 1 <= row["tokens_per_round"] <= depth + 1
        rest = sum(row["rest_ms"].values())
        assert rest == pytest.approx(ms["achieved"] - row["ideal_ms"]["median"], abs=2e-3)
    assert [m["context"] for m in pair["memory"]] == [40, 40], "contexts beyond the model's are left out"
    assert all(m["peak_bytes"] > m["kv_bytes"] > 0 for m in pair["memory"])
    assert set(pair["parts"]["forward_by_rows"]) == {1, 2, 3, 4, 6, 8, 12, 16}
    assert found["host"]["forward_35_layers_ms"] > 0


def test_what_was_reached() -> None:
    def run(ratio: float, step: float) -> dict[str, object]:
        configuration = {"batch": 8, "depth": 3, "ratio": {"median": ratio}}
        host = {"forward_35_layers_ms": 3.0, "drafter_step_ms": step}
        return {"pairs": {"demo": {"configurations": [configuration]}}, "host": host}

    assert [c["met"] for c in limits.checks({"mlx": run(0.92, 0.2)})] == [True, True, True]
    assert [c["met"] for c in limits.checks({"mlx": run(0.91, 0.3)})] == [False, True, False]
