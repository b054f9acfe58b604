"""A short run of tests/load.py: answers don't mix, nothing is lost, no row leaks."""

from __future__ import annotations

import pytest

from .load import growth, memory_of, run


def test_clients_that_come_and_go() -> None:
    report = run(clients=16, seconds=3, leave=0.3, count=6)
    assert report["wrong"] == report["failed"] == []
    assert report["rows_left"] == 0
    assert report["answers"] > 0
    assert report["left"] > 0
    assert set(report["server_rss_mb"]) == {"start", "first third", "middle third", "last third"}


def test_memory_is_judged_by_its_last_thirds() -> None:
    """Warming up is no leak, nor is a single peak."""
    assert growth([10, 50, 100, 100, 100, 100, 100, 900, 100]) == 0
    assert growth([100, 100, 100, 100, 100, 100, 110, 110, 110]) == pytest.approx(0.1)
    assert memory_of([7]) == {"start": 7, "first third": 7, "middle third": 7, "last third": 7}
