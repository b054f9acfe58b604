"""The cost model alone: shares told apart, outliers, interpolation, carrying over, dumps. And acceptance rates."""

from __future__ import annotations

import json
import math
import random

import pytest

from mlx_gemma_mtp.acceptance import AcceptanceModel, Predictability, Spread, committed
from mlx_gemma_mtp.costs import CostFacts, CostModel, context_bucket, contexts


def _learnt(step: float = 0.002, depths: tuple[int, ...] = tuple(range(9))) -> CostModel:
    model, draw = CostModel(), random.Random(1)
    for _ in range(60):
        for k in depths:
            for drafted in (0, k):
                seconds = (0.01 + 0.004 * k + step * drafted) * draw.uniform(0.9, 1.1)
                model.observe(1, k, drafted, 100, seconds)
    return model


def test_the_shares_of_target_and_drafter_are_told_apart() -> None:
    model = _learnt()
    for verified, drafted in ((0, 0), (3, 3), (0, 5), (8, 2)):
        assert model.seconds(1, verified, drafted, 100) == pytest.approx(
            0.01 + 0.004 * verified + 0.002 * drafted, rel=0.06
        )


def test_a_sample_counts_when_its_shape_repeats_and_nothing_was_compiled() -> None:
    model = CostModel()
    assert not model.observe(1, 2, 2, 100, 0.5)
    assert not model.observe(1, 2, 2, 100, 0.5, settled=False)
    assert not model.measured
    assert model.observe(1, 2, 2, 100, 0.02)
    assert model.seconds(1, 2, 2, 100) == pytest.approx(0.02)


def test_outliers_are_clamped_but_a_lasting_change_is_believed() -> None:
    model = _learnt()
    before = model.seconds(1, 0, 0, 100)
    model.observe(1, 0, 0, 100, 1.0)
    assert model.seconds(1, 0, 0, 100) < 1.1 * before
    for _ in range(12):
        model.observe(1, 0, 0, 100, 0.03)
    assert model.seconds(1, 0, 0, 100) == pytest.approx(0.03, rel=0.1)


def test_depths_between_and_behind_the_measured_ones_are_guessed_and_never_fall() -> None:
    curve = _learnt(depths=(0, 3, 6)).table(1, 100).curve()
    assert curve == sorted(curve)
    assert curve[3] < curve[4] < curve[6] < curve[8]
    assert curve[8] / curve[0] == pytest.approx(4.2, rel=0.15), "as steep behind the last as before it"


def test_a_machine_that_slows_down_does_so_at_every_depth() -> None:
    model = _learnt()
    before = model.seconds(1, 5, 5, 100)
    for _ in range(200):
        model.observe(1, 1, 1, 100, 1.2 * 0.016)
    assert model.seconds(1, 5, 5, 100) > 1.1 * before


def test_other_rows_and_contexts_start_from_the_nearest_table() -> None:
    model = _learnt()
    assert model.seconds(1, 4, 0, 900) == pytest.approx(model.seconds(1, 4, 0, 100), rel=0.01)
    assert model.seconds(2, 4, 0, 100) > model.seconds(1, 4, 0, 100)


def test_the_prior_of_experts_grows_with_the_distinct_ones() -> None:
    dense = CostFacts(dense=100.0)
    sparse = CostFacts(dense=10.0, experts=900.0, count=128, used=8)
    assert dense.target(1, 3, 0) / dense.target(1, 0, 0) == pytest.approx(1.3)
    assert 2.5 < sparse.target(1, 3, 0) / sparse.target(1, 0, 0) < 4
    assert sparse.target(8, 8, 0) < 2 * (10 * 4.1 + 900), "at most all of them"


def test_a_dump_comes_back_the_same() -> None:
    model = _learnt()
    data = json.loads(json.dumps(model.to_dict()))
    again = CostModel.from_dict(data)
    for shape in ((0, 0), (4, 4), (8, 0)):
        assert again.seconds(1, *shape, 100) == pytest.approx(model.seconds(1, *shape, 100))
    assert again.to_dict() == data
    with pytest.raises(ValueError, match="target has 3 depths, expected 9"):
        CostModel.from_dict({**data, "tables": [{**data["tables"][0], "target": [1, 2, 3]}]})


@pytest.mark.parametrize(("context", "bucket"), [(0, 0), (511, 0), (512, 1), (1023, 1), (1024, 2), (9000, 5)])
def test_contexts_share_a_table_up_to_their_doubling(context: int, bucket: int) -> None:
    assert context_bucket(context) == bucket
    assert context in contexts(bucket)


def test_rates_are_those_given_that_the_prefix_was_accepted() -> None:
    model, draw = AcceptanceModel(), random.Random(2)
    for _ in range(400):
        accepted = 0 if draw.random() > 0.9 else 1 if draw.random() > 0.5 else 3
        model.observe(0, 3, accepted)
        model.tick()
    assert model.of(0)[0][0] == pytest.approx(0.9, abs=0.12)
    assert model.of(0)[0][1] == pytest.approx(0.5, abs=0.2)
    assert model.of(0)[0][2] > 0.9


def test_a_request_starts_from_all_and_soon_has_its_own_rate() -> None:
    model = AcceptanceModel()
    for request in range(20):
        for _ in range(10):
            model.observe(request, 2, 2)
            model.tick()
    assert model.of(99)[0][0] > 0.9
    for _ in range(12):
        model.observe(99, 2, 0)
        model.tick()
    assert model.of(99)[0][0] < 0.3
    assert model.of(98)[0][0] > 0.7


def test_a_change_is_seen_within_a_few_drafts() -> None:
    model = AcceptanceModel()
    for _ in range(200):
        model.observe(0, 4, 4)
        model.tick()
    for _ in range(10):
        model.observe(0, 4, 0)
        model.tick()
    assert max(model.of(0)[0]) < 0.5


def test_committed_counts_the_targets_own_token() -> None:
    assert committed([0.5, 0.5]) == [1.0, 1.5, 1.75]


def test_predictability_tells_a_change_of_text_once() -> None:
    text = Predictability()
    text.observe(0, list(range(100)))
    assert not text.changed()
    text.observe(0, [1, 2, 3] * 20)
    assert text.changed()
    assert not text.changed()
    text.observe(0, list(range(200, 260)))
    assert text.changed()
    text.forget(0)
    assert not text.changed()


def test_a_request_that_has_ended_is_known_no_more() -> None:
    model = AcceptanceModel()
    for _ in range(20):
        model.observe(1, 2, 2)
        model.observe(2, 2, 0)
        model.tick()
    assert model.of(1) != model.of(3)
    model.forget(1)
    assert model.of(1) == model.of(3)


def test_a_draft_counts_in_its_own_round_only() -> None:
    model = AcceptanceModel()
    model.observe(1, 1, 1)
    model.tick()
    before = model.rates
    model.tick()
    assert model.rates == before


@pytest.mark.parametrize(
    ("usual", "between", "requests", "worth"),
    [(0.7, 0.0, 40, (25.0, 40.0)), (0.7, 0.25, 40, (2.0, 6.5)), (0.97, 0.0, 20, (20.0, 40.0))],
)
def test_a_new_request_trusts_the_others_as_far_as_they_were_alike(
    usual: float, between: float, requests: int, worth: tuple[float, float]
) -> None:
    """Requests whose rates lie `between` (standard deviation) apart: what the mean of all is worth in own samples."""
    found = []
    for seed in range(10):
        draw, spread = random.Random(seed), Spread()
        model = AcceptanceModel([(usual, 100.0)], spread)
        for request in range(requests):
            rate = min(max(draw.gauss(usual, between), 0.05), 0.97)
            for _ in range(15):
                accepted = 0
                while accepted < 3 and draw.random() < rate:
                    accepted += 1
                model.observe(request, 3, accepted)
                model.tick()
            model.forget(request)
        found.append(spread.start)
    assert worth[0] <= sum(found) / len(found) <= worth[1]


def test_how_far_requests_lie_apart_is_told_by_each_that_ends() -> None:
    spread = Spread()
    assert spread.start == 4.0
    spread.add(7, -7.0, 0.1, 1.0)  # too few drafts
    assert spread.start == 4.0
    # 40 drafts that are kept 9 times of 10, 6 more were lost: (36 - 3.6) / 12^2, with the weight 2/3 beside 2.91.
    spread.add(40, -6.0, 3.6, 12.0)
    assert spread.share == pytest.approx((2.91 * 0.25 + 2 / 3 * 0.225) / (2.91 + 2 / 3))
    assert spread.start == pytest.approx(1 / spread.share)
    assert spread.variance(0.9) == pytest.approx(0.09 * spread.share)
    assert spread.variance(0.999) == 0.0025, "never nothing"


def test_a_plain_round_far_cheaper_than_expected_belies_its_cost_until_it_is_believed() -> None:
    model = _learnt()
    for _ in range(20):
        model.observe(1, 3, 3, 100, 0.028)
    assert not model.table(1, 100).belied
    model.observe(1, 0, 0, 100, 0.03)
    assert not model.table(1, 100).belied, "dearer: other work does that"
    model.observe(1, 3, 0, 100, 0.005)
    assert not model.table(1, 100).belied, "no plain round"
    model.observe(1, 0, 0, 100, 0.003)
    assert model.table(1, 100).belied
    for _ in range(3):
        model.observe(1, 0, 0, 100, 0.003)
    assert not model.table(1, 100).belied
    assert model.seconds(1, 0, 0, 100) == pytest.approx(0.003, rel=0.2)


@pytest.mark.parametrize("wrong", [-0.01, math.nan, math.inf])
def test_a_dump_with_impossible_variances_is_refused(wrong: float) -> None:
    model = CostModel()
    model.store(1, 100, [0.003 + 0.002 * k for k in range(9)], 0.001)
    data = model.to_dict()
    data["tables"][0]["target_variance"][3] = wrong
    with pytest.raises(ValueError, match="variances are"):
        CostModel.from_dict(data)
