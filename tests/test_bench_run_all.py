"""bench/run_all.py starts every benchmark with options that it knows, and goes on behind one that fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .bench_modules import BENCH, bench_module

if not BENCH.is_dir():
    pytest.skip("a source distribution has no benchmarks", allow_module_level=True)

run_all = bench_module("run_all")
PARSERS = ("limits.py", "decode.py", "context.py", "serve.py", "depth.py")


@pytest.fixture
def openblas(monkeypatch: pytest.MonkeyPatch) -> Path:
    path = Path("/lib/openblas.so")
    monkeypatch.setattr(run_all.common, "find_openblas", lambda: path)
    return path


def test_all_of_them(openblas: Path) -> None:
    found = run_all.jobs(run_all.parse(["--e2b", "/tmp/e2b"]))
    names = [
        "limits",
        "decode",
        "context",
        *["depth"] * 4,
        "serve",
        "acceptance",
        "shared-noise",
        "convert",
        "tables",
        "plots",
    ]
    assert [j.name for j in found] == names
    assert [j.preload for j in found if j.name == "depth"] == [None, openblas] * 2
    records = [j.command[j.command.index("--out") + 1] for j in found if "--out" in j.command]
    assert len(set(records)) == len(records)
    assert all(Path(r).parent == run_all.common.RESULTS for r in records)


def test_without_openblas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_all.common, "find_openblas", lambda: None)
    found = run_all.jobs(run_all.parse([]))
    assert [j.name for j in found].count("depth") == 2
    (limits,) = (j for j in found if j.name == "limits")
    assert limits.command[limits.command.index("--blas") + 1] == "mlx"


@pytest.mark.parametrize("quick", [[], ["--quick", "--out", "/tmp/x"]])
def test_the_benchmarks_know_these_options(openblas: Path, quick: list[str]) -> None:
    for job in run_all.jobs(run_all.parse(quick)):
        script = Path(job.command[1])
        assert script.is_file()
        if script.name in PARSERS:
            bench_module(script.stem).parse(job.command[2:])


@pytest.mark.parametrize(("given", "complaint"), [(["--blas", "x"], "--blas"), (["--quick"], "--out")])
def test_refusals(given: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_all.parse(given)
    assert complaint in capsys.readouterr().err


def test_a_failure_is_told_and_does_not_stop_the_rest(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def job(name: str, code: str) -> Any:
        return run_all.Job(name=name, command=(sys.executable, "-c", code))

    import_ours = "import mlx_gemma_mtp, pathlib; print('path', pathlib.Path(mlx_gemma_mtp.__file__).parents[1])"
    monkeypatch.setattr(run_all, "jobs", lambda args: [job("a", "raise SystemExit(3)"), job("b", import_ours)])
    monkeypatch.setattr(sys, "argv", ["run_all.py"])
    assert run_all.main() == 1
    out, err = capfd.readouterr()
    assert f"path {run_all.common.ROOT}" in out
    assert err.count("failed: ") == 1
    assert "SystemExit(3)" in err


def test_a_dry_run_runs_nothing() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "run_all.py"), "--dry-run", "--only", "limits"],
        capture_output=True, text=True, check=True, env={"PYTHONPATH": str(BENCH.parent)},
    )  # fmt: skip
    assert done.stdout.startswith("[1/1] ")
    assert "limits.py" in done.stdout
