"""What README.md says about conversions, beside its tables (see test_bench_tables), holds of the records."""

from __future__ import annotations

from pathlib import Path

import pytest

from .bench_modules import bench_module

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")

if not RESULTS.is_dir():
    pytest.skip("a source distribution has no benchmarks", allow_module_level=True)

newest = bench_module("tables").newest


def test_every_combination_was_measured() -> None:
    _, record = newest("acceptance")
    for measured in (record["measured"], record["measured_built_in"]):
        combined = {(row["target"], row["drafter"]) for row in measured["acceptance"]}
        recipes = ("source", "8bit", "4bit", "mxfp4", "nvfp4")
        assert combined >= {(target, drafter) for target in recipes for drafter in recipes}
    plans = record["unquantized"]
    assert f"At groups of 64, {len(plans['4bit']['target'])} of the demo's matrices" in README


def test_the_targets_of_a_conversion_were_met() -> None:
    _, record = newest("convert")
    assert all(record["met"].values())
