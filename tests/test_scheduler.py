"""The loop, with models that have no weights: every interleaving gives each request its own tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp import Request, SamplingParams, SpecStats, cache, speculative
from mlx_gemma_mtp.adaptive import parse_depth
from mlx_gemma_mtp.cache import planned_bytes
from mlx_gemma_mtp.depth import FixedDepth, RoundShape, RowOutcome, RowState
from mlx_gemma_mtp.scheduler import Scheduler

from .fakes import SPEC, VOCAB, expected, fake_speculator


@dataclass(frozen=True)
class _Cutting(FixedDepth):
    """A fixed depth whose blocks end behind an improbable chain."""

    chain: float = 0.0

    @property
    def min_chain(self) -> float:
        return self.chain


def _scheduler(**options: Any) -> Scheduler:
    speculator = fake_speculator(drafter=options.pop("drafter", 1) > 0, compiled=options.pop("compiled", 0) > 0)
    settings: dict[str, Any] = {"vocab_size": VOCAB, "max_positions": 100_000, **options}
    depth = _Cutting(settings.pop("depth", 3), chain=settings.pop("min_chain", 0.0))
    return Scheduler(speculator, depth=settings.pop("policy", depth), **settings)


def _fresh(**options: int) -> tuple[Scheduler, dict[int, list[int]], dict[int, str | None]]:
    return _scheduler(**options), {}, {}


def _drain(scheduler: Scheduler, got: dict[int, list[int]], reasons: dict[int, str | None]) -> None:
    while scheduler.busy:
        _collect(scheduler, got, reasons)


def _collect(scheduler: Scheduler, got: dict[int, list[int]], reasons: dict[int, str | None]) -> None:
    for event in scheduler.step():
        got.setdefault(event.request_id, []).extend(event.tokens)
        assert event.request_id not in reasons, "an event after the end"
        if event.finish_reason is not None:
            reasons[event.request_id] = event.finish_reason


@pytest.mark.parametrize("depth", range(9))
@pytest.mark.parametrize("length", [1, 5, 6, 7, 40])
def test_one_request_gets_the_targets_tokens_at_every_depth(depth: int, length: int) -> None:
    prompt = [(3 * i + length) % VOCAB for i in range(length)]
    scheduler, got, reasons = _fresh(depth=depth, chunk=16)
    number, stats = scheduler.add(Request(prompt=prompt, max_tokens=60))
    _drain(scheduler, got, reasons)
    assert got[number] == expected(prompt, 60)
    assert reasons == {number: "length"}
    assert stats.tokens == 60
    assert (stats.accepted > 0) == (depth > 0)


requests = st.fixed_dictionaries(
    {
        "prompt": st.one_of(
            st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=60),
            # Prompts that begin alike, part in the middle, and are cut at many lengths.
            st.builds(
                lambda cut, tail: [*[(i * i) % VOCAB for i in range(cut)], *tail],
                st.integers(15, 70),
                st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
            ),
        ),
        "max_tokens": st.integers(1, 40),
        "depth": st.one_of(st.none(), st.integers(0, 8)),
        "checkpoints": st.lists(st.integers(0, 60), max_size=2),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(requests, min_size=1, max_size=9),
    order=st.lists(st.sampled_from(["add", "step", "step", "cancel"]), max_size=60),
    options=st.fixed_dictionaries(
        {
            "max_batch": st.integers(1, 5),
            "chunk": st.integers(1, 32),
            "prefill_budget": st.integers(1, 64),
            "depth": st.integers(0, 8),
            "rows_that_fit": st.sampled_from([None, 1, 1.3, 2, 2.5]),
            "prefix_cache": st.sampled_from([0, 700, 2000, 100_000]),
            "pipelined": st.sampled_from(["all", "plain", "none"]),
            # The fake drafter gives each of its guesses a probability of 0.21.
            "min_chain": st.sampled_from([0.0, 0.0, 0.03, 0.5]),
        }
    ),
    step=st.sampled_from([16, 512]),
    data=st.data(),
)
def test_any_interleaving_gives_each_request_the_tokens_it_gets_alone(
    asked: list[dict[str, object]], order: list[str], options: dict[str, Any], step: int, data: st.DataObject
) -> None:
    with patch.object(cache, "_STEP", step):
        _interleave(asked, order, options, data)


def _interleave(asked: list[dict[str, object]], order: list[str], options: dict[str, Any], data: st.DataObject) -> None:
    fit = options.pop("rows_that_fit")
    # The longest request there is has 76 + 40 tokens.
    scheduler = _scheduler(**options, kv_budget=None if fit is None else int(fit * planned_bytes(SPEC, [116])))
    got: dict[int, list[int]] = {}
    reasons: dict[int, str | None] = {}
    wanted: dict[int, Request] = {}
    stats: dict[int, SpecStats] = {}
    cancelled: set[int] = set()
    left = [Request(**r) for r in asked]  # type: ignore[arg-type]

    def add() -> None:
        request = left.pop()
        number, counters = scheduler.add(request)
        wanted[number], stats[number] = request, counters

    for action in order:
        if action == "add" and left:
            add()
        elif action == "step":
            _collect(scheduler, got, reasons)
            now = scheduler.stats()
            assert now.prefix_bytes <= options["prefix_cache"]
            assert now.kv_budget is None or now.running + now.waiting < 2 or now.kv_bytes <= now.kv_budget
        elif action == "cancel" and (open_ := [n for n in wanted if n not in reasons and n not in cancelled]):
            number = data.draw(st.sampled_from(open_))
            # One that has just ended, in a round that is on its way, is past cancelling.
            if scheduler.cancel(number):
                cancelled.add(number)
    while left:
        add()
    _drain(scheduler, got, reasons)
    for number, request in wanted.items():
        reference = expected(request.prompt, request.max_tokens)
        tokens = got.get(number, [])
        if number in cancelled:
            assert tokens == reference[: len(tokens)]
            assert number not in reasons
        else:
            assert tokens == reference
            assert reasons[number] == "length"
        _adds_up(stats[number], len(tokens))
    assert not scheduler.busy
    assert not scheduler.cancel(0)


def _adds_up(stats: SpecStats, tokens: int) -> None:
    assert stats.tokens == tokens
    assert stats.tokens == stats.prefills + stats.accepted + stats.rounds - stats.cut
    assert stats.accepted == sum(stats.accepted_per_position)
    assert stats.drafted == sum(stats.drafted_per_position)
    assert stats.accepted_per_position == sorted(stats.accepted_per_position, reverse=True)


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    stops=st.frozensets(st.integers(0, VOCAB - 1), min_size=1, max_size=2),
    depth=st.integers(0, 8),
    max_tokens=st.integers(1, 30),
)
def test_a_stop_id_ends_the_output_before_itself(
    prompt: Sequence[int], stops: frozenset[int], depth: int, max_tokens: int
) -> None:
    scheduler, got, reasons = _fresh(depth=depth)
    number, stats = scheduler.add(Request(prompt=prompt, max_tokens=max_tokens, stop_ids=stops))
    _drain(scheduler, got, reasons)
    reference = expected(prompt, max_tokens)
    end = next((i for i, t in enumerate(reference) if t in stops), None)
    assert got[number] == reference[:end]
    assert reasons[number] == ("length" if end is None else "stop")
    _adds_up(stats, len(got[number]))


def test_ignore_eos_goes_on() -> None:
    scheduler, got, reasons = _fresh()
    number, _ = scheduler.add(Request(prompt=[1], max_tokens=50, stop_ids=frozenset(range(VOCAB)), ignore_eos=True))
    _drain(scheduler, got, reasons)
    assert got[number] == expected([1], 50)


def test_drafted_marks_exactly_the_accepted_drafts() -> None:
    scheduler = _scheduler(depth=4)
    _, stats = scheduler.add(Request(prompt=[1, 2, 3], max_tokens=100))
    flags = []
    while scheduler.busy:
        flags += [f for event in scheduler.step() for f in event.drafted]
    assert sum(flags) in (stats.accepted, stats.accepted - stats.cut)


def test_each_row_drafts_to_its_own_depth_in_a_mixed_batch() -> None:
    scheduler = _scheduler(depth=2)
    depths = (0, 1, 5, None)
    stats = [scheduler.add(Request(prompt=[1, 2], max_tokens=40, depth=d))[1] for d in depths]
    flags: dict[int, list[bool]] = {}
    tokens: dict[int, list[int]] = {}
    while scheduler.busy:
        for event in scheduler.step():
            flags.setdefault(event.request_id, []).extend(event.drafted)
            tokens.setdefault(event.request_id, []).extend(event.tokens)
            assert not any(event.drafted[-1:]) or event.finish_reason is not None, "a round ends with the target's own"
    for number, (depth, counters) in enumerate(zip((0, 1, 5, 2), stats, strict=True)):
        # Drafts that only the end could use are not drawn.
        assert depth * (counters.rounds - 1) <= counters.drafted <= depth * counters.rounds
        assert len(counters.drafted_per_position) == (depth if counters.rounds else 0)
        assert tokens[number] == expected([1, 2], 40)
        assert not flags[number][0], "the first token is the prefill's"


def test_without_a_drafter_every_depth_is_plain_decoding() -> None:
    scheduler, got, reasons = _fresh(drafter=0, depth=5)
    number, stats = scheduler.add(Request(prompt=[4, 5], max_tokens=20))
    _drain(scheduler, got, reasons)
    assert got[number] == expected([4, 5], 20)
    assert (stats.drafted, stats.rounds) == (0, 19)


def test_capacity_steps_are_crossed_by_short_and_long_rows_together() -> None:
    scheduler, got, reasons = _fresh(chunk=512)
    prompts = [[(i * 7 + n) % VOCAB for i in range(n)] for n in (3, 480, 1500, 2010, 505, 1010)]
    numbers = [scheduler.add(Request(prompt=p, max_tokens=80))[0] for p in prompts]
    _drain(scheduler, got, reasons)
    for number, prompt in zip(numbers, prompts, strict=True):
        assert got[number] == expected(prompt, 80)


def test_a_shape_in_use_is_traced_once_per_capacity_step() -> None:
    scheduler = _scheduler(compiled=1, chunk=512, max_batch=4)
    speculator = scheduler._speculator
    for n in (5, 9, 30, 100):
        scheduler.add(Request(prompt=[1] * n, max_tokens=390))
    _drain(scheduler, {}, {})
    assert speculator.traces <= 6, "row counts 4, 3, 2, 1, a last round without drafts, the drafts behind a prefill"
    for i in range(4):
        for n in (7, 11, 60, 90):
            scheduler.add(Request(prompt=[2 + i] * n, max_tokens=390))
        _drain(scheduler, {}, {})
    seen = speculator.traces
    assert seen <= 10, "other lengths and contents built a round again: only last rounds differ in how many rows end"
    scheduler.add(Request(prompt=[2] * 480, max_tokens=500))
    _drain(scheduler, {}, {})
    assert speculator.traces <= seen + 3, "one step of capacity costs one more trace of each round"


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request(prompt=[VOCAB], max_tokens=1), f"token id {VOCAB}, expected 0 to {VOCAB - 1}"),
        (Request(prompt=[-1], max_tokens=1), "token id -1"),
        (Request(prompt=[1], sampling=SamplingParams(logit_bias={"a": 1.0})), "logit_bias has token id 'a'"),  # type: ignore[dict-item]
        (Request(prompt=[1], sampling=SamplingParams(logprobs=VOCAB + 1)), f"logprobs is 12, expected at most {VOCAB}"),
        (Request(prompt=[1], max_tokens=100_000), "1 \\+ 100000 tokens, expected at most 100000"),
        (Request(prompt=[1], max_tokens=1, depth=9), "depth is 9, expected at most 8"),
        (Request(prompt=[1], max_tokens=1, sampling=SamplingParams(constraint="a")), "nothing here can honour it"),
        (Request(prompt=[1], sampling=SamplingParams(logit_bias={10**6: 1.0})), "logit_bias has token id 1000000"),
        (Request(prompt=[1], sampling=SamplingParams(suppress_tokens=[-1])), "suppress_tokens has token id -1"),
    ],
)
def test_a_request_that_cant_be_honoured_is_refused_and_changes_nothing(request_: Request, said: str) -> None:
    scheduler, got, reasons = _fresh()
    with pytest.raises(ValueError, match=said):
        scheduler.add(request_)
    assert not scheduler.busy
    number, _ = scheduler.add(Request(prompt=[1], max_tokens=5))
    _drain(scheduler, got, reasons)
    assert got[number] == expected([1], 5)


def test_stop_ids_beyond_the_vocabulary_hold_no_token_back() -> None:
    # Row 0's token VOCAB + t would be row 1's token t in a table of both.
    prompts = [[1, 2], [3, 4, 5]]
    scheduler, got, reasons = _fresh()
    unheard_of = frozenset(VOCAB + t for t in expected(prompts[1], 8))
    scheduler.add(Request(prompt=prompts[0], max_tokens=8, sampling=SamplingParams(min_tokens=8), stop_ids=unheard_of))
    scheduler.add(Request(prompt=prompts[1], max_tokens=8, sampling=SamplingParams(min_tokens=8)))
    _drain(scheduler, got, reasons)
    assert got == {n: expected(prompt, 8) for n, prompt in enumerate(prompts)}


@pytest.mark.parametrize("value", [-1, 9, 2.0, "3", "fast", None, True])
def test_a_depth_that_isnt_one_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="depth is"):
        parse_depth(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(("chain", "offered"), [(0.0, 5), (0.03, 3), (0.21, 2), (0.5, 1), (1.0, 1)])
def test_a_row_offers_its_drafts_up_to_the_one_that_makes_the_chain_improbable(chain: float, offered: int) -> None:
    # The first draft has probability 0.214, the first two 0.046, the first three 0.010.
    scheduler, prompt = _scheduler(depth=5, min_chain=chain), [1, 2, 3]
    number, stats = scheduler.add(Request(prompt=prompt, max_tokens=40))
    got: dict[int, list[int]] = {}
    _drain(scheduler, got, {})
    assert got[number] == expected(prompt, 40)
    assert len(stats.drafted_per_position) == offered
    # Blocks are cut for all rows, so no position behind the last one offered was verified.
    assert stats.drafted_per_position[0] == stats.drafted_per_position[-1]


def test_rounds_go_ahead_of_what_is_read_and_end_with_the_rows() -> None:
    for pipelined, depth in (("all", 2), ("plain", 2), ("plain", 0), ("none", 0)):
        scheduler = _scheduler(pipelined=pipelined, depth=depth)
        launched: list[int] = []
        speculator = scheduler._speculator
        launch = speculator.launch

        def noted(*args: Any, ahead: int = 0, seen: list[int] = launched, run: Any = launch, **options: Any) -> Any:
            seen.append(ahead)
            return run(*args, ahead=ahead, **options)

        with patch.object(speculator, "launch", noted):
            for n in (3, 9):
                scheduler.add(Request(prompt=[1] * n, max_tokens=50))
            got: dict[int, list[int]] = {}
            _drain(scheduler, got, {})
        assert got == {i: expected([1] * n, 50) for i, n in enumerate((3, 9))}
        assert (sum(a > 0 for a in launched) > len(launched) // 2) == ((pipelined, depth) in {("all", 2), ("plain", 0)})
        assert scheduler.stats().kv_bytes == 0


def test_a_cancelled_row_says_nothing_more_and_its_neighbour_loses_nothing() -> None:
    scheduler, got, reasons = _fresh(depth=2)
    for n in (3, 9):
        scheduler.add(Request(prompt=[1] * n, max_tokens=60))
    for _ in range(5):
        _collect(scheduler, got, reasons)
    before = len(got[0])
    assert scheduler.cancel(0)
    _drain(scheduler, got, reasons)
    assert len(got[0]) == before
    assert got[1] == expected([1] * 9, 60)


def test_only_so_many_compiled_functions_are_kept() -> None:
    with patch.object(speculative, "_COMPILED", 5):
        scheduler = _scheduler(compiled=1, max_batch=4)
        for depth in (0, 1, 2, 3):
            for rows in (1, 2, 4):
                numbers = [
                    scheduler.add(Request(prompt=[1] * (n + 3), max_tokens=30, depth=depth))[0] for n in range(rows)
                ]
                got: dict[int, list[int]] = {}
                _drain(scheduler, got, {})
                assert [got[n] for n in numbers] == [expected([1] * (i + 3), 30) for i in range(rows)]
                assert len(scheduler._speculator._functions) <= 5


@dataclass(frozen=True)
class _Noting(FixedDepth):
    """Notes what a policy is told."""

    outcomes: list[RowOutcome] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)
    aborted: list[bool] = field(default_factory=list)
    rounds: list[str] = field(default_factory=list)

    def abort(self) -> None:
        self.aborted.append(True)

    def begin(self) -> None:
        self.rounds.append("begin")

    def meanwhile(self) -> None:
        self.rounds.append("meanwhile")

    def observe(self, shape: RoundShape, outcomes: Sequence[RowOutcome]) -> None:
        self.rounds.append("observe")
        self.outcomes.extend(outcomes)

    def forget(self, request: int) -> None:
        self.forgotten.append(request)


@pytest.mark.parametrize("pipelined", ["all", "none"])
def test_the_policy_hears_of_drafts_up_to_the_end_and_not_behind_it(pipelined: str) -> None:
    policy = _Noting(6)
    scheduler = _scheduler(policy=policy, pipelined=pipelined)
    got: dict[int, list[int]] = {}
    stats = [
        scheduler.add(Request(prompt=[1, n], max_tokens=40, stop_ids=frozenset({n % VOCAB})))[1] for n in range(10)
    ]
    reasons: dict[int, str | None] = {}
    _drain(scheduler, got, reasons)
    last = {o.request: o for o in policy.outcomes}
    assert all(0 <= o.accepted <= o.offered <= 6 for o in policy.outcomes)
    stopped = [last[n] for n, reason in reasons.items() if reason == "stop" and n in last]
    assert all(o.offered <= len(o.tokens) + 1 for o in stopped)
    assert any(o.accepted == len(o.tokens) + 1 for o in stopped), "a stop token that was drafted is an accepted draft"
    assert any(o.offered > len(o.tokens) for o in policy.outcomes)
    accepted = sum(o.accepted for o in policy.outcomes)
    assert 0 < accepted <= sum(s.accepted for s in stats)


@pytest.mark.parametrize(
    ("pipelined", "depth", "ahead"), [("all", 3, 2), ("plain", 3, 1), ("plain", 0, 2), ("none", 0, 1)]
)
def test_the_policy_has_time_while_a_round_is_on_its_way(pipelined: str, depth: int, ahead: int) -> None:
    policy = _Noting(depth)
    scheduler = _scheduler(policy=policy, pipelined=pipelined)
    scheduler.add(Request(prompt=[1, 2], max_tokens=40))
    _drain(scheduler, {}, {})
    begun, most, told = 0, 0, policy.rounds
    for what, then in pairwise([*told, "end"]):
        begun += {"begin": 1, "observe": -1}.get(what, 0)
        most = max(most, begun)
        assert what != "meanwhile" or (begun > 0 and then == "observe")
    assert begun == 0
    assert most == ahead
    assert told.count("observe") == told.count("meanwhile") == told.count("begin") > 5


def test_the_policy_forgets_every_request_that_is_over() -> None:
    policy = _Noting(3)
    scheduler = _scheduler(policy=policy, max_batch=2)
    for n in range(5):
        scheduler.add(Request(prompt=[1, n], max_tokens=10 if n else 60))
    scheduler.step()
    scheduler.step()
    assert policy.forgotten == []
    for number in (0, 4):  # a row, and one that waits
        assert scheduler.cancel(number)
    assert policy.forgotten == [0, 4]
    assert scheduler.pause(1)
    assert 1 in scheduler
    assert scheduler.cancel(1)
    assert 1 not in scheduler
    _drain(scheduler, {}, {})
    assert policy.forgotten.count(1) == 2, "when it was taken out, and when it was over"
    assert sorted(set(policy.forgotten)) == [0, 1, 2, 3, 4]
    lost, _ = scheduler.add(Request(prompt=[1], max_tokens=30))
    scheduler.step()
    with patch.object(scheduler._speculator, "land", side_effect=RuntimeError), pytest.raises(RuntimeError):
        scheduler.step()
    assert scheduler.abort() == [lost]
    assert policy.forgotten[-1] == lost
    assert policy.aborted == [True]


def test_the_policy_forgets_a_row_that_ended_before_the_next_round_failed() -> None:
    policy = _Noting(0)
    scheduler = _scheduler(policy=policy, pipelined="all")
    short, _ = scheduler.add(Request(prompt=[1], max_tokens=6))
    for n in range(3):
        scheduler.add(Request(prompt=[1, n], max_tokens=60))
    while not scheduler._closing:
        scheduler.step()
    assert policy.forgotten == []
    with patch.object(scheduler._speculator, "land", side_effect=RuntimeError), pytest.raises(RuntimeError):
        scheduler.step()
    assert short not in scheduler.abort()
    assert short in policy.forgotten


class _Scripted(FixedDepth):
    """Depths by round, the last one going on; notes the rounds' shapes, and whether each plan's depth was compiled."""

    def __init__(self, *depths: int) -> None:
        super().__init__(depths[0])
        self.depths, self.shapes, self.compiled = list(depths), list[tuple[int, int]](), list[bool]()

    def plan(self, rows: Sequence[RowState], *, width: int, context: int, compiled: Callable[[int], bool]) -> list[int]:
        depth = self.depths.pop(0) if len(self.depths) > 1 else self.depths[0]
        self.compiled.append(compiled(depth))
        return [min(depth, row.cap) for row in rows]

    def observe(self, shape: RoundShape, outcomes: Sequence[RowOutcome]) -> None:
        self.shapes.append((shape.verified, shape.drafted))


@pytest.mark.parametrize("pipelined", ["all", "plain", "none"])
def test_a_rare_change_of_depth_compiles_nothing_of_its_own(pipelined: str) -> None:
    policy = _Scripted(0, 0, 0, 3, 3, 3, 0, 0, 0, 3, 0)
    scheduler = _scheduler(compiled=1, policy=policy, pipelined=pipelined)
    got: dict[int, list[int]] = {}
    number, stats = scheduler.add(Request(prompt=[1, 2, 3], max_tokens=60))
    _drain(scheduler, got, {})
    assert got[number] == expected([1, 2, 3], 60)
    assert policy.shapes[:10] == [
        (0, 0), (0, 0), (3, 3), (3, 3), (3, 3), (3, 3), (0, 0), (0, 0), (3, 3), (3, 3)
    ]  # fmt: skip
    assert set(policy.shapes[10:]) == {(0, 0)}
    assert scheduler._speculator.traces == 3, "the first token, plain rounds, rounds of three drafts"
    assert stats.drafted == 4 * 3, "what the deeper rounds drew beside the plan wasn't offered"


def test_a_change_of_depth_that_comes_often_is_compiled() -> None:
    often = 2 * speculative._RARE
    policy = _Scripted(*[0, 3] * (often + 2))
    scheduler = _scheduler(compiled=1, policy=policy)
    got: dict[int, list[int]] = {}
    number, _ = scheduler.add(Request(prompt=[1, 2, 3], max_tokens=120))
    _drain(scheduler, got, {})
    assert got[number] == expected([1, 2, 3], 120)
    assert (3, 3) in policy.shapes[:often]
    assert set(policy.shapes[often + 4 : often + 10]) == {(0, 3), (3, 0)}


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, seed=3)]
)
def test_the_policy_hears_what_is_compiled(sampling: SamplingParams) -> None:
    policy = _Scripted(2)
    scheduler = _scheduler(compiled=1, policy=policy)
    scheduler.add(Request(prompt=[1, 2, 3], max_tokens=20, sampling=sampling))
    _drain(scheduler, {}, {})
    assert policy.compiled[0] is False
    assert policy.compiled[3] is True
    assert not scheduler._speculator.has_round(scheduler._cache, None, 5)
