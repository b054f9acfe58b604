"""The runtime against transformers: logits, tokens, drafts and rounds of tiny pairs, as kept in `goldens`.

tools/make_goldens.py made the goldens, from the pairs that tests/tiny.py writes. It kept only prompts in
which no choice is so close that rounding could turn it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_gemma_mtp import Runtime, load
from tests import tiny

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(file.stem for file in GOLDENS.glob("*.json"))
ONE_PER_KIND = [name for name in NAMES if name.endswith("-0") or name.startswith("text-")]
MAX_DEPTH = 8
RELATIVE = 1e-4  # of the largest logit


@dataclass(frozen=True, kw_only=True)
class Case:
    """A pair's golden and the runtime that has to match it."""

    golden: dict[str, Any]
    arrays: dict[str, Any]
    runtime: Runtime

    @property
    def prompts(self) -> list[dict[str, Any]]:
        """What was recorded of each prompt."""
        prompts: list[dict[str, Any]] = self.golden["prompts"]
        return prompts


Cases = Callable[[str], Case]


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """Writes and loads the pair of a golden, once."""

    @functools.cache
    def make(name: str) -> Case:
        golden = json.loads((GOLDENS / f"{name}.json").read_text())
        directory = tmp_path_factory.mktemp(name)
        tiny.write_pair(directory, golden["kind"], seed=golden["seed"], style=golden["style"], window=golden["window"])
        assert tiny.fingerprint(directory) == golden["weights_sha256"], (
            "tests/tiny.py writes other weights than the goldens were made from: run tools/make_goldens.py"
        )
        with np.load(GOLDENS / f"{name}.npz") as file:
            arrays = dict(file)
        runtime = load(str(directory), drafter=str(directory / "drafter"), dtype="float32")
        return Case(golden=golden, arrays=arrays, runtime=runtime)

    return make


def test_every_kind_is_recorded_in_both_styles() -> None:
    """A golden that is missing would be a pair that nothing checks."""
    goldens = [json.loads((GOLDENS / f"{name}.json").read_text()) for name in NAMES]
    found = {(golden["kind"], golden["style"]) for golden in goldens}
    expected = {(kind, style) for kind in tiny.KINDS for style in ("google", "hf")}
    assert found == expected - {("text", "google")}
    assert len(ONE_PER_KIND) == len(tiny.KINDS)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_each_prompt(cases: Cases, name: str) -> None:
    """The last position's logits, for prompts shorter and longer than the window."""
    case = cases(name)
    for prompt, expected in zip(case.prompts, case.arrays["last"], strict=True):
        found = np.array(case.runtime.logits(prompt["tokens"]))
        assert found.shape == (len(prompt["tokens"]), tiny.VOCAB)
        assert _difference(found[-1], expected) < RELATIVE, f"prompt of {len(prompt['tokens'])} tokens"


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_every_position(cases: Cases, name: str) -> None:
    """Logits at all positions of one prompt that is longer than the window."""
    case = cases(name)
    tokens = case.prompts[case.golden["all_positions"]]["tokens"]
    assert len(tokens) > case.golden["window"]
    assert _difference(np.array(case.runtime.logits(tokens)), case.arrays["every"]) < RELATIVE


@pytest.mark.parametrize("depth", range(MAX_DEPTH + 1))
@pytest.mark.parametrize("name", ONE_PER_KIND)
def test_tokens_at_every_depth(cases: Cases, name: str, depth: int) -> None:
    """Greedy tokens don't depend on the depth. The prompt is shorter than the window, which then wraps."""
    case = cases(name)
    prompt = case.prompts[2]
    count = len(prompt["greedy"])
    out = case.runtime.generate(prompt["tokens"], max_tokens=count, depth=depth, ignore_eos=True)
    assert out.tokens == prompt["greedy"]
    assert out.stats.drafted <= depth * out.stats.rounds
    assert (out.stats.accepted > 0) == (depth > 0)


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_a_batch(cases: Cases, name: str, depth: int) -> None:
    """Greedy tokens of all prompts at once: rows of mixed lengths, each with its own accepted drafts."""
    case = cases(name)
    prompts = [p["tokens"] for p in case.prompts]
    count = len(case.prompts[0]["greedy"])
    outputs = case.runtime.generate_batch(prompts, max_tokens=count, depth=depth, ignore_eos=True)
    assert [out.tokens for out in outputs] == [p["greedy"] for p in case.prompts]


@pytest.mark.parametrize("position", ["length", "length_minus_one"])
@pytest.mark.parametrize("name", NAMES)
def test_first_drafts(cases: Cases, name: str, position: str) -> None:
    """Eight drafts after each prompt, with queries at the position transformers uses and at ours."""
    case = cases(name)
    for prompt in case.prompts:
        length = len(prompt["tokens"])
        expected = prompt["drafts"][position]
        given = length if position == "length" else None
        found = case.runtime.draft(prompt["tokens"], depth=len(expected), position=given)
        assert found == expected, f"prompt of {length} tokens"


@pytest.mark.parametrize("name", NAMES)
def test_rounds_accept_what_was_recorded(cases: Cases, name: str) -> None:
    """Tokens and accepted drafts of every later round: after rejections, and after the window wraps.

    A kind's two pairs take turns at the prompts, one at a time; together they cover every length.
    """
    case = cases(name)
    depth = case.golden["round_depth"]
    for prompt in case.prompts[case.golden["seed"] :: 2]:
        accepted: list[int] = prompt["accepted"]
        count = 1 + sum(accepted) + len(accepted)
        out = case.runtime.generate(prompt["tokens"], max_tokens=count, depth=depth, ignore_eos=True)
        stats = out.stats
        assert out.tokens == prompt["greedy"][:count]
        assert (stats.rounds, stats.accepted) == (len(accepted), sum(accepted))
        assert len(out.tokens) == 1 + stats.accepted + stats.rounds
        by_position = [sum(n > i for n in accepted) for i in range(depth)]
        assert list(stats.accepted_per_position) == by_position


def _difference(found: Any, expected: Any) -> float:
    """The largest difference, as a share of the largest expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
