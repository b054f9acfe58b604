"""What an output must look like: JSON Schema, regex and Lark grammars (llguidance), and a budget for thinking.

A user names a constraint with a plain value (`JsonSchema`, `Regex`, `Lark`, `ThinkingBudget`, `Both`), which knows no
tokenizer. `Grammars.start` makes a `Matcher` of it for one output: the `sampling.Constraint` that a round asks for the
masks of a whole block. It runs on the host and knows neither models nor MLX. llguidance is imported when the first
grammar is compiled.

A grammar governs the answer. Where the prompt turned thinking on, the output may open with a thought, and the grammar
applies behind it. The law is the target's own, restricted to what the grammar allows: every way to spell an allowed
text in tokens stays open (llguidance's forcing of the tokenizer's own spelling is off: it would take a mark that is
quoted in the text, such as `<turn|>`, for the special token, and fail).
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .request import ConstraintError, Request
from .text import TextCodec

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Mask = npt.NDArray[np.uint32]
"""Allowed tokens: bit t % 32 of word t // 32, in a (words,) row or a (rows, words) block."""

_CACHED = 64
_NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
_SCHEMA_ERROR = "failed to compile JSON schema: "
_CONTROL_ESCAPE = re.compile(r"\\[aevux]")
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_CHANNEL_OPEN, _CHANNEL_CLOSE, _THINK = "<|channel>", "<channel|>", "<|think|>"
_TURN_MARKS = ("<|turn>", "<turn|>")

_SCHEMA_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_SCHEMA_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_SCHEMAS = frozenset({"items", "additionalItems", "additionalProperties"})
_ASSERTIONS = frozenset(
    "$ref const enum type minItems maxItems required minProperties maxProperties minLength maxLength pattern format "
    "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split()
)
_ANNOTATIONS = frozenset(
    "$anchor $schema $id id $comment title description default deprecated readOnly writeOnly examples "
    "contentMediaType contentEncoding discriminator".split()
)
_KEYWORDS = _SCHEMA_MAPS | _SCHEMA_LISTS | _SCHEMAS | _ASSERTIONS | _ANNOTATIONS


@dataclass(frozen=True)
class JsonSchema:
    """The answer is one JSON value that is valid under `schema` (a mapping, or JSON text; kept as JSON text).

    Properties come in the schema's order, additional ones behind them. White space is allowed wherever JSON allows
    it, except before and after the value; `compact` allows none. `format` is enforced. Strings hold no \\u escapes,
    unless the schema itself needs control characters. A schema that uses a keyword which can't be enforced is
    refused. Raises ValueError.
    """

    schema: Mapping[str, Any] | str
    compact: bool = False

    def __post_init__(self) -> None:
        try:
            schema = json.loads(self.schema) if isinstance(self.schema, str) else self.schema
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
            # A mapping may hold keys that are no text: JSON makes them text.
            schema = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"schema is no JSON: {error}") from error
        if not isinstance(schema, dict):
            raise ValueError(f"schema is {_shown(schema)}, expected a JSON object")
        _check_text("schema", text)
        _check_schema(schema)
        object.__setattr__(self, "schema", text)

    @property
    def lark(self) -> str:
        """The same as a Lark grammar."""
        # With \\u, an additional property could be spelled like one that has a schema of its own.
        options: dict[str, Any] = {"lenient": False, "json_allowed_escapes": 'nrbtf\\"'}
        if self.compact:
            options["whitespace_flexible"] = False
        schema = json.loads(str(self.schema))
        if _controls(schema):
            # llguidance takes a control character that it can't spell for nothing at all.
            del options["json_allowed_escapes"]
        return "start: %json " + json.dumps({"x-guidance": options, **schema}, ensure_ascii=False)


@dataclass(frozen=True)
class Regex:
    """The whole answer matches `pattern` (Rust's regex syntax without look-around, \\b and back-references)."""

    pattern: str

    def __post_init__(self) -> None:
        _check_text("pattern", self.pattern)

    @property
    def lark(self) -> str:
        """The same as a Lark grammar."""
        from llguidance import LLMatcher

        return str(json.loads(LLMatcher.grammar_from_regex(self.pattern))["grammars"][0]["lark_grammar"])


@dataclass(frozen=True)
class Lark:
    """The whole answer is a sentence of `grammar`, in llguidance's variety of Lark; its start symbol is `start`."""

    grammar: str

    def __post_init__(self) -> None:
        _check_text("grammar", self.grammar)

    @property
    def lark(self) -> str:
        """The grammar."""
        return self.grammar


Grammar = JsonSchema | Regex | Lark


@dataclass(frozen=True)
class ThinkingBudget:
    """At most `tokens` tokens of the output are within thoughts, their header line included, their marks not.

    When they are spent, an open thought must close, and none may open any more. A thought that the prompt left open
    counts from the output's first token.
    """

    tokens: int

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, int) or isinstance(self.tokens, bool) or self.tokens < 0:
            raise ValueError(f"tokens is {self.tokens!r}, expected a count of at least 0")


@dataclass(frozen=True)
class Both:
    """A grammar for the answer and a budget for the thought before it. Two grammars can't be combined."""

    grammar: Grammar
    budget: ThinkingBudget

    def __post_init__(self) -> None:
        if not isinstance(self.grammar, Grammar):
            raise ValueError(f"grammar is {_shown(self.grammar)}, expected JsonSchema, Regex or Lark")
        if not isinstance(self.budget, ThinkingBudget):
            raise ValueError(f"budget is {_shown(self.budget)}, expected ThinkingBudget")


Spec = JsonSchema | Regex | Lark | ThinkingBudget | Both


class Grammars:
    """Makes constraints for the outputs of one model. For one thread at a time.

    Costs nothing until the first grammar: then the vocabulary is indexed (1.6 s and 70 MB for Gemma 4's).
    """

    def __init__(self, codec: TextCodec, vocab_size: int, stop_ids: Collection[int] | None = None) -> None:
        """`vocab_size` is the model's, which may exceed the tokenizer's; `stop_ids` default to the codec's."""
        self._tokenizer = codec._tokenizer.backend_tokenizer
        self._stop_ids = frozenset(codec.stop_ids if stop_ids is None else stop_ids)
        self._vocab_size = vocab_size
        self._marks = _Marks.of(self._tokenizer)
        self._special = sorted(i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special)
        # The token by which llguidance says that the output may end: one that is never text.
        self._end = self._special[0] if self._special else 0
        self._index: LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def start(self, spec: object, *, prompt: Sequence[int] = (), stop_ids: Collection[int] | None = None) -> Matcher:
        """A new constraint for one output that follows `prompt` and ends with one of `stop_ids`.

        Raises ValueError, naming the field, when the specification can't be used; nothing of it is ever ignored.
        """
        grammar, budget = _parts(spec)
        stops = self._stop_ids if stop_ids is None else frozenset(stop_ids)
        for token in stops:
            if not 0 <= token < self._vocab_size:
                raise ValueError(f"stop_ids has {token}, expected 0 to {self._vocab_size - 1}")
        if grammar is not None and not stops:
            raise ValueError("stop_ids is empty: an output under a grammar needs a token to end with")
        if budget is not None and (self._marks.opens is None or self._marks.closes is None):
            raise ValueError(f"this model has no thoughts to limit: no {_CHANNEL_OPEN} and {_CHANNEL_CLOSE}")
        rules = _Rules.of(self._marks, self._vocab_size, stops, budget, grammar is not None, self._end)
        place = self._marks.place_after(prompt)
        return Matcher(rules, place, None if grammar is None else self._compile(grammar))

    def of_request(self, request: Request) -> Matcher | None:
        """The constraint that a request asks for, if any: a `Scheduler`'s `constrain`. Raises ValueError."""
        sampling = request.sampling
        if sampling.constraint is None:
            return None
        if not isinstance(sampling.constraint, ThinkingBudget):
            ends = "with a grammar: it says where to end"
            if sampling.min_tokens:
                raise ValueError(f"min_tokens is {sampling.min_tokens}, expected 0 {ends}")
            if request.ignore_eos:
                raise ValueError(f"ignore_eos is True, expected False {ends}")
        return self.start(sampling.constraint, prompt=request.prompt, stop_ids=request.stop_ids)

    def _compile(self, spec: Grammar) -> LLMatcher:
        """A matcher at the start of the grammar, never to be moved."""
        if spec in self._compiled:
            self._compiled.move_to_end(spec)
            return self._compiled[spec]
        import llguidance

        if self._index is None:
            self._index = self._indexed()
        field = {JsonSchema: "schema", Regex: "pattern", Lark: "grammar"}[type(spec)]
        matcher = llguidance.LLMatcher(
            self._index,
            llguidance.LLMatcher.grammar_from_lark(spec.lark + _NO_FORCING),
            limits=llguidance.LLParserLimits(verbose_errors=False),
            log_level=0,
        )
        if matcher.is_error():
            message = matcher.get_error()
            if isinstance(spec, JsonSchema) and _SCHEMA_ERROR in message:
                # Without the grammar that is made of it.
                message = message.partition(_SCHEMA_ERROR)[2].partition("\n   1 | ")[0]
            raise ValueError(f"{field} can't be used: {message.strip()}")
        first = np.frombuffer(matcher.compute_bitmask(), np.uint32)
        if matcher.is_error() or not first.any():
            message = _error(matcher)
            nothing = not message or message.startswith("NoExtension")
            raise ValueError(f"{field} can't be used: {'nothing matches it' if nothing else message}")
        self._compiled[spec] = matcher
        if len(self._compiled) > _CACHED:
            self._compiled.popitem(last=False)
        return matcher

    def _indexed(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        vocabulary = _Vocabulary(self._tokenizer, self._vocab_size, special=self._special, end=self._end)
        return LLTokenizer(TokenizerWrapper(vocabulary))


class _Vocabulary:
    """The bytes of every token, as llguidance.TokenizerWrapper wants them. Raises ValueError for other tokenizers.

    Gemma's pieces are text with "▁" for a space, or one byte written `<0x0A>`. Ids without a piece have no bytes and
    are never allowed.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, *, special: Sequence[int], end: int) -> None:
        decoder = "" if tokenizer.decoder is None else tokenizer.decoder.__getstate__().decode()
        if not ("ByteFallback" in decoder and "▁" in json.dumps(json.loads(decoder), ensure_ascii=False)):
            raise ValueError("a grammar needs a tokenizer of Gemma's kind: pieces with ▁ for spaces, and byte fallback")
        added = tokenizer.get_added_tokens_decoder()
        self.eos_token_id = end
        self.bos_token_id = None
        self.tokens = [b""] * vocab_size
        self.special_token_ids = special
        for piece, i in tokenizer.get_vocab().items():
            if i >= vocab_size:
                raise ValueError(f"the tokenizer has id {i}, but the model's vocabulary ends at {vocab_size - 1}")
            byte = None if i in added else _BYTE_PIECE.fullmatch(piece)
            self.tokens[i] = bytes.fromhex(byte[1]) if byte else self._text(piece, literal=i in added)

    @staticmethod
    def _text(piece: str, *, literal: bool) -> bytes:
        return (piece if literal else piece.replace("▁", " ")).encode()

    def __call__(self, text: str) -> list[int]:
        """llguidance asks for spellings only where it forces them, which is off."""
        return []


@dataclass(frozen=True, kw_only=True)
class _Marks:
    """Ids of the marks around thoughts and turns, and of the one by which a prompt turns thinking on."""

    opens: int | None
    closes: int | None
    think: int | None
    turns: frozenset[int]

    @staticmethod
    def of(tokenizer: Any) -> _Marks:
        opens, closes, think, *turns = (
            tokenizer.token_to_id(name) for name in (_CHANNEL_OPEN, _CHANNEL_CLOSE, _THINK, *_TURN_MARKS)
        )
        return _Marks(opens=opens, closes=closes, think=think, turns=frozenset(t for t in turns if t is not None))

    def place_after(self, prompt: Sequence[int]) -> _Place:
        """Where an output behind `prompt` begins: in a thought, before one that may come, or in the answer."""
        for token in reversed(prompt):
            if token == self.opens:
                return _Place(thinking=True)
            if token == self.closes:
                return _Place()
            if token in self.turns:
                break
        return _Place(may_think=self.opens is not None and self.closes is not None and self.think in prompt)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where in an output one is. `may_think` only matters under a grammar, `spent` only with a budget."""

    thinking: bool = False
    may_think: bool = False
    ended: bool = False
    spent: int = 0


@dataclass(frozen=True, kw_only=True)
class _Rules:
    """What stays the same for one output: its marks and stop ids, its budget, and masks (words,) made of them."""

    marks: _Marks
    stops: frozenset[int]
    budget: int | None
    strict: bool  # whether a grammar governs the answer
    end: int
    anything: Mask
    thought: Mask
    answer: Mask
    stop_bits: Mask
    cleared: Mask
    close: Mask

    @staticmethod
    def of(marks: _Marks, vocab_size: int, stops: frozenset[int], budget: int | None, strict: bool, end: int) -> _Rules:
        words = -(-vocab_size // 32)
        anything = np.full(words, 0xFFFFFFFF, np.uint32)
        if vocab_size % 32:
            anything[-1] = (1 << vocab_size % 32) - 1
        # What ends a thought other than its closing mark would leave no room for the answer.
        kept_out = stops | marks.turns if strict else frozenset()
        return _Rules(
            marks=marks,
            stops=stops,
            budget=budget,
            strict=strict,
            end=end,
            anything=anything,
            thought=anything & ~_bits(kept_out - {marks.closes}, words),
            answer=anything & ~_bits(() if marks.opens is None else (marks.opens,), words),
            stop_bits=_bits(stops, words),
            cleared=~_bits(stops | {end}, words),
            close=_bits(() if marks.closes is None else (marks.closes,), words),
        )

    def spent(self, place: _Place) -> bool:
        """Whether no more thought tokens are left."""
        return self.budget is not None and place.spent >= self.budget

    def may_open(self, place: _Place) -> bool:
        """Whether the next token may open a thought."""
        return not self.spent(place) and (place.may_think or not self.strict)

    def after(self, place: _Place, token: int) -> tuple[_Place, bool]:
        """The place behind `token`, which is allowed at `place`, and whether the grammar has to consume it."""
        if place.ended:
            return place, False
        if self.strict and not place.thinking and token in self.stops:
            return replace(place, ended=True), False
        if place.thinking:
            if token == self.marks.closes or token in self.marks.turns:
                return replace(place, thinking=False), False
            return replace(place, spent=place.spent + 1), False
        if token == self.marks.opens and self.may_open(place):
            return replace(place, thinking=True, may_think=False), False
        return (replace(place, may_think=False) if place.may_think else place), self.strict


class Matcher:
    """The constraint of one output: a `sampling.Constraint`.

    Under a grammar, stop ids are allowed exactly where the answer is complete, and nothing else is allowed where it
    can't go on. Within the thought before it every token but stop ids and turn marks is allowed.
    """

    def __init__(self, rules: _Rules, place: _Place, grammar: LLMatcher | None) -> None:
        """`grammar` is at its start and is left there."""
        self._rules, self._place, self._grammar = rules, place, grammar
        self._matcher = None if grammar is None else grammar.deep_copy()
        self._answer: list[int] = []

    @property
    def complete(self) -> bool:
        """Whether the output may end here: always without a grammar."""
        if self._matcher is None or self._place.ended:
            return True
        return not self._place.thinking and self._matcher.is_accepting()

    def masks(self, drafts: Sequence[int]) -> Mask:
        """Allowed tokens before and after each of `drafts`: (len(drafts) + 1, words), bit t % 32 of word t // 32.

        Rows behind a forbidden draft allow everything. Changes nothing. Raises ConstraintError when no token could
        come next.
        """
        rules, place, consumed = self._rules, self._place, 0
        out = np.empty((len(drafts) + 1, rules.anything.size), np.uint32)
        for i, row in enumerate(out):
            self._fill(row, place)
            if i == 0 and not row.any():
                raise ConstraintError(f"the output can't go on under its constraint: {self._failure()}")
            if i == len(drafts):
                break
            draft = drafts[i]
            if not 0 <= draft < 32 * row.size or not row[draft >> 5] >> np.uint32(draft & 31) & np.uint32(1):
                out[i + 1 :] = rules.anything
                break
            place, consumes = rules.after(place, draft)
            if consumes and self._matcher is not None:
                self._matcher.consume_token(draft)
                consumed += 1
        if self._matcher is not None and (self._matcher.is_error() or not self._matcher.rollback(consumed)):
            self._restart()
        return out

    def advance(self, tokens: Sequence[int]) -> None:
        """Note the tokens that the output was given. Raises ConstraintError at one that was not allowed."""
        for token in tokens:
            place, consumes = self._rules.after(self._place, token)
            allowed = self._allows(token) and (
                not consumes or self._matcher is None or self._matcher.consume_token(token)
            )
            if not allowed:
                raise ConstraintError(f"token {token} is not allowed by the constraint: {self._failure()}")
            if consumes:
                self._answer.append(token)
            self._place = place

    def _allows(self, token: int) -> bool:
        """Whether `token` may come next, as far as the grammar doesn't say itself when it consumes it."""
        rules, place = self._rules, self._place
        if place.thinking:
            mask = rules.close if rules.spent(place) else rules.thought
            return bool(mask[token >> 5] >> np.uint32(token & 31) & np.uint32(1))
        if rules.strict and token in rules.stops:
            return self.complete
        if not rules.strict:
            return token != rules.marks.opens or rules.may_open(place)
        return not place.ended

    def _fill(self, row: Mask, place: _Place) -> None:
        """Write the mask of what may come at `place`, to which the grammar's matcher has been moved."""
        rules = self._rules
        if place.thinking:
            row[:] = rules.close if rules.spent(place) else rules.thought
        elif self._matcher is None:
            row[:] = rules.anything if rules.may_open(place) else rules.answer
        elif place.ended:
            row[:] = rules.stop_bits
        else:
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            if self._matcher.is_error():
                row[:] = 0
                return
            complete = row[rules.end >> 5] >> np.uint32(rules.end & 31) & np.uint32(1)
            row &= rules.cleared
            if complete:
                row |= rules.stop_bits
            if rules.may_open(place) and rules.marks.opens is not None:
                row[rules.marks.opens >> 5] |= np.uint32(1 << (rules.marks.opens & 31))

    def _restart(self) -> None:
        """Go back to the answer so far, after llguidance met a limit behind a draft: it can't roll that back."""
        assert self._grammar is not None
        self._matcher = self._grammar.deep_copy()
        self._matcher.consume_tokens(self._answer)

    def _failure(self) -> str:
        return ("" if self._matcher is None else _error(self._matcher)) or "nothing else fits"


def _parts(spec: object) -> tuple[Grammar | None, int | None]:
    """The grammar and the thinking budget of a specification."""
    if isinstance(spec, Both):
        return spec.grammar, spec.budget.tokens
    if isinstance(spec, ThinkingBudget):
        return None, spec.tokens
    if isinstance(spec, Grammar):
        return spec, None
    raise ValueError(f"constraint is {_shown(spec)}, expected JsonSchema, Regex, Lark, ThinkingBudget or Both")


def _check_schema(root: Mapping[str, Any]) -> None:
    """Refuse keywords that llguidance would pass over or couldn't keep: it takes an unknown one for an annotation."""
    controls = _controls(root)
    for where, schema in _subschemas(root):
        for key in schema:
            if key not in _KEYWORDS:
                raise ValueError(f"schema: the keyword {key!r} at {where} can't be enforced")
        least, required = schema.get("minProperties", 0), schema.get("required", [])
        # Additional names may repeat, and repeated names are one property.
        if isinstance(least, int) and isinstance(required, list) and least > max(1, len(required)):
            expected = "at most 1, or as many as are required"
            raise ValueError(f"schema: minProperties {least} at {where} can't be enforced, expected {expected}")
        named = schema.get("properties") or schema.get("patternProperties")
        if controls and named and schema.get("additionalProperties") is not False:
            raise ValueError(
                f"schema: the names of additional properties at {where} can't be enforced in a schema with control "
                "characters, expected additionalProperties false"
            )


def _controls(root: Mapping[str, Any]) -> bool:
    """Whether a schema asks for control characters that only a \\u escape can spell."""
    if "\\u00" in json.dumps(root, ensure_ascii=False):
        return True
    patterns = (p for _, s in _subschemas(root) for p in (s.get("pattern"), *_names(s.get("patternProperties"))))
    return any(isinstance(p, str) and _CONTROL_ESCAPE.search(p) for p in patterns)


def _names(value: object) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def _subschemas(root: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A schema and all within it that are objects, with their places."""
    todo: list[tuple[str, object]] = [("#", root)]
    while todo:
        where, schema = todo.pop()
        if not isinstance(schema, dict):
            continue  # true, false, or what llguidance refuses
        yield where, schema
        for key, value in schema.items():
            at = f"{where}/{key}"
            if key in _SCHEMA_MAPS and isinstance(value, dict):
                todo += [(f"{at}/{name}", part) for name, part in value.items()]
            elif isinstance(value, list) and (key in _SCHEMA_LISTS or key == "items"):
                todo += [(f"{at}/{i}", part) for i, part in enumerate(value)]
            elif key in _SCHEMAS:
                todo.append((at, value))


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is {_shown(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is no valid Unicode: a lone surrogate at {error.start}") from error


def _bits(tokens: Collection[int | None], words: int) -> Mask:
    """A mask (words,) that allows `tokens` alone."""
    mask = np.zeros(words, np.uint32)
    for token in tokens:
        if token is not None:
            mask[token >> 5] |= np.uint32(1 << (token & 31))
    return mask


def _error(matcher: LLMatcher) -> str:
    """llguidance's message; empty where there is no error."""
    return matcher.get_error().removesuffix("<non-verbose/>").strip()


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
