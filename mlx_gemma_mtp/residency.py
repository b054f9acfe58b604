"""Memory that macOS keeps resident while something is generated: else it may page weights out that a pause left alone.

Does nothing where there is no Metal. Never run on a Mac by its authors.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

log = logging.getLogger(__name__)

_lock = threading.Lock()
_users = 0
_before = 0


@contextmanager
def wired() -> Iterator[None]:
    """Wire as much as the GPU's recommended working set, until the last one who asked for it is done.

    May be nested, and used by several threads at once. What the system refuses is left as it was.
    """
    if not mx.metal.is_available():
        yield
        return
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _users, _before
    with _lock:
        _users += 1
        if _users == 1:
            _before = _set(int(mx.device_info().get("max_recommended_working_set_size", 0)))


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            mx.synchronize()  # the limit isn't to change under what is still computed
            _set(_before)


def _set(limit: int) -> int:
    """Returns the limit before."""
    try:
        return mx.set_wired_limit(limit)
    except (RuntimeError, ValueError) as error:
        log.info("memory is not wired: %s", error)
        return 0
