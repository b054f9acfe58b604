"""The command `bench`, from a pair on disk to a record and a table."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_gemma_mtp import bench_cli
from mlx_gemma_mtp.benchmark import race
from mlx_gemma_mtp.benchmark.plots import draw, plots_of
from mlx_gemma_mtp.cli import app

from . import tiny


def spread(value: float) -> dict[str, float]:
    return {"median": value, "min": value, "max": value}


def measured(rate: float, shares: list[float]) -> dict[str, object]:
    return {
        "decode_tokens_per_second": spread(rate),
        "first_token_s": spread(0.25),
        "peak_bytes": 1_500_000_000,
        "accepted_per_round": 1.5 if shares else None,
        "acceptance_by_position": shares,
    }


RECORD = {
    "benchmark": "bench",
    "date": "2026-01-02T03:04:05+00:00",
    "machine": {"chip": "Apple M9", "cores": 8, "memory_gb": 64.0, "os": "macOS-27", "load_at_start": 0.5},
    "pair": {"target": {"path": "/m/gemma-4-E4B-it"}, "drafter": {"path": "/m/assistant"}},
    "dtype": "bfloat16",
    "backend": "Device(gpu, 0)",
    "versions": {"mlx": "1.2"},
    "prompts": {"kind": "built-in", "lengths": [13, 42]},
    "new_tokens": 128,
    "repeats": 4,
    "pause_s": 5.0,
    "processes": "one at a time",
    "verify": {"verdict": "equal", "requests": 8},
    "left_out": {"mlx-vlm, plain": "No module named 'mlx_vlm'"},
    "same_tokens_as_plain": {"ours, plain": True, "mlx-lm, plain": False},
    "summary": {
        "1": {
            "ours, plain": measured(50, []),
            "ours, auto": measured(80, [0.9, 0.6]),
            "mlx-lm, plain": measured(40, []),
        },
        "8": {"ours, plain": measured(200, []), "ours, auto": measured(220, [0.8])},
    },
}


def test_the_table() -> None:
    text = bench_cli.markdown(RECORD)
    assert text.startswith("**gemma-4-E4B-it** with assistant, bfloat16, Device(gpu, 0)")
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["tokens/s, decoding", "ours, plain", "ours, auto", "mlx-lm, plain"]
    assert rows[2:4] == [["batch 1", "50.0", "80.0", "40.0"], ["batch 8", "200.0", "220.0", "-"]]
    assert "Over ours, plain: batch 1: auto 1.60x; batch 8: auto 1.10x." in text
    assert "Other tokens than ours, plain: mlx-lm, plain" in text
    assert "Left out: mlx-vlm, plain: No module named 'mlx_vlm'" in text
    assert "one at a time, load at start 0.5." in text


def test_the_plots_of_a_record(tmp_path: Path) -> None:
    plots = {plot.name: plot for plot in plots_of(RECORD)}
    assert list(plots) == ["speed-by-batch", "first-token", "memory-by-batch", "acceptance-by-position"]
    assert plots["speed-by-batch"].lines["ours, auto"] == ([1.0, 8.0], [80.0, 220.0])
    assert plots["speed-by-batch"].lines["mlx-lm, plain"] == ([1.0], [40.0])
    assert plots["acceptance-by-position"].lines["ours, auto, batch 1"] == ([1.0, 2.0], [0.9, 0.6])
    pytest.importorskip("matplotlib")
    files = draw(list(plots.values()), tmp_path, prefix="x-")
    assert [f.name for f in files] == [f"x-{name}.png" for name in plots]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)


def test_plots_of_limits() -> None:
    rows = [
        {"batch": 1, "depth": k, "ideal_tokens_per_second": 9.0, "achieved_tokens_per_second": 8.0, "achieved_ms": ms}
        for k, ms in ((0, spread(10.0)), (1, spread(16.0)))
    ]
    memory = [{"context": 64, "depth": 0, "peak_bytes": 3e6, "held_bytes": 2e6, "kv_bytes": 1e6}]
    runs = {"mlx": {"pairs": {"demo": {"configurations": rows, "memory": memory}}}}
    plots = {plot.name: plot.lines for plot in plots_of({"benchmark": "limits", "runs": runs})}
    assert plots["limits-demo-mlx"]["batch 1, ideal"] == ([0.0, 1.0], [9.0, 9.0])
    gain = plots["speed-by-acceptance-demo-mlx"]["batch 1, 1 draft"]
    assert (gain[1][0], gain[1][-1]) == pytest.approx((10 / 16, 20 / 16))
    assert plots["memory-demo-mlx"]["K/V"] == ([64.0], [1.0])


@pytest.mark.parametrize("text", ["", "0", "1,x", "1,,2", "129", "-1"])
def test_batches_that_cannot_be(text: str) -> None:
    with pytest.raises(ValueError, match="no list of batches"):
        bench_cli.parse_batches(text)


def test_batches() -> None:
    assert bench_cli.parse_batches("8, 1,2,8") == (1, 2, 8)


def test_a_pair_from_disk_to_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_pair(tmp_path / "pair", "edge")
    monkeypatch.setattr(bench_cli, "_PEERS", ("mlx-lm",))
    held: list[int] = []

    def raced(plan: race.Plan, progress: object = None) -> race.Outcome:
        held.append(mx.get_active_memory())
        return real(plan)

    real, before = race.race, mx.get_active_memory()
    monkeypatch.setattr(race, "race", raced)
    given = ["--model", str(tmp_path / "pair"), "--out", str(tmp_path / "out"), "--batches", "1,2", "--drafts", "2"]
    with pytest.raises(SystemExit) as done:
        app(["bench", "--quick", *given, "-n", "6", "--repeats", "1", "--json"])
    assert done.value.code == 0
    record = json.loads(capsys.readouterr().out)
    entrants = {"ours, plain", "ours, 2 drafts", "ours, auto", "mlx-lm, plain"}
    assert record["left_out"] == {}
    assert {name for entered in record["summary"].values() for name in entered} == entrants
    assert list(record["summary"]) == ["1", "2"]
    assert record["verify"]["verdict"] == "equal"
    assert all(record["same_tokens_as_plain"].values())
    assert record["summary"]["2"]["ours, 2 drafts"]["accepted_per_round"] > 0
    (file,) = (tmp_path / "out").glob("bench-*.json")
    assert json.loads(file.read_text()) == record
    assert bench_cli.markdown(record)
    assert held[0] - before < (tmp_path / "pair" / "model.safetensors").stat().st_size / 2, "the pair is still loaded"
