"""`convert`: from sources to a measured pair in one directory. Knows nothing of terminals."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..config import QuantSpec
from ..loading import DEMO, find_drafter, memory_limit, resolve
from .checkpoint import Checkpoint, ConvertError
from .fit import WORK, Fit, kv_bytes, smallest_mac
from .hub import Preview, cache_directory, preview
from .output import appearing, check_destination, check_space, copy_side_files, gigabytes, remove_quietly, write_record
from .plan import ModelPlan, Output, PairPlan, plan_pair
from .prompts import PromptSet, built_in, read_prompts
from .provenance import Hasher, checked_hashes, known_hashes, revision_of, versions
from .recipes import RECIPES, Recipe, drafter_default, find_recipe
from .stream import Progress, write_model
from .writer import SHARD_BYTES

_SUGGESTED = ("bf16", "8bit", "6bit", "4bit", "mxfp4")
MAX_SCORED = 512
"""Tokens of a prompt and its answer that are scored at most."""

REFERENCE = "source"
"""What tables of measurements call the pair that was converted."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to convert, how, and what to check. See `convert`."""

    source: str
    out: Path
    drafter: str | None = "auto"
    recipe: str = "bf16"
    drafter_recipe: str | None = None
    revision: str | None = None
    text_only: bool = False
    force: bool = False
    dry_run: bool = False
    memory: int | None = None
    context: int = 8192
    measure: bool | None = None
    prompts: Path | None = None
    compare: Sequence[str] = ()
    compare_drafter: Sequence[str] = ()
    depth: int = 4
    min_acceptance: float | None = None
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, kw_only=True)
class Watcher:
    """Whom to tell: `note` gets a line of text, `progress` every piece written, `stage` what begins."""

    note: Callable[[str], None] = field(default=lambda _: None)
    stage: Callable[[str], None] = field(default=lambda _: None)
    progress: Progress | None = None


class TooLargeError(ConvertError):
    """The pair doesn't fit the Mac it was to fit; says what would."""


def run(options: Options, watch: Watcher | None = None) -> dict[str, Any]:
    """Convert; returns the record that `conversion.json` holds. Raises ConvertError, LoadError or ConfigError."""
    watch = watch or Watcher()
    _check_options(options)
    recipe = find_recipe(options.recipe)
    chosen = None if options.drafter_recipe is None else find_recipe(options.drafter_recipe)
    compared = [find_recipe(n) for n in options.compare], [find_recipe(n) for n in options.compare_drafter]
    _refuse_twins([recipe, *compared[0]])
    _refuse_twins([*([chosen] if chosen else []), *compared[1]])
    planner = _Planning(options, watch, recipe, chosen)
    if (early := planner.before_download()) is not None:
        return early
    path = resolve(options.source, options.revision)
    beside = find_drafter(options.source, path) if options.drafter == "auto" else options.drafter
    drafter_path = None if beside is None else resolve(beside, None)
    check_destination(options.out, [p for p in (path, drafter_path) if p], force=options.force)
    planner.sources = Checkpoint(path), None if drafter_path is None else Checkpoint(drafter_path)
    pair = planner.plan(recipe, chosen)
    prompts = _prompts(options, pair, path)
    fit = planner.checked_fit(pair)
    scratch = _scratch_bytes(options, prompts, pair, [planner.plan(r, None) for r in compared[0]])
    free = check_space(options.out, pair.bytes + scratch + (64 << 20))
    watch.note(f"output: {gigabytes(pair.bytes)}, free on the disk: {gigabytes(free)}")
    record = _record(pair, _Names(target=options.source, drafter=beside), fit)
    if options.dry_run:
        return record
    with appearing(options.out) as out, Hasher() as hasher:
        _write(pair, out, record, hasher, options, watch)
        if prompts is not None:
            record["measured"] = _measure(pair, prompts, out, compared, options, planner.plan, watch)
        write_record(out, record)
    return record


def accepted_share(record: Mapping[str, Any]) -> float | None:
    """Share of all drafts offered that the written pair accepted, or None if it wasn't measured."""
    for row in (record["measured"] or {}).get("acceptance", ()):
        if (row["target"], row["drafter"]) == (record["target"]["recipe"]["name"], record["drafter"]["recipe"]["name"]):
            return float(row["acceptance"])
    return None


def _check_options(options: Options) -> None:
    """Refuse, before anything is fetched, what can't be honoured in the end."""
    if options.measure is False and (options.min_acceptance is not None or options.compare or options.compare_drafter):
        raise ConvertError("--min-acceptance and --compare need the measurement that --no-measure leaves out")
    if options.prompts is not None:
        read_prompts(options.prompts, has_tokenizer=True)


def _refuse_twins(recipes: Sequence[Recipe]) -> None:
    """Tables of measurements name recipes: two may not have one name, and none that of the reference."""
    seen: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe.name == REFERENCE or seen.setdefault(recipe.name, recipe) != recipe:
            raise ConvertError(f"a recipe is called {recipe.name}, as another model measured is: rename its file")


@dataclass(frozen=True, kw_only=True)
class _Names:
    """Sources as the caller named them."""

    target: str
    drafter: str | None


class _Planning:
    """Plans the pair with any recipes, from the hub's headers first and then from the files."""

    def __init__(self, options: Options, watch: Watcher, recipe: Recipe, drafter_recipe: Recipe | None) -> None:
        self._options, self._watch = options, watch
        self._recipe, self._drafter_recipe = recipe, drafter_recipe
        self.sources: tuple[Checkpoint, Checkpoint | None]
        self._said: set[str] = set()

    def plan(self, target: Recipe, drafter: Recipe | None) -> PairPlan:
        """The pair; a drafter without a recipe gets the default beside `target`."""
        return plan_pair(
            *self.sources,
            target,
            lambda kinds: drafter or drafter_default(target, kinds),
            text_only=self._options.text_only,
        )

    def before_download(self) -> dict[str, Any] | None:
        """For a hub id: check size and fit from its headers, before fetching it; the record if that was all."""
        options = self._options
        if options.source == DEMO or Path(options.source).expanduser().is_dir():
            return None
        name = options.drafter
        if name == "auto":
            name = find_drafter(options.source, Path(options.source))
        target = preview(options.source, options.revision) if _is_hub_id(options.source) else None
        drafter: Checkpoint | None = None
        if name is not None:
            drafter = preview(name, None) if _is_hub_id(name) else Checkpoint(resolve(name, None))
        if target is None or (name is not None and drafter is None):
            return None
        check_destination(options.out, [], force=options.force)
        self.sources = target, drafter
        pair = self.plan(self._recipe, self._drafter_recipe)
        fit = self.checked_fit(pair)
        absent = sum(m.source.absent for m in pair.models if isinstance(m.source, Preview))
        free = check_space(options.out, pair.bytes, cache=cache_directory(), absent=absent)
        self._watch.note(
            f"to fetch: {gigabytes(absent)}, output: {gigabytes(pair.bytes)}, free on the disk: {gigabytes(free)}"
        )
        return _record(pair, _Names(target=options.source, drafter=name), fit) if options.dry_run else None

    def checked_fit(self, pair: PairPlan) -> Mapping[str, object] | None:
        """The sum for the Mac that was named, or for the smallest that takes it, or None.

        TooLargeError if it doesn't fit the one that was named, with the recipe that would.
        """
        memory = self._options.memory
        if memory is None:
            least = smallest_mac(pair.target_config, sum(m.text_bytes for m in pair.models), self._options.context)
            self._say(f"smallest Mac: {least or 'none has enough memory'}")
            return None if least is None else least.to_dict()
        fit = self._fit(memory, pair)
        if fit.fits:
            self._say(f"fits: {fit}")
            return fit.to_dict()
        for name in _SUGGESTED:
            other = self._fit(memory, self.plan(RECIPES[name], self._drafter_recipe))
            if other.fits:
                raise TooLargeError(f"{pair.target.recipe.name} doesn't fit: {fit}; --quantize {name} would: {other}")
        raise TooLargeError(f"{pair.target.recipe.name} doesn't fit, nor does any other recipe: {fit}")

    def _say(self, text: str) -> None:
        """Note it, but not a second time when the plan from the hub's headers was right."""
        if text not in self._said:
            self._said.add(text)
            self._watch.note(text)

    def _fit(self, memory: int, pair: PairPlan) -> Fit:
        weights = sum(m.text_bytes for m in pair.models)
        context = self._options.context
        return Fit(memory=memory, context=context, weights=weights, kv=kv_bytes(pair.target_config, context))


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).is_dir()


def _prompts(options: Options, pair: PairPlan, path: Path) -> PromptSet | None:
    """What to measure on, or None: where it wasn't asked for and the source doesn't fit in memory, or wasn't wanted."""
    if options.measure is False:
        return None
    if options.min_acceptance is not None and pair.drafter is None:
        raise ConvertError("--min-acceptance needs a drafter, and there is none")
    needed = _measuring_bytes(pair)
    asked = options.measure or options.min_acceptance is not None or options.compare or options.compare_drafter
    if needed > memory_limit():
        if asked:
            raise ConvertError(
                f"measuring takes {gigabytes(needed)} of memory for the source, this machine has "
                f"{gigabytes(memory_limit())}: convert with --no-measure"
            )
        return None
    has_tokenizer = any((path / name).is_file() for name in _TOKENIZERS)
    if options.prompts is not None:
        return read_prompts(options.prompts, has_tokenizer=has_tokenizer)
    return built_in(has_tokenizer=has_tokenizer)


def _measuring_bytes(pair: PairPlan) -> int:
    """Memory for the source and for a few arrays of a prompt's distributions, which are the largest there are."""
    # The CPU backend computes in float32: twice the bytes of 16-bit weights.
    copies = 2 if mx.default_device().type == mx.cpu else 1
    weights = sum(m.text_source_bytes for m in pair.models)
    return copies * weights + 4 * _distribution_bytes(pair, 1) + WORK


def _distribution_bytes(pair: PairPlan, prompts: int) -> int:
    return 4 * pair.target_config.vocab_size * MAX_SCORED * prompts


def _scratch_bytes(options: Options, prompts: PromptSet | None, pair: PairPlan, compared: Sequence[PairPlan]) -> int:
    if prompts is None:
        return 0
    distributions = _distribution_bytes(pair, len(prompts.prompts(pair.target_config.vocab_size)))
    drafters = len(options.compare_drafter) * (pair.drafter.source_bytes if pair.drafter else 0)
    return distributions + sum(p.target.bytes for p in compared) + drafters


def _write(pair: PairPlan, out: Path, record: dict[str, Any], hasher: Hasher, options: Options, watch: Watcher) -> None:
    """Weights, side files and hashes of both models."""
    places = [(m, role, out / sub) for m, (role, sub) in zip(pair.models, _ROLES, strict=False)]
    for plan, _, _ in places:
        hasher.add(plan.source.files)
    for plan, role, place in places:
        place.mkdir(exist_ok=True)
        watch.stage(f"converting the {role}")
        files = write_model(plan, place, watch.progress, shard_bytes=options.shard_bytes)
        hasher.add(files)
        record[role]["side_files"] = copy_side_files(plan.source.directory, place, plan.config)
        record[role]["files"] = files
    watch.stage("hashing")
    for plan, role, _ in places:
        files = plan.source.files
        record[role]["source_files"] = checked_hashes(hasher, files, known_hashes(files))
        record[role]["files"] = checked_hashes(hasher, record[role]["files"], {})


_ROLES = (("target", "."), ("drafter", "drafter"))


def _measure(
    pair: PairPlan,
    prompts: PromptSet,
    out: Path,
    compared: tuple[list[Recipe], list[Recipe]],
    options: Options,
    plan: Callable[[Recipe, Recipe | None], PairPlan],
    watch: Watcher,
) -> dict[str, Any]:
    """Source and output, and what else was to be compared, every target with every drafter."""
    from .measure import Candidate, measure_pairs

    scratch = out / ".measure"
    scratch.mkdir()
    targets = {REFERENCE: pair.target.source.directory, pair.target.recipe.name: out}
    drafters: dict[str, Path] = {}
    if pair.drafter is not None:
        drafters = {REFERENCE: pair.drafter.source.directory, pair.drafter.recipe.name: out / "drafter"}
    with ExitStack() as stack:
        stack.callback(remove_quietly, scratch)
        for recipe in compared[0]:
            if recipe.name not in targets:
                targets[recipe.name] = _extra(plan(recipe, None).target, scratch / f"target-{recipe.name}", watch)
        for recipe in compared[1]:
            other = plan(pair.target.recipe, recipe).drafter
            if other is not None and recipe.name not in drafters:
                drafters[recipe.name] = _extra(other, scratch / f"drafter-{recipe.name}", watch)
        return measure_pairs(
            [Candidate(name=n, path=p) for n, p in targets.items()],
            [Candidate(name=n, path=p) for n, p in drafters.items()],
            prompts,
            scratch=scratch,
            depth=options.depth,
            limit=MAX_SCORED,
            note=watch.stage,
        )


def _extra(plan: ModelPlan, directory: Path, watch: Watcher) -> Path:
    """A conversion that is only measured."""
    directory.mkdir()
    watch.stage(f"converting to {plan.recipe.name}, to compare")
    write_model(plan, directory, watch.progress)
    copy_side_files(plan.source.directory, directory, plan.config)
    return directory


def _record(pair: PairPlan, names: _Names, fit: Mapping[str, object] | None) -> dict[str, Any]:
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
