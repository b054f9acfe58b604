"""Pairs that benchmarks make themselves: random weights in a given shape. Knows nothing of measuring."""

from __future__ import annotations

import json
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


SHAPE_LONG = tiny.Shape(
    family="gemma4", layers="sssssfsssssf", hidden=256, mlp=1024, heads=8, kv_heads=4, global_kv_heads=2, head_dim=32,
    global_head_dim=64, k_eq_v=True, drafter_hidden=128, drafter_mlp=256, drafter_heads=4,
)  # fmt: skip
"""31B's order of layers and its grouped heads, narrow: 128k tokens of K/V in float32 are 0.3 GB."""


@contextmanager
def random_pair(shape: tiny.Shape, *, window: int = 512, positions: int = 4096) -> Iterator[Path]:
    """A directory with a pair of this shape (float32, 512 tokens in its vocabulary), gone afterwards.

    `positions`: the longest context that its configs allow.
    """
    with TemporaryDirectory(prefix="pair-") as scratch:
        for directory in tiny.write_pair(Path(scratch), "dense", shape=shape, seed=1, window=window):
            file = directory / "config.json"
            config = json.loads(file.read_text())
            config["text_config"]["max_position_embeddings"] = positions
            file.write_text(json.dumps(config))
        yield Path(scratch)
