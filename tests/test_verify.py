"""`verify`: healthy pairs are equal, a broken one is a bug with its position, and what is told of it where."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from typer.testing import CliRunner, Result

from mlx_gemma_mtp import Runtime, SamplingParams
from mlx_gemma_mtp.cli import app
from mlx_gemma_mtp.constraints import Both, JsonSchema, Regex, ThinkingBudget
from mlx_gemma_mtp.loading import load_pair
from mlx_gemma_mtp.request import FinishReason
from mlx_gemma_mtp.sampling import History
from mlx_gemma_mtp.verify import (
    Case,
    CaseError,
    CaseReport,
    Check,
    Difference,
    Limits,
    Report,
    built_in_cases,
    read_cases,
    verify,
    worst,
)
from mlx_gemma_mtp.verify.check import Pair
from mlx_gemma_mtp.verify.judge import Choice, rounding
from mlx_gemma_mtp.verify.peer import MlxLm, MlxLmError
from mlx_gemma_mtp.verify.report import Output
from mlx_gemma_mtp.verify_cli import differences, page, parse_depths, sentence
from mlx_gemma_mtp.views import BlockView

from .tiny import Kind, write_pair

LIMITS = Limits(vocab_size=512, max_positions=4096, max_tokens=16)


def make(path: Path, kind: Kind, *, drafter: str | None = "auto") -> Runtime:
    write_pair(path, kind, seed=3)
    return Runtime(load_pair(str(path), drafter=drafter, dtype="float32"), compiled=False)


@pytest.fixture(scope="module")
def demo() -> Runtime:
    return Runtime(load_pair("demo", dtype="float32"), compiled=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return make(tmp_path_factory.mktemp("unified"), "unified")


def cases(*lines: dict[str, Any], limits: Limits = LIMITS) -> list[Case]:
    return read_cases([json.dumps(line) for line in lines], None, limits)


SOME = (
    {"id": "greedy", "tokens": [5, 9, 11, 30], "ignore_eos": True},
    {"id": "warm", "tokens": list(range(20, 45)), "temperature": 0.9, "top_k": 40, "seed": 3, "max_tokens": 9},
    {"id": "edited", "tokens": [7], "temperature": 1.2, "top_p": 0.9, "repetition_penalty": 1.3, "min_tokens": 4},
)


class ShiftedView(BlockView):
    """Writes the K/V of a block, longer than a single step, one place too far on."""

    def attend(self, slot: int, q: mx.array, kv: tuple[mx.array, mx.array] | None = None) -> mx.array:
        if kv is not None and self.block > 1:
            keys, values = (mx.concatenate([x[:, :, -1:], x[:, :, :-1]], axis=2) for x in kv)
            kv = keys, values
        return super().attend(slot, q, kv)


class TestPairs:
    @pytest.mark.parametrize("kind", ["dense", "moe", "edge", "edge2", "unified", "text"])
    def test_tiny_pairs_are_equal(self, tmp_path: Path, kind: Kind) -> None:
        report = verify(make(tmp_path, kind), cases(*SOME), depths=[1, 4])
        assert report.verdict == "equal", list(map(sentence, (c for _, c in differences(report))))
        assert report.mlx_lm_verdict in ("equal", "near-tie")
        assert report.passed()
        assert [(s.way, s.depth) for s in report.speculation] == [
            ("alone", 1), ("batch", 1), ("alone", 4), ("batch", 4)
        ]  # fmt: skip
        assert all(s.stats.accepted > 0 for s in report.speculation)

    def test_the_demo_pair_is_equal(self, demo: Runtime) -> None:
        chosen = built_in_cases(demo.text, Limits.of(demo, 8))
        assert len(chosen) >= 12
        told: list[tuple[str, float]] = []
        report = verify(demo, chosen[:2] + chosen[7:10], depths=[3], progress=lambda *x: told.append(x))
        assert report.verdict == report.mlx_lm_verdict == "equal"
        shares = [share for _, share in told]
        assert shares == sorted(shares)
        assert 0 < shares[0] < shares[-1] < 1

    def test_constraints_choices_and_stop_strings_are_verified(self, demo: Runtime) -> None:
        schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
        lines = [
            {"prompt": "As JSON, please.", "temperature": 0.8, "response_format": {"type": "json_object"}},
            {"prompt": "As JSON.", "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
            {"prompt": "Tell a story.", "stop": [" the", "."], "ignore_eos": True},
            {"prompt": "Say something.", "temperature": 1.0, "n": 2, "logprobs": True},
        ]
        chosen = read_cases(map(json.dumps, lines), demo.text, Limits.of(demo, 24))
        report = verify(demo, chosen, depths=[2, 5], mlx_lm=False)
        assert report.verdict == "equal", list(map(sentence, (c for _, c in differences(report))))
        stopped, first, second = report.cases[2].plain, *(entry.plain for entry in report.cases[3:])
        assert (stopped.finish_reason, len(stopped.tokens) < 24) == ("stop", True)
        assert first.tokens != second.tokens
        assert json.loads(json.dumps(report.to_dict()))["requests"][2]["stop"] == [" the", "."]

    def test_a_constraint_that_cant_be_kept_names_its_request(self, demo: Runtime) -> None:
        chosen = read_cases(['{"id": "bad", "prompt": "x", "regex": "("}'], demo.text, Limits.of(demo, 8))
        with pytest.raises(CaseError, match="request bad: pattern can't be used"):
            verify(demo, chosen, depths=[1])

    def test_a_constraint_limits_what_rounding_explains(self) -> None:
        logits = mx.array([9.0, 5.0, 4.999, 1.0])
        allowed = mx.array([False, True, True, True])
        history = History(SamplingParams(), [1], [], frozenset())
        assert not Choice(logits, history).within_reach(2, 0.01)
        assert Choice(logits, history, allowed).within_reach(2, 0.01)

    def test_later_requests_join(self, tiny: Runtime) -> None:
        report = verify(tiny, cases(*SOME, {"tokens": [3], "max_tokens": 1}), depths=[0, 2], max_batch=2, mlx_lm=False)
        assert report.verdict == "equal"
        assert (report.mlx_lm_verdict, report.mlx_lm_note) == (None, None)

    @pytest.mark.parametrize("kind", ["demo", "tiny"])
    def test_keys_off_by_one_are_a_bug(
        self, kind: str, demo: Runtime, tiny: Runtime, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mlx_gemma_mtp.speculative.BlockView", ShiftedView)
        rt = {"demo": demo, "tiny": tiny}[kind]
        case = cases({"tokens": list(range(20, 45)), "ignore_eos": True, "max_tokens": 24})
        report = verify(rt, case, depths=[0, 3], mlx_lm=False)
        assert report.verdict == "bug"
        assert not report.passed(allow_ties=True)
        plain = report.cases[0].plain.tokens
        found = {(c.way, c.depth): c for c in report.cases[0].checks}
        assert found["batch", 0].verdict == "equal"
        for way in ("alone", "batch"):
            broken = found[way, 3]
            assert broken.verdict == "bug"
            d = broken.difference
            assert d is not None
            assert d.margin is not None
            assert d.tolerance is not None
            assert 0 < d.position < 24
            assert d.expected == plain[d.position] != d.got
            assert d.margin > 2 * d.tolerance
            assert f"bug at position {d.position}: plain {d.expected}" in sentence(broken)

    def test_without_a_drafter(self, tmp_path: Path) -> None:
        rt = make(tmp_path, "unified", drafter=None)
        with pytest.raises(ValueError, match="no drafter"):
            verify(rt, cases(SOME[0]), depths=[1])
        assert verify(rt, cases(SOME[0]), depths=[0], mlx_lm=False).drafter is None

    @pytest.mark.parametrize("depths", [[], [9], [-1], [1, 1]])
    def test_depths(self, tiny: Runtime, depths: list[int]) -> None:
        with pytest.raises(ValueError, match="depths are"):
            verify(tiny, cases(SOME[0]), depths=depths)


class TestMlxLm:
    def test_a_checkpoint_that_it_cant_load(self, tmp_path: Path) -> None:
        rt = make(tmp_path, "unified")
        (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
        report = verify(rt, cases(SOME[0]), depths=[1])
        assert report.verdict == "equal"
        assert report.mlx_lm_verdict is None
        assert "mlx-lm can't load" in str(report.mlx_lm_note)

    def test_too_little_memory(self, tiny: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mlx_gemma_mtp.verify.peer.memory_limit", lambda: 1000)
        with pytest.raises(MlxLmError, match="twice over"):
            MlxLm(tiny)

    def test_a_difference_is_information_only(self, tiny: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(self: MlxLm, case: Case, plain: Output, stop_ids: frozenset[int]) -> Output:
            return Output((*plain.tokens[:2], (plain.tokens[2] + 1) % 512, *plain.tokens[3:]), plain.finish_reason)

        monkeypatch.setattr(MlxLm, "decode", wrong)
        report = verify(tiny, cases(SOME[0]), depths=[1])
        assert (report.verdict, report.mlx_lm_verdict) == ("equal", "bug")
        assert report.passed()
        other = report.to_dict()["requests"][0]["mlx_lm"]
        assert other["difference"]["position"] == 2
        assert "depth" not in other

    def test_stops_are_compared(self, tiny: Runtime) -> None:
        plain = verify(tiny, cases(SOME[0]), depths=[0], mlx_lm=False).cases[0].plain.tokens
        at = next(i for i, token in enumerate(plain) if i > 2 and token not in plain[:i])
        case, stopped = cases(SOME[0])[0], Output(plain[:at], "stop")
        assert MlxLm(tiny).decode(case, stopped, frozenset({plain[at]})) == stopped
        assert MlxLm(tiny).decode(case, stopped, frozenset()) == Output(plain[: at + 1], "length")


class TestJudgement:
    def choice(self, logits: Sequence[float], **params: Any) -> Choice:
        return Choice(mx.array(list(logits)), History(SamplingParams(**params), [1, 2], [3], frozenset({0})))

    def near(self, choice: Choice, a: int, b: int, tolerance: float) -> bool:
        return choice.within_reach(a, tolerance) and choice.within_reach(b, tolerance)

    def test_greedy(self) -> None:
        choice = self.choice([0.0, 5.0, 4.99, 1.0])
        margin, excluded = choice.margin(1, 2)
        assert margin == pytest.approx(0.01, abs=1e-5)
        assert not excluded
        assert self.near(choice, 1, 2, 0.006)
        assert not self.near(choice, 1, 2, 0.004)
        assert not self.near(choice, 1, 3, 0.1)

    def test_neither_is_the_best(self) -> None:
        choice = self.choice([0.0, 5.0, 4.99, 9.0])
        assert choice.margin(1, 2)[0] == pytest.approx(0.01, abs=1e-5)
        assert not self.near(choice, 1, 2, 0.1)

    def test_penalties_and_bias_come_first(self) -> None:
        choice = self.choice([0.0, 0.0, 1.0, 8.0], repetition_penalty=2.0, logit_bias={1: 8.0})
        assert choice.margin(3, 1)[0] == pytest.approx(0.0, abs=1e-5)
        assert self.near(choice, 3, 1, 1e-4)

    def test_stop_ids_are_held_back(self) -> None:
        choice = self.choice([5.0, 4.999, 0.0], min_tokens=2)
        assert not self.near(choice, 0, 1, 0.01)

    def test_noise_counts_in_logits(self) -> None:
        logits = [1.0, 0.9, 0.8, 0.7]
        warm = self.choice(logits, temperature=2.0, seed=5)
        values: list[float] = warm.scores().tolist()  # type: ignore[assignment]
        best = values.index(max(values))
        for token in range(4):
            margin, excluded = warm.margin(best, token)
            assert margin == pytest.approx(2.0 * (values[best] - values[token]), abs=1e-5)
            assert not excluded
            assert self.near(warm, best, token, margin / 2 + 1e-4)
            assert token == best or not self.near(warm, best, token, margin / 2 - 1e-4)

    @pytest.mark.parametrize(
        ("logits", "params"),
        [
            ([3.0, 2.0, 1.999, 0.0], {"top_k": 2}),
            ([3.0, 2.0, 1.999, 0.0], {"min_p": 0.368}),
        ],
    )
    def test_the_edge_of_what_sampling_keeps(self, logits: list[float], params: dict[str, Any]) -> None:
        kept = [self.choice(logits, temperature=1.0, seed=s, **params) for s in range(60)]
        dropped = [c for c in kept if (c.scores()[2] < -1e29).item()]
        assert dropped
        assert all(c.margin(1, 2)[1] for c in dropped)
        assert any(c.within_reach(2, 0.01) for c in dropped)
        assert not any(c.within_reach(2, 1e-5) for c in dropped)
        assert not any(c.within_reach(3, 0.01) for c in dropped)

    def test_the_edge_of_top_p(self) -> None:
        probs = [0.5, 0.3, 0.15, 0.05]  # the third is kept if those before it hold less than top_p
        logits = mx.log(mx.array(probs)).tolist()
        chosen = [self.choice(logits, temperature=1.0, seed=s, top_p=0.7999) for s in range(60)]  # type: ignore[arg-type]
        assert all((c.scores()[2] < -1e29).item() for c in chosen)
        assert any(c.within_reach(2, 0.01) for c in chosen)
        assert not any(c.within_reach(2, 1e-5) for c in chosen)

    def test_tolerance(self) -> None:
        half = rounding(20.0, mx.bfloat16, 60, 5376)
        assert half == pytest.approx(20 / 128 * 60**0.5 / 2)
        assert rounding(20.0, mx.float16, 60, 5376) == pytest.approx(half / 8)
        single = rounding(20.0, mx.float32, 60, 5376)
        assert 1e-4 < single < 1e-2
        assert rounding(0.0, mx.float32, 4, 64) == rounding(1.0, mx.float32, 4, 64)

    def test_tf32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mlx_gemma_mtp.verify.judge.mx.default_device", lambda: SimpleNamespace(type=mx.gpu))
        monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
        assert rounding(20.0, mx.float32, 64, 64) == pytest.approx(20 * 2**-10 * 4)
        monkeypatch.setenv("MLX_ENABLE_TF32", "0")
        assert rounding(20.0, mx.float32, 64, 64) < 1e-3

    def test_the_worst(self) -> None:
        assert worst([]) == "equal"
        assert worst(["equal", "near-tie"]) == "near-tie"
        assert worst(["bug", "near-tie", "equal"]) == "bug"


class TestDifferences:
    @pytest.mark.parametrize(
        ("tokens", "reason", "position", "got"),
        [
            ((5, 6), "stop", 2, 106),  # the likelier of the stop ids, or the other one
            ((5, 6), "length", 2, None),
            ((5, 6, 7), "stop", 3, 106),
            ((5, 6, 7, 8), "length", 3, 8),
        ],
    )
    def test_ends(
        self, tiny: Runtime, tokens: tuple[int, ...], reason: FinishReason, position: int, got: int | None
    ) -> None:
        found = Pair(tiny).difference(cases(SOME[0])[0], Output((5, 6, 7), "length"), Output(tokens, reason))
        assert found is not None
        assert found.position == position
        assert found.got == got or (got == 106 and found.got == 1)
        assert not found.near_tie


class TestRequests:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{", "line 1: not JSON"),
            ("[1]", "line 1: list, expected a JSON object"),
            ('{"prompt": "a", "best_of": 2}', "line 1: field 'best_of' isn't supported here"),
            ('{"tokens": [5], "stop": ["x"]}', "stop needs a tokenizer"),
            ('{"tokens": [5], "stop_token_ids": [512]}', "stop_token_ids has 512"),
            ('{"tokens": [5], "n": 0}', "n is 0, expected a count of at least 1"),
            ('{"tokens": [5], "tools": []}', "tools are there beside tokens"),
            ('{"tokens": [5], "top_logprobs": 2}', "top_logprobs is 2 without logprobs"),
            ('{"tokens": [5], "logprobs": 1, "top_logprobs": 2}', "logprobs is 1 beside top_logprobs"),
            ('{"tokens": [5], "logprobs": "yes"}', "logprobs is 'yes', expected true, false or a count"),
            ('{"tokens": [5], "regex": "a", "grammar": "b"}', "regex and grammar are there, expected one"),
            (
                '{"tokens": [5], "response_format": {"type": "xml"}}',
                "response_format is {'type': 'xml'}, expected text",
            ),
            ('{"tokens": [5], "thinking_budget": -1}', "tokens is -1, expected a count"),
            ('{"tokens": [5], "seed": 1, "seed": 2}', "field 'seed' is there twice"),
            ('{"tokens": [5], "temperature": NaN}', "NaN is no JSON number"),
            ('{"tokens": [5], "temperature": 1e999}', "temperature is inf, expected a number"),
            ('{"tokens": [5], "temperature": "hot"}', "temperature is 'hot', expected a number"),
            ('{"tokens": [5], "temperature": true}', "temperature is True, expected a number"),
            ('{"tokens": [5], "temperature": -1}', "temperature is -1.0, expected a number of at least 0"),
            ('{"tokens": [5], "top_k": 1.5}', "top_k is 1.5, expected a whole number"),
            ('{"tokens": [5], "top_p": 2}', "top_p is 2.0, expected a number above 0"),
            ('{"tokens": [5], "logit_bias": {"512": 1}}', "logit_bias has token id '512'"),
            ('{"tokens": [5], "logit_bias": {"a": 1}}', "logit_bias has token id 'a'"),
            ('{"tokens": [5], "logit_bias": {"4": "x"}}', "4 is 'x', expected a number, as logit_bias"),
            ('{"tokens": [5], "suppress_tokens": [-1]}', "suppress_tokens has -1, expected token ids from 0 to 511"),
            ('{"tokens": [5], "max_tokens": 0}', "max_tokens is 0"),
            ('{"tokens": [5], "max_tokens": 1, "max_completion_tokens": 1}', "are the same"),
            ('{"tokens": [5], "max_tokens": 4096}', "1 \\+ 4096 tokens, expected at most 4096"),
            ('{"tokens": [5], "ignore_eos": 1}', "ignore_eos is 1, expected true or false"),
            ('{"tokens": [5], "id": 7}', "id is 7, expected a text"),
            ('{"tokens": [512]}', "tokens has 512"),
            ('{"tokens": [true]}', "tokens has True"),
            ('{"tokens": []}', "tokens is empty"),
            ('{"tokens": [5], "prompt": "a"}', "prompt and tokens of prompt, tokens and messages"),
            ('{"temperature": 1}', "none of prompt, tokens and messages"),
            ('{"prompt": "a"}', "prompt needs a tokenizer"),
            ("\n \n", "the file has no requests"),
        ],
    )
    def test_errors(self, line: str, message: str) -> None:
        with pytest.raises(CaseError, match=message):
            read_cases(line.split("\n"), None, LIMITS)

    def test_errors_name_the_file_and_the_line(self) -> None:
        with pytest.raises(CaseError, match=r"^x\.jsonl, line 3: top_k is -1"):
            read_cases(['{"tokens": [5]}', "", '{"tokens": [5], "top_k": -1}'], None, LIMITS, source="x.jsonl")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ({"messages": []}, "messages is empty"),
            ({"messages": [{"role": "boss", "content": "x"}]}, "role is 'boss'"),
            ({"messages": "x"}, "messages is 'x', expected a list"),
            ({"prompt": 5}, "prompt is 5, expected a text"),
        ],
    )
    def test_texts(self, demo: Runtime, line: dict[str, Any], message: str) -> None:
        with pytest.raises(CaseError, match=message):
            read_cases([json.dumps(line)], demo.text, LIMITS)

    def test_parameters(self) -> None:
        (case,) = cases(
            {
                "tokens": [5, 6], "temperature": 1, "top_p": 0.5, "top_k": 4, "min_p": 0.1, "seed": 2**63,
                "repetition_penalty": 1.1, "presence_penalty": -0.5, "frequency_penalty": 0.5, "min_tokens": 3,
                "suppress_tokens": [9], "logit_bias": {"7": -3}, "max_completion_tokens": 5, "id": None,
            }
        )  # fmt: skip
        assert case.sampling == SamplingParams(
            temperature=1.0, top_p=0.5, top_k=4, min_p=0.1, seed=2**63, repetition_penalty=1.1, presence_penalty=-0.5,
            frequency_penalty=0.5, min_tokens=3, suppress_tokens=(9,), logit_bias={7: -3.0},
        )  # fmt: skip
        assert (case.name, case.max_tokens, case.tokens, case.seeded) == ("line 1", 5, (5, 6), False)

    def test_openai_style_requests(self, demo: Runtime) -> None:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        line: dict[str, Any] = {
            "model": "gemma", "stream": True, "user": "me", "messages": [{"role": "user", "content": "Hi"}],
            "stop": "END", "stop_token_ids": [9], "n": 2, "logprobs": True, "top_logprobs": 3, "thinking_budget": 7,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        }  # fmt: skip
        first, second = read_cases([json.dumps(line)], demo.text, LIMITS)
        assert (first.stop, first.stop_ids, first.sampling.logprobs) == (("END",), (9,), 3)
        assert first.sampling.constraint == Both(JsonSchema(schema), ThinkingBudget(7))
        assert [first.name, second.name] == ["line 1, choice 0", "line 1, choice 1"]
        assert [first.choice, second.choice] == [0, 1]
        (other,) = cases({"tokens": [5], "regex": "[a-z]+", "logprobs": 2})
        assert (other.sampling.constraint, other.sampling.logprobs) == (Regex("[a-z]+"), 2)
        plain = cases({"tokens": [5], "response_format": {"type": "text"}, "grammar": None, "logprobs": False})
        assert plain[0].sampling == SamplingParams()

    def test_unseeded_requests_get_a_seed_of_their_own(self) -> None:
        first, second, greedy = cases(*({"tokens": [5], "temperature": t} for t in (1, 1, 0)))
        assert first.seeded
        assert second.seeded
        assert first.sampling.seed != second.sampling.seed
        assert (greedy.seeded, greedy.sampling.seed) == (False, None)
        assert cases({"tokens": [5], "temperature": 1})[0] == first
        with pytest.raises(ValueError, match="seed is None"):
            replace(first, sampling=SamplingParams(temperature=1.0))

    def test_prompts_go_through_the_template(self, demo: Runtime) -> None:
        assert demo.text is not None
        message = {"role": "user", "content": "Hello"}
        lines = [json.dumps({"prompt": "Hello"}), json.dumps({"messages": [message]})]
        assert [c.tokens for c in read_cases(lines, demo.text, LIMITS)] == [tuple(demo.text.render([message]))] * 2

    def test_the_built_in_set_without_a_tokenizer(self) -> None:
        made = built_in_cases(None, LIMITS)
        lengths = [len(case.tokens) for case in made]
        assert min(lengths) < 8
        assert max(lengths) > 300
        assert any(case.seeded for case in made)
        assert any(case.sampling.greedy for case in made)
        assert made == built_in_cases(None, LIMITS)


def test_depths_of_a_text() -> None:
    assert parse_depths("1..6") == (1, 2, 3, 4, 5, 6)
    assert parse_depths("0, 2..3") == (0, 2, 3)
    for bad in ("", "x", "1..", "..2", "6..1", "1,1", "9", "-1", "1...2"):
        with pytest.raises(ValueError, match="depths"):
            parse_depths(bad)


# --- what is shown -----------------------------------------------------------------------------------------------


def report_of(difference: Difference | None, *, note: str | None = None) -> Report:
    case = Case(name="<b>&", text="<script>alert(1)</script>", tokens=(5,), max_tokens=4)
    entry = CaseReport(case=case, plain=Output((8, 9), "length"), text="a</pre><img src=x>")
    entry.checks = [Check(way="alone", depth=2, difference=difference), Check(way="batch", depth=2, difference=None)]
    return Report(
        model="/m", drafter=None, dtype="float32", backend="cpu", exactness={"bitwise": None},
        depths=(2,), max_batch=1, cases=[entry], mlx_lm_note=note,
    )  # fmt: skip


TIE = Difference(
    position=1, expected=9, got=7, expected_text="<i>", got_text="[red]", margin=1e-6, tolerance=1e-5, near_tie=True
)
BUG = replace(TIE, near_tie=False, margin=3.0)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: dict[str, str | None] = {}
        self.data = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.update(attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.data += data


class TestPage:
    @pytest.mark.parametrize(("found", "verdict"), [(None, "equal"), (TIE, "near-tie"), (BUG, "bug")])
    def test_self_contained_and_escaped(self, found: Difference | None, verdict: str) -> None:
        text = page(report_of(found, note="<u>none</u>"))
        parsed = Page(text)
        assert not parsed.open
        assert not {"script", "img", "link", "b", "i", "u", "iframe", "base"} & set(parsed.tags)
        assert not {"src", "href", "onclick", "onload"} & set(parsed.attributes)
        assert not re.search(r"https?:|url\(|@import", text)
        assert "default-src 'none'" in text
        assert "prefers-color-scheme: dark" in text
        assert "<script>alert(1)</script>" in parsed.data
        assert "a</pre><img src=x>" in parsed.data
        assert f'<p class="{verdict}">' in text
        assert ("at position 1: plain 9 '<i>', here 7 '[red]'" in parsed.data) is (found is not None)


Run = Callable[..., Result]


@pytest.fixture
def run(tiny: Runtime, monkeypatch: pytest.MonkeyPatch) -> Run:
    def load(path: str, **_: Any) -> Runtime:
        return tiny

    monkeypatch.setitem(sys.modules, "mlx_gemma_mtp.runtime", SimpleNamespace(load=load, Runtime=Runtime))
    return lambda *args, **more: CliRunner().invoke(app, ["verify", "-m", "m", "--no-mlx-lm", *args], **more)


@pytest.fixture
def says(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[[Difference | None], Run]:
    """Run with a report that is made up."""

    def choose(found: Difference | None) -> Run:
        monkeypatch.setattr("mlx_gemma_mtp.verify.verify", lambda *_, **__: report_of(found))
        return run

    return choose


class TestCommand:
    def test_a_pair_that_is_equal(self, run: Run, tmp_path: Path) -> None:
        file = tmp_path / "x.jsonl"
        file.write_text("\ufeff" + "\n".join(map(json.dumps, SOME)) + "\n")
        result = run(str(file), "--depths", "2", "-n", "6", "--html", str(tmp_path / "x.html"))
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        assert "all equal: 3 requests" in result.stdout
        assert "<!doctype html>" in (tmp_path / "x.html").read_text()

    def test_json_is_one_object_alone(self, run: Run) -> None:
        result = run("-", "--depths", "1", "-n", "4", "--json", input=json.dumps(SOME[0]))
        data = json.loads(result.stdout)
        assert (result.exit_code, result.stderr) == (0, "")
        assert (data["passed"], data["verdict"]) == (True, "equal")
        assert [c["way"] for c in data["requests"][0]["checks"]] == ["alone", "batch"]
        assert len(data["requests"][0]["tokens"]) == 4

    @pytest.mark.parametrize(
        ("found", "strict", "lenient"), [(None, 0, 0), (TIE, 1, 0), (BUG, 1, 1)], ids=["equal", "tie", "bug"]
    )
    def test_exit_codes(
        self, says: Callable[[Difference | None], Run], found: Difference | None, strict: int, lenient: int
    ) -> None:
        for args, code in (([], strict), (["--allow-ties"], lenient)):
            assert says(found)(*args).exit_code == code
            as_json = says(found)(*args, "--json")
            assert as_json.exit_code == code
            assert json.loads(as_json.stdout)["passed"] is (code == 0)
            assert as_json.stderr == ""

    def test_a_bug_is_told_with_its_position(self, says: Callable[[Difference | None], Run]) -> None:
        shown = " ".join(says(BUG)().stdout.split())
        assert "<b>&, depth 2, alone: bug at position 1: plain 9 '<i>', here 7 '[red]', margin 3" in shown
        assert "a BUG: differences beyond rounding in 1 of 1 requests" in shown

    @pytest.mark.parametrize(
        ("args", "code", "message"),
        [
            (["--depths", "1..9"], 2, "--depths"),
            (["--depths", "x"], 2, "no list of depths"),
            (["--max-batch", "0"], 2, "--max-batch"),
            (["missing.jsonl"], 1, "missing.jsonl"),
            (["--html", "no/such/folder/x.html"], 2, "no/such/folder"),
            (["-"], 1, "stdin has no requests"),
        ],
    )
    def test_errors(self, run: Run, args: list[str], code: int, message: str) -> None:
        result = run(*args, "--json")
        assert (result.exit_code, result.stdout) == (code, "")
        assert message in json.loads(result.stderr)["error"]["message"]

    def test_a_line_that_cant_be_read(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "x.jsonl").write_text('{"tokens": [5]}\n{"tokens": [5], "stop": "x"}\n')
        result = run(str(tmp_path / "x.jsonl"))
        assert (result.exit_code, result.stdout) == (1, "")
        assert "x.jsonl, line 2: stop needs a tokenizer" in result.stderr
