"""What a conversion will write, decided and checked before any work: every tensor, its format and its size.

Knows nothing of output directories, progress or measuring.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import mlx.core as mx

from ..config import ConfigError, DrafterConfig, LayerSpec, Quantization, QuantSpec, TargetConfig
from ..loading import build_drafter, build_target
from ..models.drafter import Drafter
from ..models.linear import WeightsError
from ..models.target import Target
from .checkpoint import FLOATS, Checkpoint, ConvertError, Entry
from .configs import output_config
from .names import MLX_NAMES, Destination, Skipped, canonical_path
from .quantize import DTYPES, packed_shapes
from .recipes import Recipe
from .writer import Slot

_Model = TypeVar("_Model", Target, Drafter)
_PACKED_PARTS = (".scales", ".biases")
_TOWER = "vision or audio tower"


@dataclass(frozen=True, kw_only=True)
class Output:
    """One tensor of the output and where it comes from.

    `sources` is a plain tensor, or a packed one's weights, scales and biases, of `source_spec`. `spec` is how it is
    packed in the output (None: not), `grid` how its scales are chosen; equal specs are copied. `part` of `parts` is
    the slice of each matrix's rows that it takes.
    """

    path: str
    sources: tuple[Entry, ...]
    source_spec: QuantSpec | None
    spec: QuantSpec | None
    grid: str
    reason: str
    part: int
    parts: int
    rows: int
    columns: int
    slots: tuple[Slot, ...]

    @property
    def copied(self) -> bool:
        """Whether the bytes stay as they are."""
        return self.spec == self.source_spec and self.slots[0].dtype == self.sources[0].dtype

    @property
    def source_bytes(self) -> int:
        return sum(s.size for s in self.sources) // self.parts

    @property
    def bytes(self) -> int:
        return sum(s.size for s in self.slots)

    def row_ranges(self, limit: int) -> Iterator[tuple[int, int, int]]:
        """(first, last, to): source rows and where they go, in pieces of at most about `limit` source bytes."""
        matrix = self.sources[0].shape[-2] if self.parts > 1 else self.sources[0].rows
        take = matrix // self.parts
        step = max(1, limit * self.rows // max(self.source_bytes, 1))
        for index in range(self.sources[0].rows // matrix if matrix else 0):
            begin = index * matrix + self.part * take
            for first in range(0, take, step):
                last = min(first + step, take)
                yield begin + first, begin + last, index * take + first


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """One checkpoint's conversion.

    `unquantized`: matrices that stay so though the recipe says otherwise, and why. `idle`: patterns of its rules that
    match nothing.
    """

    source: Checkpoint
    config: dict[str, Any]
    recipe: Recipe
    kinds: frozenset[str]
    outputs: tuple[Output, ...]
    skipped: Mapping[str, int]
    unquantized: Mapping[str, str]
    idle: tuple[str, ...]

    @property
    def slots(self) -> list[Slot]:
        return [s for o in self.outputs for s in o.slots]

    @property
    def bytes(self) -> int:
        return sum(o.bytes for o in self.outputs)

    @property
    def source_bytes(self) -> int:
        return sum(o.source_bytes for o in self.outputs)

    @property
    def text_bytes(self) -> int:
        """What this runtime keeps in memory: all but vision and audio."""
        return sum(o.bytes for o in self.outputs if o.reason != _TOWER)

    @property
    def text_source_bytes(self) -> int:
        """The same of the source."""
        return sum(o.source_bytes for o in self.outputs if o.reason != _TOWER)


@dataclass(frozen=True, kw_only=True)
class PairPlan:
    """A target's conversion and its drafter's, and the target's config."""

    target: ModelPlan
    drafter: ModelPlan | None
    target_config: TargetConfig

    @property
    def source_bytes(self) -> int:
        return sum(m.source_bytes for m in self.models)

    @property
    def models(self) -> list[ModelPlan]:
        return [self.target] if self.drafter is None else [self.target, self.drafter]

    @property
    def bytes(self) -> int:
        return sum(m.bytes for m in self.models)


def plan_pair(
    target: Checkpoint,
    drafter: Checkpoint | None,
    recipe: Recipe,
    drafter_recipe: Callable[[frozenset[str]], Recipe],
    *,
    text_only: bool = False,
) -> PairPlan:
    """Plan both conversions and check them against the models: nothing missing, nothing unknown, every shape right.

    Raises ConvertError or ConfigError, naming the tensor or field.
    """
    config = TargetConfig.from_hf(target.config)
    kinds = {"target"}
    kinds |= {"moe"} if any(s.moe for s in config.layers) else set()
    kinds |= {"per_layer"} if config.per_layer_hidden else set()
    planned = _plan(target, config.layers, config.quantization, recipe, frozenset(kinds), text_only)
    other = None
    if drafter is not None:
        drafter_config = DrafterConfig.from_hf(drafter.config, config)
        found = frozenset({"drafter"} | ({"centroids"} if drafter_config.centroids else set()))
        other = _plan(
            drafter, drafter_config.layers, drafter_config.quantization, drafter_recipe(found), found, text_only
        )
    _check(planned, other)
    return PairPlan(target=planned, drafter=other, target_config=config)


def _plan(
    source: Checkpoint,
    layers: tuple[LayerSpec, ...],
    quantization: Quantization | None,
    recipe: Recipe,
    kinds: frozenset[str],
    text_only: bool,
) -> ModelPlan:
    planner = _Planner(source, quantization, recipe, kinds)
    names = MLX_NAMES[str(source.config["model_type"])]
    skipped: Counter[str] = Counter()
    for entry in source.tensors.values():
        if entry.dtype == "F64":
            raise ConvertError(f"{entry} has dtype F64, expected F32, F16 or BF16")
        if planner.packed_part(entry.name):
            continue
        places = names.destinations(entry.name, lambda i: i >= len(layers) or layers[i].writes_kv, text_only=text_only)
        if isinstance(places, Skipped):
            skipped[places.rule] += 1
        else:
            for place in places:
                planner.add(entry, place)
    outputs = sorted(planner.outputs, key=lambda o: (o.sources[0].file, o.sources[0].begin, o.part))
    _refuse_twins(outputs)
    config = _config(source.config, layers, outputs, recipe, text_only=text_only)
    return ModelPlan(
        source=source,
        config=config,
        recipe=recipe,
        kinds=kinds,
        outputs=tuple(outputs),
        skipped=dict(skipped),
        unquantized=planner.unquantized,
        idle=tuple(recipe.idle(planner.matrices, kinds)),
    )


class _Planner:
    """Turns tensors and their destinations into outputs."""

    def __init__(
        self, source: Checkpoint, quantization: Quantization | None, recipe: Recipe, kinds: frozenset[str]
    ) -> None:
        self.source, self.recipe, self.kinds = source, recipe, kinds
        self.quantization = quantization
        self.overrides = {canonical_path(p): s for p, s in quantization.overrides} if quantization else {}
        self.outputs: list[Output] = []
        self.unquantized: dict[str, str] = {}
        self.matrices: set[str] = set()

    def packed_part(self, name: str) -> bool:
        """Whether a tensor is part of a packed matrix, which is planned with its weights."""
        return name.endswith(_PACKED_PARTS) and name.rsplit(".", 1)[0] + ".weight" in self.source.tensors

    def add(self, entry: Entry, place: Destination) -> None:
        """Plan one destination of a tensor."""
        base = entry.name.removesuffix(".weight")
        packed = [self.source.tensors[base + p] for p in _PACKED_PARTS if base + p in self.source.tensors]
        if place.canonical is None:
            # Vision and audio: as they are, packed parts included.
            for part, suffix in zip((entry, *packed), (".weight", *_PACKED_PARTS), strict=False):
                name = place.name if part is entry else place.name.removesuffix(".weight") + suffix
                self._copy(part, name)
            return
        path = place.canonical.removesuffix(".weight")
        source_spec = None
        if packed and entry.name.endswith(".weight"):
            if self.quantization is None:
                raise ConvertError(f"{packed[0]} is there, but the config has no `quantization`")
            source_spec = self.overrides.get(path, self.quantization.default)
        self._matrix(entry, tuple(packed) if source_spec else (), source_spec, place, path)

    def _copy(self, entry: Entry, name: str) -> None:
        slot = Slot(name=name, dtype=entry.dtype, shape=entry.shape)
        self.outputs.append(
            Output(
                path=name.removesuffix(".weight"), sources=(entry,), source_spec=None, spec=None, grid="minmax",
                reason=_TOWER, part=0, parts=1, rows=entry.rows, columns=entry.columns, slots=(slot,),
            )
        )  # fmt: skip

    def _matrix(
        self, entry: Entry, packed: tuple[Entry, ...], source_spec: QuantSpec | None, place: Destination, path: str
    ) -> None:
        columns = entry.columns * 32 // source_spec.bits if source_spec else entry.columns
        if source_spec is not None:
            _check_packed((entry, *packed), source_spec, columns)
        if place.parts > 1 and (len(entry.shape) < 3 or entry.shape[-2] % place.parts):
            raise ConvertError(f"{entry} has shape {entry.shape}, expected a stack of matrices with gate and up rows")
        lead = list(entry.shape[:-1])
        if place.parts > 1:
            lead[-1] //= place.parts
        spec, reason = None, ""
        if place.canonical is not None and place.canonical.endswith(".weight") and len(entry.shape) > 1:
            self.matrices.add(path)
            spec, reason = self.recipe.spec_of(path, self.kinds)
        if spec is not None and columns % spec.group_size:
            reason = f"its width {columns} doesn't divide into groups of {spec.group_size}"
            self.unquantized[path] = reason
            spec = None
        if spec is not None and source_spec is None and not entry.is_float:
            raise ConvertError(f"{entry} has dtype {entry.dtype}, expected floating point or MLX's packed weights")
        self.outputs.append(
            Output(
                path=place.name.removesuffix(".weight"), sources=(entry, *packed), source_spec=source_spec, spec=spec,
                grid=self.recipe.grid, reason=reason, part=place.part, parts=place.parts, rows=prod(lead),
                columns=columns, slots=_slots(place.name, entry, packed, source_spec, spec, lead, columns),
            )
        )  # fmt: skip


def _check_packed(parts: tuple[Entry, ...], spec: QuantSpec, columns: int) -> None:
    """Refuse packed weights whose parts aren't those of `spec`, as rows are read from each by its own header."""
    affine = FLOATS, (parts[1].dtype,)
    kinds: list[tuple[str, ...]] = [("U32",), *(affine if spec.mode == "affine" else [("U8",)])]
    if len(parts) != len(kinds):
        found = " and ".join(p.name for p in parts[1:])
        raise ConvertError(f"{parts[0]} is packed with {found}, expected {len(kinds) - 1} such tensors for {spec.mode}")
    for part, kind, shape in zip(parts, kinds, packed_shapes(parts[0].rows, columns, spec), strict=True):
        expected = (*parts[0].shape[:-1], shape[1])
        if part.dtype not in kind or part.shape != expected:
            raise ConvertError(
                f"{part} has dtype {part.dtype} and shape {part.shape}, expected {' or '.join(kind)} and {expected} "
                f"for {spec.bits} bits in groups of {spec.group_size}"
            )


def _slots(
    name: str,
    entry: Entry,
    packed: tuple[Entry, ...],
    source_spec: QuantSpec | None,
    spec: QuantSpec | None,
    lead: list[int],
    columns: int,
) -> tuple[Slot, ...]:
    kept = packed[0].dtype if source_spec and source_spec.mode == "affine" else entry.dtype
    dtype = "F16" if kept == "F16" else "BF16"
    if spec is None:
        kind = dtype if entry.is_float or source_spec else entry.dtype
        return (Slot(name=name, dtype=kind, shape=(*lead, columns) if entry.shape else ()),)
    if spec == source_spec:
        dtype = packed[0].dtype
    base = name.removesuffix("weight")
    shapes = packed_shapes(prod(lead), columns, spec)
    kinds = ["U32", dtype, dtype] if spec.mode == "affine" else ["U32", "U8"]
    return tuple(
        Slot(name=base + part, dtype=kind, shape=(*lead, shape[1]))
        for part, kind, shape in zip(("weight", "scales", "biases"), kinds, shapes, strict=False)
    )


def _refuse_twins(outputs: list[Output]) -> None:
    seen: dict[str, Output] = {}
    for output in outputs:
        for slot in output.slots:
            if slot.name in seen:
                raise ConvertError(
                    f"{output.sources[0]} and {seen[slot.name].sources[0]} would both become {slot.name}"
                )
            seen[slot.name] = output


def _config(
    data: Mapping[str, Any], layers: tuple[LayerSpec, ...], outputs: list[Output], recipe: Recipe, *, text_only: bool
) -> dict[str, Any]:
    used = {o.path: o.spec for o in outputs if o.spec is not None} | _packed_towers(data, outputs)
    common = recipe.default or (Counter(used.values()).most_common(1)[0][0] if used else None)
    return output_config(data, layers, used, common, text_only=text_only)


def _packed_towers(data: Mapping[str, Any], outputs: list[Output]) -> dict[str, QuantSpec]:
    """Specs of vision and audio matrices that the source holds packed."""
    quantization = Quantization.from_hf(data)
    if quantization is None:
        return {}
    named = dict(quantization.overrides)
    scaled = [o.path.removesuffix(".scales") for o in outputs if o.spec is None and o.path.endswith(".scales")]
    return {path: named.get(path, quantization.default) for path in scaled}


def _check(target: ModelPlan, drafter: ModelPlan | None) -> None:
    """Build both models from lazy zeros of the planned shapes: the loader's own strictness, before any work."""
    model = _checked(target, lambda arrays: build_target(TargetConfig.from_hf(target.config), arrays, mx.bfloat16))
    if drafter is not None:
        config = DrafterConfig.from_hf(drafter.config, TargetConfig.from_hf(target.config))
        _checked(drafter, lambda arrays: build_drafter(config, arrays, model, mx.bfloat16))


def _checked(plan: ModelPlan, build: Callable[[dict[str, mx.array]], _Model]) -> _Model:
    try:
        return build({s.name: mx.zeros(s.shape, DTYPES[s.dtype]) for s in plan.slots})
    except WeightsError as e:
        raise ConvertError(f"{plan.source.directory}: {e}") from e
    except ConfigError as e:
        raise ConvertError(f"{plan.source.directory / 'config.json'}: {e}") from e
