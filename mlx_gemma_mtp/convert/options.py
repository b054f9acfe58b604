"""What a conversion is asked for, and whom it tells. Knows nothing of models or terminals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .checkpoint import ConvertError
from .prompts import read_prompts
from .stream import Progress
from .writer import SHARD_BYTES


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


def check_options(options: Options) -> None:
    """Refuse, before anything is fetched, what can't be honoured in the end."""
    if options.measure is False and (options.min_acceptance is not None or options.compare or options.compare_drafter):
        raise ConvertError("--min-acceptance and --compare need the measurement that --no-measure leaves out")
    if options.prompts is not None:
        read_prompts(options.prompts, has_tokenizer=True)
