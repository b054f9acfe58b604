"""The command line. Knows the runtime's interface, and nothing of models, caches or MLX.

stdout carries the answer alone (or, with --json, one object); all else goes to stderr. Modules that take time
to import are imported by the command that needs them, so that --help answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from .bench_cli import bench
from .chat_cli import chat
from .cli_options import PROGRAM, ClickError
from .convert.cli import ConvertCommand, convert
from .generate_cli import generate
from .info_cli import info
from .serve_cli import serve
from .tune_cli import tune
from .verify_cli import verify

_USAGE, _FAILURE, _INTERRUPTED, _BROKEN_PIPE = 2, 1, 130, 141


class _Group(TyperGroup):
    """Commands whose errors are one line (or one JSON object) on stderr, and an exit code."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *_: Any, **__: Any) -> NoReturn:
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        options = arguments[: arguments.index("--")] if "--" in arguments else arguments

        def run() -> None:
            with self.make_context(prog_name or PROGRAM, arguments) as context:
                self.invoke(context)

        sys.exit(_guarded(run, as_json="--json" in options))


app = typer.Typer(
    cls=_Group,
    name=PROGRAM,
    help="Gemma 4 with its MTP drafters, in MLX.",
    add_completion=False,
    rich_markup_mode=None,  # importing rich would double the time that --help takes
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line on the process's arguments, and exit."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


for command in (generate, chat, info, verify, serve, tune, bench):
    app.command()(command)
app.command(cls=ConvertCommand)(convert)


def _guarded(run: Callable[[], None], *, as_json: bool) -> int:
    """Run a command; the exit code. Whatever goes wrong is told in one line, without a traceback."""
    try:
        run()
        sys.stdout.flush()
        return 0
    except typer.Exit as done:
        return done.exit_code
    except ClickError as error:
        return _told(error.format_message(), error.exit_code, as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except BrokenPipeError:
        with suppress(OSError):  # or the interpreter's own flush at exit would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except Exception as error:  # the edge of the program: people get a line, with MLX_GEMMA_MTP_DEBUG all of it
        if os.environ.get("MLX_GEMMA_MTP_DEBUG"):
            raise
        expected = isinstance(error, ValueError | OSError | RuntimeError) or type(error).__module__.startswith(
            __package__ or ""
        )
        return _told(str(error) if expected else f"{type(error).__name__}: {error}", _FAILURE, as_json)


def _told(message: str, code: int, as_json: bool) -> int:
    line = " ".join(message.split())
    if as_json:
        kind = "usage" if code == _USAGE else "failure"
        sys.stderr.write(json.dumps({"error": {"type": kind, "message": line}}) + "\n")
    else:
        sys.stderr.write(f"error: {line}\n")
    return code
