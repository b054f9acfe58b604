"""Text to token ids and back: tokenizer, chat template, incremental text, the thought channel.

It knows neither models nor MLX. Loading a tokenizer imports mlx-lm; importing this module does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .generation_config import read_stop_ids

PieceKind = Literal["answer", "thinking"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_ROLES = ("system", "developer", "user", "assistant", "model", "tool")
# The template writes "model" for "assistant" itself, and compares roles with "assistant" before that.
_ROLE_ALIASES = {"model": "assistant", "developer": "system"}
_CHANNEL_OPEN, _CHANNEL_CLOSE = "<|channel>", "<channel|>"
_TURN_OPEN, _TURN_CLOSE = "<|turn>", "<turn|>"
_CALL_OPEN = "<|tool_call>"
_THOUGHT_HEADER = "thought\n"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """New text of one kind. `drafted`: the token that completed it was an accepted draft."""

    kind: PieceKind
    text: str
    drafted: bool = False


class Detokenizer:
    """Token ids of one output to text, as they come.

    The texts of every `push` and of the last `flush`, joined, are `TextCodec.decode` of the same ids. No text
    is ever taken back, and none ends within a character: bytes of an unfinished one wait for the next ids.
    """

    def __init__(self, stream: Any, *, hidden: frozenset[int], size: int) -> None:
        self._stream = stream
        self._hidden = hidden
        self._size = size

    def push(self, token: int) -> str:
        """Text that is final now. Special tokens, and ids outside the vocabulary, have none of their own."""
        if token in self._hidden or not 0 <= token < self._size:
            return self.flush()
        self._stream.add_token(token)
        return str(self._stream.last_segment)

    def flush(self) -> str:
        """What was held back; an unfinished character becomes U+FFFD. More ids may follow."""
        self._stream.finalize()
        return str(self._stream.last_segment)


class ChannelParser:
    """Parts the thought channel from the answer: `<|channel>thought\\n` … `\\n<channel|>`.

    The marks, the header line and the newline before the closing mark are no text. A turn mark closes an open
    thought, as a new turn starts with an answer. Marks are known by id, so an answer can quote them as text.
    """

    def __init__(self, *, opens: int | None, closes: frozenset[int]) -> None:
        self._opens = opens
        self._closes = closes
        self._thinking = False
        self._header: str | None = None  # text since the opening mark, while it may still become the header
        self._newline = ""  # a newline that is not shown if the thought ends here

    def passes(self, token: int) -> bool:
        """Whether the text that became final with `token` is the answer's as it is, and nothing changes by it."""
        return not self._thinking and token != self._opens

    def push(self, token: int, text: str) -> list[Piece]:
        """Pieces of `text`, which became final with `token`; for a mark, it is text from before the mark."""
        pieces = self._text(text)
        if token == self._opens:
            self._thinking, self._header = True, ""
        elif token in self._closes and self._thinking:
            pieces += self._close_header()
            self._thinking, self._newline = False, ""
        return pieces

    def flush(self) -> list[Piece]:
        """What was held back, at the end of an output that did not close its thought."""
        pieces = self._close_header() if self._thinking else []
        pieces += _piece("thinking", self._newline)
        self._newline = ""
        return pieces

    def forget_held(self) -> None:
        """Drop a newline that is held back: it belongs to the prompt."""
        self._newline = ""

    def _text(self, text: str) -> list[Piece]:
        if not self._thinking or not text:
            return _piece("answer", text)
        if self._header is not None:
            self._header += text
            if self._header != _THOUGHT_HEADER and _THOUGHT_HEADER.startswith(self._header):
                return []
            text, self._header = self._header.removeprefix(_THOUGHT_HEADER), None
        return self._thought(text)

    def _thought(self, text: str) -> list[Piece]:
        if not text:
            return []
        text = self._newline + text
        self._newline = "\n" if text.endswith("\n") else ""
        return _piece("thinking", text.removesuffix("\n"))

    def _close_header(self) -> list[Piece]:
        header, self._header = self._header, None
        return [] if header is None or header == _THOUGHT_HEADER.strip() else self._thought(header)


class TextStream:
    """Ids of one output to pieces: a detokenizer and a channel parser that know the prompt.

    A prompt that ends inside an open thought makes the output begin as thinking.
    """

    def __init__(self, detokenizer: Detokenizer, parser: ChannelParser, *, prompt_tail: Sequence[int]) -> None:
        """`prompt_tail`: the prompt's ids from the mark that opened a thought on, if that is still open."""
        self._detokenizer = detokenizer
        self._parser = parser
        for token in prompt_tail:
            parser.push(token, detokenizer.push(token))
        parser.forget_held()

    def push(self, tokens: Sequence[int], drafted: Sequence[bool] = ()) -> tuple[Piece, ...]:
        """Pieces that `tokens` make final. `drafted` has one flag per token, or none at all."""
        if drafted and len(drafted) != len(tokens):
            raise ValueError(f"drafted has {len(drafted)} flags for {len(tokens)} tokens")
        pieces: list[Piece] = []
        answer, was_drafted = "", False  # text of the answer that is no piece yet, and its flag
        for i, token in enumerate(tokens):
            flag, text = bool(drafted) and drafted[i], self._detokenizer.push(token)
            if answer and (flag != was_drafted or not self._parser.passes(token)):
                pieces.append(Piece(kind="answer", text=answer, drafted=was_drafted))
                answer = ""
            if self._parser.passes(token):
                answer, was_drafted = answer + text, flag
                continue
            for p in self._parser.push(token, text):
                pieces.append(Piece(kind=p.kind, text=p.text, drafted=flag))
        if answer:
            pieces.append(Piece(kind="answer", text=answer, drafted=was_drafted))
        return merged(pieces)

    def flush(self) -> tuple[Piece, ...]:
        """What was held back: call it once, after the last token."""
        tail = self._detokenizer.flush()
        return merged([*(self._parser.push(-1, tail)), *self._parser.flush()])


class TextCodec:
    """Tokenizer and chat template of one model directory. Holds no state of any output."""

    stop_ids: frozenset[int]
    """Ids that end an output: generation_config.json's, else config.json's, else the tokenizer's."""

    def __init__(self, tokenizer: Any, *, stop_ids: frozenset[int] = frozenset()) -> None:
        """`tokenizer` is an `mlx_lm.tokenizer_utils.TokenizerWrapper`."""
        self._tokenizer = tokenizer
        self._size = len(tokenizer)
        self._bos = self._id("<bos>") if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        added = tokenizer.added_tokens_decoder
        self._special = frozenset(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}
        turn_close = self._id(_TURN_CLOSE)
        self.stop_ids = stop_ids or frozenset(tokenizer.eos_token_ids) | _present(turn_close)
        self._channel_open = self._id(_CHANNEL_OPEN)
        self._turn_open = self._id(_TURN_OPEN)
        # A call ends a thought, too: models do open one without closing the thought first.
        marks = (self._id(_CHANNEL_CLOSE), self._id(_CALL_OPEN))
        self._channel_closes = _present(self._turn_open, turn_close, *marks)

    @classmethod
    def from_directory(cls, path: Path) -> TextCodec | None:
        """The codec of a model directory, or None when it holds no tokenizer. Runs no code found there.

        Raises ValueError when a file can't be read as what it should be.
        """
        if not any((path / name).is_file() for name in _TOKENIZER_FILES):
            return None
        from mlx_lm.tokenizer_utils import load

        stop_ids = read_stop_ids(path)
        try:
            tokenizer = load(path, {"trust_remote_code": False})
        except Exception as error:  # tokenizers raises plain Exception for a file that it can't read
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"can't load the tokenizer in {path}: {reason}") from error
        return cls(tokenizer, stop_ids=stop_ids)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render` works."""
        return bool(self._tokenizer.has_chat_template)

    def encode(self, text: str) -> list[int]:
        """Ids of raw text, `<bos>` in front exactly once (whether or not the text starts with it)."""
        _check_unicode("the text", text)
        return self._with_one_bos(self._tokenizer.encode(text, add_special_tokens=False))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of a conversation through the chat template, ready for the model's turn.

        A message has a `role` (system, developer, user, assistant, model or tool) and a `content`: text, or a
        list of {"type": "text", "text": …}. Other keys (`tool_calls`, `name`) reach the template unchanged.
        Special tokens written out in a content are read as special tokens. Raises ValueError for all else.
        """
        if not self.has_chat_template:
            raise ValueError("this model has no chat template; give it raw text instead of messages")
        from jinja2 import TemplateError

        try:
            ids = self._tokenizer.apply_chat_template(
                _checked(messages),
                tools=None if tools is None else list(tools),
                add_generation_prompt=True,
                enable_thinking=thinking,
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refused the messages: {error}") from error
        return self._with_one_bos(ids)

    def checkpoints(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Lengths of a rendered prompt at which later ones may part from it: behind its first turn and before its last.

        The last turn is the model's, just begun: what the template puts into it is not what it becomes as history.
        """
        turns = [i for i, token in enumerate(prompt) if token == self._turn_open]
        return tuple(sorted({turns[1], turns[-1]})) if len(turns) > 1 else ()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens. Bytes that are no UTF-8 become U+FFFD."""
        detokenizer = self.detokenizer()
        return "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()

    def detokenizer(self) -> Detokenizer:
        """A new detokenizer, for one output."""
        return Detokenizer(self._tokenizer.detokenizer, hidden=self._special, size=self._size)

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """A new stream of pieces, for one output that follows `prompt`."""
        parser = ChannelParser(opens=self._channel_open, closes=self._channel_closes)
        return TextStream(self.detokenizer(), parser, prompt_tail=self._open_thought(prompt))

    def split(self, ids: Sequence[int], prompt: Sequence[int] = ()) -> tuple[str, str | None]:
        """Answer and thinking (None: there was none) of a whole output that follows `prompt`."""
        stream = self.stream(prompt)
        pieces = [*stream.push(ids), *stream.flush()]
        thinking = "".join(p.text for p in pieces if p.kind == "thinking")
        return "".join(p.text for p in pieces if p.kind == "answer"), thinking or None

    def mark(self, name: str) -> int | None:
        """The id of a mark like `<|tool_call>`; None where the vocabulary lacks it."""
        return self._id(name)

    def in_thought(self, prompt: Sequence[int]) -> bool:
        """Whether an output behind `prompt` begins within a thought."""
        return bool(self._open_thought(prompt))

    def thinks_after(self, token: int, thinking: bool) -> bool:
        """Whether what follows `token` is thought, where `thinking` says it of the token itself."""
        return token == self._channel_open or (thinking and token not in self._channel_closes)

    @property
    def thought_marks(self) -> frozenset[int]:
        """The tokens behind which `thinks_after` may differ from before."""
        return self._channel_closes | _present(self._channel_open)

    def token_bytes(self, token: int) -> bytes:
        """What one token is on its own: a piece's UTF-8, a single byte, or a mark's name."""
        piece = self._tokenizer.convert_ids_to_tokens(token) if 0 <= token < self._size else None
        if piece is None:
            return b""
        byte = None if token in self._special else _BYTE_PIECE.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()

    def _id(self, name: str) -> int | None:
        found = self._tokenizer.convert_tokens_to_ids(name)
        # A name that is not in the vocabulary gives the id of <unk>.
        known = found is not None and self._tokenizer.convert_ids_to_tokens(found) == name
        return int(found) if known else None

    def _with_one_bos(self, ids: Sequence[int]) -> list[int]:
        if self._bos is None:
            return list(ids)
        start = 0
        while start < len(ids) and ids[start] == self._bos:
            start += 1
        return [self._bos, *ids[start:]]

    def _open_thought(self, prompt: Sequence[int]) -> Sequence[int]:
        for i in range(len(prompt) - 1, -1, -1):
            if prompt[i] == self._channel_open:
                return prompt[i:]
            if prompt[i] in self._channel_closes:
                break
        return ()


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError("messages is empty or no list, expected a list of {'role': …, 'content': …}")
    checked = []
    answerable = False  # a tool message here answers calls before it; the template drops any other silently
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} is {type(message).__name__}, expected {{'role': …, 'content': …}}")
        role = message.get("role")
        if role not in _ROLES:
            raise ValueError(f"{where}: role is {role!r}, expected one of {', '.join(_ROLES)}")
        if role == "tool" and not answerable:
            raise ValueError(f"{where}: a tool message has to follow an assistant message with tool_calls")
        calls = bool(message.get("tool_calls"))
        _check_content(where, message.get("content"), optional=calls)
        answerable = role == "tool" or calls
        checked.append({**message, "role": _ROLE_ALIASES.get(role, role)})
    return checked


def _check_content(where: str, content: object, *, optional: bool) -> None:
    if isinstance(content, str):
        _check_unicode(f"{where}: content", content)
    elif isinstance(content, Sequence) and not isinstance(content, bytes):
        for j, part in enumerate(content):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            if kind != "text":
                raise ValueError(f"{where}: part {j} is {kind!r}; this runtime reads only 'text' parts")
            if not isinstance(part.get("text"), str):
                raise ValueError(f"{where}: part {j} has no 'text' of type str")
            _check_unicode(f"{where}: part {j}", part["text"])
    elif content is not None or not optional:
        raise ValueError(f"{where}: content is {type(content).__name__}, expected text or text parts")


def _check_unicode(what: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is no valid Unicode: a lone surrogate at {error.start}") from error


def _piece(kind: PieceKind, text: str) -> list[Piece]:
    return [Piece(kind=kind, text=text)] if text else []


def merged(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """The same text in as few pieces as their kinds and flags allow."""
    out: list[Piece] = []
    for p in pieces:
        if out and (out[-1].kind, out[-1].drafted) == (p.kind, p.drafted):
            out[-1] = Piece(kind=p.kind, text=out[-1].text + p.text, drafted=p.drafted)
        else:
            out.append(p)
    return tuple(out)


def _present(*ids: int | None) -> frozenset[int]:
    return frozenset(i for i in ids if i is not None)
