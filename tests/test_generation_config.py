"""generation_config.json: ids that end an output, and defaults of sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_gemma_mtp import SamplingParams
from mlx_gemma_mtp.generation_config import generation_defaults, read_stop_ids

DEMO = Path(__file__).parents[1] / "mlx_gemma_mtp" / "demo"


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [1, 9, 5]}, {"eos_token_id": 1}, {1, 9, 5}),
        ({"eos_token_id": 7}, None, {7}),
        ({}, {"eos_token_id": [1, 9]}, {1, 9}),
        (None, {"eos_token_id": None, "text_config": {"eos_token_id": 1}}, {1}),
        (None, {}, set()),
        (None, None, set()),
    ],
)
def test_stop_ids(
    tmp_path: Path,
    generation: dict[str, Any] | None,
    config: dict[str, Any] | None,
    expected: set[int],
) -> None:
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    assert read_stop_ids(tmp_path) == expected


@pytest.mark.parametrize("value", ["1", True, -1, [1, "2"], {"id": 1}])
def test_stop_ids_that_are_no_ids(tmp_path: Path, value: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"eos_token_id in .*generation_config\.json"):
        read_stop_ids(tmp_path)


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_stop_ids(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds list"):
        read_stop_ids(tmp_path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, SamplingParams(temperature=1.0)),
        ({"eos_token_id": 1}, SamplingParams(temperature=1.0)),
        ({"temperature": 0.7, "top_k": 64, "top_p": 0.95}, SamplingParams(temperature=0.7, top_k=64, top_p=0.95)),
        ({"do_sample": False, "temperature": 0.7, "top_k": None}, SamplingParams()),
        (
            {"min_p": 0.1, "repetition_penalty": 1.1, "suppress_tokens": [5, 6]},
            SamplingParams(temperature=1.0, min_p=0.1, repetition_penalty=1.1, suppress_tokens=(5, 6)),
        ),
    ],
)
def test_defaults(tmp_path: Path, config: dict[str, Any] | None, expected: SamplingParams) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert generation_defaults(tmp_path) == expected


def test_the_demo_pairs_defaults() -> None:
    assert generation_defaults(DEMO) == SamplingParams(temperature=1.0, top_k=64, top_p=0.95)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"temperature": "hot"}, "temperature in .* is 'hot', expected a number"),
        ({"top_p": True}, "top_p in .* is True, expected a number"),
        ({"top_k": 1.5}, "top_k in .* is 1.5, expected a count"),
        ({"top_p": 2.0}, r"generation_config.json: top_p is 2.0, expected"),
        ({"suppress_tokens": [-1]}, r"suppress_tokens in .* is \[-1\], expected a list of ids"),
    ],
)
def test_defaults_that_cant_be_used(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        generation_defaults(tmp_path)
