"""Adaptive depth in a simulator: near the best fixed depth in hindsight, never far below plain decoding."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from mlx_gemma_mtp.adaptive import AdaptiveDepth, DepthMemory
from mlx_gemma_mtp.costs import CostFacts, CostModel
from mlx_gemma_mtp.depth import DepthPolicy, FixedDepth, RoundShape, RowOutcome, RowState
from mlx_gemma_mtp.depth_view import View

from .simulator import Clock, Cost, Rates, Run, World, experts, flat, linear, steady, stepped

KINDS: dict[str, Cost] = {"flat": flat, "linear": linear, "stepped": stepped, "experts": experts}


def _all(depth: int) -> bool:
    return True


def _run(world: World, seed: int, memory: DepthMemory | None = None) -> Run:
    clock = Clock()
    return world.run(AdaptiveDepth(memory, clock=clock), clock, seed=seed)


def _best(world: World) -> tuple[int, float]:
    """In a world that never changes."""
    return replace(world, rounds=1).best()


def _tuned(world: World) -> DepthMemory:
    """What `tune` would have found."""
    costs = CostModel()
    costs.store(world.rows, world.context, [world.seconds(k, k, 0) for k in range(9)], world.draft)
    return DepthMemory(CostModel.from_dict(costs.to_dict()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.7, 0.85, 0.95])
def test_regret_and_plain(kind: str, rate: float) -> None:
    """Over 2,000 rounds, with noise of 15% and a stall every 50 rounds."""
    world = World(cost=KINDS[kind], rates=steady(rate), stall_every=50)
    (best, most), rates = _best(world), [_run(world, seed).rate() for seed in range(8)]
    assert sum(rates) / 8 >= (0.97 if best else 0.98) * most, f"best is {best}"
    assert min(rates) >= 0.95 * most, "bad luck costs little more"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.85])
def test_regret_with_compilations(kind: str, rate: float) -> None:
    """Of 30 ms each, the time of one to five plain rounds."""
    world = World(cost=KINDS[kind], rates=steady(rate), stall_every=50, trace=0.03)
    most, rates = _best(world)[1], [_run(world, seed).rate() for seed in range(4)]
    assert sum(rates) / 4 >= 0.965 * most
    assert min(rates) >= 0.95 * most


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lag", [0, 1])
def test_mixed_batches_with_one_round_under_way(kind: str, lag: int) -> None:
    """Rows of all kinds of text, with a profile; rounds are begun before the last one is observed, or not."""

    def rates(row: int, round_: int) -> Sequence[float]:
        return [(0.2, 0.6, 0.9, 0.95)[row]] * 8

    world = World(cost=KINDS[kind], rates=rates, rows=4, lag=lag, stall_every=50)
    for seed in (3, 4):
        assert _run(world, seed, _tuned(world)).rate() >= 0.97 * _best(world)[1]


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_a_profile_leaves_little_to_be_found_out(kind: str, rows: int) -> None:
    for rate in (0.3, 0.85):
        world = World(cost=KINDS[kind], rates=steady(rate), rows=rows, rounds=600)
        rates, best = [_run(world, seed, _tuned(world)).rate() for seed in range(4)], _best(world)[1]
        assert sum(rates) / 4 >= 0.97 * best
        assert min(rates) >= 0.94 * best, "bad luck costs more in so few rounds"


PRODUCTS = {
    "flat": ((1, 1.0), (128, 1.64)),
    "linear": ((1, 1.0), (128, 86.0)),
    "stepped": ((1, 1.0), (5, 1.0), (6, 1.7), (10, 1.7), (11, 3.2), (128, 3.2)),
    "experts": ((1, 1.0), (32, 1.3), (128, 3.0)),
}
"""What a runtime times at load, by kind of cost."""


def _loaded(kind: str) -> DepthMemory:
    """What a runtime starts with that has no profile."""
    facts = CostFacts(products=PRODUCTS[kind])
    if kind == "experts":
        facts = replace(facts, dense=0.06, experts=1.0, count=128, used=8)
    return DepthMemory(CostModel(facts))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), [(0.9, 0.2), (0.2, 0.9)])
def test_it_recovers_within_60_rounds(kind: str, rows: int, before: float, after: float) -> None:
    """A text that gets easier repeats itself, which is seen while nothing is drafted."""

    def rates(row: int, round_: int) -> Sequence[float]:
        return [before if round_ < 1000 else after] * 8

    def tokens(round_: int) -> int:
        return round_ % 5 if (before if round_ < 1000 else after) > 0.6 else round_

    world = World(cost=KINDS[kind], rates=rates, rows=rows, rounds=1300, tokens=tokens)
    best = _best(world.after(1000))[1]
    runs = [_run(world, seed, _loaded(kind)) for seed in range(6)]
    assert sum(run.rate(1060, 1120) for run in runs) / 6 >= 0.88 * best
    assert sum(run.rate(1120) for run in runs) / 6 >= 0.96 * best


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_rates_that_drift(kind: str, rows: int) -> None:
    """From 0.95 to 0.15 and back, twice."""
    world = World(
        cost=KINDS[kind], rates=lambda row, t: [0.55 + 0.4 * math.cos(t / 500 * math.pi)] * 8, rows=rows, stall_every=50
    )
    best, most = world.best()
    found = [_run(world, seed, _loaded(kind)).rate() for seed in range(4)]
    assert sum(found) / 4 >= (0.97 if best else 0.98) * most
    assert min(found) >= 0.96 * most


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize(("kind", "rate"), [("linear", 0.5), ("linear", 0.3), ("experts", 0.3)])
def test_texts_that_change_in_vain_cost_little(kind: str, rate: float, rows: int) -> None:
    """Code and prose in turns of 40 rounds, of which neither can be drafted: only the first changes are looked into."""
    world = World(
        cost=KINDS[kind], rates=steady(rate), rows=rows, stall_every=50,
        tokens=lambda t: t % 5 if t // 40 % 2 else t,
    )  # fmt: skip
    best, most = _best(world)
    found = [_run(world, seed, _loaded(kind)).rate() for seed in range(4)]
    assert best == 0
    assert sum(found) / 4 >= 0.965 * most


def test_short_requests_cost_little_in_a_fresh_process() -> None:
    """64 rounds of one request, where no draft pays and each compilation costs five rounds."""
    world = World(cost=linear, rates=steady(0.4), rounds=64, trace=0.03)
    plain = Clock()
    fixed = world.run(FixedDepth(0), plain)
    assert _run(world, 0).rate() >= 0.75 * fixed.rate()


@pytest.mark.parametrize("rate", [0.3, 0.98])
def test_a_profile_without_rates_is_soon_worth_something(rate: float) -> None:
    """Requests of 64 rounds, costs of a pair measured on a CPU; only drafts tell that eight of them pay, or none."""
    costs = (3.8, 5.6, 7.3, 8.7, 11.3, 11.7, 12.0, 13.9, 15.5)
    world = World(
        cost=lambda rows, k, context: 1e-3 * costs[k], draft=0.0012, rates=steady(rate), rounds=64, trace=0.025
    )
    found = []
    for seed in range(3):
        memory, compiled = _tuned(world), set[tuple[int, int]]()
        for i in range(9):
            clock = Clock()
            policy = AdaptiveDepth(memory, clock=clock)
            found.append(world.run(policy, clock, seed=10 * seed + i, compiled=compiled).rate())
    later = [rate for i, rate in enumerate(found) if i % 9 >= 6]
    assert sum(later) / len(later) >= 0.94 * _best(world)[1]


@pytest.mark.parametrize("rows", [1, 4])
def test_a_machine_that_is_slow_at_times_changes_no_choice(rows: int) -> None:
    """Half as fast for dozens of rounds at a time, as a shared one is; requests are short and drafts pay."""
    costs = (2.0, 3.5, 4.7, 5.4, 6.3, 7.3, 8.2, 9.0, 9.8)
    rates = []
    for seed in range(4):
        draw, paces = random.Random(seed), list[float]()
        while len(paces) < 1500:
            paces += [2.0 if len(paces) % 2 else 1.0] * draw.randrange(10, 80)
        world = World(
            cost=lambda rows, k, context: 1e-3 * costs[k] * (0.4 + 0.6 * rows),
            draft=0.0006, rates=steady(0.97), rows=rows, rounds=1500, request_rounds=9, pace=paces.__getitem__,
        )  # fmt: skip
        rates.append(_run(world, seed, _tuned(world)).rate() / _best(world)[1])
    assert sum(rates) / 4 >= 0.95
    assert min(rates) >= 0.9


def test_costs_measured_at_a_bad_time_are_not_believed_for_ever() -> None:
    """A profile in which drafts are three times too dear: no acceptance would make them pay."""
    world = World(cost=flat, rates=steady(0.9), rounds=4000)
    memory = _tuned(world)
    table = memory.costs.table(1, world.context)
    table.target = [seconds and seconds * (1.0 if k == 0 else 8.0) for k, seconds in enumerate(table.target)]
    table.changed()
    memory.rates = [(0.9, 50.0)]
    run = _run(world, 0, memory)
    assert run.depths[5:500] == [0] * 495
    assert sum(run.depths[3000:]) / 1000 > 3


def test_a_profile_that_makes_plain_decoding_too_dear_is_soon_corrected() -> None:
    """By a quarter, so that drafts seem to gain where they lose: plain decoding is looked at early and at no price."""
    costs = (12.5, 28.0, 36.0, 49.0, 76.0, 80.0, 84.0, 130.0, 138.0)
    world = World(
        cost=lambda rows, k, context: 1e-3 * costs[k], draft=0.0018, rates=steady(0.97), rows=8, rounds=400,
        request_rounds=14, trace=0.015,
    )  # fmt: skip
    late = []
    for seed in range(8):
        profile = CostModel()
        profile.store(8, 300, [1e-3 * (c * (1.0 if k else 1.25) + 1.8 * k) for k, c in enumerate(costs)], 0.0018)
        run = _run(world, seed, DepthMemory(profile, rates=[(0.97, 100.0)] * 3))
        late.append(sum(run.depths[150:]) / 250)
    assert sum(late) / 8 < 0.3, "mean depth: parked, but for trials"


def test_short_requests_learn_from_each_other() -> None:
    memory = DepthMemory()
    world = World(cost=flat, rates=steady(0.8), rounds=64)
    rates = [_run(world, seed, memory).rate() for seed in range(12)]
    assert min(rates[6:]) >= 0.9 * _best(world)[1]


class Book:
    """A policy driven by hand: a clock, and rounds that take as long as told."""

    def __init__(self, policy: DepthPolicy, clock: Clock) -> None:
        self.policy, self.clock, self.block = policy, clock, 0

    def round(self, states: Sequence[RowState], seconds: Cost, accepted: int, context: int = 100) -> list[int]:
        depths = self.policy.plan(states, width=len(states), context=context, compiled=_all)
        self.policy.begin()
        self.policy.meanwhile()
        self.clock.now += seconds(len(states), self.block, context) + 0.001 * max(depths)
        shape = RoundShape(rows=len(states), verified=self.block, drafted=max(depths), context=context)
        kept = min(accepted, self.block)
        outcomes = [RowOutcome(request=s.request, offered=self.block, accepted=kept) for s in states]
        self.policy.observe(shape, outcomes)
        self.block = max(depths)
        return depths


def test_rows_that_ask_for_a_depth_get_it_and_the_others_share_the_block() -> None:
    clock = Clock()
    book = Book(AdaptiveDepth(clock=clock), clock)
    states = [RowState(request=0, cap=1000, fixed=5), RowState(request=1, cap=1000), RowState(request=2, cap=0)]
    states.append(RowState(request=3, cap=1000, fixed=0))
    for _ in range(30):
        depths = book.round(states, flat, 8)
        assert (depths[0], depths[2], depths[3]) == (5, 0, 0)
        assert depths[1] >= 5, "a block of five drafts is verified anyway"


def test_a_row_that_joins_does_not_change_the_running_blocks() -> None:
    clock = Clock()
    policy = AdaptiveDepth(clock=clock)
    book, old = Book(policy, clock), [RowState(request=0, cap=1000)]
    for _ in range(60):
        running = book.round(old, flat, 8)[0]
    assert running > 3
    assert policy.plan([RowState(request=1, cap=1000)], width=1, context=5000, compiled=_all) == [running]


def _dear_together(rows: int, verified: int, context: int) -> float:
    """Drafts cost nothing where a row is alone, and far too much else."""
    return 0.02 if rows == 1 else 0.02 * (1 + 3 * verified)


def test_a_batch_that_changes_goes_on_at_its_last_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, and without a look at it for some rounds; what was planned doesn't change because it is explained."""
    looks, of = [0], View.of

    def counted(*args: Any) -> View:
        looks[0] += 1
        return of(*args)

    monkeypatch.setattr(View, "of", counted)
    clock = Clock()
    policy = AdaptiveDepth(clock=clock)
    book = Book(policy, clock)
    alone, both = [RowState(request=0, cap=1000)], [RowState(request=n, cap=1000) for n in (0, 1)]

    def rounds(states: Sequence[RowState], count: int) -> list[int]:
        if states is alone:
            policy.forget(1)
        return [max(book.round(states, _dear_together, 8)) for _ in range(count)]

    rounds(alone, 100)
    deep = Counter(rounds(alone, 50)).most_common(1)[0][0]
    rounds(both, 100)
    assert deep > 0
    assert Counter(rounds(both, 50)).most_common(1)[0][0] == 0
    for before, after, depth in ((both, alone, deep), (alone, both, 0)):
        rounds(before, 20)
        while policy._trial is not None or policy._wait < 6:
            rounds(before, 1)
        looks[0] = 0
        assert rounds(after, 1) == [depth], "in the first round"
        assert looks[0] == 0
        policy._cut = True
        cut, choice = policy.min_chain, policy.describe()
        assert (choice.depth, policy.min_chain) == (depth, cut)
        looks[0] = 0
        rounds(after, 5)
        assert looks[0] > 0, "soon there is a choice"


def test_plain_decoding_is_found_where_costs_come_from_another_batch() -> None:
    """They say that drafts cost nothing; plain decoding, never measured with two rows, would be better by far."""
    clock = Clock()
    policy = AdaptiveDepth(clock=clock)
    book = Book(policy, clock)
    for _ in range(150):
        book.round([RowState(request=0, cap=1000)], _dear_together, 8)
    both = [RowState(request=n, cap=1000) for n in (0, 1)]
    for slope in (1.2, 3.0):
        found = [max(book.round(both, lambda r, k, c: 0.02 * (1 + slope * k), 8)) for _ in range(150)]  # noqa: B023
        assert sum(depth > 0 for depth in found[100:]) <= 5, f"{slope}: parked, but for trials"


def test_batches_that_are_soon_over_still_change_the_depth() -> None:
    """Two requests that come one after the other and are over three rounds later, again and again."""
    clock, memory = Clock(), DepthMemory()
    before = World(cost=flat, rates=steady(0.95), rows=2, rounds=300)
    before.run(AdaptiveDepth(memory, clock=clock), clock)
    replace(before, rows=1).run(AdaptiveDepth(memory, clock=clock), clock)
    policy = AdaptiveDepth(memory, clock=clock)
    book, late = Book(policy, clock), []
    for n in range(0, 160, 2):
        first, second = RowState(request=n, cap=1000), RowState(request=n + 1, cap=1000)
        book.block = 0
        for states in ([first], [first, second], [first, second], [first, second]):
            depths = book.round(states, linear, 0, context=before.context)
            late += depths if n >= 80 else []
        policy.forget(n)
        policy.forget(n + 1)
    assert sum(late) <= 0.2 * len(late), "parked, but for trials"


def test_what_the_requests_ask_for_is_said() -> None:
    clock = Clock()
    policy = AdaptiveDepth(clock=clock)
    book = Book(policy, clock)
    for fixed in (0, 3):
        book.round([RowState(request=0, cap=1000, fixed=fixed)], flat, 8)
        assert str(policy.describe()) == f"{('no', 0, 0, '3')[fixed]} drafts (asked for by the requests)"
    for _ in range(20):
        book.round([RowState(request=1, cap=1000)], flat, 8)
    assert "asked" not in policy.describe().reason


def test_before_any_draft_there_is_no_acceptance_to_tell() -> None:
    clock = Clock()
    policy = AdaptiveDepth(_tuned(World(cost=linear, rates=steady(0.5))), clock=clock)
    Book(policy, clock).round([RowState(request=0, cap=1000)], linear, 0, context=300)
    assert policy.describe().reason.endswith("no draft verified yet")


def test_parking_is_explained() -> None:
    clock = Clock()
    policy = AdaptiveDepth(clock=clock)
    assert policy.describe().reason == "nothing was decoded yet"
    book = Book(policy, clock)
    for _ in range(300):
        book.round([RowState(request=0, cap=1000)], linear, 0)
    choice = policy.describe()
    assert choice.depth == 0
    assert choice.reason.startswith("parked: verify(2) costs 1.")
    assert choice.acceptance[0] < 0.4
    assert choice.costs[0] == 1.0
    assert list(choice.costs) == sorted(choice.costs)


def test_a_pause_between_rounds_is_no_round() -> None:
    """A caller who reads slowly, or a prefill between two rounds, costs the depths nothing."""
    clock = Clock()
    memory = DepthMemory()
    book = Book(AdaptiveDepth(memory, clock=clock), clock)
    for _ in range(20):
        book.round([RowState(request=0, cap=0)], flat, 0)
        clock.now += 5.0
    assert memory.costs.seconds(1, 0, 0, 100) == pytest.approx(flat(1, 0, 100), rel=0.02)


def test_what_a_further_draft_is_worth() -> None:
    """Where verifying is free every draft is, where it costs as much as a token only a likely one."""
    found = {}
    for name, cost in (("flat", flat), ("experts", experts)):
        clock = Clock()
        world = World(cost=cost, rates=steady(0.95), noise=0.0)
        policy = AdaptiveDepth(_tuned(world), clock=clock)
        world.run(policy, clock)
        found[name] = policy.min_chain
    assert found["flat"] == 0.0
    assert 0.1 < found["experts"] < 0.8
    assert FixedDepth(3).min_chain == 0.0


@pytest.mark.parametrize(("slope", "cut", "cut_ahead"), [(0.02, False, False), (0.1, True, False), (0.4, True, True)])
def test_blocks_are_cut_where_a_draft_is_dear(slope: float, cut: bool, cut_ahead: bool) -> None:
    """Dearer where rounds are launched ahead, which cut ones can't be."""
    world = World(cost=lambda r, k, c: 0.02 * (1 + slope * k), rates=steady(0.95), noise=0.0)
    for ahead, expected in ((False, cut), (True, cut_ahead)):
        clock = Clock()
        policy = AdaptiveDepth(_tuned(world), clock=clock, ahead=ahead)
        world.run(policy, clock)
        assert policy._chosen > 1
        assert (policy.min_chain > 0.0) == expected


def test_a_failed_round_does_not_shift_the_clock_of_the_next() -> None:
    clock = Clock()
    memory = DepthMemory()
    policy = AdaptiveDepth(memory, clock=clock)
    policy.plan([RowState(request=0, cap=0)], width=1, context=100, compiled=_all)
    policy.begin()
    policy.forget(0)
    clock.now += 100.0
    book = Book(policy, clock)
    for _ in range(3):
        book.round([RowState(request=1, cap=0)], flat, 0)
        clock.now += 5.0
    policy.forget(1)
    assert memory.costs.seconds(1, 0, 0, 100) == pytest.approx(flat(1, 0, 100), rel=0.01)


def test_ended_requests_leave_nothing_behind() -> None:
    """A request may be told of after it was forgotten."""
    clock = Clock()
    policy = AdaptiveDepth(clock=clock)
    policy.plan([RowState(request=7, cap=1000)], width=1, context=10, compiled=_all)
    policy.begin()
    policy.forget(7)
    policy.observe(
        RoundShape(rows=1, verified=2, drafted=0, context=10),
        [RowOutcome(request=7, offered=2, accepted=1, tokens=(1, 2))],
    )
    assert policy._acceptance._own == {}
    assert policy._predictability._tail == {}
    assert policy._acceptance.rates[0][0] > 0.65, "but all requests' rates know of it"


def _growing(row: int, round_: int) -> Sequence[float]:
    return [0.8] * 8


@pytest.mark.parametrize(("gain", "chosen"), [(1.03, 0), (1.15, 1)])
def test_plain_decoding_is_left_for_what_is_surely_better(gain: float, chosen: int) -> None:
    """A profile says that one draft gains so much; nothing is compiled but plain rounds, and none is measured."""
    memory = DepthMemory(rates=[(0.9, 160.0)], trace=0.0)
    memory.costs.store(1, 100, [0.01 * (1 if k == 0 else 1.9 * k / gain) for k in range(9)], 0.001)
    policy = AdaptiveDepth(memory, clock=Clock())
    for _ in range(4):
        for _ in range(8):
            policy.plan([RowState(request=0, cap=1000)], width=1, context=100, compiled=lambda k: k == 0)
    assert policy.describe().depth == chosen


@pytest.mark.parametrize("seed", range(20))
def test_another_context_has_a_table_of_its_own(seed: int) -> None:
    """Verifying gets dear as the context grows: what paid at first is given up."""

    def cost(rows: int, verified: int, context: int) -> float:
        return flat(rows, verified, context) + 1e-5 * max(context - 1000, 0) * verified

    rates: Rates = _growing
    world = World(cost=cost, rates=rates, rounds=2000, context=300, growth=4.0)
    run = _run(world, seed)
    assert sum(run.depths[:400]) / 400 > 3
    late = world.after(1500)
    assert run.rate(1700) >= 0.94 * max(
        sum(late.expected(k, t) for t in range(200, 500)) / sum(world.seconds(k, k, 1500 + t) for t in range(200, 500))
        for k in range(9)
    )


@pytest.mark.parametrize("rounds", [4, 7])
def test_short_requests_still_change_the_depth(rounds: int) -> None:
    """Texts become unpredictable; each request is over before it was looked at twice, and has a policy of its own."""
    clock, memory = Clock(), DepthMemory()
    before = World(cost=experts, rates=steady(0.95), rounds=300)
    before.run(AdaptiveDepth(memory, clock=clock), clock)
    short = World(cost=experts, rates=steady(0.1), rounds=rounds)
    depths = [short.run(AdaptiveDepth(memory, clock=clock), clock, seed=seed).depths for seed in range(60)]
    assert sum(map(sum, depths[:2])) > 0
    assert sum(map(sum, depths[40:])) <= 0.1 * 20 * rounds, "parked, but for trials"


def test_rounds_that_failed_are_not_timed() -> None:
    clock, memory = Clock(), DepthMemory()
    policy = AdaptiveDepth(memory, clock=clock)
    book, rows = Book(policy, clock), [RowState(request=0, cap=0)]
    policy.plan(rows, width=1, context=100, compiled=_all)
    policy.begin()
    policy.abort()
    clock.now += 5.0
    for _ in range(20):
        book.round(rows, flat, 0)
        clock.now += 5.0
    policy.forget(0)
    assert memory.costs.seconds(1, 0, 0, 100) == pytest.approx(flat(1, 0, 100), rel=0.02)


def test_a_known_table_is_not_looked_at_again_for_a_new_request() -> None:
    """The depth goes on, and is explained when asked for."""
    memory, clock = DepthMemory(), Clock()
    world = World(cost=flat, rates=steady(0.9), rounds=300)
    world.run(AdaptiveDepth(memory, clock=clock), clock)
    policy = AdaptiveDepth(memory, clock=clock)
    book = Book(policy, clock)
    (depth,) = book.round([RowState(request=0, cap=1000)], flat, 8, context=300)
    assert depth > 3
    choice = policy.describe()
    assert choice.depth == depth
    assert "acceptance 0." in choice.reason
    assert book.round([RowState(request=0, cap=1000)], flat, 8, context=300) == [depth]
