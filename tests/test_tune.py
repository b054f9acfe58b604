"""Tuning on the fakes, and on a scripted clock: what is measured, what is left out, what is kept and found again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from mlx_gemma_mtp import load
from mlx_gemma_mtp.cli import app
from mlx_gemma_mtp.costs import CostFacts, CostModel
from mlx_gemma_mtp.profiles import Profile
from mlx_gemma_mtp.speculative import Speculator
from mlx_gemma_mtp.tune import Curve, Tuning, tune
from mlx_gemma_mtp.tune_cli import bars, draw, table

from .fakes import SPEC, VOCAB, fake_speculator


class Clock:
    """Time that passes as rounds are run: 10 ms, 1 ms per token verified, 2 ms per draft."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, launch = 0.0, Speculator.launch

        def timed(
            speculator: Speculator, cache: object, block: object, depths: list[int], *rest: Any, **more: Any
        ) -> object:
            tokens = block.tokens.size  # type: ignore[attr-defined]
            self.now += 0.010 + 0.001 * tokens + 0.002 * max(depths)
            return launch(speculator, cache, block, depths, *rest, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(Speculator, "launch", timed)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def _tuned(seconds: float = 100.0, drafter: bool = True) -> Tuning:
    speculator = fake_speculator(drafter=drafter)
    return tune(
        speculator,
        CostFacts(),
        vocab_size=VOCAB,
        max_positions=4096,
        batches=(1, 2),
        contexts=(20, 600),
        seconds=seconds,
    )


def test_every_shape_is_measured_and_the_shares_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    seen: list[float] = []
    found = tune(
        fake_speculator(),
        CostFacts(),
        vocab_size=VOCAB,
        max_positions=4096,
        batches=(1, 2),
        contexts=(20, 600),
        progress=lambda _, share: seen.append(share),
    )
    assert [(c.rows, c.context) for c in found.curves] == [(1, 20), (2, 20), (1, 600), (2, 600)]
    assert seen == sorted(seen)
    assert found.left_out == ()
    for curve in found.curves:
        for k, seconds in enumerate(curve.seconds):
            assert seconds == pytest.approx(0.010 + 0.001 * curve.rows * (k + 1) + 0.002 * k, rel=0.03)
    assert found.costs.seconds(1, 2, 0, 20) == pytest.approx(0.013, rel=0.05)


def test_what_there_is_no_time_for_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    found = _tuned(seconds=0.5)
    assert len(found.curves) + len(found.left_out) == 4
    assert found.left_out
    with pytest.raises(ValueError, match="no drafter"):
        _tuned(drafter=False)


@pytest.mark.parametrize("seconds", [3.0, 8.0, 13.0])
def test_it_is_over_in_time(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """A shape takes seconds here: one that is begun late is measured in few rounds, and none is begun too late."""
    clock = Clock(monkeypatch)
    found = _tuned(seconds=seconds)
    assert found.curves
    assert clock.now <= seconds
    assert len(found.curves) + len(found.left_out) == 4
    for curve in found.curves:
        assert curve.seconds[8] == pytest.approx(0.026 + 0.009 * curve.rows, rel=0.03)


def test_small_shapes_leave_time_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first could use 12 seconds by itself."""
    clock = Clock(monkeypatch)
    found = _tuned(seconds=14.0)
    assert [(c.rows, c.context) for c in found.curves] == [(1, 20), (2, 20), (1, 600), (2, 600)]
    assert clock.now <= 14.0


def test_the_best_depth_depends_on_acceptance() -> None:
    curve = Curve(rows=2, context=10, seconds=tuple(0.01 + 0.004 * k for k in range(9)))
    assert curve.best(0.1) == 0
    assert 0 < curve.best(0.7) < curve.best(0.9)
    assert curve.rate(1, 0.5) == pytest.approx(2 * 1.5 / 0.014)
    lines = bars(curve, 0.7)
    assert lines[1 + curve.best(0.7)].endswith("<- best")
    tuning = Tuning(costs=CostModel(), curves=(curve,), left_out=(), seconds=1.0)
    assert len(table(tuning)) == 2


def test_a_profile_is_found_again_for_the_same_weights_alone(tmp_path: Path) -> None:
    weights, costs = [mx.arange(10.0)], CostModel()
    for _ in range(5):
        costs.observe(1, 2, 2, 100, 0.5)
    profile = Profile(SPEC, weights, folder=tmp_path)
    assert profile.read() is None
    profile.write(costs)
    again = Profile(SPEC, weights, folder=tmp_path).read()
    assert again is not None
    assert again.seconds(1, 2, 2, 100) == pytest.approx(0.5)
    assert Profile(SPEC, [mx.arange(11.0)], folder=tmp_path).read() is None
    damaged = profile.path.read_text().replace('"rows": 1', '"rows": Infinity')
    assert damaged != profile.path.read_text()
    for text in (damaged, json.dumps({"about": {}, "costs": {}})):
        profile.path.write_text(text)
        assert profile.read() is None
    profile.path.write_text("{")
    assert profile.read() is None


def test_the_command_measures_keeps_and_load_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_GEMMA_MTP_CACHE", str(tmp_path))
    result = CliRunner().invoke(app, ["tune", "--dtype", "float32", "--seconds", "1", "--json"])
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["curves"][0]["rows"] == 1
    assert len(data["left_out"]) > 0
    assert Path(data["profile"]).parent == tmp_path
    runtime = load("demo", dtype="float32")
    assert runtime.depth_memory.costs.measured
    assert runtime.depth_memory.costs.to_dict() == data["costs"]


def test_a_plot_needs_matplotlib_or_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curve = Curve(rows=1, context=10, seconds=tuple(0.01 + 0.004 * k for k in range(9)))
    tuning = Tuning(costs=CostModel(), curves=(curve,), left_out=(), seconds=1.0)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError, match=r"mlx-gemma-mtp\[plot\]"):
        draw(tuning, tmp_path / "a.png")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    draw(tuning, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
