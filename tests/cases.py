"""Which combinations are tried: something of every kind always, all of them with `--long`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from . import tiny

LONG = pytest.mark.long
every = False
"""Whether `--long` was given; set before tests are imported."""
_WHOLE = ("moe", "edge")  # experts and keys as values; per-layer embeddings, shared K/V and centroids
_PACKINGS = ("bf16", "4bit", "mxfp4")


def examples(usual: int, long: int) -> int:
    """How many examples hypothesis makes."""
    return long if every else usual


def kinds_with(recipes: Iterable[str]) -> list[Any]:
    """Parameters (kind of pair, recipe): all recipes for two kinds, which have all sorts of tensors."""
    return [
        pytest.param(kind, recipe, marks=() if kind in _WHOLE or recipe in _PACKINGS else LONG)
        for kind in tiny.KINDS
        for recipe in recipes
    ]
