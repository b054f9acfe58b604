"""What products cost by tokens, measured with a clock that the products themselves move, and what follows from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_gemma_mtp import runtime
from mlx_gemma_mtp.costs import CostFacts, CostModel
from mlx_gemma_mtp.loading import load_pair
from mlx_gemma_mtp.products import TOKENS, product_costs
from mlx_gemma_mtp.runtime import Runtime, cost_facts, load

LINEAR = tuple((n, float(n)) for n in TOKENS)


class Machine:
    """Blocks that take what `cost` says for their tokens; `stalls`: runs of a block that take a second longer."""

    def __init__(self, cost: Callable[[int], float], *, stalls: frozenset[int] = frozenset(), blocks: int = 1) -> None:
        self.now, self.count, self.used = 0.0, 0, set[int]()
        self.blocks = [self._block(i, cost, stalls) for i in range(blocks)]

    def _block(self, i: int, cost: Callable[[int], float], stalls: frozenset[int]) -> Callable[[mx.array], mx.array]:
        def block(x: mx.array) -> mx.array:
            self.used.add(i)
            self.now += cost(x.shape[0]) + (self.count in stalls)
            self.count += 1
            return x + 1

        return block

    def measure(self) -> dict[int, float]:
        return dict(product_costs(self.blocks, 8, mx.float32, clock=lambda: self.now))


def test_costs_are_told_in_those_of_one_token() -> None:
    assert Machine(lambda n: 1e-4 * (1 + n)).measure() == pytest.approx({n: (1 + n) / 2 for n in TOKENS})


@pytest.mark.parametrize("stalls", [{i} for i in range(0, 24, 3)] + [{0, 1, 2, 10}, set(range(0, 20, 4))])
def test_a_stall_is_no_cost_and_leaves_no_size_out(stalls: set[int]) -> None:
    found = Machine(lambda n: 1e-4 * (1 + n / 64), stalls=frozenset(stalls)).measure()
    assert found == pytest.approx({n: (64 + n) / 65 for n in TOKENS})


def test_costs_never_fall() -> None:
    found = Machine(lambda n: 3e-5 if n == 4 else 1e-5 * n**0.5).measure()
    assert list(found.values()) == sorted(found.values())
    assert found[8] == found[4] == pytest.approx((3.0 + 8**0.5) / 2)
    assert found[16] == pytest.approx(4.0)


def test_slow_products_are_measured_for_few_tokens_and_weights() -> None:
    slow = Machine(lambda n: 0.06 * n, blocks=60)
    assert slow.measure() == pytest.approx({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}), "enough to tell how it grows"
    assert slow.used == {0}
    assert slow.now < 6 * 0.06 * 15 + 0.2


def test_quick_products_are_measured_together() -> None:
    quick = Machine(lambda n: 2e-4 * n, blocks=60)
    quick.measure()
    assert len(quick.used) == 16, "3 ms of them, each with weights of its own"
    assert max(quick.used) > 50, "from the first layers to the last"


def test_the_prior_follows_what_products_cost() -> None:
    facts = CostFacts(products=((1, 1.0), (2, 1.5), (8, 1.5), (16, 5.5)), drafter=0.1)
    assert [facts.target(1, k, 0) for k in (0, 1, 4, 7)] == pytest.approx([1.0, 1.5, 1.5, 1.5])
    assert facts.target(4, 2, 0) == pytest.approx(3.5), "half-way between 8 and 16 tokens"
    assert facts.target(8, 3, 0) == pytest.approx(5.5 + 16 * 0.5), "on the last line"
    assert facts.step(2, 0) == pytest.approx(0.15)
    flat_end = CostFacts(products=((1, 1.0), (8, 8.0), (16, 8.0)))
    assert flat_end.target(4, 7, 0) == pytest.approx(8.0 + 16 * 0.5 * 7 / 15), "a last sample by chance as low as that"


def test_tokens_of_one_expert_cost_as_many_tokens_of_a_product() -> None:
    facts = CostFacts(dense=0.0, experts=100.0, count=4, used=1, products=LINEAR)
    assert facts.target(1, 0, 0) == pytest.approx(25.0)
    assert facts.target(16, 0, 0) == pytest.approx(16 * 25.0), "nothing is shared where products cost what tokens do"
    flat = replace(facts, products=((1, 1.0), (4096, 1.0)))
    assert flat.target(16, 0, 0) == pytest.approx(100.0, rel=0.02)


@pytest.mark.parametrize("rows", [8, 16])
def test_costs_are_carried_over_to_more_rows_as_products_say(rows: int) -> None:
    """Measured with 4 rows where each token costs as much as the first: by the default, 32 tokens cost the most."""
    model = CostModel(CostFacts(products=LINEAR, drafter=0.01))
    model.store(4, 200, [0.01 * (k + 1) for k in range(9)], 0.0001)
    costs = model.table(rows, 200).steady()
    assert costs[0] == pytest.approx(0.01 * rows / 4, rel=0.02)
    assert costs[8] / costs[0] == pytest.approx(9.0, rel=0.05)


@pytest.mark.parametrize(
    "products",
    [
        (),
        ((1, 1.0),),
        ((2, 1.0), (4, 2.0)),
        ((1, 2.0), (2, 3.0)),
        ((1, 1.0), (1, 2.0)),
        ((1, 1.0), (2, 0.5)),
        ((1, 1.0), (2, float("nan"))),
        ((1, 1.0), (2, float("inf"))),
    ],
)
def test_products_that_make_no_sense_are_refused(products: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match="products are"):
        CostFacts(products=products)


def test_a_profile_keeps_them() -> None:
    model = CostModel(CostFacts(products=((1, 1.0), (4, 3.0))))
    model.store(1, 200, [0.01 + 0.002 * k for k in range(9)], 0.001)
    data = json.loads(json.dumps(model.to_dict()))
    assert CostModel.from_dict(data).facts == model.facts
    with pytest.raises(ValueError, match="too many values"):
        CostModel.from_dict({**data, "facts": {**data["facts"], "products": [[1, 2, 3]]}})


def test_a_pair_is_measured_when_it_is_loaded_and_by_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def read(self) -> None:
            return None

        def write(self, costs: CostModel) -> None:
            kept.append(costs.facts)

    def counted(*args: object) -> tuple[tuple[int, float], ...]:
        measured.append(product_costs(*args))  # type: ignore[arg-type]
        return measured[-1]

    def tuned(_: object, facts: CostFacts, **__: object) -> object:
        return type("Tuned", (), {"costs": CostModel(facts)})

    kept: list[CostFacts] = []
    measured: list[tuple[tuple[int, float], ...]] = []
    monkeypatch.setattr(Runtime, "profile", lambda _: Nothing())
    monkeypatch.setattr(runtime, "product_costs", counted)
    monkeypatch.setattr(runtime, "tune", tuned)
    pair = load("demo")
    facts = pair.depth_memory.costs.facts
    assert [n for n, _ in measured[0]] == list(TOKENS[: len(measured[0])])
    assert facts == replace(cost_facts(load_pair("demo")), products=measured[0])
    assert load("demo", drafter=None).depth_memory.costs.facts.products == CostFacts().products
    assert len(measured) == 1, "without drafts there is nothing to choose"
    pair.tune()
    assert [f.products for f in kept] == measured[1:], "as the machine is now"
