"""Whole pairs under a state machine: requests come, go, are sent back and reuse prefixes, and keep their own tokens."""

from __future__ import annotations

import random
from functools import cache as remembered
from pathlib import Path
from tempfile import mkdtemp
from unittest.mock import patch

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_gemma_mtp import Request, Runtime, SamplingParams, cache
from mlx_gemma_mtp.cache import planned_bytes
from mlx_gemma_mtp.depth import FixedDepth
from mlx_gemma_mtp.loading import load_pair
from mlx_gemma_mtp.scheduler import Scheduler

from .cases import examples
from .tiny import Kind, write_pair

KINDS: tuple[Kind, ...] = ("edge2", "moe")
VOCAB = 512
LONGEST = 90

_STEMS = [[random.Random(f"stem-{i}").randrange(5, VOCAB) for _ in range(60)] for i in range(2)]
prompts = st.builds(
    lambda stem, cut, tail: (*_STEMS[stem][:cut], *tail),
    st.integers(0, 1),
    st.integers(0, 60),
    st.lists(st.integers(5, VOCAB - 1), min_size=1, max_size=8),
)
sampled = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.2]),
    seed=st.integers(0, 99),
    top_k=st.sampled_from([0, 20]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
)


@remembered
def _pair(kind: Kind) -> Runtime:
    path = Path(mkdtemp())
    write_pair(path, kind, seed=11)
    return Runtime(load_pair(str(path), dtype="float32"), compiled=False)


class Interleaving(RuleBasedStateMachine):
    """Any interleaving of add, cancel, step, preemption and prefix hits."""

    @initialize(
        kind=st.sampled_from(KINDS),
        max_batch=st.integers(1, 3),
        budget=st.sampled_from([1.0, 1.4, 2.0, 9.0]),
        prefixes=st.sampled_from([0, 1 << 22]),
        prefill=st.sampled_from([8, 64]),
        depth=st.integers(0, 4),
    )
    def begin(self, kind: Kind, max_batch: int, budget: float, prefixes: int, prefill: int, depth: int) -> None:
        self.patch = patch.object(cache, "_STEP", 16)
        self.patch.start()
        self.runtime = _pair(kind)
        spec = self.runtime._speculator.spec
        self.scheduler = Scheduler(
            self.runtime._speculator,
            vocab_size=VOCAB,
            max_positions=4096,
            depth=FixedDepth(depth),
            max_batch=max_batch,
            prefill_budget=prefill,
            kv_budget=int(budget * planned_bytes(spec, [LONGEST])),
            prefix_cache=prefixes,
        )
        self.asked: dict[int, Request] = {}
        self.got: dict[int, list[int]] = {}
        self.ended: set[int] = set()

    @rule(prompt=prompts, sampling=sampled, tokens=st.integers(1, 20), checkpoint=st.integers(0, 60))
    def add(self, prompt: tuple[int, ...], sampling: SamplingParams, tokens: int, checkpoint: int) -> None:
        request = Request(prompt=prompt, max_tokens=tokens, sampling=sampling, checkpoints=(checkpoint,))
        number, _ = self.scheduler.add(request)
        self.asked[number], self.got[number] = request, []

    @precondition(lambda self: self.scheduler.busy)
    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            for event in self.scheduler.step():
                assert event.request_id in self.asked
                assert event.request_id not in self.ended
                self.got[event.request_id] += event.tokens
                if event.finish_reason is not None:
                    self.ended.add(event.request_id)
                    self._compare(event.request_id)

    @precondition(lambda self: self.scheduler.busy)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        left = [n for n in self.asked if n not in self.ended]
        # One that has just ended, in a round that is on its way, is past cancelling.
        if left and self.scheduler.cancel(number := data.draw(st.sampled_from(left))):
            assert number not in self.scheduler
            self.ended.add(number)

    @invariant()
    def within_the_budget(self) -> None:
        if hasattr(self, "scheduler"):
            now = self.scheduler.stats()
            assert now.kv_budget is not None
            assert now.running + now.waiting < 2 or now.kv_bytes <= now.kv_budget

    def teardown(self) -> None:
        if hasattr(self, "scheduler"):
            while self.scheduler.busy:
                self.step(1)
            assert self.ended == set(self.asked)
            assert self.scheduler.stats().kv_bytes == 0
            self.patch.stop()

    def _compare(self, number: int) -> None:
        request = self.asked[number]
        alone = self.runtime.generate(
            list(request.prompt), max_tokens=request.max_tokens, sampling=request.sampling, depth=0, ignore_eos=True
        )
        assert self.got[number] == alone.tokens


Interleaving.TestCase.settings = settings(
    max_examples=examples(8, long=30),
    stateful_step_count=25,
    deadline=None,
    phases=(Phase.generate, Phase.reuse, Phase.shrink),
)
TestInterleaving = Interleaving.TestCase
