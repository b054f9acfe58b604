"""Sampling through whole pairs: seeded requests keep their tokens at every depth and in every batch."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp import Request, Runtime, SamplingParams
from mlx_gemma_mtp.depth import FixedDepth
from mlx_gemma_mtp.loading import load_pair
from mlx_gemma_mtp.scheduler import Scheduler

from .cases import examples
from .tiny import Kind, write_pair

KINDS: tuple[Kind, ...] = ("unified", "edge2")
VOCAB = 512


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Runtime]:
    """Pairs with a full and a centroid head, not compiled: many kinds of batches, a few rounds each."""
    made: dict[str, Runtime] = {}
    for kind in KINDS:
        path = tmp_path_factory.mktemp(kind)
        write_pair(path, kind, seed=5)
        made[kind] = Runtime(load_pair(str(path), dtype="float32"), compiled=False)
    return made


def _prompt(seed: int, length: int) -> list[int]:
    return [random.Random(f"{seed}-{i}").randrange(5, VOCAB) for i in range(length)]


seeded = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.8, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 20, 64]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-3, 3), max_size=3),
)
crowd = st.one_of(seeded, st.just(SamplingParams()), st.builds(SamplingParams, temperature=st.just(1.2)))


@settings(max_examples=examples(25, long=200), deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    params=st.lists(crowd, min_size=1, max_size=3),
    first=seeded,
    lengths=st.lists(st.integers(1, 30), min_size=4, max_size=4),
    depths=st.lists(st.integers(0, 6), min_size=4, max_size=4),
    joins=st.lists(st.integers(0, 3), min_size=4, max_size=4),
)
def test_seeded_rows_equal_plain_decoding_alone_and_in_ragged_batches(
    pairs: dict[str, Runtime],
    kind: str,
    params: list[SamplingParams],
    first: SamplingParams,
    lengths: list[int],
    depths: list[int],
    joins: list[int],
) -> None:
    rt, count = pairs[kind], 6
    scheduler = Scheduler(rt._speculator, vocab_size=VOCAB, max_positions=4096, depth=FixedDepth(3), max_batch=3)
    got: dict[int, list[int]] = {}

    def step() -> None:
        for event in scheduler.step():
            got.setdefault(event.request_id, []).extend(event.tokens)

    asked = []
    for i, p in enumerate([first, *params]):
        prompt = _prompt(i, lengths[i])
        request = Request(prompt=prompt, max_tokens=count, sampling=p, depth=depths[i], ignore_eos=True)
        asked.append((scheduler.add(request)[0], prompt, p))
        for _ in range(joins[i]):
            step()
    while scheduler.busy:
        step()
    for number, prompt, p in asked:
        if p.contract == "exact":
            plain = rt.generate(prompt, max_tokens=count, sampling=p, depth=0, ignore_eos=True)
            assert got[number] == plain.tokens
        assert len(got[number]) == count


def test_choices_of_one_seed_differ_and_come_again(pairs: dict[str, Runtime]) -> None:
    rt, p = pairs["unified"], SamplingParams(temperature=1.0, seed=7)
    outs = [rt.generate(_prompt(1, 9), max_tokens=16, sampling=p, depth=3, ignore_eos=True, n=3) for _ in range(2)]
    first, again = ([c.tokens for c in out.choices] for out in outs)
    assert first == again
    assert len({tuple(t) for t in first}) == 3
    assert outs[0].tokens == first[0]


def test_unseeded_sampling_is_fresh_every_time(pairs: dict[str, Runtime]) -> None:
    rt, p = pairs["unified"], SamplingParams(temperature=1.0)
    outs = [rt.generate(_prompt(1, 9), max_tokens=24, sampling=p, depth=3, ignore_eos=True) for _ in range(3)]
    assert len({tuple(o.tokens) for o in outs}) == 3
    assert {o.contract for o in outs} == {"distribution"}


@pytest.mark.parametrize("depth", [0, 2, 5])
def test_logprobs_are_the_targets_at_every_depth(pairs: dict[str, Runtime], depth: int) -> None:
    rt, prompt = pairs["edge2"], _prompt(3, 12)
    params = SamplingParams(temperature=0.8, seed=3, logprobs=4)
    out = rt.generate(prompt, max_tokens=14, sampling=params, depth=depth, ignore_eos=True)
    assert out.logprobs is not None
    assert len(out.logprobs) == len(out.tokens)
    logits = rt.logits(prompt + out.tokens)
    for i, (token, entry) in enumerate(zip(out.tokens, out.logprobs, strict=True)):
        row = logits[len(prompt) - 1 + i]
        reference: list[float] = (row - row.logsumexp()).tolist()  # type: ignore[assignment]
        assert entry.token == token
        assert entry.logprob == pytest.approx(reference[token], abs=2e-4)
        best = sorted(range(VOCAB), key=lambda t: -reference[t])[:4]
        assert [t for t, _ in entry.top] == best
        assert [v for _, v in entry.top] == pytest.approx([reference[t] for t in best], abs=2e-4)


def test_logprobs_of_a_greedy_request_change_no_token(pairs: dict[str, Runtime]) -> None:
    rt, prompt = pairs["unified"], _prompt(3, 12)
    plain = rt.generate(prompt, max_tokens=20, depth=3, ignore_eos=True)
    with_them = rt.generate(prompt, max_tokens=20, depth=3, ignore_eos=True, sampling=SamplingParams(logprobs=0))
    assert plain.tokens == with_them.tokens
    assert plain.logprobs is None
    assert with_them.logprobs is not None
    assert all(e.top == () for e in with_them.logprobs)
