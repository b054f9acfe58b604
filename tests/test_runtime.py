"""Real (tiny, random) pairs through the public interface: ragged batches, joins, leaves, long prompts."""

from __future__ import annotations

import random

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp import Request, Runtime, SamplingParams, load
from mlx_gemma_mtp.depth import FixedDepth
from mlx_gemma_mtp.loading import load_pair
from mlx_gemma_mtp.scheduler import Scheduler

from .cases import LONG
from .tiny import Kind, write_pair

KINDS: tuple[Kind, ...] = ("dense", "moe", "edge", "edge2", "unified")
VOCAB = 512


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Runtime]:
    """One pair of each kind, in float32, with a window of 16.

    Not compiled (the parity tests are): these tests use many shapes a few times each, which costs mostly tracing.
    """
    made: dict[str, Runtime] = {}
    for kind in KINDS:
        path = tmp_path_factory.mktemp(kind)
        write_pair(path, kind, seed=3)
        made[kind] = Runtime(load_pair(str(path), dtype="float32"), compiled=False)
    return made


def _prompt(seed: int, length: int) -> list[int]:
    return [random.Random(f"{seed}-{i}").randrange(5, VOCAB) for i in range(length)]


def _choices(rt: Runtime, tokens: list[int]) -> list[int]:
    """The likeliest token after each of `tokens`."""
    chosen: list[int] = mx.argmax(rt.logits(tokens), axis=-1).tolist()  # type: ignore[assignment]
    return chosen


def _plain(rt: Runtime, prompt: list[int], count: int) -> list[int]:
    return rt.generate(prompt, max_tokens=count, depth=0, ignore_eos=True).tokens


@pytest.mark.parametrize("kind", KINDS)
def test_plain_decoding_follows_the_uncached_logits(pairs: dict[str, Runtime], kind: str) -> None:
    rt, prompt = pairs[kind], _prompt(1, 21)
    tokens = _plain(rt, prompt, 40)
    chosen = _choices(rt, prompt + tokens)
    assert tokens == chosen[len(prompt) - 1 : -1]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.integers(1, 70), min_size=2, max_size=5),
    depths=st.lists(st.integers(0, 8), min_size=5, max_size=5),
    counts=st.lists(st.integers(1, 40), min_size=5, max_size=5),
    joins=st.lists(st.integers(0, 6), min_size=5, max_size=5),
    seed=st.integers(0, 5),
)
def test_a_ragged_batch_with_joins_and_leaves_equals_the_rows_alone(
    pairs: dict[str, Runtime],
    kind: str,
    lengths: list[int],
    depths: list[int],
    counts: list[int],
    joins: list[int],
    seed: int,
) -> None:
    rt = pairs[kind]
    scheduler = Scheduler(
        rt._speculator, vocab_size=VOCAB, max_positions=4096, depth=FixedDepth(3), max_batch=4, chunk=16
    )
    prompts = [_prompt(seed + i, n) for i, n in enumerate(lengths)]
    got: dict[int, list[int]] = {}

    def step() -> None:
        for event in scheduler.step():
            got.setdefault(event.request_id, []).extend(event.tokens)

    numbers = []
    for prompt, depth, count, wait in zip(prompts, depths, counts, joins, strict=False):
        numbers.append(scheduler.add(Request(prompt=prompt, max_tokens=count, depth=depth, ignore_eos=True))[0])
        for _ in range(wait):
            step()
    while scheduler.busy:
        step()
    for number, prompt, count in zip(numbers, prompts, counts, strict=False):
        assert got[number] == _plain(rt, prompt, count)


# Around the window of 16; with 30 tokens more, the rings of 32 come round.
_RAGGED = [_prompt(i, n) for i, n in enumerate((1, 15, 16, 17, 50))]
_REFERENCES: dict[str, list[list[int]]] = {}


@pytest.mark.parametrize(
    ("kind", "depth"),
    [
        pytest.param(kind, depth, marks=() if kind == "dense" or depth in (1, 4, 8) else LONG)
        for kind in KINDS
        for depth in range(9)
    ],
)
def test_generate_batch_equals_generate_at_every_depth(pairs: dict[str, Runtime], kind: str, depth: int) -> None:
    rt = pairs[kind]
    if kind not in _REFERENCES:
        _REFERENCES[kind] = [_plain(rt, p, 30) for p in _RAGGED]
    outs = rt.generate_batch(_RAGGED, max_tokens=30, depth=depth, ignore_eos=True)
    assert [o.tokens for o in outs] == _REFERENCES[kind]
    assert all(o.stats.tokens == 30 and o.finish_reason == "length" for o in outs)


@pytest.mark.parametrize("kind", ["dense", "edge"])
def test_a_prompt_longer_than_many_chunks_decodes_the_same_in_any_chunks(pairs: dict[str, Runtime], kind: str) -> None:
    rt, prompt = pairs[kind], _prompt(9, 600)
    outputs = []
    for chunk in (512, 100, 7):
        scheduler = Scheduler(
            rt._speculator,
            vocab_size=VOCAB,
            max_positions=4096,
            depth=FixedDepth(2),
            chunk=chunk,
            prefill_budget=512,
        )
        scheduler.add(Request(prompt=prompt, max_tokens=20, ignore_eos=True))
        tokens: list[int] = []
        while scheduler.busy:
            tokens += [t for event in scheduler.step() for t in event.tokens]
        outputs.append(tokens)
    chosen = _choices(rt, prompt + outputs[0])
    assert outputs[0] == chosen[len(prompt) - 1 : -1]
    assert outputs[1:] == outputs[:1] * 2


def test_a_stream_gives_the_same_tokens_and_may_be_dropped(pairs: dict[str, Runtime]) -> None:
    rt, prompt = pairs["edge"], _prompt(4, 30)
    reference = rt.generate(prompt, max_tokens=30, depth=4, ignore_eos=True)
    steps = list(rt.stream(prompt, max_tokens=30, depth=4, ignore_eos=True))
    assert [t for s in steps for t in s.tokens] == reference.tokens
    assert [s.finish_reason for s in steps[:-1]] == [None] * (len(steps) - 1)
    assert steps[-1].finish_reason == "length"
    dropped = rt.stream(prompt, max_tokens=30, ignore_eos=True)
    next(dropped)
    del dropped
    assert rt.generate(prompt, max_tokens=30, ignore_eos=True).tokens == reference.tokens


def test_timing_and_stats_describe_the_run(pairs: dict[str, Runtime]) -> None:
    out = pairs["dense"].generate(_prompt(2, 10), max_tokens=20, depth=3, ignore_eos=True)
    assert out.timing.prompt_tokens == 10
    assert out.timing.decode_tokens == 19
    assert out.timing.peak_memory > 0
    assert out.timing.decode_seconds > 0
    assert out.stats.drafted == 3 * out.stats.rounds
    assert out.text == ""
    assert len(out.drafted) == len(out.tokens)


def test_info_names_what_the_drafter_reads(pairs: dict[str, Runtime]) -> None:
    info = pairs["edge"].info()
    layers = pairs["edge"].config.layers
    writers = [i for i, layer in enumerate(layers) if layer.writes_kv]
    assert info["drafter"]["kv_bytes"] == 0
    assert set(info["drafter"]["reads_target_layers"]) == {
        max(i for i in writers if layers[i].kind == kind) for kind in ("sliding", "full")
    }
    assert info["model"]["bytes"] > info["drafter"]["bytes"] > 0
    full = [layers[i] for i in writers if layers[i].window is None]
    assert info["kv"]["bytes_per_1k_tokens"] == 1024 * sum(2 * 4 * s.kv_heads * s.head_dim for s in full)


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ([], {}, "prompt"),
        ([VOCAB], {}, f"token id {VOCAB}"),
        ("hello", {}, "no tokenizer"),
        ([1], {"depth": 9}, "depth is 9"),
        ([1], {"max_tokens": 0}, "max_tokens is 0"),
        ([1], {"sampling": [SamplingParams()] * 2}, "2 entries for 1 prompts"),
        ([1], {"max_tokens": 10**9}, "expected at most"),
    ],
)
def test_bad_input_is_named(pairs: dict[str, Runtime], prompt: object, options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pairs["dense"].generate(prompt, **options)  # type: ignore[arg-type]


def test_draft_and_logits_refuse_bad_tokens(pairs: dict[str, Runtime]) -> None:
    for call in (pairs["dense"].draft, pairs["dense"].logits):
        with pytest.raises(ValueError, match="empty"):
            call([])
        with pytest.raises(ValueError, match=f"id {VOCAB}"):
            call([1, VOCAB])


def test_the_next_turn_of_a_chat_reuses_what_the_last_one_computed() -> None:
    rt = load("demo")
    turns: list[dict[str, str]] = [{"role": "user", "content": "Tell me a short story about a fox."}]
    cold = rt.generate(turns, max_tokens=40)
    assert cold.timing.reused_tokens == 0
    rt.keep_prefixes(1 << 24)
    assert rt.generate(turns, max_tokens=40).tokens == cold.tokens
    turns += [{"role": "assistant", "content": cold.text}, {"role": "user", "content": "And one about a bear."}]
    warm = rt.generate(turns, max_tokens=40)
    assert warm.timing.reused_tokens > 20
    rt.keep_prefixes(0)
    assert rt.prefixes.nbytes == 0
    again = rt.generate(turns, max_tokens=40)
    assert again.timing.reused_tokens == 0
    assert again.tokens == warm.tokens


def test_dropping_a_stream_leaves_its_prefix() -> None:
    rt = load("demo")
    rt.keep_prefixes(1 << 24)
    stream = rt.stream("Tell me a short story about a fox.", max_tokens=60)
    next(stream)
    del stream
    assert rt.prefixes.nbytes > 0
    assert rt.default_kv_budget() > rt.default_kv_budget(prefix_cache=1000) > 0
