"""Recipes: which matrix is quantized how, and why. Data, and a reader of TOML files. Knows nothing of files or MLX."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from ..config import ConfigError, QuantSpec
from .checkpoint import ConvertError

Level = Literal["base", "high", "keep"]
"""What an exception asks of a recipe: its own format, its 8-bit format, or no quantization."""


_EVERY_KIND = ("target", "drafter")


@dataclass(frozen=True, kw_only=True)
class Special:
    """Matrices of some architectures that a recipe treats differently. `match` is a pattern of canonical paths."""

    match: str
    level: Level
    kinds: tuple[str, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Matrices that one recipe treats differently; `spec` None keeps them unquantized."""

    match: str
    spec: QuantSpec | None
    reason: str
    kinds: tuple[str, ...] = _EVERY_KIND


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model's matrices are quantized: `default` (None: not at all), rules first, then the exceptions.

    `grid` "q4_0" takes scales from each group's largest value, as GGUF's q4_0 does, instead of MLX's min and max.
    """

    name: str
    default: QuantSpec | None
    high: QuantSpec | None
    about: str
    rules: tuple[Rule, ...] = ()
    grid: Literal["minmax", "q4_0"] = "minmax"

    def spec_of(self, path: str, kinds: frozenset[str]) -> tuple[QuantSpec | None, str]:
        """How the matrix at a canonical path is quantized in a model of these kinds, and the reason if not by default.

        The first rule that matches decides; else the first exception; else the default.
        """
        if self.default is None and not self.rules:
            return None, ""
        for rule in self.rules:
            if kinds.intersection(rule.kinds) and fnmatchcase(path, rule.match):
                return rule.spec, rule.reason
        for exception in EXCEPTIONS:
            if kinds.intersection(exception.kinds) and fnmatchcase(path, exception.match):
                spec = {"base": self.default, "high": self.high, "keep": None}[exception.level]
                return spec, exception.reason
        return self.default, ""

    def idle(self, paths: Collection[str], kinds: frozenset[str]) -> list[str]:
        """Patterns of rules for models of these kinds that match none of their matrices."""
        mine = [r.match for r in self.rules if kinds.intersection(r.kinds)]
        return [match for match in mine if not any(fnmatchcase(path, match) for path in paths)]


def _affine(bits: int, group_size: int = 64) -> QuantSpec:
    return QuantSpec(bits=bits, group_size=group_size, mode="affine")


_MXFP4 = QuantSpec(bits=4, group_size=32, mode="mxfp4")
_NVFP4 = QuantSpec(bits=4, group_size=16, mode="nvfp4")
_MXFP8 = QuantSpec(bits=8, group_size=32, mode="mxfp8")

EXCEPTIONS: tuple[Special, ...] = (
    Special(
        match="layers.*.router.proj",
        level="high",
        kinds=("moe",),
        reason="a rounded score can swap an expert for another; 128 rows a layer cost nothing",
    ),
    Special(
        match="layers.*.mlp.*_proj",
        level="high",
        kinds=("moe",),
        reason="every token passes the dense MLP beside the experts, which carry most of the bytes",
    ),
    Special(
        match="masked_embedding.centroids",
        level="high",
        kinds=("centroids",),
        reason="a rounded score can lose the cluster that holds the right token",
    ),
    Special(
        match="embed_tokens",
        level="keep",
        kinds=("centroids",),
        reason="a step reads the candidates' rows only, and mlx-vlm's centroid head needs them unpacked",
    ),
    Special(
        match="embed_tokens_per_layer",
        level="base",
        kinds=("per_layer",),
        reason="almost half of the weights, but one row a token: the recipe's own bits save gigabytes",
    ),
    Special(
        match="embed_tokens",
        level="base",
        kinds=_EVERY_KIND,
        reason="embedding and head in one: the head is read whole for every token, so it has the recipe's own bits",
    ),
)
"""In this order, the first that matches decides, unless a recipe's own rule does."""

RECIPES: Mapping[str, Recipe] = {
    r.name: r
    for r in (
        Recipe(name="bf16", default=None, high=None, about="the source's own values; for reference and for converting"),
        Recipe(name="8bit", default=_affine(8), high=_affine(8), about="affine, groups of 64: all but lossless"),
        Recipe(name="6bit", default=_affine(6), high=_affine(8), about="affine, groups of 64"),
        Recipe(name="4bit", default=_affine(4), high=_affine(8), about="affine, groups of 64: the usual choice"),
        Recipe(name="mxfp8", default=_MXFP8, high=_MXFP8, about="8-bit floats, groups of 32: for M1 and M2"),
        Recipe(name="nvfp4", default=_NVFP4, high=_MXFP8, about="4-bit floats, groups of 16: for M1 and M2"),
        Recipe(name="mxfp4", default=_MXFP4, high=_MXFP8, about="4-bit floats, groups of 32: smallest, for M1 and M2"),
        Recipe(
            name="q4_0",
            default=_affine(4, 32),
            high=_affine(8),
            about="GGUF's q4_0 grid as affine groups of 32: for the -qat-q4_0-unquantized checkpoints",
            rules=(
                Rule(
                    match="embed_tokens",
                    spec=_affine(8),
                    reason="8 bits hold the embedding's grid, whether or not it was trained on q4_0's",
                    kinds=("target",),
                ),
            ),
            grid="q4_0",
        ),
    )
}


def drafter_default(target: Recipe, kinds: frozenset[str]) -> Recipe:
    """The drafter's recipe where none is named: unquantized beside an unquantized target, else 4 or 8 bits.

    A full head makes the drafter's cost: 4 bits. Behind a centroid head little is read: 8 bits.
    """
    if target.default is None:
        return RECIPES["bf16"]
    floating = target.default.mode != "affine"
    if "centroids" in kinds:
        return RECIPES["mxfp8" if floating else "8bit"]
    return RECIPES["mxfp4" if floating else "4bit"]


def find_recipe(name: str) -> Recipe:
    """A recipe by its name, or from a TOML file. Raises ConvertError."""
    if name in RECIPES:
        return RECIPES[name]
    if not name.endswith(".toml"):
        raise ConvertError(f"{name!r} is no recipe: expected {', '.join(RECIPES)} or a .toml file")
    return _from_toml(Path(name).expanduser())


def _from_toml(path: Path) -> Recipe:
    try:
        tomllib = import_module("tomllib")
    except ModuleNotFoundError as e:
        raise ConvertError(f"{path}: recipes in TOML need Python 3.11 or later") from e
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ConvertError(f"the recipe {path} is not there") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConvertError(f"the recipe {path} is not valid TOML: {e}") from e
    try:
        return parse_recipe(path.stem, data)
    except (ConvertError, ConfigError) as e:
        raise ConvertError(f"the recipe {path}: {e}") from e


def parse_recipe(name: str, data: Mapping[str, Any]) -> Recipe:
    """A recipe from a parsed TOML file; the format is in convert/README.md. Raises ConvertError or ConfigError."""
    _only(data, ("base", "about", "default", "high", "rules", "grid"), "")
    base = data.get("base", "4bit")
    if base not in RECIPES:
        raise ConvertError(f"base is {base!r}, expected one of {', '.join(RECIPES)}")
    start = RECIPES[base]
    rules = data.get("rules", [])
    if not isinstance(rules, list):
        raise ConvertError(f"rules is {rules!r}, expected [[rules]] tables")
    grid = data.get("grid", start.grid)
    default = _spec(data["default"], "default") if "default" in data else start.default
    if grid not in ("minmax", "q4_0") or (grid == "q4_0" and default != RECIPES["q4_0"].default):
        raise ConvertError(f'grid is {grid!r}, expected "minmax", or "q4_0" with affine 4 bits in groups of 32')
    return Recipe(
        name=name,
        default=default,
        high=_spec(data["high"], "high") if "high" in data else start.high,
        about=str(data.get("about", f"from {name}.toml")),
        rules=tuple(_rule(r, i) for i, r in enumerate(rules)) + start.rules,
        grid=grid,
    )


def _rule(data: Any, index: int) -> Rule:
    where = f"rules[{index}]"
    if not isinstance(data, dict) or not isinstance(data.get("match"), str):
        raise ConvertError(f"{where} is {data!r}, expected a table with a pattern `match`")
    _only(data, ("match", "reason", "keep", "bits", "group_size", "mode"), f"{where}.")
    spec = {k: v for k, v in data.items() if k not in ("match", "reason", "keep")}
    if data.get("keep", False) is True:
        _only(spec, (), f"{where} with keep = true: ")
        return Rule(match=data["match"], spec=None, reason=str(data.get("reason", "kept by the recipe")))
    return Rule(match=data["match"], spec=_spec(spec, where), reason=str(data.get("reason", "set by the recipe")))


def _spec(data: Any, where: str) -> QuantSpec:
    if not isinstance(data, dict):
        raise ConvertError(f"{where} is {data!r}, expected a table with bits, group_size and mode")
    _only(data, ("bits", "group_size", "mode"), f"{where}.")
    mode = data.get("mode", "affine")
    fixed = {"mxfp4": _MXFP4, "nvfp4": _NVFP4, "mxfp8": _MXFP8}.get(mode)
    bits, size = data.get("bits", fixed and fixed.bits), data.get("group_size", fixed.group_size if fixed else 64)
    if type(bits) is not int or type(size) is not int:
        raise ConvertError(f"{where} has bits {bits!r} and group_size {size!r}, expected whole numbers")
    return QuantSpec(bits=bits, group_size=size, mode=mode)


def _only(data: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise ConvertError(f"{where}{key} is unknown, expected {', '.join(known) or 'nothing else'}")
