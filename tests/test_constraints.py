"""Constraints against the demo tokenizer: masks of whole blocks, 200 JSON schemas, thoughts before answers."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from mlx_gemma_mtp.constraints import (
    Both,
    Grammars,
    JsonSchema,
    Lark,
    Mask,
    Matcher,
    Regex,
    Spec,
    ThinkingBudget,
)
from mlx_gemma_mtp.loading import load_pair
from mlx_gemma_mtp.request import ConstraintError, Request, SamplingParams
from mlx_gemma_mtp.runtime import Runtime
from mlx_gemma_mtp.text import TextCodec

from .cases import LONG

DEMO = Path(__file__).parents[1] / "mlx_gemma_mtp" / "demo"
PADDING = 13
"""Rows of the fake model's vocabulary that the tokenizer doesn't know."""

Json = dict[str, Any]


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    found = TextCodec.from_directory(DEMO)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def vocab(codec: TextCodec) -> int:
    size: int = codec._tokenizer.backend_tokenizer.get_vocab_size()
    return size + PADDING


@pytest.fixture(scope="module")
def grammars(codec: TextCodec, vocab: int) -> Grammars:
    return Grammars(codec, vocab)


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime(load_pair("demo"), compiled=False)


@pytest.fixture(scope="module")
def ids(codec: TextCodec) -> dict[str, int]:
    names = ("<|channel>", "<channel|>", "<|think|>", "<|turn>", "<turn|>", "<eos>")
    return {name: codec._tokenizer.convert_tokens_to_ids(name) for name in names}


def tokens_of(row: Mask) -> list[int]:
    bits = np.unpackbits(np.ascontiguousarray(row).view(np.uint8), bitorder="little")
    return [int(t) for t in np.flatnonzero(bits)]


def has(row: Mask, token: int) -> bool:
    return bool(int(row[token >> 5]) >> (token & 31) & 1)


def spelled(codec: TextCodec, text: str) -> list[int]:
    found: list[int] = codec._tokenizer.encode(text, add_special_tokens=False)
    return found


def in_bytes(codec: TextCodec, text: str) -> list[int]:
    return [codec._tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in text.encode()]


def accepts(matcher: Matcher, tokens: Sequence[int]) -> bool:
    for token in tokens:
        if token not in tokens_of(matcher.masks([])[0]):
            return False
        matcher.advance([token])
    return matcher.complete


@dataclass(frozen=True)
class Ids:
    """Tokens by use: `stops` end an output, `closers` end a string, list or object."""

    stops: frozenset[int]
    closers: list[int]
    vocab: int


class TestSchemas:
    """Random schemas, each driven by a fake decode loop with blocks of drafts."""

    @pytest.mark.parametrize("group", range(10))
    def test_outputs_are_valid_and_blocks_exact(
        self, group: int, grammars: Grammars, codec: TextCodec, vocab: int
    ) -> None:
        ids = Ids(codec.stop_ids, [t for c in '"]}' for t in spelled(codec, c)], vocab)
        for seed in range(group * 20, group * 20 + 20):
            schema = random_schema(seed)
            spec = JsonSchema(schema, compact=seed % 3 == 0)
            text = codec.decode(decode_at_random(grammars, spec, ids, seed))
            problems = list(Draft202012Validator(schema).iter_errors(json.loads(text)))
            assert not problems, (seed, schema, text, problems[0].message)
            if spec.compact:
                whole = json.loads(text)
                assert text == json.dumps(whole, ensure_ascii=False, separators=(",", ":")) or _has_floats(whole)


def decode_at_random(grammars: Grammars, spec: Spec, ids: Ids, seed: int) -> list[int]:
    """A finished output of random allowed tokens, given in blocks; checks every mask on the way."""
    rng = np.random.default_rng(seed)
    matcher, output = grammars.start(spec), list[int]()
    while len(output) < 1000:
        reference = grammars.start(spec)
        reference.advance(output)
        drafts, rows = random_drafts(reference, rng, ids)
        block = matcher.masks(drafts)
        assert block.dtype == np.uint32
        assert block.shape == (len(drafts) + 1, -(-ids.vocab // 32))
        assert (block[: len(rows)] == rows).all()
        assert (matcher.masks(drafts) == block).all()  # nothing has changed
        given = list[int]()
        for i, row in enumerate(rows):
            follow = i < len(drafts) and i + 1 < len(rows) and rng.random() < 0.7
            token = drafts[i] if follow else pick(row, rng, ids)
            if token in ids.stops:
                matcher.advance(given)
                assert matcher.complete
                return output + given
            given.append(token)
            if not follow:
                break
        output += given
        matcher.advance(given)
    raise AssertionError(f"no end after {len(output)} tokens: {spec}")


def random_drafts(reference: Matcher, rng: np.random.Generator, ids: Ids) -> tuple[list[int], list[Mask]]:
    """Drafts, a few of them forbidden, and the masks up to the first such, made by advancing token by token."""
    drafts, rows = list[int](), [reference.masks([])[0]]
    assert {has(rows[0], t) for t in ids.stops} == {reference.complete}
    for _ in range(rng.integers(0, 6)):
        draft = int(rng.integers(0, ids.vocab)) if rng.random() < 0.1 else pick(rows[-1], rng, ids)
        drafts.append(draft)
        if not has(rows[-1], draft) or draft in ids.stops:
            drafts += [int(t) for t in rng.integers(0, ids.vocab, 2)]
            break
        reference.advance([draft])
        rows.append(reference.masks([])[0])
    return drafts, rows


def pick(row: Mask, rng: np.random.Generator, ids: Ids) -> int:
    """A random allowed token; those that bring the end nearer are likelier."""
    for likely, tokens in ((0.5, ids.stops), (0.3, ids.closers)):
        found = [t for t in tokens if has(row, t)]
        if found and rng.random() < likely:
            return found[rng.integers(len(found))]
    allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
    return int(allowed[rng.integers(len(allowed))])


def _has_floats(value: object) -> bool:
    if isinstance(value, dict | list):
        return any(_has_floats(v) for v in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) or value == 0


NAMES = ("a", "name", "id", "unit price", "größe", 'say "x"', "tags", "b_1", "<turn|>")
PATTERNS = ("^[a-z]{2,5}$", "^[A-Z][a-z]?[0-9]{2}$", "^(red|green|blue)$", "^#[0-9a-f]{6}$", "^[^a-z ]{1,3}$", "^é+$")


class Dice(random.Random):
    """Random numbers; `small`: every value of a schema is short, however a model goes on."""

    small = False


def random_schema(seed: int, *, small: bool = False) -> Json:
    """A satisfiable schema."""
    rng = Dice(seed)
    rng.small = small
    schema = _object(rng, 1 if small else 2) if rng.random() < 0.7 else _any(rng, 2 if small else 3)
    if rng.random() < 0.2:
        schema = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "T",
            "$defs": {"part": schema, "flag": {"type": "boolean"}},
            "type": "object",
            "properties": {"one": {"$ref": "#/$defs/part"}, "on": {"$ref": "#/$defs/flag"}},
            "required": ["one"],
            "additionalProperties": False,
        }
    return schema


def _any(rng: Dice, depth: int) -> Json:
    makers = [_string, _string, _number, _number, _literal]
    makers += [partial(m, depth=depth - 1) for m in (_object, _map, _array, _array, _choice)] if depth > 0 else []
    return rng.choice(makers)(rng)


def _object(rng: Dice, depth: int) -> Json:
    names = rng.sample(NAMES, rng.randint(1, 3 if rng.small else 4))
    schema: Json = {"type": "object", "properties": {n: _any(rng, depth) for n in names}}
    required = [n for n in names if rng.random() < 0.6]
    if required or rng.random() < 0.5:
        schema["required"] = required
    if rng.random() < 0.8 or rng.small:
        schema["additionalProperties"] = False
    elif rng.random() < 0.5:
        schema["additionalProperties"] = _number(rng)
    if rng.random() < 0.15:
        return {"allOf": [schema, {"properties": {names[0]: True}, "required": [names[0]]}]}
    return schema


def _map(rng: Dice, depth: int) -> Json:
    most = rng.randint(1, 3)
    if rng.random() < 0.5 and not rng.small:
        return {"type": "object", "additionalProperties": _any(rng, depth), "minProperties": 1, "maxProperties": most}
    names = {"^x_[a-z]{1,3}$": _any(rng, depth), "^[0-9]{1,2}$": _number(rng)}
    return {"type": "object", "patternProperties": names, "additionalProperties": False, "maxProperties": most}


def _array(rng: Dice, depth: int) -> Json:
    least = rng.randint(0, 2)
    schema: Json = {
        "type": "array",
        "items": _any(rng, depth),
        "minItems": least,
        "maxItems": least + rng.randint(0, 2),
    }
    if rng.random() < 0.2:
        schema = {"type": "array", "prefixItems": [_any(rng, depth), _number(rng)], "items": False, "minItems": 1}
    return schema


def _choice(rng: Dice, depth: int) -> Json:
    options = [_any(rng, depth) for _ in range(rng.randint(2, 3))]
    if rng.random() < 0.2:
        return {"oneOf": [{"type": "null"}, _string(rng), _map(rng, 0)]}
    return {"anyOf": options}


def _string(rng: Dice) -> Json:
    kind = rng.random()
    if kind < 0.4:
        return {"type": "string", "pattern": rng.choice(PATTERNS), "maxLength": 9}
    if kind < 0.5:
        return {
            "type": "string",
            "format": rng.choice(["date", "ipv4"] if rng.small else ["date", "time", "ipv4", "uuid"]),
        }
    least = rng.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}


def _number(rng: Dice) -> Json:
    low = rng.randint(-300, 300)
    kind = rng.random()
    if kind < 0.3:
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
    if kind < 0.5:
        return {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + rng.randint(2, 50)}
    if kind < 0.6:
        return {"type": "integer", "multipleOf": rng.choice([2, 3, 7]), "minimum": 0, "maximum": 99}
    if rng.small:
        return {"type": "number", "enum": [low, low / 4, 0.5]}
    if kind < 0.9:
        return {"type": "number", "minimum": low / 4, "exclusiveMaximum": low / 4 + 10}
    return {"type": ["integer", "null"]}


def _literal(rng: Dice) -> Json:
    values: list[object] = [
        True,
        None,
        3,
        -1.5,
        "",
        "naïve ☃",
        'a"\\b\n',
        "<turn|> <|channel>",
        [1, "x"],
        {"k": [None]},
    ]
    if rng.random() < 0.4:
        return {"const": rng.choice(values)}
    if rng.random() < 0.2:
        return {"type": rng.choice(["boolean", "null"])}
    return {"enum": rng.sample(values, rng.randint(1, 4))}


class TestDecoding:
    """The demo pair under constraints."""

    @pytest.mark.parametrize("group", [0, *(pytest.param(g, marks=LONG) for g in range(1, 5))])
    def test_drafts_change_nothing(self, runtime: Runtime, group: int) -> None:
        """40 schemas (of 200), greedy: all outputs valid, and those of depth 4 are those of depth 0."""
        seeds = range(1000 + group * 40, 1000 + group * 40 + 40)
        schemas = [random_schema(seed, small=True) for seed in seeds]
        sampling = [SamplingParams(constraint=JsonSchema(s, compact=True)) for s in schemas]
        prompts = [f"Write the record of {seed} as JSON." for seed in seeds]
        plain, drafted = (
            runtime.generate_batch(prompts, max_tokens=100, sampling=sampling, depth=depth, max_batch=20)
            for depth in (0, 4)
        )
        for schema, one, other in zip(schemas, plain, drafted, strict=True):
            assert one.tokens == other.tokens
            assert one.finish_reason == other.finish_reason == "stop", (schema, one.text)
            problems = list(Draft202012Validator(schema).iter_errors(json.loads(one.text)))
            assert not problems, (schema, one.text, problems[0].message)
        assert sum(g.stats.accepted for g in drafted) > 0

    def test_sampled_rows_and_thoughts(self, runtime: Runtime, ids: dict[str, int]) -> None:
        """Seeded rows equal plain decoding's under a constraint too, and unseeded ones obey it."""
        spec = JsonSchema(random_schema(1003, small=True), compact=True)
        both = Both(Regex("[a-z]{2,6}"), ThinkingBudget(5))
        params = [
            SamplingParams(temperature=1.0, seed=3, constraint=spec),
            SamplingParams(temperature=1.5, seed=4, top_k=40, constraint=both),
            SamplingParams(temperature=1.0, constraint=spec),
            SamplingParams(temperature=1.0, seed=5),
        ]
        assert runtime.text is not None
        prompt = runtime.text.render([{"role": "user", "content": "Think first."}], thinking=True)
        opened = [*prompt, ids["<|channel>"]]
        plain, drafted = (
            runtime.generate_batch([prompt, opened, prompt, prompt], max_tokens=60, sampling=params, depth=depth)
            for depth in (0, 4)
        )
        for i in (0, 1, 3):
            assert plain[i].tokens == drafted[i].tokens
        for output in (plain[1], drafted[1]):
            assert ids["<channel|>"] in output.tokens[:6]
            assert re.fullmatch("[a-z]{2,6}", output.text)


class TestText:
    """That tokens stand for the right bytes."""

    @pytest.mark.parametrize("text", ["a b", "é☃ x", "<turn|>", "line\n", "  two  spaces", "\u0001"])
    def test_a_literal_can_be_spelled_in_pieces_and_in_bytes(
        self, grammars: Grammars, codec: TextCodec, text: str
    ) -> None:
        spec = JsonSchema({"const": text})
        written = json.dumps(text, ensure_ascii=False)
        assert accepts(grammars.start(spec), in_bytes(codec, written))
        if "<" not in text:
            assert accepts(grammars.start(spec), spelled(codec, written))

    def test_special_tokens_are_no_text(self, grammars: Grammars, ids: dict[str, int], codec: TextCodec) -> None:
        for spec in (Regex(r"(.|\n)*"), JsonSchema({"const": "<turn|>"})):
            row = grammars.start(spec).masks(in_bytes(codec, '"'))[-1]
            assert ids["<|channel>"] not in tokens_of(row)
        assert ids["<turn|>"] not in tokens_of(row)

    def test_a_lark_grammar_can_name_special_tokens(self, grammars: Grammars, codec: TextCodec) -> None:
        matcher = grammars.start(Lark('start: <|tool_call> "x" | "y"'))
        assert accepts(matcher, [codec._tokenizer.convert_tokens_to_ids("<|tool_call>"), *in_bytes(codec, "x")])

    def test_ids_without_a_piece_are_never_allowed(self, grammars: Grammars, vocab: int) -> None:
        row = grammars.start(Regex(r"(.|\n)*")).masks([])[0]
        assert max(tokens_of(row)) < vocab - PADDING
        anything = grammars.start(ThinkingBudget(3)).masks([])[0]
        assert tokens_of(anything) == list(range(vocab))

    def test_stop_ids_that_are_text_only_end(self, grammars: Grammars, codec: TextCodec) -> None:
        (five,) = spelled(codec, "5")
        matcher = grammars.start(Regex("[0-9]{3}"), stop_ids={five})
        one = spelled(codec, "1")
        masks = matcher.masks(one * 3)
        assert [five in tokens_of(row) for row in masks] == [False, False, False, True]
        assert tokens_of(masks[-1]) == [five]

    def test_nothing_but_stop_ids_after_one(self, grammars: Grammars, codec: TextCodec, ids: dict[str, int]) -> None:
        matcher = grammars.start(Regex("a+"))
        matcher.advance([*spelled(codec, "a"), ids["<turn|>"]])
        assert set(tokens_of(matcher.masks([])[0])) == codec.stop_ids
        assert matcher.complete


class TestThinking:
    """Thoughts before a constrained answer, and their budget."""

    @pytest.mark.parametrize("budget", [0, 1, 4])
    def test_a_budget_closes_the_thought(
        self, grammars: Grammars, ids: dict[str, int], vocab: int, budget: int
    ) -> None:
        opens, closes, word = ids["<|channel>"], ids["<channel|>"], 300
        matcher = grammars.start(ThinkingBudget(budget))
        everything = list(range(vocab))
        without = [t for t in everything if t != opens]
        if budget == 0:
            assert tokens_of(matcher.masks([])[0]) == without
            return
        chain = [word, opens, *[word] * budget, closes, word]
        expected = [everything] * (2 + budget) + [[closes], without, without]
        assert [tokens_of(row) for row in matcher.masks(chain)] == expected
        for token, row in zip(chain, expected[:-1], strict=True):
            assert tokens_of(matcher.masks([])[0]) == row
            matcher.advance([token])

    def test_thoughts_share_a_budget(self, grammars: Grammars, ids: dict[str, int]) -> None:
        opens, closes = ids["<|channel>"], ids["<channel|>"]
        chain = [opens, 300, 300, closes, 300, opens, 300]
        assert tokens_of(grammars.start(ThinkingBudget(3)).masks(chain)[-1]) == [closes]

    def test_a_turn_mark_ends_a_thought(self, grammars: Grammars, ids: dict[str, int]) -> None:
        chain = [ids["<|channel>"], 300, ids["<|turn>"], 300, 300]
        assert 300 in tokens_of(grammars.start(ThinkingBudget(2)).masks(chain)[-1])

    def test_a_thought_left_open_by_the_prompt(self, grammars: Grammars, ids: dict[str, int]) -> None:
        prompt = [2, ids["<|turn>"], 300, ids["<|channel>"], 300, 300, 300]
        matcher = grammars.start(ThinkingBudget(1), prompt=prompt)
        first, second = matcher.masks([300])
        assert 300 in tokens_of(first)
        assert tokens_of(second) == [ids["<channel|>"]]

    def test_a_grammar_governs_the_answer_only(self, grammars: Grammars, ids: dict[str, int], codec: TextCodec) -> None:
        opens, closes = ids["<|channel>"], ids["<channel|>"]
        prompt = [2, ids["<|turn>"], ids["<|think|>"], ids["<turn|>"], ids["<|turn>"], 300]
        spec = Regex("[0-9]{2}")
        answer = grammars.start(spec).masks(spelled(codec, "7"))
        matcher = grammars.start(spec, prompt=prompt)
        chain = [opens, 300, closes, *spelled(codec, "7")]
        rows = matcher.masks(chain)
        assert set(tokens_of(rows[0])) == {*tokens_of(answer[0]), opens}
        for row in rows[1:3]:
            assert set(range(len(row) * 32)) - set(tokens_of(row)) >= codec.stop_ids | {ids["<|turn>"]}
            assert {closes, 300} <= set(tokens_of(row))
        np.testing.assert_array_equal(rows[3:], answer)
        matcher.advance(chain[:1])
        assert not matcher.complete
        matcher.advance(chain[1:])
        np.testing.assert_array_equal(matcher.masks([])[0], answer[1])
        # Once the answer has begun, or without thinking, no thought may open.
        begun = grammars.start(spec, prompt=prompt)
        begun.advance(spelled(codec, "7"))
        np.testing.assert_array_equal(begun.masks([])[0], answer[1])
        for tail in ([ids["<|channel>"], 300, closes], [2]):
            done = grammars.start(spec, prompt=[*(prompt if len(tail) > 1 else []), *tail])
            np.testing.assert_array_equal(done.masks([])[0], answer[0])

    def test_a_grammar_and_a_budget(self, grammars: Grammars, ids: dict[str, int], codec: TextCodec) -> None:
        opens, closes = ids["<|channel>"], ids["<channel|>"]
        prompt = [ids["<|think|>"], ids["<|turn>"]]
        spec = Regex("[0-9]{2}")
        answer = grammars.start(spec).masks([])[0]
        rows = grammars.start(Both(spec, ThinkingBudget(2)), prompt=prompt).masks([opens, 300, 300, closes])
        assert opens in tokens_of(rows[0])
        assert len(tokens_of(rows[2])) > 1
        assert tokens_of(rows[3]) == [closes]
        np.testing.assert_array_equal(rows[4], answer)
        none_left = grammars.start(Both(spec, ThinkingBudget(0)), prompt=prompt).masks([])[0]
        np.testing.assert_array_equal(none_left, answer)


class TestRefusals:
    """What can't be enforced is named."""

    @pytest.mark.parametrize(
        ("schema", "message"),
        [
            ("{", "schema is no JSON"),
            ("[]", "expected a JSON object"),
            ({"enum": [float("nan")]}, "schema is no JSON"),
            ({"enum": ["\ud800"]}, "schema is no valid Unicode"),
            ({"type": "string", "minLenght": 3}, "the keyword 'minLenght' at #"),
            ({"properties": {"a": {"items": {"not": {}}}}}, "the keyword 'not' at #/properties/a/items"),
            ({"anyOf": [{}, {"uniqueItems": True}]}, "the keyword 'uniqueItems' at #/anyOf/1"),
            ({"type": "object", "minProperties": 2}, "minProperties 2 at #"),
            ({"properties": {"\u0001": {}}}, "control characters"),
            ({"x-guidance": {"lenient": True}}, "the keyword 'x-guidance'"),
        ],
    )
    def test_schemas_at_once(self, schema: Json | str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            JsonSchema(schema)

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            (JsonSchema({"type": "strin"}), "schema can't be used: Invalid type: strin"),
            (JsonSchema({"oneOf": [{"type": "number"}, {"type": "integer"}]}), "oneOf constraints are not supported"),
            (JsonSchema({"format": "poem", "type": "string"}), "schema can't be used: Unknown format: poem"),
            (JsonSchema({"$ref": "https://x.org/y"}), "schema can't be used: Resource"),
            (JsonSchema({"type": "integer", "minimum": 2, "maximum": 1}), "Unsatisfiable"),
            (Regex("a("), "pattern can't be used: .*unclosed group"),
            (Regex("(?=a)b"), "pattern can't be used: .*look-around"),
            (Regex(r"[^\s\S]"), "pattern can't be used: nothing matches it"),
            (Lark("start: x"), "grammar can't be used: .*unknown name"),
            (Lark("begin: /x/"), "grammar can't be used: no start rule found"),
            (None, "constraint is None, expected JsonSchema"),
            ({"type": "object"}, "constraint is {'type': 'object'}, expected JsonSchema"),
        ],
    )
    def test_what_llguidance_refuses(self, grammars: Grammars, spec: object, message: str) -> None:
        with pytest.raises(ValueError, match=f"(?s){message}"):
            grammars.start(spec)

    def test_values(self, grammars: Grammars) -> None:
        for make, message in (
            (lambda: Regex(""), "pattern is '', expected text"),
            (lambda: ThinkingBudget(-1), "tokens is -1"),
            (lambda: Both(Regex("a"), Regex("b")), "budget is Regex"),  # type: ignore[arg-type]
            (lambda: Both(ThinkingBudget(1), ThinkingBudget(1)), "grammar is ThinkingBudget"),  # type: ignore[arg-type]
            (lambda: grammars.start(Regex("a"), stop_ids=()), "stop_ids is empty"),
            (lambda: grammars.start(Regex("a"), stop_ids=(10**6,)), "stop_ids has 1000000"),
        ):
            with pytest.raises(ValueError, match=message):
                make()

    def test_requests(self, grammars: Grammars, codec: TextCodec) -> None:
        def ask(**fields: Any) -> Matcher | None:
            sampling = SamplingParams(**fields)
            return grammars.of_request(Request(prompt=[2], sampling=sampling, stop_ids=codec.stop_ids))

        assert ask() is None
        assert ask(constraint=ThinkingBudget(3), min_tokens=2) is not None
        assert ask(constraint=Regex("a")) is not None
        with pytest.raises(ValueError, match="min_tokens is 2, expected 0 with a grammar"):
            ask(constraint=Regex("a"), min_tokens=2)

    def test_other_tokenizers(self) -> None:
        from tokenizers import Tokenizer, decoders, models

        bare = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
        bare.decoder = decoders.ByteLevel()
        codec: Any = SimpleNamespace(_tokenizer=SimpleNamespace(backend_tokenizer=bare), stop_ids=frozenset({0}))
        made = Grammars(codec, 1)
        with pytest.raises(ValueError, match="a tokenizer of Gemma's kind"):
            made.start(Regex("a"))
        with pytest.raises(ValueError, match="no thoughts to limit"):
            made.start(ThinkingBudget(3))

    def test_a_vocabulary_smaller_than_the_tokenizers(self, codec: TextCodec, vocab: int) -> None:
        with pytest.raises(ValueError, match=f"vocabulary ends at {vocab - PADDING - 2}"):
            Grammars(codec, vocab - PADDING - 1).start(Regex("a"))

    def test_a_token_that_is_not_allowed(self, grammars: Grammars, codec: TextCodec, ids: dict[str, int]) -> None:
        for spec, token in (
            (Regex("[0-9]+"), spelled(codec, "x")[0]),
            (Regex("[0-9]+"), ids["<turn|>"]),
            (ThinkingBudget(0), ids["<|channel>"]),
        ):
            with pytest.raises(ConstraintError, match=f"token {token} is not allowed"):
                grammars.start(spec).advance([token])


class TestState:
    """Specifications are values; matchers are independent."""

    def test_specifications(self) -> None:
        schema = {"type": "object", "properties": {"b": {}, "a": {}}}
        spec = JsonSchema(schema)
        schema["type"] = "array"
        assert spec == JsonSchema('{"type": "object",\n"properties": {"b": {}, "a": {}}}')
        assert spec != JsonSchema({"type": "object", "properties": {"a": {}, "b": {}}})  # their order counts
        assert len({spec, JsonSchema(spec.schema), Regex("a"), Regex("a"), Lark("start: /a/")}) == 3

    def test_matchers_of_one_specification(self, grammars: Grammars, codec: TextCodec) -> None:
        one, other = grammars.start(Regex("ab")), grammars.start(Regex("ab"))
        one.advance(spelled(codec, "a"))
        assert tokens_of(other.masks([])[0]) == tokens_of(grammars.start(Regex("ab")).masks([])[0])
        assert tokens_of(one.masks([])[0]) != tokens_of(other.masks([])[0])

    def test_a_limit_behind_a_draft_costs_nothing(
        self, codec: TextCodec, vocab: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import llguidance

        monkeypatch.setattr(llguidance, "LLParserLimits", partial(llguidance.LLParserLimits, max_items_in_row=60))
        limited, spec = Grammars(codec, vocab), Lark('start: "☃" many | "a"\nmany: ' + ambiguous())
        snow, (a,) = in_bytes(codec, "☃"), spelled(codec, "a")
        matcher = limited.start(spec)
        before = matcher.masks([])
        rows = matcher.masks([*snow, a])
        assert [bool(row.any()) for row in rows[:4]] == [True, True, True, False]
        assert (matcher.masks([]) == before).all()
        matcher.advance([a])
        assert matcher.complete
        stuck = limited.start(spec)
        with pytest.raises(ConstraintError, match=r"token|can't go on"):
            play(stuck, snow)


def play(matcher: Matcher, tokens: Sequence[int]) -> None:
    for token in tokens:
        matcher.advance([token])
    matcher.masks([])


def ambiguous() -> str:
    """Many rules that are open at once."""
    names = [f"n{i}" for i in range(80)]
    return " | ".join(names) + "\n" + "\n".join(f'{n}: "x" {n} "{i}" | "y{i}"' for i, n in enumerate(names))
