"""Pairs that benchmarks make themselves: random weights in a given shape. Knows nothing of measuring."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import common

sys.path.insert(0, str(common.ROOT))

from tests import tiny

SHAPE_60M = tiny.Shape(
    family="gemma4", layers="ssfssfssfssfssf", hidden=512, mlp=2048, heads=8, kv_heads=4, global_kv_heads=2,
    head_dim=64, global_head_dim=128, k_eq_v=True, drafter_hidden=128, drafter_mlp=256, drafter_heads=4,
)  # fmt: skip
"""About 60 million parameters, so that a drafter step is a small part of a forward."""

SHAPE_35_LAYERS = tiny.Shape(
    family="gemma4", layers="ssssf" * 7, hidden=64, mlp=64, heads=4, kv_heads=1, ple=16, shared=20, double_wide=True,
    drafter_hidden=32, drafter_mlp=64, drafter_heads=2, centroids=32,
)  # fmt: skip
"""E2B's layers, so narrow that a forward is little but its graph."""


@contextmanager
def random_pair(shape: tiny.Shape, *, window: int = 512) -> Iterator[Path]:
    """A directory with a pair of this shape (float32, 512 tokens in its vocabulary), gone afterwards."""
    with TemporaryDirectory(prefix="pair-") as scratch:
        tiny.write_pair(Path(scratch), "dense", shape=shape, seed=1, window=window)
        yield Path(scratch)
