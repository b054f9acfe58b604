"""Decode paths on backends whose kernels round differently by size: found, kept to, or refused."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_gemma_mtp import Request, Runtime, SamplingParams, load
from mlx_gemma_mtp.bitwise import PADDINGS, BitwiseError, choose_shapes
from mlx_gemma_mtp.depth import FixedDepth
from mlx_gemma_mtp.loading import load_pair
from mlx_gemma_mtp.probe import ProbeResult, Widths, probe
from mlx_gemma_mtp.scheduler import Scheduler
from mlx_gemma_mtp.speculative import Block, Shapes, Speculator
from mlx_gemma_mtp.views import KVView

from .fakes import SPEC, VOCAB, FakeDrafter, FakeTarget, expected
from .tiny import write_pair

DEPTH = 6


class Metal(FakeTarget):
    """Rounds as GPUs do: one way for a single row of a product, another for a few, a third for `limit` and more.

    `seen` collects the sizes of products, prompts left out.
    """

    def __init__(self, limit: int = 7) -> None:
        self.limit, self.seen = limit, set[int]()

    def __call__(self, tokens: mx.array, view: KVView, *, last_only: bool = False) -> mx.array:
        return super().__call__(tokens, view, last_only=last_only)

    def unembed(self, hidden: mx.array) -> mx.array:
        size = hidden.size // hidden.shape[-1]
        self.seen.add(size)
        kind = 0 if size == 1 else 1 if size < self.limit else 2
        return super().unembed(hidden) + 1e-6 * kind


def found(target: Metal, rows: int = 8) -> tuple[Shapes, ProbeResult]:
    def ask(least: int) -> ProbeResult:
        return probe(target, SPEC, Widths.full(rows, DEPTH, 60, least=least), vocab_size=VOCAB)

    return choose_shapes(ask, drafts=True)


def test_steps_are_padded_and_blocks_kept_short() -> None:
    shapes, result = found(Metal())
    assert (shapes.least, shapes.longest, shapes.free) == (2, {1: 6, 2: 3, 3: 2}, False)
    assert shapes.max_rows == 3
    assert not result.bitwise  # 8 x 2 isn't, among others
    assert [shapes.width(1, n) for n in (1, 2, 5, 9)] == [2, 2, 5, 6]
    assert [shapes.width(2, n) for n in (1, 3, 4)] == [2, 3, 3]


def test_where_all_is_bitwise_nothing_is_restricted() -> None:
    asked = []

    def ask(least: int) -> ProbeResult:
        asked.append(least)
        return probe(FakeTarget(), SPEC, Widths.full(3, DEPTH, 60, least=least), vocab_size=VOCAB)

    shapes, _ = choose_shapes(ask, drafts=True)
    assert (shapes.least, shapes.longest, shapes.free) == (1, {1: 7, 2: 7, 3: 7}, True)
    assert asked == [1]


def test_where_no_path_is_bitwise_it_says_what_differs() -> None:
    class Restless(Metal):
        calls = 0

        def unembed(self, hidden: mx.array) -> mx.array:
            self.calls += 1
            return super().unembed(hidden) + 1e-6 * self.calls

    with pytest.raises(BitwiseError, match=r"steps of 1: logits differ .* 1x2, .*; steps of 4: .* 1x4, ") as error:
        found(Restless())
    assert all(f"steps of {least}" in str(error.value) for least in PADDINGS)


def test_one_width_for_all_is_a_path_where_every_width_differs() -> None:
    class Fussy(Metal):
        def unembed(self, hidden: mx.array) -> mx.array:
            return FakeTarget.unembed(self, hidden) + 1e-6 * hidden.shape[1]

    shapes, _ = found(Fussy(), rows=2)
    assert (shapes.least, shapes.longest) == (4, {1: 4, 2: 4})


def test_what_could_not_be_probed_is_not_relied_on() -> None:
    def hurried(least: int) -> ProbeResult:
        return probe(Metal(), SPEC, Widths.full(2, DEPTH, 60, least=least), vocab_size=VOCAB, seconds=0)

    with pytest.raises(BitwiseError, match="nothing was probed"):
        choose_shapes(hurried, drafts=True)

    def small(least: int) -> ProbeResult:
        row = SPEC.ring_bytes() + 1024 * SPEC.bytes_per_token()
        return probe(Metal(), SPEC, Widths.full(2, DEPTH, 60, least=least), vocab_size=VOCAB, max_bytes=row)

    assert choose_shapes(small, drafts=True)[0].longest == {1: 6}


@pytest.mark.parametrize("depth", range(DEPTH + 1))
def test_no_product_leaves_the_kernels_of_the_path(depth: int) -> None:
    """Rows come and go; plain decoding, at depth 0, is padded, too. `first` multiplies one row, always by itself."""
    target = Metal()
    speculator = Speculator(target, FakeDrafter(), SPEC, compiled=False)
    speculator.shapes, _ = found(target)
    target.seen.clear()
    scheduler = Scheduler(
        speculator, vocab_size=VOCAB, max_positions=1000, depth=FixedDepth(depth), max_batch=3, chunk=16
    )
    prompts = [[(3 * i + n) % VOCAB for i in range(n)] for n in (1, 20, 7, 33, 5)]
    asked, got = {}, dict[int, list[int]]()
    for i, prompt in enumerate(prompts):
        asked[scheduler.add(Request(prompt=prompt, max_tokens=10 + 6 * i))[0]] = (prompt, 10 + 6 * i)
    while scheduler.busy:
        for event in scheduler.step():
            got.setdefault(event.request_id, []).extend(event.tokens)
    assert target.seen <= {1, 2, 3, 4, 5, 6}
    assert {number: expected(*request) for number, request in asked.items()} == got


def test_a_block_in_another_width() -> None:
    block = Block(mx.array([[5, 1, 2, 3], [6, 4, 0, 0]]), mx.array([3, 1]))
    short, long = block.resized(2), block.resized(6)
    assert (short.tokens.tolist(), short.offered.tolist()) == ([[5, 1], [6, 4]], [1, 1])
    assert (long.tokens.tolist(), long.offered.tolist()) == ([[5, 1, 2, 3, 0, 0], [6, 4, 0, 0, 0, 0]], [3, 1])
    assert block.resized(4) is block


class TestRuntime:
    def pair(self, path: Path) -> Runtime:
        write_pair(path, "unified", seed=3)
        runtime = Runtime(load_pair(str(path), dtype="float32"), compiled=False)
        runtime.config = replace(runtime.config, max_positions=700)  # there are fewer keys to probe behind
        return runtime

    def test_a_restricted_path_changes_no_token(self, tmp_path: Path) -> None:
        """Here all is bitwise, so restricted decoding has to equal free decoding."""
        runtime = self.pair(tmp_path)
        prompts = [[7, 9, 40], list(range(30, 60)), [5], list(range(8, 20))]
        params = [
            SamplingParams(),
            SamplingParams(temperature=1.0, seed=3, top_k=30),
            SamplingParams(temperature=0.8, seed=4, repetition_penalty=1.3, logprobs=2),
            SamplingParams(temperature=1.0),
        ]
        free = runtime.generate_batch(prompts, max_tokens=20, sampling=params, depth=0, ignore_eos=True)
        runtime._speculator.shapes = Shapes(least=2, longest={1: 6, 2: 3, 3: 2}, free=False)
        for depth in (0, 1, 5):
            outs = runtime.generate_batch(prompts, max_tokens=20, sampling=params, depth=depth, ignore_eos=True)
            assert [o.tokens for o in outs[:3]] == [o.tokens for o in free[:3]]
            assert all(o.stats.tokens == len(o.tokens) == 20 for o in outs)
            assert all(len(o.stats.drafted_per_position) <= 5 for o in outs)
            assert all((o.bitwise, o.differing_shapes) == (True, ()) for o in outs)

    def test_a_budget_of_memory_loses_no_row(self, tmp_path: Path) -> None:
        runtime = self.pair(tmp_path)
        runtime._speculator.shapes = Shapes(least=2, longest={1: 6, 2: 3, 3: 2}, free=False)
        spec = runtime._speculator.spec
        budget = 2 * (spec.ring_bytes() + 1024 * spec.bytes_per_token())
        scheduler = runtime.scheduler(max_batch=8, kv_budget=budget, prefix_cache=1 << 20)
        for i in range(4):
            scheduler.add(Request(prompt=[5 + i] * 400, max_tokens=120, ignore_eos=True))
        most = 0
        while scheduler.busy:
            scheduler.step()
            most = max(most, scheduler.running)
        stats = scheduler.stats()
        assert (stats.preemptions, stats.prefix_entries) == (0, 0)
        assert most == 2

    def test_responses_say_what_the_probe_found(self, tmp_path: Path) -> None:
        runtime = self.pair(tmp_path)
        assert runtime.generate([5], max_tokens=2).bitwise is None
        assert runtime.info()["exactness"] == {"bitwise": None, "differing_shapes": []}
        runtime.probe(max_batch=2, depth=2, quick=True)
        assert runtime.generate([5], max_tokens=2).bitwise is True
        assert runtime.info()["exactness"]["probe"].startswith("bitwise in ")

    def test_a_full_probe_is_found_by_a_quick_one(self, tmp_path: Path) -> None:
        runtime = self.pair(tmp_path)
        full = runtime.probe(max_batch=1, depth=1)
        assert not full.cached
        again = runtime.probe(max_batch=1, depth=1, quick=True)
        assert (again.cached, again.widths) == (True, full.widths)

    def test_a_backend_that_differs(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        runtime = self.pair(tmp_path)
        plain = runtime._loaded.target.unembed

        def rounding(hidden: mx.array) -> mx.array:
            size = hidden.size // hidden.shape[-1]
            return plain(hidden) * (1 + 1e-6 * (0 if size == 1 else 1 if size < 7 else 2))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(runtime._loaded.target), "unembed", lambda self, hidden: rounding(hidden))
            patch.setenv("MLX_PRETEND", "gpu")  # else the next two would find each other's results
            runtime.probe(max_batch=2, depth=3, quick=True)
            out = runtime.generate([5], max_tokens=2)
            assert (out.bitwise, out.differing_shapes) == (False, ("1x4", "2x1", "2x4"))
            with caplog.at_level(logging.WARNING):
                runtime.require_bitwise(max_batch=4, depth=3)
            assert "batches are of 3 rows at most" in caplog.text
            assert runtime.info()["exactness"]["steps_padded_to"] == 2
            assert runtime.info()["exactness"]["longest_blocks"] == ["1x4", "2x3", "3x2"]
            assert runtime.generate([5], max_tokens=2).bitwise is True

    def test_the_demo_pair_is_bitwise_here(self) -> None:
        runtime = load("demo", bitwise=True, max_batch=1)
        exact = runtime.info()["exactness"]
        assert (exact["bitwise"], exact["steps_padded_to"]) == (True, 1)
        assert exact["longest_blocks"] == ["1x9"]
