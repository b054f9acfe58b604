"""`convert`: from sources to a measured pair in one directory. Knows nothing of terminals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..loading import DEMO, find_drafter, resolve
from .checkpoint import Checkpoint, ConvertError
from .fit import Fit, kv_bytes, longest_context, smallest_mac
from .hub import Preview, cache_directory, preview
from .options import Options, Watcher, check_options
from .output import appearing, check_destination, check_space, copy_side_files, gigabytes, write_record
from .plan import PairPlan, plan_pair
from .provenance import Hasher, checked_hashes, known_hashes
from .recipes import RECIPES, Recipe, drafter_default, find_recipe
from .records import Names, make_record
from .stream import write_model
from .trial import choose_prompts, refuse_twins, scratch_bytes, try_out

_SUGGESTED = ("bf16", "8bit", "6bit", "4bit", "mxfp4")


class TooLargeError(ConvertError):
    """The pair doesn't fit the Mac it was to fit; says what would."""


def run(options: Options, watch: Watcher | None = None) -> dict[str, Any]:
    """Convert; returns the record that `conversion.json` holds. Raises ConvertError, LoadError or ConfigError."""
    watch = watch or Watcher()
    check_options(options)
    recipe = find_recipe(options.recipe)
    chosen = None if options.drafter_recipe is None else find_recipe(options.drafter_recipe)
    compared = [find_recipe(n) for n in options.compare], [find_recipe(n) for n in options.compare_drafter]
    refuse_twins([recipe, *compared[0]])
    refuse_twins([*([chosen] if chosen else []), *compared[1]])
    planner = _Planning(options, watch, recipe, chosen)
    if (early := planner.before_download()) is not None:
        return early
    path = resolve(options.source, options.revision)
    beside = find_drafter(options.source, path) if options.drafter == "auto" else options.drafter
    drafter_path = None if beside is None else resolve(beside, None)
    check_destination(options.out, [p for p in (path, drafter_path) if p], force=options.force)
    planner.sources = Checkpoint(path), None if drafter_path is None else Checkpoint(drafter_path)
    pair = planner.plan(recipe, chosen)
    for model, (role, _) in zip(pair.models, _ROLES, strict=False):
        for match in model.idle:
            watch.note(f"recipe {model.recipe.name}: no matrix of the {role} matches {match!r}")
    prompts = choose_prompts(options, pair, path)
    fit = planner.checked_fit(pair)
    scratch = scratch_bytes(options, prompts, pair, [planner.plan(r, None) for r in compared[0]])
    free = check_space(options.out, pair.bytes + scratch + (64 << 20))
    watch.note(f"output: {gigabytes(pair.bytes)}, free on the disk: {gigabytes(free)}")
    record = make_record(pair, Names(target=_named(options.source), drafter=beside and _named(beside)), fit)
    if options.dry_run:
        return record
    with appearing(options.out, force=options.force) as out, Hasher() as hasher:
        _write(pair, out, record, hasher, options, watch)
        if prompts is not None:
            record["measured"] = try_out(pair, prompts, out, compared, options, planner.plan, watch)
        write_record(out, record)
    return record


def accepted_share(record: Mapping[str, Any]) -> float | None:
    """Share of all drafts offered that the written pair accepted, or None if it wasn't measured."""
    for row in (record["measured"] or {}).get("acceptance", ()):
        if (row["target"], row["drafter"]) == (record["target"]["recipe"]["name"], record["drafter"]["recipe"]["name"]):
            return float(row["acceptance"])
    return None


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
            if options.revision is not None:
                raise ConvertError(f"--revision is {options.revision!r}: {options.source} isn't a hub id, and has none")
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
        return make_record(pair, Names(target=options.source, drafter=name), fit) if options.dry_run else None

    def checked_fit(self, pair: PairPlan) -> Mapping[str, object] | None:
        """The sum for the Mac that was named, or for the smallest that takes it, or None.

        TooLargeError if it doesn't fit the one that was named, with the recipe that would.
        """
        memory = self._options.memory
        if memory is None:
            least = smallest_mac(pair.target_config, sum(m.text_bytes for m in pair.models), self._options.context)
            self._say(f"takes {least}" if least else "no Mac has enough memory")
            return None if least is None else least.to_dict()
        fit = self._fit(memory, pair)
        if fit.fits:
            self._say(f"fits: {fit}")
            return fit.to_dict()
        for name in _SUGGESTED:
            other = self._fit(memory, self.plan(RECIPES[name], self._drafter_recipe))
            if other.fits:
                raise TooLargeError(f"{pair.target.recipe.name} doesn't fit: {fit}; --quantize {name} would: {other}")
        longest = longest_context(memory, pair.target_config, other.weights)
        hint = f"; --quantize {name} with --context {longest // 1024}k would" if longest else ""
        raise TooLargeError(f"{pair.target.recipe.name} doesn't fit, nor does any other recipe: {fit}{hint}")

    def _say(self, text: str) -> None:
        """Note it, but not a second time when the plan from the hub's headers was right."""
        if text not in self._said:
            self._said.add(text)
            self._watch.note(text)

    def _fit(self, memory: int, pair: PairPlan) -> Fit:
        weights = sum(m.text_bytes for m in pair.models)
        context = self._options.context
        return Fit(memory=memory, context=context, weights=weights, kv=kv_bytes(pair.target_config, context))


def _named(source: str) -> str:
    """How a record names a source: a directory by its whole path, from wherever the record is read."""
    local = Path(source).expanduser()
    return str(local.absolute()) if source != DEMO and local.is_dir() else source


def _is_hub_id(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).is_dir()


def _write(pair: PairPlan, out: Path, record: dict[str, Any], hasher: Hasher, options: Options, watch: Watcher) -> None:
    """Weights, side files and hashes of both models."""
    places = [(m, role, out / sub) for m, (role, sub) in zip(pair.models, _ROLES, strict=False)]
    known = {role: known_hashes(plan.source.files) for plan, role, _ in places}
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
        record[role]["source_files"] = checked_hashes(hasher, plan.source.files, known[role])
        record[role]["files"] = checked_hashes(hasher, record[role]["files"], {})


_ROLES = (("target", "."), ("drafter", "drafter"))
