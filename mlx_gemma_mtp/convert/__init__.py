"""From Hugging Face weights to a quantized, measured pair: `convert`. Its work is imported when it is called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .stream import Progress

__all__ = ["convert"]


def convert(
    source: str | Path,
    out: str | Path,
    *,
    drafter: str | Path | None = "auto",
    quantize: str = "bf16",
    drafter_quantize: str | None = None,
    revision: str | None = None,
    text_only: bool = False,
    force: bool = False,
    dry_run: bool = False,
    fit: str | None = None,
    context: str | int = "8k",
    measure: bool | None = None,
    prompts: str | Path | None = None,
    compare: Sequence[str] = (),
    compare_drafter: Sequence[str] = (),
    depth: int = 4,
    min_acceptance: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Convert a target, and its drafter into `out`/drafter; returns what `out`/conversion.json holds.

    `source`, `drafter`: directories or hub ids; drafter "auto" looks as `load` does, None leaves it out. `quantize`,
    `drafter_quantize`: a recipe's name or a TOML file; the drafter's default is 4 or 8 bits beside a quantized target.
    `fit` (like "32GB") and `context` check, before any work, that the pair fits such a Mac. `measure` None: if the
    source fits in memory; `compare` and `compare_drafter` name further recipes to measure. `dry_run` writes nothing.
    The output appears whole or not at all. Raises ConvertError, LoadError or ConfigError. A measured acceptance below
    `min_acceptance` raises nothing here: `pipeline.accepted_share` tells it, and the command line's exit code.
    """
    from .fit import parse_context, parse_memory
    from .options import Options, Watcher
    from .pipeline import run

    options = Options(
        source=str(source),
        out=Path(out).expanduser(),
        drafter=None if drafter is None else str(drafter),
        recipe=quantize,
        drafter_recipe=drafter_quantize,
        revision=revision,
        text_only=text_only,
        force=force,
        dry_run=dry_run,
        memory=None if fit is None else parse_memory(fit),
        context=parse_context(str(context)),
        measure=measure,
        prompts=None if prompts is None else Path(prompts).expanduser(),
        compare=tuple(compare),
        compare_drafter=tuple(compare_drafter),
        depth=depth,
        min_acceptance=min_acceptance,
    )
    return run(options, Watcher(progress=progress))
