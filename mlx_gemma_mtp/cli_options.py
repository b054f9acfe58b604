"""Options that several commands have, and what they come to. Imports what takes time when it is called."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from .terminal import note, progress_bar

if TYPE_CHECKING:
    from .request import SamplingParams
    from .runtime import Runtime

PROGRAM = "mlx-gemma-mtp"
DEMO = "demo"
_PROBED_ROWS = 8

# Newer versions of typer carry their own click: this name leads to the error classes of either.
UsageError, ClickError = cast(tuple[type[typer.BadParameter], ...], typer.BadParameter.__mro__[1:3])

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Directory or hub id of the target. Without it: the demo pair."),
]
DrafterOption = Annotated[
    str, typer.Option(help='Directory or hub id of the drafter, "auto", or "none" for plain decoding.')
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
DtypeOption = Annotated[str | None, typer.Option(help="bfloat16, float16 or float32; the checkpoint's own.")]
DepthOption = Annotated[str, typer.Option(metavar="N|auto", help="Tokens to draft per round; 0: none.")]
TemperatureOption = Annotated[float | None, typer.Option(help="0, the default: always the likeliest token.")]
TopKOption = Annotated[int | None, typer.Option(help="Draw from the K likeliest tokens only; 0: from all.")]
TopPOption = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that make up this share.")]
MinPOption = Annotated[float | None, typer.Option(help="Draw only tokens at least this likely beside the likeliest.")]
OwnSamplingOption = Annotated[
    bool, typer.Option("--model-sampling", help="Sample as the model's generation_config.json says; options go first.")
]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text in the answer. Repeatable.")
]
SeedOption = Annotated[int | None, typer.Option(help="Sampled output comes again, the same at every depth.")]
BitwiseOption = Annotated[
    bool,
    typer.Option("--bitwise", help="Decode only in shapes probed to round like single steps; fail where none does."),
]
JsonSchemaOption = Annotated[
    Path | None, typer.Option("--json-schema", metavar="FILE", help="The answer is JSON, valid under this schema.")
]
RegexOption = Annotated[str | None, typer.Option("--regex", help="The whole answer matches this.")]
GrammarOption = Annotated[
    Path | None, typer.Option("--grammar", metavar="FILE", help="The whole answer is a sentence of this Lark grammar.")
]
SystemOption = Annotated[str | None, typer.Option(help="System message.")]
ThinkingOption = Annotated[bool, typer.Option("--thinking/--no-thinking", help="Let the model think first.")]
HighlightOption = Annotated[bool, typer.Option("--highlight", help="Colour the accepted drafts.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; errors are JSON, too.")]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The pair that a command is for."""

    model: str | None
    drafter: str
    revision: str | None
    dtype: str | None
    bitwise_rows: int = 0
    """With --bitwise: rows of the largest batch."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling options as given; `own`: what isn't given is as the model's makers want it, not greedy."""

    own: bool
    given: Mapping[str, Any]

    @staticmethod
    def of(own: bool, **options: Any) -> Sampling:
        """Of options, None where not given. Raises BadParameter."""
        from .request import SamplingParams

        given = {name: value for name, value in options.items() if value is not None}
        try:
            SamplingParams(**given)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        return Sampling(own=own, given=given)

    def params(self, runtime: Runtime) -> SamplingParams:
        """What it comes to for this pair."""
        from .request import SamplingParams

        return replace(runtime.generation_defaults if self.own else SamplingParams(), **self.given)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an answer may come to."""

    max_tokens: int
    depth: int | Literal["auto"]
    ignore_eos: bool
    sampling: Sampling
    stop: tuple[str, ...]

    def arguments(self, runtime: Runtime) -> dict[str, Any]:
        """Arguments of `Runtime.generate` and `Runtime.stream`."""
        given = {"max_tokens": self.max_tokens, "depth": self.depth, "ignore_eos": self.ignore_eos}
        return {**given, "sampling": self.sampling.params(runtime), "stop": self.stop}


def parse_stops(stop: Sequence[str] | None) -> tuple[str, ...]:
    """Stop strings as given. Raises BadParameter."""
    if stop and not all(stop):
        raise typer.BadParameter("'' is empty, expected a text", param_hint="--stop")
    return tuple(stop or ())


def parse_depth(depth: str) -> int | Literal["auto"]:
    """A depth as given. Raises BadParameter."""
    from .adaptive import parse_depth

    value = int(depth) if depth.isascii() and depth.isdigit() else depth
    try:
        parse_depth(value)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--depth") from error
    return value if isinstance(value, int) else "auto"


def with_system(turns: Sequence[Mapping[str, str]], system: str | None) -> list[Mapping[str, str]]:
    """The messages of a conversation, the system's first."""
    return [*turns] if system is None else [{"role": "system", "content": system}, *turns]


def refuse_together(given: Mapping[str, bool]) -> None:
    """Raises UsageError if more than one of these was given."""
    names = [name for name, present in given.items() if present]
    if len(names) > 1:
        raise UsageError(f"{' and '.join(names)} can't be given together")


def open_runtime(source: Source, *, quiet: bool) -> Runtime:
    """Load the pair; unless `quiet`, warnings and progress are shown on stderr."""
    from .runtime import load

    _show_warnings(quiet)
    if source.model is None and not quiet:
        note("this is the bundled demo pair; name a real one with, say, --model google/gemma-4-E4B-it")
    drafter = None if source.drafter == "none" else source.drafter
    with progress_bar(shown=not quiet and sys.stderr.isatty()) as progress:
        return load(
            source.model or DEMO,
            drafter=drafter,
            dtype=source.dtype,
            revision=source.revision,
            progress=progress,
            bitwise=source.bitwise_rows > 0,
            max_batch=source.bitwise_rows or _PROBED_ROWS,
        )


def _show_warnings(quiet: bool) -> None:
    class _Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            note(record.getMessage())

    log = logging.getLogger(__package__)
    log.handlers = [logging.NullHandler() if quiet else _Notes(logging.WARNING)]
    log.propagate = False
