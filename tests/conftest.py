"""What all tests share: nothing is kept in the user's cache folder; one server over the demo pair."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .serving import Live

os.environ["MLX_GEMMA_MTP_CACHE"] = tempfile.mkdtemp(prefix="mlx-gemma-mtp-tests-")


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """A server that all may ask, each leaving it idle; made once, as its rounds are compiled as they are met."""
    from .serving import demo_server

    with demo_server() as server:
        yield server
