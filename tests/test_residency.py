"""Memory kept resident while something is generated: on Metal alone, once for all who ask, given back at the end."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import pytest

from mlx_gemma_mtp import Engine, Request, load
from mlx_gemma_mtp.residency import wired

LARGE = 1 << 34


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What was asked of a machine that has Metal and whose limit was 7."""
    asked = [7]

    def set_limit(limit: int) -> int:
        asked.append(limit)
        return asked[-2]

    def synchronize() -> None:
        waited.append(len(asked))
        really()

    waited, really = list[int](), mx.synchronize
    monkeypatch.setattr(mx, "synchronize", synchronize)

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": LARGE})
    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    yield asked
    assert asked[-1] == 7
    assert len(asked) - 1 in waited, "the limit changes when all is computed"


def test_the_first_one_wires_and_the_last_one_gives_back(limits: list[int]) -> None:
    with wired():
        with wired():
            assert limits == [7, LARGE]
        assert limits == [7, LARGE]
    assert limits == [7, LARGE, 7]
    with pytest.raises(KeyError), wired():
        raise KeyError
    assert limits == [7, LARGE, 7, LARGE, 7]


def test_what_the_system_refuses_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(limit: int) -> int:
        raise ValueError("too large")

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": LARGE})
    monkeypatch.setattr(mx, "set_wired_limit", refuse)
    with wired():
        pass


def test_nothing_is_wired_without_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(limit: int) -> int:
        raise AssertionError

    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx, "set_wired_limit", never)
    with wired():
        pass


def test_a_stream_that_is_left_in_the_middle_gives_back(limits: list[int]) -> None:
    runtime = load("demo")
    del limits[1:]  # what is timed at load is wired, too
    steps = runtime.stream([1, 2, 3], max_tokens=20)
    next(steps)
    assert limits == [7, LARGE]
    del steps
    assert limits == [7, LARGE, 7]


def test_an_engine_wires_while_it_works(limits: list[int]) -> None:
    runtime = load("demo")
    del limits[1:]
    with Engine(runtime) as engine:
        engine.submit(Request(prompt=[1, 2, 3], max_tokens=5)).result()
    assert limits == [7, LARGE, 7]
