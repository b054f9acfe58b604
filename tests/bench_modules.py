"""Modules of bench/, which is no package: its files are scripts that find each other by directory."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).parents[1] / "bench"


def bench_module(name: str) -> Any:
    """bench/NAME.py, imported as the scripts import it. Raises ImportError in a source distribution."""
    if str(BENCH) not in sys.path:
        sys.path.append(str(BENCH))
    return importlib.import_module(name)
