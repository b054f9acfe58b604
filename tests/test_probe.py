"""The bit probe: equal where blocks are single steps, wrong widths named, results kept and found again."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_gemma_mtp.loading import Loaded, load_pair
from mlx_gemma_mtp.probe import ProbeResult, Width, Widths, cache_folder, cached_probe, environment, fingerprint, probe
from mlx_gemma_mtp.views import CacheSpec, KVView

from .fakes import SPEC, VOCAB, FakeTarget
from .tiny import write_pair

WIDTHS = Widths(rows=(1, 3), blocks=(1, 2, 5), keys=(9, 40))


class Rounding(FakeTarget):
    """Adds `gap` to a logit at position 2 of blocks longer than that, as another kernel's rounding might."""

    def __init__(self, gap: float, rows: int = 1) -> None:
        self.gap, self.rows, self.calls = gap, rows, 0

    def __call__(self, tokens: mx.array, view: KVView, *, last_only: bool = False) -> mx.array:
        self.calls += 1
        self.block, self.batch = tokens.shape[1], tokens.shape[0]
        return super().__call__(tokens, view, last_only=last_only)

    def unembed(self, hidden: mx.array) -> mx.array:
        logits = super().unembed(hidden)
        if 2 < self.block < 9 and self.batch >= self.rows:
            logits[:, 2, 7] = logits[:, 2, 7] + self.gap
        return logits


def demo_spec(loaded: Loaded) -> CacheSpec:
    return CacheSpec(slots=loaded.config.kv_slots, max_block=9, dtype=loaded.dtype)


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return load_pair("demo", drafter=None, dtype="float32")


def test_blocks_of_the_demo_pair_are_single_steps_bit_for_bit(demo: Loaded) -> None:
    result = probe(demo.target, demo_spec(demo), Widths.quick(8, 3, 8192), vocab_size=2048)
    assert result.bitwise
    assert not result.skipped
    assert [(w.rows, w.block) for w in result.widths] == [(1, 1), (1, 4), (8, 1), (8, 4)]
    assert {w.capacity for w in result.widths} == {1024}  # single steps had 512


@pytest.mark.parametrize("compiled", [False, True])
def test_a_wrapped_ring_and_every_capacity(tmp_path: Path, compiled: bool) -> None:
    write_pair(tmp_path, "unified", seed=3)
    loaded = load_pair(str(tmp_path), drafter=None, dtype="float32")
    widths = Widths(rows=(1, 2), blocks=(2, 3), keys=(5, 507), least=2, compiled=compiled)
    result = probe(loaded.target, demo_spec(loaded), widths, vocab_size=512)
    assert result.bitwise
    assert {(w.keys, w.capacity) for w in result.widths} == {(5, 512), (5, 1024), (507, 512), (507, 1024)}


def test_the_widths_that_differ_are_named() -> None:
    result = probe(Rounding(0.25), SPEC, WIDTHS, vocab_size=VOCAB)
    assert not result.bitwise
    assert {(w.rows, w.block, w.keys) for w in result.differing} == {(r, 5, k) for r in (1, 3) for k in (9, 40)}
    assert {(w.max_difference, w.positions) for w in result.differing} == {(0.25, (2,))}
    assert result.holds(1, 2)
    assert not result.holds(3, 5)
    assert not result.holds(1, 4)  # nobody looked
    assert "by 0.25 at most" in result.describe()
    assert "1x5, 3x5" in result.describe()
    assert json.loads(json.dumps(result.to_dict()))["differing"][0]["positions"] == [2]


def test_a_difference_of_the_last_bit_counts() -> None:
    class LastBit(Rounding):
        def unembed(self, hidden: mx.array) -> mx.array:
            logits = FakeTarget.unembed(self, hidden)
            return logits if self.block == 1 else mx.where(logits == 0, -0.0, logits)

    result = probe(LastBit(0), SPEC, WIDTHS, vocab_size=VOCAB)
    assert not result.bitwise
    assert {w.max_difference for w in result.differing} == {0.0}


def test_batches_alone_may_differ() -> None:
    result = probe(Rounding(1.0, rows=3), SPEC, WIDTHS, vocab_size=VOCAB)
    assert {w.rows for w in result.differing} == {3}


def test_limits_of_time_and_memory_are_told() -> None:
    late = probe(FakeTarget(), SPEC, WIDTHS, vocab_size=VOCAB, seconds=0)
    assert not late.bitwise
    assert not late.widths
    assert late.skipped == ("the rest behind 9 keys (time)", "the rest behind 40 keys (time)")
    assert "nothing was probed" in late.describe()
    row = SPEC.ring_bytes() + 1024 * SPEC.bytes_per_token()
    small = probe(FakeTarget(), SPEC, WIDTHS, vocab_size=VOCAB, max_bytes=row)
    assert small.bitwise
    assert {w.rows for w in small.widths} == {1}
    assert small.skipped == ("3 rows behind 9 keys (memory)", "3 rows behind 40 keys (memory)")
    assert "left out: 3 rows" in small.describe()


def test_what_a_full_probe_covers() -> None:
    full = Widths.full(8, 6, 8192)
    assert (full.rows, full.blocks) == ((1, 2, 3, 4, 6, 8), tuple(range(1, 8)))
    assert full.keys == (48, 1000, 1056, 4056, 4128)
    assert Widths.full(1, 1, 2000).keys == (48, 1000, 1056)
    assert Widths.full(1, 6, 20).keys == (1,)
    assert Widths.quick(4, 6, 20).keys == (13,)


@pytest.mark.parametrize("bad", [{"rows": ()}, {"blocks": (0,)}, {"keys": (0,)}, {"least": 0}, {"least": 2}])
def test_impossible_widths(bad: dict[str, object]) -> None:
    fields: dict[str, object] = {"rows": (1,), "blocks": (1,), "keys": (1,)}
    with pytest.raises(ValueError, match=next(iter(bad))):
        Widths(**(fields | bad))  # type: ignore[arg-type]


def test_blocks_longer_than_the_caches() -> None:
    with pytest.raises(ValueError, match="at most 9 tokens"):
        probe(FakeTarget(), SPEC, Widths(rows=(1,), blocks=(10,), keys=(1,)), vocab_size=VOCAB)


class TestKept:
    def ask(self, folder: Path, target: Rounding, **more: object) -> ProbeResult:
        options: dict[str, object] = {"vocab_size": VOCAB, "weights": [mx.arange(6)], "folder": folder}
        return cached_probe(target, SPEC, WIDTHS, **(options | more))  # type: ignore[arg-type]

    def test_found_again(self, tmp_path: Path) -> None:
        target, folder = Rounding(0.5), tmp_path / "new"
        first = self.ask(folder, target)
        calls = target.calls
        again = self.ask(folder, target)
        assert target.calls == calls
        assert (first.cached, again.cached) == (False, True)
        assert again.widths == first.widths
        assert again.describe() == first.describe()
        assert len(list(folder.iterdir())) == 1

    def test_other_circumstances_are_probed_anew(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target = Rounding(0.0)
        self.ask(tmp_path, target)
        assert not self.ask(tmp_path, target, weights=[mx.arange(1, 7)]).cached
        assert not self.ask(tmp_path, target, max_bytes=1 << 30).cached
        monkeypatch.setenv("MLX_ENABLE_TF32", "0")
        assert not self.ask(tmp_path, target).cached
        monkeypatch.setenv("LD_PRELOAD", "")
        monkeypatch.setenv("MLX_GEMMA_MTP_DEBUG", "1")
        assert self.ask(tmp_path, target).cached
        assert environment()["variables"]["MLX_ENABLE_TF32"] == "0"

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"about": 1}', "\x00"])
    def test_a_broken_file_is_replaced(self, tmp_path: Path, content: str) -> None:
        self.ask(tmp_path, Rounding(0.5))
        (file,) = tmp_path.iterdir()
        good = file.read_text()
        file.write_text(content)
        assert not self.ask(tmp_path, Rounding(0.5)).cached
        assert json.loads(file.read_text())["widths"] == json.loads(good)["widths"]

    def test_a_file_with_broken_widths_is_replaced(self, tmp_path: Path) -> None:
        self.ask(tmp_path, Rounding(0.5))
        (file,) = tmp_path.iterdir()
        data = json.loads(file.read_text())
        file.write_text(json.dumps(data | {"widths": [{"rows": 1}]}))
        assert not self.ask(tmp_path, Rounding(0.5)).cached

    def test_a_folder_that_cant_be_written_is_done_without(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert not self.ask(tmp_path / "file", Rounding(0.0)).cached

    def test_a_hurried_result_is_not_kept(self, tmp_path: Path) -> None:
        self.ask(tmp_path, Rounding(0.0), seconds=0)
        assert not list(tmp_path.iterdir())

    def test_the_users_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.platform", "linux")
        monkeypatch.setenv("MLX_GEMMA_MTP_CACHE", "/elsewhere")
        assert cache_folder() == Path("/elsewhere")
        monkeypatch.delenv("MLX_GEMMA_MTP_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
        assert cache_folder() == Path("/caches/mlx-gemma-mtp")


def test_a_fingerprint_tells_weights_apart() -> None:
    a = mx.arange(600, dtype=mx.float32).reshape(20, 30)
    seen = {
        fingerprint([a]),
        fingerprint([a + 1]),
        fingerprint([a.reshape(30, 20)]),
        fingerprint([a.astype(mx.bfloat16)]),
        fingerprint([a, a]),
        fingerprint([]),
    }
    assert len(seen) == 6
    assert fingerprint([mx.array(a)]) == fingerprint([a])


def test_a_width_without_differences_is_bitwise() -> None:
    assert Width(rows=1, block=1, keys=1, capacity=512, max_difference=0.0, positions=()).bitwise
