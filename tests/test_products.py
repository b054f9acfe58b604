"""What products cost by tokens, measured with a clock that the products themselves move, and what follows from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_gemma_mtp.costs import CostFacts, CostModel
from mlx_gemma_mtp.loading import load_pair
from mlx_gemma_mtp.products import TOKENS, product_costs
from mlx_gemma_mtp.runtime import Runtime, cost_facts, load

LINEAR = tuple((n, float(n)) for n in TOKENS)


class Machine:
    """Products that take what `cost` says for their tokens; `stalls`: products, counted, that take a second longer."""

    def __init__(self, cost: Callable[[int], float], *, stalls: frozenset[int] = frozenset(), weights: int = 1) -> None:
        self.now, self.count, self.used = 0.0, 0, set[int]()
        self.products = [self._product(i, cost, stalls) for i in range(weights)]

    def _product(
        self, weight: int, cost: Callable[[int], float], stalls: frozenset[int]
    ) -> Callable[[mx.array], list[mx.array]]:
        def product(x: mx.array) -> list[mx.array]:
            self.used.add(weight)
            self.now += cost(x.shape[0]) + (self.count in stalls)
            self.count += 1
            return [x]

        return product

    def measure(self) -> dict[int, float]:
        return dict(product_costs(self.products, 8, mx.float32, clock=lambda: self.now))


def test_costs_are_told_in_those_of_one_token() -> None:
    assert Machine(lambda n: 1e-4 * (1 + n)).measure() == pytest.approx({n: (1 + n) / 2 for n in TOKENS})


@pytest.mark.parametrize("stalls", [{0}, {2}, {12}, {20}, {0, 1, 2, 10}])
def test_a_stall_and_a_slow_start_are_no_costs(stalls: set[int]) -> None:
    found = Machine(lambda n: 1e-5 * n, stalls=frozenset(stalls)).measure()
    assert found == pytest.approx({n: float(n) for n in found})
    assert 1 in found


def test_costs_never_fall() -> None:
    found = Machine(lambda n: 3e-5 if n == 4 else 1e-5 * n**0.5).measure()
    assert list(found.values()) == sorted(found.values())
    assert found[8] == found[4] == pytest.approx(3.0)


def test_slow_products_are_measured_for_few_tokens_and_weights() -> None:
    slow, quick = Machine(lambda n: 0.03 * n, weights=60), Machine(lambda n: 2e-4 * n, weights=60)
    assert slow.measure() == pytest.approx({1: 1.0, 2: 2.0, 4: 4.0})
    assert slow.used == {0}
    assert slow.now < 1.0
    quick.measure()
    assert len(quick.used) == 15, "3 ms of products, each of weights of its own"


def test_the_prior_follows_what_products_cost() -> None:
    facts = CostFacts(products=((1, 1.0), (2, 1.5), (8, 1.5), (16, 5.5)), drafter=0.1)
    assert [facts.target(1, k, 0) for k in (0, 1, 4, 7)] == pytest.approx([1.0, 1.5, 1.5, 1.5])
    assert facts.target(4, 2, 0) == pytest.approx(3.5), "half-way between 8 and 16 tokens"
    assert facts.target(8, 3, 0) == pytest.approx(5.5 + 16 * 0.5), "on the last line"
    assert facts.step(2, 0) == pytest.approx(0.15)
    assert CostFacts(products=((1, 1.0),)).target(1, 3, 0) == pytest.approx(4.0), "each token as much as the first"


@pytest.mark.parametrize("rows", [8, 16])
def test_costs_are_carried_over_to_more_rows_as_products_say(rows: int) -> None:
    """Measured with 4 rows where each token costs as much as the first; a guess that 32 cost the most would draft."""
    model = CostModel(CostFacts(products=LINEAR, drafter=0.01))
    model.store(4, 200, [0.01 * (k + 1) for k in range(9)], 0.0001)
    costs = model.table(rows, 200).steady()
    assert costs[0] == pytest.approx(0.01 * rows / 4, rel=0.02)
    assert costs[8] / costs[0] == pytest.approx(9.0, rel=0.05)


@pytest.mark.parametrize(
    "products",
    [(), ((2, 1.0),), ((1, 1.0), (1, 2.0)), ((1, 1.0), (2, 0.5)), ((1, 0.0), (2, 1.0)), ((1, 1.0), (2, float("inf")))],
)
def test_products_that_make_no_sense_are_refused(products: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match="products are"):
        CostFacts(products=products)


def test_a_profile_keeps_them_and_one_without_them_is_read() -> None:
    model = CostModel(CostFacts(products=((1, 1.0), (4, 3.0))))
    model.store(1, 200, [0.01 + 0.002 * k for k in range(9)], 0.001)
    data = json.loads(json.dumps(model.to_dict()))
    assert CostModel.from_dict(data).facts == model.facts
    older = {**data, "facts": {k: v for k, v in data["facts"].items() if k != "products"}}
    assert CostModel.from_dict(older).facts == replace(model.facts, products=CostFacts().products)
    with pytest.raises((TypeError, ValueError)):
        CostModel.from_dict({**data, "facts": {**data["facts"], "products": [[1, 2, 3]]}})


def test_a_pair_is_measured_when_it_is_loaded_and_by_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(_: Runtime) -> object:
        class Nothing:
            def read(self) -> None:
                return None

            def write(self, costs: CostModel) -> None:
                kept.append(costs.facts)

        return Nothing()

    kept: list[CostFacts] = []
    monkeypatch.setattr(Runtime, "profile", without)
    runtime = load("demo")
    loaded = runtime.depth_memory.costs.facts
    assert loaded.products[0] == (1, 1.0)
    assert [n for n, _ in loaded.products] == list(TOKENS[: len(loaded.products)])
    assert loaded == replace(cost_facts(load_pair("demo")), products=loaded.products)
    assert load("demo", drafter=None).depth_memory.costs.facts.products == CostFacts().products
    runtime.tune(seconds=0.1)
    assert runtime.depth_memory.costs.facts == kept[0]
    assert kept[0].products not in (CostFacts().products, loaded.products), "measured anew"
