"""The command `convert`. Knows terminals, and of the converter its interface alone; imports it when it runs."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.status import Status

    from .options import Options, Watcher
    from .stream import Advance

_WORSE = 3
_BUILT_IN = "built-in"


_RECIPES = "bf16, 8bit, 6bit, 4bit, mxfp8, nvfp4, mxfp4, q4_0, or a .toml file."
QuantizeOption = Annotated[str, typer.Option("--quantize", "-q", metavar="RECIPE", help=_RECIPES)]
DrafterQuantizeOption = Annotated[
    str | None, typer.Option(metavar="RECIPE", help="The drafter's; default 4 or 8 bits if the target is quantized.")
]
FitOption = Annotated[
    str | None, typer.Option(metavar="32GB", help="Check first that it fits a Mac of so much memory.")
]
MeasureOption = Annotated[
    str | None,
    typer.Option(metavar="[PROMPTS]", help="Compare with the source, on a file's prompts; on where it fits in memory."),
]
MinAcceptanceOption = Annotated[
    float | None, typer.Option(min=0, max=1, help="Exit with 3 if a smaller share of all drafts is accepted.")
]


class ConvertCommand(TyperCommand):
    """`convert`, whose --measure may stand without a file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        filled: list[str] = []
        for i, word in enumerate(args):
            filled.append(word)
            if word == "--measure" and (i + 1 == len(args) or args[i + 1].startswith("-")):
                filled.append(_BUILT_IN)
        parsed: list[str] = super().parse_args(ctx, filled)
        return parsed


def convert(
    source: Annotated[str, typer.Argument(help="Directory or hub id of the target.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory to make; the drafter goes into OUT/drafter.")],
    drafter: Annotated[str, typer.Option(help='Directory or hub id of the drafter, "auto", or "none".')] = "auto",
    quantize: QuantizeOption = "bf16",
    drafter_quantize: DrafterQuantizeOption = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    text_only: Annotated[bool, typer.Option("--text-only", help="Leave out vision and audio.")] = False,
    fit: FitOption = None,
    context: Annotated[str, typer.Option(metavar="32k", help="Tokens of context to fit.")] = "8k",
    measure: MeasureOption = None,
    no_measure: Annotated[bool, typer.Option("--no-measure", help="Don't compare with the source.")] = False,
    compare: Annotated[str | None, typer.Option(metavar="A,B", help="Measure these target recipes, too.")] = None,
    compare_drafter: Annotated[str | None, typer.Option(metavar="A,B", help="And these of the drafter.")] = None,
    depth: Annotated[int, typer.Option(min=1, max=8, help="Drafts per round when measuring.")] = 4,
    min_acceptance: MinAcceptanceOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Plan and check, write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout; errors are JSON, too.")] = False,
) -> None:
    """Convert and quantize a model and its drafter, and measure what that costs."""
    from .fit import parse_context, parse_memory
    from .options import Options
    from .pipeline import accepted_share, run

    if measure is not None and no_measure:
        raise typer.BadParameter("--measure and --no-measure can't be given together")
    options = Options(
        source=source,
        out=out.expanduser(),
        drafter=None if drafter == "none" else drafter,
        recipe=quantize,
        drafter_recipe=drafter_quantize,
        revision=revision,
        text_only=text_only,
        force=force,
        dry_run=dry_run,
        memory=None if fit is None else parse_memory(fit),
        context=parse_context(context),
        measure=False if no_measure else (True if measure is not None else None),
        prompts=Path(measure).expanduser() if measure not in (None, _BUILT_IN) else None,
        compare=_listed(compare),
        compare_drafter=_listed(compare_drafter),
        depth=depth,
        min_acceptance=min_acceptance,
    )
    with _cleaning_up_when_terminated(), _watcher(quiet=as_json) as watch:
        record = run(options, watch)
    if as_json:
        typer.echo(json.dumps(record))
    else:
        _print_summary(record, options)
    share = accepted_share(record)
    if min_acceptance is not None and share is not None and share < min_acceptance:
        _note(f"the pair accepts {share:.1%} of its drafts, less than --min-acceptance {min_acceptance:.1%}")
        raise typer.Exit(_WORSE)


def _listed(names: str | None) -> tuple[str, ...]:
    return tuple(n.strip() for n in (names or "").split(",") if n.strip())


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


@contextmanager
def _cleaning_up_when_terminated() -> Iterator[None]:
    """Let a plain `kill` unwind as Ctrl-C does, so that the unfinished output is removed."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _watcher(*, quiet: bool) -> Iterator[Watcher]:
    from .options import Watcher

    if quiet:
        yield Watcher()
    elif not sys.stderr.isatty():
        yield Watcher(note=_note, stage=_note)
    else:
        with _Display() as display:
            yield Watcher(note=display.note, stage=display.stage, progress=display.advance)


class _Display:
    """One changing line on stderr: what is going on; while tensors are written a bar, their bytes and the time left."""

    def __enter__(self) -> _Display:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._what = ""
        self._status: Status | None = None
        self._bar: Progress | None = None
        self._shown = 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def stage(self, what: str) -> None:
        """Begin something new."""
        self._clear()
        self._what = what
        self._status = self._console.status(what)
        self._status.start()

    def advance(self, at: Advance) -> None:
        """Show how far it is, a few times a second."""
        from .output import gigabytes

        if time.monotonic() - self._shown < 0.1 and at.tensors_done < at.tensors:
            return
        self._shown = time.monotonic()
        bar = self._bar or self._start_bar(at.bytes)
        bar.update(
            bar.task_ids[0],
            completed=at.bytes_done,
            tensors=f"{at.tensors_done}/{at.tensors}",
            size=f"{gigabytes(at.bytes_done)} of {gigabytes(at.bytes)}",
        )

    def _start_bar(self, total: int) -> Progress:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._clear()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[tensors]} tensors, {task.fields[size]},"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._bar.add_task(self._what, total=total, tensors="0", size="")
        self._bar.start()
        return self._bar

    def _clear(self) -> None:
        if self._status is not None:
            self._status.stop()
        if self._bar is not None:
            self._bar.stop()
        self._status = self._bar = None


def _print_summary(record: dict[str, Any], options: Options) -> None:
    from .output import gigabytes, measured_tables, summarized

    lines = []
    for role in ("target", "drafter"):
        if (model := record[role]) is not None:
            bits = f"{model['bits_per_weight']:.2f} bits per weight"
            lines.append(f"{role:<8} {model['recipe']['name']:<8} {gigabytes(model['bytes'])}, {bits}")
            if model["unquantized"]:
                lines.append(f"{'':<8} unquantized, as no group divides the width: {summarized(model['unquantized'])}")
    if record["drafter"] is None:
        lines.append("drafter  none: no drafts, plain decoding")
    if record["measured"]:
        lines += ["", *measured_tables(record["measured"]), ""]
    elif not options.dry_run:
        lines.append("not measured" + ("" if options.measure is False else ": the source doesn't fit in memory"))
    if options.dry_run:
        lines.append(f"nothing written to {options.out}")
    else:
        lines.append(f"written to {options.out}; to run it: mlx-gemma-mtp generate --model {options.out} PROMPT")
    _note("\n".join(lines))
