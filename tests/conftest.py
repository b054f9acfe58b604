"""What all tests share: nothing is kept in the user's cache folder; one server over the demo pair; `--long`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from . import cases

if TYPE_CHECKING:
    from .serving import Live

os.environ["MLX_GEMMA_MTP_CACHE"] = tempfile.mkdtemp(prefix="mlx-gemma-mtp-tests-")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also the tests marked long: more cases of the same kinds")


def pytest_configure(config: pytest.Config) -> None:
    cases.every = config.getoption("--long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --long, tests marked long are deselected, which pytest's last line counts."""
    if config.getoption("--long"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    items[:] = [item for item in items if item not in long]
    config.hook.pytest_deselected(items=long)


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """A server that all may ask, each leaving it idle; made once, as its rounds are compiled as they are met."""
    from .serving import demo_server

    with demo_server() as server:
        yield server
