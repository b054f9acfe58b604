"""README.md's tables are those of the newest records, and records of every kind can be rendered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .bench_modules import BENCH, bench_module

if not BENCH.is_dir():
    pytest.skip("a source distribution has no benchmarks", allow_module_level=True)

tables = bench_module("tables")
README = (BENCH.parent / "README.md").read_text(encoding="utf-8")
MACHINE = {"chip": "A chip", "cores": 2, "os": "Linux-6.1"}
ABOUT = {"environments": {"ours": {"versions": {"mlx": "1.2", "mlx-lm": "3.4"}}}}


def spread(value: float) -> dict[str, float]:
    return {"median": value, "min": value, "max": value}


def save(folder: Path, name: str, record: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps({"machine": MACHINE, "repeats": 3, **record}))


def put(text: str) -> str:
    return f"before\n<!-- table: {text} -->\nold\n<!-- end of table -->\nbehind\n"


def test_the_readme_is_current() -> None:
    assert tables.rendered(README) == README, "run python bench/tables.py"


def test_the_readme_has_its_tables() -> None:
    for name in ("decode", "convert", "acceptance", "acceptance-built-in"):
        assert f"<!-- table: {name} -->" in README


def test_decode(tmp_path: Path) -> None:
    rates = {"ours, plain": 100.4, "ours, 3 drafts": 150.0, "mlx-lm, plain": 50.0}
    summary = {a: {"decode_tokens_per_second": spread(r)} for a, r in rates.items()}
    run = {**ABOUT, "summary": {"one": summary, "batch": summary}}
    save(tmp_path, "decode-2026-01-01-x.json", {"depths": [0, 3], "batch": 8, "runs": {"mlx": run}})
    text = tables.rendered(put("decode"), tmp_path)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert cells[0] == ["", "mlx-lm, plain", "mlx-vlm, plain", "mlx-vlm, MTP", "ours, plain", "ours, MTP"]
    assert cells[2] == ["one at a time, MLX's own BLAS", "50", "-", "-", "100", "**150**"]
    assert "A chip, 2 cores, Linux; mlx 1.2, mlx-lm 3.4, 3 repeats: `bench/results/decode-2026-01-01-x.json`" in text
    assert text.startswith("before\n")
    assert text.endswith("<!-- end of table -->\nbehind\n")
    assert "old" not in text
    assert tables.rendered(text, tmp_path) == text


def test_limits(tmp_path: Path) -> None:
    configurations = [{"batch": b, "depth": 3, "ratio": spread(0.9 + b / 100), "repeats": 40 - b} for b in (1, 8)]
    pair = {"parameters": {"target": 60_000_000}, "configurations": configurations}
    save(
        tmp_path,
        "limits-2026-01-01-x.json",
        {"versions": {"mlx": "1.2"}, "runs": {"openblas": {"pairs": {"random": pair}}}},
    )
    text = tables.rendered(put("limits"), tmp_path)
    assert "| random (60 M parameters), batch 8, OpenBLAS | 0.98     |" in text
    assert "; mlx 1.2, 32 to 39 repeats: " in text


def test_serve(tmp_path: Path) -> None:
    measured = {"tokens_per_second": spread(99.6), "mean_first_token_s": spread(0.25)}
    runs = {"mlx": {**ABOUT, "summary": {"batch 1": {"ours": measured}, "apart": {"mlx-lm, plain": measured}}}}
    save(tmp_path, "serve-2026-01-01-x.json", {"runs": runs})
    text = tables.rendered(put("serve"), tmp_path)
    assert "| batch 1, MLX's own BLAS | 100 (0.25 s) | -             |" in text


def test_the_newest_record_counts(tmp_path: Path) -> None:
    for day in ("02", "10"):
        save(tmp_path, f"decode-2026-01-{day}-x.json", {"day": day})
    save(tmp_path, "decode-quick.json", {"day": "none"})
    name, record = tables.newest("decode", tmp_path)
    assert (name, record["day"]) == ("decode-2026-01-10-x.json", "10")


def test_a_marker_that_nothing_can_be_put_behind(tmp_path: Path) -> None:
    with pytest.raises(tables.TableError, match="no table 'speed'"):
        tables.rendered(put("speed"), tmp_path)


def test_what_was_not_measured_yet(tmp_path: Path) -> None:
    text = tables.rendered(put("decode"), tmp_path)
    assert "\nNot measured yet: `python bench/run_all.py --only decode`\n<!-- end of table -->" in text
    assert "old" not in text


def test_depth_is_of_several_records(tmp_path: Path) -> None:
    found = {
        "best": 3, "auto_over_best": 0.991, "auto_over_plain": 1.5, "policy_ms_per_round": 0.0814,
        "policy_ms_per_round_waited_for": 0.0452,
        "tokens_per_second": {"auto": 149.6, "0": 100.0, "3": 151.2},
    }  # fmt: skip
    for pair, blas in (("random", ""), ("demo", "/usr/lib/libopenblas.so.0")):
        name = f"depth-{pair}-{'openblas' if blas else 'mlx'}-2026-01-01-x.json"
        about = {"pair": pair, "preload": blas, "acceptance": 0.8, "mlx": "1.2"}
        save(tmp_path, name, {**about, "batches": {"4": found}})
    text = tables.rendered(put("depth"), tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[2] == ["demo, batch 4, OpenBLAS", "100", "151 (at 3)", "150", "1.50", "0.99", "0.08 (0.05)"]
    assert rows[3][0] == "60 M parameters, 0.8 accepted, batch 4, MLX's own BLAS"
    both = "`bench/results/depth-demo-openblas-2026-01-01-x.json`, `bench/results/depth-random-mlx-2026-01-01-x.json`"
    assert f"A chip, 2 cores, Linux; mlx 1.2, 3 repeats: {both}\n" in text
    elsewhere = {**about, "machine": {"chip": "other", "cores": 4, "os": "Linux-6"}}
    save(tmp_path, "depth-demo-mlx-2026-01-02-x.json", {**elsewhere, "batches": {"4": found}})
    caption = "other, 4 cores, Linux; mlx 1.2, 3 repeats: `bench/results/depth-demo-mlx-2026-01-02-x.json`"
    assert caption in tables.rendered(put("depth"), tmp_path)
    assert tables.rendered(put("depth"), tmp_path / "none").count("Not measured yet") == 1
