"""Tables of round costs kept between processes: `tune` writes them, `load` reads them. Knows no rounds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from .costs import CostModel
from .probe import cache_folder, environment, fingerprint
from .views import CacheSpec

_FORMAT = 2


class Profile:
    """The file of one pair's costs on this machine, with this software. `weights`: of target and drafter.

    `folder`: default `probe.cache_folder()`.
    """

    def __init__(self, spec: CacheSpec, weights: Sequence[mx.array], *, folder: Path | None = None) -> None:
        about = {"format": _FORMAT, "environment": environment(), "weights": fingerprint(weights), "cache": repr(spec)}
        self._about: dict[str, Any] = json.loads(json.dumps(about))
        name = hashlib.sha256(json.dumps(self._about, sort_keys=True).encode()).hexdigest()[:32]
        self.path = (cache_folder() if folder is None else folder) / f"costs-{name}.json"

    def read(self) -> CostModel | None:
        """The costs, if they were measured and can be read."""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            return CostModel.from_dict(data["costs"]) if data["about"] == self._about else None
        except (OSError, ValueError, ArithmeticError, TypeError, KeyError):
            return None

    def write(self, costs: CostModel) -> None:
        """Keep the costs. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            part.write_text(json.dumps({"about": self._about, "costs": costs.to_dict()}), encoding="utf-8")
            part.replace(self.path)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
