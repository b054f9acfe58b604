"""What `conversion.json` says of a planned pair. Knows nothing of files, progress or measuring."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import QuantSpec
from .plan import ModelPlan, Output, PairPlan
from .provenance import revision_of, versions
from .recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Names:
    """Sources as the caller named them."""

    target: str
    drafter: str | None


def make_record(pair: PairPlan, names: Names, fit: Mapping[str, object] | None) -> dict[str, Any]:
    """The record of a conversion that is still to be done: files and measurements are added to it."""
    now = datetime.datetime.now(datetime.timezone.utc)
    record: dict[str, Any] = {
        "format": 1,
        "versions": versions(),
        "created": now.isoformat(timespec="seconds"),
        "bytes": pair.bytes,
        "target": _model_record(pair.target, names.target),
        "drafter": None if pair.drafter is None else _model_record(pair.drafter, str(names.drafter)),
        "fit": fit,
        "measured": None,
    }
    return record


def _model_record(plan: ModelPlan, source: str) -> dict[str, Any]:
    weights = sum(o.rows * o.columns for o in plan.outputs)
    return {
        "source": source,
        "revision": revision_of(plan.source.directory),
        "recipe": _recipe_record(plan.recipe),
        "bytes": plan.bytes,
        "text_bytes": plan.text_bytes,
        "bits_per_weight": 8 * plan.bytes / max(weights, 1),
        "unquantized": dict(plan.unquantized),
        "exceptions": {o.path: o.reason for o in plan.outputs if o.reason and o.spec != plan.recipe.default},
        "skipped": dict(plan.skipped),
        "tensors": {o.path: _tensor_record(o) for o in plan.outputs},
    }


def _recipe_record(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "default": _spec_record(recipe.default),
        "high": _spec_record(recipe.high),
        "grid": recipe.grid,
        "rules": [{"match": r.match, "spec": _spec_record(r.spec), "reason": r.reason} for r in recipe.rules],
    }


def _spec_record(spec: QuantSpec | None) -> dict[str, object] | None:
    return None if spec is None else {"bits": spec.bits, "group_size": spec.group_size, "mode": spec.mode}


def _tensor_record(output: Output) -> dict[str, object]:
    size = output.rows * output.columns
    return {
        "dtype": output.slots[0].dtype if output.spec is None else output.spec.mode,
        "bits": round(8 * output.bytes / size, 4) if size else 0,
        "bytes": output.bytes,
    }
