"""README.md's figures about conversions are those of the records in bench/results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.skipif(not RESULTS.is_dir(), reason="a source distribution has no benchmarks")


def newest(name: str) -> tuple[str, Any]:
    """The name of a benchmark's last record, and what it holds."""
    path = max(RESULTS.glob(f"{name}-*.json"))
    return path.name, json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench/convert.py, which is no module of the package."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location("bench_convert", ROOT / "bench" / "convert.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_acceptance(bench: Any) -> None:
    name, record = newest("acceptance")
    assert f"bench/results/{name}" in README
    for measured in (record["measured"], record["measured_built_in"]):
        combined = {(row["target"], row["drafter"]) for row in measured["acceptance"]}
        recipes = ("source", "8bit", "4bit", "mxfp4", "nvfp4")
        assert combined >= {(target, drafter) for target in recipes for drafter in recipes}
        assert bench.table(measured) in README
    plans = record["unquantized"]
    assert f"At groups of 64, {len(plans['4bit']['target'])} of the demo's matrices" in README


def test_the_cost_of_a_conversion() -> None:
    name, record = newest("convert")
    assert all(record["met"].values())
    assert f"bench/results/{name}" in README
    for side, label in (("ours", "ours"), ("mlx-lm", "`mlx_lm.convert`")):
        row = record["median"][side]
        runs = ", ".join(f"{sample['wall_s']:.0f}" for sample in record["samples"][side])
        peak, output = row["peak_rss_bytes"] / 1e9, row["output_bytes"] / 1e9
        assert f"| {label} | {row['wall_s']:.0f} s ({runs}) | {peak:.2f} GB | {output:.1f} GB |" in README
