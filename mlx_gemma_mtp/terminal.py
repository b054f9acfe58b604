"""How commands speak in a terminal: notes and progress on stderr, answers on stdout. Knows no models, imports none."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from .generation import Step, Timing
    from .request import FinishReason
    from .stats import SpecStats
    from .text import Piece

_DIM, _DRAFTED, _RESET = "\x1b[2m", "\x1b[32m", "\x1b[0m"
# Output of a model must not move the cursor or rename the window: a terminal gets newlines and tabs only.
_CONTROLS = {i: None for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}


def styled(stream: TextIO) -> bool:
    """Whether a stream takes colours."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


def note(text: str) -> None:
    """Say something on stderr, behind what was answered so far."""
    sys.stdout.flush()
    sys.stderr.write(f"{_DIM}{text}{_RESET}\n" if styled(sys.stderr) else f"{text}\n")
    sys.stderr.flush()


def size_of(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


@contextmanager
def progress_bar(*, shown: bool) -> Iterator[Callable[[str, float], None] | None]:
    """Takes what is being done and its share done so far (0: a download begins); None unless `shown`."""
    if not shown:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task("", total=1.0)

    def report(what: str, share: float) -> None:
        if share == 0:  # a download shows the hub's own bars, which a second one would garble
            note(what)
            return
        bar.start()
        bar.update(task, description=what, completed=share)

    try:
        yield report
    finally:
        bar.stop()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a whole output came to."""

    tokens: int
    finish_reason: FinishReason | None
    stats: SpecStats
    timing: Timing


class Printer:
    """Shows an output as it comes: the answer on stdout, a thought before it on stderr, dimmed."""

    def __init__(self, *, highlight: bool) -> None:
        self._drafted = _DRAFTED if highlight and styled(sys.stdout) else ""
        if highlight and not self._drafted:
            note("--highlight needs a terminal: nothing is coloured")
        self._thinking = False
        self._last = ""
        self.answer = ""

    def follow(self, steps: Iterable[Step], *, with_text: bool) -> Outcome:
        """Show every step as it comes (without text: its ids); what the whole came to."""
        last, count = None, 0
        try:
            for last in steps:
                count += len(last.tokens)
                if with_text:
                    for piece in last.pieces:
                        self._show(piece)
                else:
                    self._show_ids(last)
                sys.stdout.flush()
        finally:
            self._end_line()
        if last is None:
            raise RuntimeError("the output ended before its first step")
        if self._drafted:
            sys.stderr.write(f"{self._drafted}coloured{_RESET}: drafted and accepted; the rest: the target's own\n")
        return Outcome(tokens=count, finish_reason=last.finish_reason, stats=last.stats, timing=last.timing)

    def _show(self, piece: Piece) -> None:
        if piece.kind == "thinking":
            sys.stdout.flush()
            self._write(sys.stderr, piece.text, _DIM if styled(sys.stderr) else "")
            sys.stderr.flush()
        else:
            if self._thinking:
                sys.stderr.write("\n\n")
                sys.stderr.flush()
            self.answer += piece.text
            self._write(sys.stdout, piece.text, self._drafted if piece.drafted else "")
        self._thinking = piece.kind == "thinking"

    def _show_ids(self, step: Step) -> None:
        for token, drafted in zip(step.tokens, step.drafted, strict=True):
            self._write(sys.stdout, f"{' ' if self._last else ''}{token}", self._drafted if drafted else "")

    def _write(self, stream: TextIO, text: str, style: str) -> None:
        if stream.isatty():
            text = text.translate(_CONTROLS)
        stream.write(f"{style}{text}{_RESET}" if style else text)
        self._last = text[-1:] or self._last

    def _end_line(self) -> None:
        if self._last not in ("", "\n"):
            stream = sys.stderr if self._thinking else sys.stdout
            stream.write("\n")
        sys.stdout.flush()
