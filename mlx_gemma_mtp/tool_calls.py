"""Gemma 4's tool calls: token ids of an output to thoughts, answers and calls, as they come. Knows no HTTP, no MLX.

A call is `<|tool_call>call:NAME{key:<|"|>text<|"|>,n:1}<tool_call|>`. Marks are known by id, so strings may hold
anything, braces and quotes and spelled-out marks included. What models write instead at times is understood, too:
other quotes, `call:name(key=value)`, no `call:`, names with a prefix, missing commas and closing braces. What can't be
understood is given as answer text: nothing is dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .stops import OutputReader
from .text import Detokenizer, Piece, TextCodec

CALL_OPEN, CALL_CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'

_SHELLS = {"{": "}", "(": ")"}
_HEAD = re.compile(r"\s*(?:call\s*:\s*)?([\w.:/-]*)\s*")
_BARE_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


@dataclass(frozen=True, kw_only=True)
class CallDelta:
    """New parts of call number `index`: its `name` (in its first delta alone), and JSON text of its arguments.

    The arguments of all deltas, joined, are a JSON object, unless the output ended within the call.
    """

    index: int
    name: str | None = None
    arguments: str = ""
    drafted: bool = False


Delta = Piece | CallDelta


@dataclass(frozen=True, kw_only=True)
class Block:
    """What several tokens made final. Of them, the first `kept` were read: all, or those up to a stop string's end.

    `answered`: indices of those that are the answer's; `thought`: how many are a thought's, or its closing mark.
    """

    deltas: Sequence[Delta]
    kept: int
    answered: Sequence[int]
    thought: int


class CallWriter:
    """The body of one call, character by character, to its name and its arguments as JSON text.

    `name` is None until the name is complete, and `failed` is true when the body is no call at all; then nothing was
    given out. `rest` is text behind the call's end.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.failed = False
        self.rest = ""
        self._head = ""
        self._closers: list[str] = []  # of the objects and lists that are open
        self._state = "head"
        self._word = ""  # a bare key or value, or what waits behind a quote that may be the last
        self._quote = ""  # what the open string began with
        self._is_key = False
        self._escape = ""
        self._half = ""  # an escape that waits for the other half of its pair
        self._first = True
        self._out: list[str] = []

    @property
    def done(self) -> bool:
        """Whether the arguments are complete."""
        return self._state == "done"

    def push(self, text: str) -> str:
        """JSON text that `text` completes."""
        for i, char in enumerate(text):
            if self.failed:
                break
            if self._state == "done":
                self.rest += text[i:]
                break
            self._step(char)
        return self._taken()

    def quote(self) -> str:
        """The mark `<|"|>`."""
        if self._state == "done":
            self.rest += QUOTE
        elif self._state == "head":
            self.failed = True
        elif self._state == "string":
            if self._quote == QUOTE:
                self._end_string()
            else:
                self._text(QUOTE)
        else:
            self._settle()
            self._open_string(QUOTE)
        return self._taken()

    def close(self) -> str:
        """The mark `<tool_call|>`: closes whatever is open. A name alone is a call without arguments."""
        if self._state == "head":
            found = _HEAD.fullmatch(self._head)
            if found is None or not found[1]:
                self.failed = True
                return ""
            self.name, self._state = found[1], "done"
            return "{}"
        if not self.failed:
            self._settle()
            if self._state == "string":
                self._end_string()
            while self._closers:
                self._pop()
        return self._taken()

    def _taken(self) -> str:
        out, self._out = "".join(self._out), []
        return out

    def _step(self, char: str) -> None:
        if self._state == "head":
            self._in_head(char)
        elif self._state == "string":
            self._in_string(char)
        elif self._state == "closing":
            self._behind_quote(char)
        elif self._state == "bare":
            self._in_bare(char)
        elif self._state == "colon":
            if char in ":=":
                self._state = "value"
            elif not char.isspace():
                self._out.append("null")
                self._state = "after"
                self._step(char)
        elif self._state == "after":
            self._behind_value(char)
        else:
            self._at_item(char)

    def _in_head(self, char: str) -> None:
        if char in _SHELLS and (found := _HEAD.fullmatch(self._head)) and found[1]:
            self.name = found[1]
            self._push("{", _SHELLS[char])
        else:
            self._head += char
            self.failed = _HEAD.fullmatch(self._head) is None

    def _push(self, bracket: str, closer: str) -> None:
        self._out.append(bracket)
        self._closers.append(closer)
        self._first, self._state = True, "item"

    def _pop(self) -> None:
        if self._state in ("colon", "value") and self._closers[-1] != "]":
            self._out.append("null")
        self._out.append("]" if self._closers.pop() == "]" else "}")
        self._first, self._state = False, "after" if self._closers else "done"

    def _at_item(self, char: str) -> None:
        """Where a key, a list's item ("item") or a key's value ("value") may begin."""
        wants_key = self._state == "item" and self._closers[-1] != "]"
        if char.isspace():
            return
        if char in "}])" and char in self._closers:
            self._close_to(char)
        elif char == ",":
            if self._state == "value":
                self._out.append("null")
                self._state = "after"
                self._step(char)
        elif char == "{" and wants_key and self._closers == [")"] and self._first:
            self._closers = ["}"]  # ({ … }): the outer bracket means nothing
        elif char in "\"'":
            self._open_string(char)
        elif char in "{[" and not wants_key:
            self._separate()
            self._push(char, "}" if char == "{" else "]")
        else:
            self._word, self._is_key, self._state = "", wants_key, "bare"
            self._in_bare(char)

    def _close_to(self, closer: str) -> None:
        """Close all up to the innermost bracket that `closer` belongs to."""
        while True:
            found = self._closers[-1] == closer
            self._pop()
            if found:
                break

    def _separate(self) -> None:
        """A comma, where a key or a list's item is not the first."""
        if self._state == "item":
            if not self._first:
                self._out.append(", ")
            self._first = False

    def _open_string(self, quote: str) -> None:
        self._is_key = self._state == "item" and self._closers[-1] != "]"
        self._separate()
        self._out.append('"')
        self._quote, self._state, self._word = quote, "string", ""

    def _text(self, text: str) -> None:
        self._end_half()
        self._out.append(json.dumps(text, ensure_ascii=False)[1:-1])

    def _in_string(self, char: str) -> None:
        if self._quote == QUOTE:
            self._text(char)
        elif self._escape:
            self._in_escape(char)
        elif char == "\\":
            self._escape = char
        elif char == self._quote:
            self._state, self._word = "closing", char
        else:
            self._text(char)

    def _in_escape(self, char: str) -> None:
        self._escape += char
        if self._escape[1] != "u":
            self._text(_ESCAPES.get(char, char if char in "\\/\"'" else self._escape))
            self._escape = ""
        elif len(self._escape) > 2 and char not in "0123456789abcdefABCDEF":
            self._text(self._escape)
            self._escape = ""
        elif len(self._escape) == 6:
            self._unicode(self._escape)
            self._escape = ""

    def _unicode(self, escape: str) -> None:
        """A complete \\uXXXX. Halves of a pair come one by one; one without the other is no text."""
        code = int(escape[2:], 16)
        low = 0xDC00 <= code < 0xE000
        if self._half and low:
            escape, self._half = self._half + escape, ""
        self._end_half()
        if 0xD800 <= code < 0xDC00:
            self._half = escape
        else:
            self._out.append("\ufffd" if low and len(escape) == 6 else escape)

    def _end_half(self) -> None:
        if self._half:
            self._out.append("\ufffd")
            self._half = ""

    def _behind_quote(self, char: str) -> None:
        """A quote ends its string only where what follows can follow a string."""
        if char.isspace():
            self._word += char
        elif char in ",}])" or (self._is_key and char in ":="):
            self._end_string()
            self._step(char)
        else:
            held, self._word, self._state = self._word, "", "string"
            self._text(held)
            self._step(char)

    def _end_string(self) -> None:
        if self._escape:
            self._text(self._escape)
            self._escape = ""
        self._end_half()
        self._word = ""
        self._out.append('": ' if self._is_key else '"')
        self._state = "colon" if self._is_key else "after"

    def _in_bare(self, char: str) -> None:
        ends = ":=" if self._is_key else ","
        if char in ends or char == self._closers[-1] or (self._is_key and char == ","):
            self._end_bare()
            self._step(char)
        else:
            self._word += char

    def _end_bare(self) -> None:
        word, self._word = self._word.strip(), ""
        if self._is_key:
            self._state = "item"
            self._separate()
            self._out.append(json.dumps(word, ensure_ascii=False) + ": ")
            self._state = "colon"
            return
        self._state = "item" if self._closers[-1] == "]" else "value"
        self._separate()
        number = _NUMBER.fullmatch(word)
        self._out.append(word if number else _BARE_WORDS.get(word) or json.dumps(word, ensure_ascii=False))
        self._state = "after"

    def _behind_value(self, char: str) -> None:
        if char == ",":
            self._state = "item"
        elif char in "}])" and char in self._closers:
            self._close_to(char)
        elif not char.isspace() and char not in "}])":
            self._state = "item"
            self._step(char)

    def _settle(self) -> None:
        """End a bare word or a string whose last quote was seen, where a mark follows it."""
        if self._state == "bare":
            self._end_bare()
        elif self._state == "closing":
            self._end_string()
        if self._state == "after":
            self._state = "item"
        elif self._state == "colon":
            self._state = "value"


def resolve_name(name: str, declared: Collection[str]) -> str:
    """The declared name that a model means: its own spelling, or what follows a prefix like `functions.` or `a:b:`."""
    if name in declared:
        return name
    found = [d for d in declared if name.endswith((f":{d}", f".{d}", f"/{d}"))]
    return found[0] if len(found) == 1 else name


class ToolStream:
    """Token ids of one output to pieces of text and calls.

    `tools` are the names offered; with None, calls are not looked for. `stop_match` is the stop string that ended
    the output, or None: it is looked for in the answer alone, not in thoughts and calls.
    """

    def __init__(
        self,
        codec: TextCodec,
        *,
        prompt: Sequence[int] = (),
        tools: Collection[str] | None = None,
        stops: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        self._codec = codec
        self._reader = OutputReader(codec.stream(prompt), stops, min_tokens=min_tokens)
        self._tools = tools
        self._open, self._close, self._quote = (codec.mark(m) for m in (CALL_OPEN, CALL_CLOSE, QUOTE))
        self._marks = codec.thought_marks | {self._open}
        self._thinking = codec.in_thought(prompt)
        self._writer: CallWriter | None = None
        self._detokenizer: Detokenizer | None = None
        self._raw = ""  # the open call's body as text
        self._named = False
        self.calls = 0

    @property
    def stop_match(self) -> str | None:
        """The stop string that was met, or None."""
        return self._reader.matched

    @property
    def in_answer(self) -> bool:
        """Whether the next token is the answer's, and not within a thought or a call."""
        return self._writer is None and not self._thinking

    @property
    def in_thought(self) -> bool:
        """Whether the next token is a thought's, or its closing mark."""
        return self._thinking

    def read(self, tokens: Sequence[int], drafted: Sequence[bool]) -> Block:
        """`push` for all tokens of an event, one `drafted` flag each."""
        if self._writer is None and self._marks.isdisjoint(tokens):
            found = self._reader.push(tokens, drafted)
            thought = found.kept if self._thinking else 0
            return Block(deltas=found.pieces, kept=found.kept, answered=range(found.kept - thought), thought=thought)
        deltas, answered, thought, kept = list[Delta](), list[int](), 0, 0
        for i, token in enumerate(tokens):
            in_answer = self.in_answer
            thought += self.in_thought
            deltas += self.push(token, drafted[i])
            kept += 1
            if in_answer and self.in_answer:
                answered.append(i)
            if self.stop_match is not None:
                break
        return Block(deltas=deltas, kept=kept, answered=answered, thought=thought)

    def push(self, token: int, drafted: bool = False) -> list[Delta]:
        """What `token` makes final."""
        if self._writer is not None:
            return self._in_call(token, drafted)
        self._thinking = self._codec.thinks_after(token, self._thinking)
        if self._tools is not None and token == self._open:
            out: list[Delta] = [*self._reader.push([token], [drafted]).pieces, *self._reader.flush()]
            if self.stop_match is None:
                self._begin()
            return out
        return list(self._reader.push([token], [drafted]).pieces)

    def flush(self, *, cut: bool) -> list[Delta]:
        """What was held back: call it once, after the last token.

        A call that is still open is closed, unless the output was `cut` short: then its arguments stay incomplete.
        """
        if self._writer is None:
            return list(self._reader.flush())
        assert self._detokenizer is not None
        out = self._text(self._detokenizer.flush(), False)
        if not cut:
            return out + self._end(False, mark="")
        return out if self._named else out + _answer(CALL_OPEN + self._raw, False)

    def _begin(self) -> None:
        self._writer, self._raw, self._named = CallWriter(), "", False
        self._detokenizer = self._codec.detokenizer()

    def _in_call(self, token: int, drafted: bool) -> list[Delta]:
        assert self._detokenizer is not None
        assert self._writer is not None
        out = self._text(self._detokenizer.push(token), drafted)
        if token == self._quote:
            self._raw += QUOTE
            out += self._written(self._writer.quote(), drafted)
        elif token == self._close or token == self._open:
            out += self._end(drafted)
            if token == self._open:
                self._begin()
        return out

    def _text(self, text: str, drafted: bool) -> list[Delta]:
        if not text or self._writer is None:
            return []
        self._raw += text
        return self._written(self._writer.push(text), drafted)

    def _written(self, arguments: str, drafted: bool) -> list[Delta]:
        """The delta for what the writer gave, and those of a call that begins behind it within the same marks."""
        writer = self._writer
        assert writer is not None
        out: list[Delta] = []
        if writer.name is not None and not self._named:
            self._named = True
            name = resolve_name(writer.name, self._tools or ())
            out.append(CallDelta(index=self.calls, name=name, arguments=arguments, drafted=drafted))
            self.calls += 1
        elif arguments:
            out.append(CallDelta(index=self.calls - 1, arguments=arguments, drafted=drafted))
        rest = writer.rest.lstrip(" \n\t,;)}]")
        if writer.done and rest:
            self._writer, self._named, self._raw = CallWriter(), False, rest
            out += self._written(self._writer.push(rest), drafted)
        return out

    def _end(self, drafted: bool, mark: str = CALL_CLOSE) -> list[Delta]:
        """The call's end, by its mark or without it."""
        writer = self._writer
        assert writer is not None
        out: list[Delta] = []
        known = writer.name is not None or resolve_name(self._raw.strip(), self._tools or ()) in (self._tools or ())
        if known or self._raw.strip().startswith("call:"):
            out = self._written(writer.close(), drafted)
        if not self._named:
            out += _answer(f"{CALL_OPEN}{self._raw}{mark}", drafted)
        self._writer = self._detokenizer = None
        return out


def _answer(text: str, drafted: bool) -> list[Delta]:
    return [Piece(kind="answer", text=text, drafted=drafted)]
