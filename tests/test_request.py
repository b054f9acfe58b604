"""What a caller may ask for, and what is refused by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from mlx_gemma_mtp.request import Request, SamplingParams, TokenEvent


def test_the_default_is_greedy() -> None:
    params = SamplingParams()
    assert params.greedy
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0, 0, 1, 0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected a number of at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1, expected a count of at least 0"),
        ({"top_p": 0}, "top_p is 0, expected a number above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": -0.01}, "min_p is -0.01, expected a number from 0 to 1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a number above 0"),
        ({"min_tokens": -1}, "min_tokens is -1"),
        ({"logprobs": -1}, "logprobs is -1, expected None or a count"),
    ],
)
def test_bad_sampling_is_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 100},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"min_p": 1},
        {"repetition_penalty": 1e-3},
        {"logprobs": 0},
        {"seed": 0},
        {"seed": -5},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0},
    ],
)
def test_values_at_the_edge_are_taken(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    assert {name: value for name, value in dataclasses.asdict(params).items() if name in fields} == fields


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repetition_penalty", 1.1),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -0.5),
        ("min_tokens", 1),
        ("logprobs", 0),
        ("constraint", object()),
        ("logit_bias", {3: -1.0}),
        ("suppress_tokens", (1, 2)),
    ],
)
def test_what_changes_or_reports_logits_is_not_plainly_greedy(field: str, value: object) -> None:
    params = SamplingParams(**{field: value})  # type: ignore[arg-type]
    assert not params.greedy
    assert params.contract == "exact"
    assert dataclasses.replace(params, temperature=1.0).contract == "distribution"
    assert dataclasses.replace(params, temperature=1.0, seed=0).contract == "exact"


def test_filters_alone_do_not_change_a_greedy_choice() -> None:
    assert SamplingParams(top_k=5, top_p=0.5, min_p=0.1, seed=3).greedy
    assert not SamplingParams(temperature=0.01).greedy
    assert SamplingParams(logit_bias={}, suppress_tokens=[]).greedy


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": []}, r"prompt is \[\], expected at least one token id"),
        ({"max_tokens": 0}, "max_tokens is 0, expected a count of at least 1"),
        ({"depth": -1}, "depth is -1, expected None or a count"),
    ],
)
def test_bad_requests_are_named(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Request(**({"prompt": [1]} | fields))


def test_a_request_can_not_be_changed() -> None:
    request = Request(prompt=[1, 2], depth=0)
    assert (request.max_tokens, request.stop_ids, request.ignore_eos) == (256, frozenset(), False)
    assert request.sampling.greedy
    for value, field in ((request, "prompt"), (request.sampling, "top_k"), (event(), "tokens")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, 3)


def test_requests_share_nothing() -> None:
    first, second = SamplingParams(), SamplingParams()
    assert first.logit_bias is not second.logit_bias
    assert first == second


def test_fields_are_given_by_name() -> None:
    kinds: tuple[Callable[..., object], ...] = (Request, SamplingParams, TokenEvent)
    for kind in kinds:
        with pytest.raises(TypeError, match="positional argument"):
            kind([1])


def event(tokens: tuple[int, ...] = (4, 5), drafted: tuple[bool, ...] = (True, False)) -> TokenEvent:
    return TokenEvent(request_id=1, tokens=tokens, drafted=drafted)


def test_every_token_of_an_event_has_a_flag() -> None:
    assert event().finish_reason is None
    assert event((), ()).tokens == ()
    with pytest.raises(ValueError, match="drafted has 1 flags for 2 tokens"):
        event(drafted=(True,))
