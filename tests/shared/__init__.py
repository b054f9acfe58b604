"""Tests against reference data beside the repository, in ../shared. Without it they skip and say so."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[3] / "shared" / "gemma4"
SIZES = ("E2B", "E4B", "12B", "26B-A4B", "31B")
CHECKPOINTS = tuple(f"gemma-4-{size}-it{role}" for size in SIZES for role in ("", "-assistant"))

needs_shared = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"the shared reference data is not beside the repository ({DATA})"
)


def config(name: str) -> dict[str, Any]:
    """The config.json of an official checkpoint, "gemma-4-E2B-it" for example."""
    value: dict[str, Any] = json.loads((DATA / "configs" / f"{name}.config.json").read_text(encoding="utf-8"))
    return value


def inventory(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """All tensors of an official checkpoint: name to safetensors type and shape."""
    with gzip.open(DATA / "layout" / f"{name}.tensors.json.gz") as file:
        table = json.load(file)["map"]
    return {tensor: (kind, tuple(shape)) for tensor, (kind, shape) in table.items()}
