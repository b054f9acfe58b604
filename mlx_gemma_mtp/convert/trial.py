"""Whether and on what a conversion is measured, and with what beside it. Knows nothing of how that is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..loading import memory_limit
from .checkpoint import ConvertError
from .fit import WORK
from .options import Options, Watcher
from .output import copy_side_files, gigabytes, remove_quietly
from .plan import ModelPlan, PairPlan
from .prompts import PromptSet, built_in, read_prompts
from .recipes import Recipe
from .stream import write_model

MAX_SCORED = 512
"""Tokens of a prompt and its answer that are scored at most."""

REFERENCE = "source"
"""What tables of measurements call the pair that was converted."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def choose_prompts(options: Options, pair: PairPlan, path: Path) -> PromptSet | None:
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


def scratch_bytes(options: Options, prompts: PromptSet | None, pair: PairPlan, compared: Sequence[PairPlan]) -> int:
    """Disk space that measuring takes for a while, beside the output."""
    if prompts is None:
        return 0
    distributions = _distribution_bytes(pair, len(prompts.prompts(pair.target_config.vocab_size)))
    drafters = len(options.compare_drafter) * (pair.drafter.source_bytes if pair.drafter else 0)
    return distributions + sum(p.target.bytes for p in compared) + drafters


def refuse_twins(recipes: Sequence[Recipe]) -> None:
    """Tables of measurements name recipes: two may not have one name, and none that of the reference."""
    seen: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe.name == REFERENCE or seen.setdefault(recipe.name, recipe) != recipe:
            raise ConvertError(f"a recipe is called {recipe.name}, as another model measured is: rename its file")


def try_out(
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
