"""A short soak; `python -m tests.soak` is the long one."""

from __future__ import annotations

from .soak import soak


def test_every_request_ends_and_memory_returns() -> None:
    report = soak(40, seed=3, longest=300)
    assert report.wrong == []
    assert report.compared > 0
    assert {"cancelled", "invalid", "length"} <= report.ends.keys()
