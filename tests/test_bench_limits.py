"""bench/limits.py measures all parts of a tiny pair, and says what was reached. Nothing here depends on times."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from . import tiny
from .bench_modules import BENCH, bench_module

if not BENCH.is_dir():
    pytest.skip("a source distribution has no benchmarks", allow_module_level=True)

limits, rounds = bench_module("limits"), bench_module("rounds")


def options(*more: str) -> argparse.Namespace:
    given = ["--batches", "1,2", "--depths", "0,2", "--repeats", "1", "--rounds", "2", "--queue", "2"]
    args: argparse.Namespace = limits.parse([*given, "--context", "8", "--contexts", "40,9000000", *more])
    return args


def test_ratios_of_a_pair(tmp_path: Path) -> None:
    tiny.write_pair(tmp_path, "edge")
    found = list(rounds.measure("ratios", str(tmp_path), options()))
    rows = found[-1]["configurations"]
    assert [(r["batch"], r["depth"]) for r in rows] == [(1, 0), (1, 2), (2, 0), (2, 2)]
    assert len(found) == len(rows), "what is there is given as soon as it is there"
    for row in rows:
        ms, depth = {name: spread["median"] for name, spread in row["ms"].items()}, row["depth"]
        assert row["ideal_ms"]["median"] == pytest.approx(ms["forward"] + depth * ms["step"], abs=2e-3)
        assert row["ratio"]["median"] == pytest.approx(row["ideal_ms"]["median"] / ms["achieved"], rel=0.01)
        assert 1 <= row["tokens_per_round"] <= depth + 1
        rest = sum(row["rest_ms"].values())
        assert rest == pytest.approx(ms["achieved"] - row["ideal_ms"]["median"], abs=2e-3)


def test_a_scheduler_lasts_for_as_many_samples_as_its_rows_have_room(tmp_path: Path) -> None:
    tiny.write_pair(tmp_path, "edge")
    with rounds.opened(str(tmp_path), options()) as (loaded, prompts):
        parts = rounds.Parts(loaded, queue=2)
        decoding = rounds.Decoding(parts, rounds.PrefixCache(parts.spec, 1 << 30), prompts[:2], 3)
        for _ in range(6):
            assert decoding.sample(30) > 0
    assert decoding.rounds == 6 * 30 * 2
    assert decoding.tokens >= decoding.rounds


def test_parts_of_a_pair(tmp_path: Path) -> None:
    tiny.write_pair(tmp_path, "edge")
    (found,) = rounds.measure("parts", str(tmp_path), options())
    assert [m["context"] for m in found["memory"]] == [40, 40], "contexts beyond the model's are left out"
    assert all(m["peak_bytes"] > m["kv_bytes"] > 0 for m in found["memory"])
    assert set(found["parts"]["forward_by_rows"]) == {1, 2, 3, 4, 6, 8, 12, 16}


def test_the_hosts_share() -> None:
    (found,) = rounds.measure("host", "", options())
    assert found["host"]["forward_35_layers_ms"] > 0


def test_what_the_processes_found_is_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        task = json.loads(command[command.index("--task") + 1])
        assert command[:2] == ["nice", "-n"]
        out, what = Path(command[-1]), task["what"]
        if what == "ratios":
            out.write_text(json.dumps({"parameters": {"target": 1, "drafter": 1}, "configurations": []}))
        if what == "host":
            out.write_text(json.dumps({"host": {"forward_35_layers_ms": 1.0, "drafter_step_ms": 0.1}}))
        return subprocess.CompletedProcess(command, 0 if what != "parts" else 124)

    record = tmp_path / "limits.json"
    argv = ["limits.py", "--pairs", "demo", "--blas", "mlx", "--under", "nice -n 1", "--out", str(record)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(limits.common, "describe_machine", dict)
    monkeypatch.setattr(limits.common, "describe_commit", str)
    assert limits.main() == 1, "a process that failed is no success"
    assert "parts of demo" in capsys.readouterr().err
    data = json.loads(record.read_text())
    assert data["runs"]["mlx"]["pairs"]["demo"]["parameters"] == {"target": 1, "drafter": 1}
    assert [c["met"] for c in data["checks"]] == [True, True]


def test_what_was_reached() -> None:
    def run(ratio: float, step: float) -> dict[str, object]:
        configuration = {"batch": 8, "depth": 3, "ratio": {"median": ratio}}
        host = {"forward_35_layers_ms": 3.0, "drafter_step_ms": step}
        return {"pairs": {"demo": {"configurations": [configuration]}}, "host": host}

    assert [c["met"] for c in limits.checks({"mlx": run(0.92, 0.2)})] == [True, True, True]
    assert [c["met"] for c in limits.checks({"mlx": run(0.91, 0.3)})] == [False, True, False]
