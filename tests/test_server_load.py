"""A short run of tests/load.py: answers don't mix, nothing is lost, no row leaks."""

from __future__ import annotations

from .load import run


def test_clients_that_come_and_go() -> None:
    report = run(clients=16, seconds=3, leave=0.3, count=6)
    assert report["wrong"] == report["failed"] == []
    assert report["rows_left"] == 0
    assert report["answers"] > 0
    assert report["left"] > 0
