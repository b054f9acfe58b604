"""Stop strings: text ends where one of them begins. Knows nothing of MLX, models, requests or how tokens are made."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .text import Piece, TextStream, merged


def checked_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Stop strings of a caller's value: one text, or several. Raises ValueError."""
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop has {text!r}, expected texts of at least one character")
    return texts


class StopStrings:
    """Passes text on until one of the stop strings is complete, and never a part of that one.

    The first to be complete wins; of several complete with the same character, the longest. So the result doesn't
    depend on the pieces in which text comes. `matched` names the winner.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = checked_stops(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is final now: all but what may yet turn out to begin a stop string. Nothing behind a match."""
        if self.matched is not None:
            return ""
        text, self._held = self._held + text, ""
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.matched = min(found)
            return text[:at]
        longest = max(map(len, self._stops), default=1) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self._stops):
                self._held = text[-count:]
                break
        return text.removesuffix(self._held)

    def flush(self) -> str:
        """What was held back, where the text ends or is interrupted; nothing behind a match."""
        text, self._held = self._held, ""
        return text


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What tokens came to: `pieces` of final text, and how many of the tokens were read, up to a match."""

    pieces: tuple[Piece, ...]
    kept: int


class OutputReader:
    """Tokens of one output to text that ends before a stop string. Only the answer is searched, no thought.

    Tokens are read one at a time, so that where an output ends doesn't depend on the blocks they came in. `matched`
    is the stop string that ended it; the token that completed it is the last one read. What the first `min_tokens`
    tokens say is not searched.
    """

    def __init__(self, stream: TextStream, stops: Sequence[str] = (), *, min_tokens: int = 0) -> None:
        self._stream = stream
        self._stops = StopStrings(stops) if stops else None
        self._unsearched = min_tokens
        self._held: deque[Piece] = deque()

    @property
    def matched(self) -> str | None:
        """The stop string that was met, or None."""
        return None if self._stops is None else self._stops.matched

    def push(self, tokens: Sequence[int], drafted: Sequence[bool] = ()) -> Reading:
        """Read `tokens`, up to the one that completes a stop string. `drafted`: as in `TextStream.push`."""
        if self._stops is None:
            return Reading(pieces=self._stream.push(tokens, drafted), kept=len(tokens))
        pieces: list[Piece] = []
        for i, token in enumerate(tokens):
            if self._stops.matched is not None:
                return Reading(pieces=merged(pieces), kept=i)
            new = self._stream.push([token], drafted[i : i + 1])
            pieces += self._searched(self._stops, new) if self._unsearched <= 0 else new
            self._unsearched -= 1
        return Reading(pieces=merged(pieces), kept=len(tokens))

    def flush(self) -> tuple[Piece, ...]:
        """What was held back: call it once, after the last token. May still meet a stop string."""
        pieces = self._stream.flush()
        if self._stops is None:
            return pieces
        if self._stops.matched is not None:
            return ()
        found = self._searched(self._stops, pieces)
        return merged([*found, *self._released(len(self._stops.flush()))])

    def _searched(self, stops: StopStrings, pieces: Sequence[Piece]) -> list[Piece]:
        out: list[Piece] = []
        for piece in pieces:
            if stops.matched is not None:
                break
            if piece.kind == "answer":
                self._held.append(piece)
                out += self._released(len(stops.push(piece.text)))
            else:
                # A stop string doesn't reach from before a thought to behind it.
                out += [*self._released(len(stops.flush())), piece]
        return out

    def _released(self, count: int) -> list[Piece]:
        """The first `count` characters held back, each with the flag it came with."""
        out: list[Piece] = []
        while count:
            piece = self._held.popleft()
            text, rest = piece.text[:count], piece.text[count:]
            out.append(replace(piece, text=text))
            count -= len(text)
            if rest:
                self._held.appendleft(replace(piece, text=rest))
        return out
