"""What a checkpoint's generation_config.json says: ids that end an output, and how its makers want tokens chosen.

Knows nothing of MLX, tokenizers or models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .json_file import read_object
from .request import SamplingParams

_FILE = "generation_config.json"
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")


def read_stop_ids(path: Path) -> frozenset[int]:
    """Ids that end an output, from generation_config.json, else config.json; empty when neither names any.

    Raises ValueError, naming the file, when `eos_token_id` is neither an id, a list of ids nor null.
    """
    for name in (_FILE, "config.json"):
        file = path / name
        if not file.is_file():
            continue
        config = read_object(file, ValueError)
        text_config = config.get("text_config")
        places = [config, text_config] if isinstance(text_config, dict) else [config]
        for value in (place.get("eos_token_id") for place in places):
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise ValueError(f"eos_token_id in {file} is {value!r}, expected an id or a list of ids")
            if ids:
                return frozenset(ids)
    return frozenset()


def generation_defaults(path: Path) -> SamplingParams:
    """How the makers of the checkpoint in directory `path` want tokens chosen.

    Read are temperature, top_k, top_p, min_p, repetition_penalty and suppress_tokens of generation_config.json;
    `do_sample: false` means greedy. What it doesn't name, or all where there is no such file, is the model's own law:
    temperature 1 and nothing cut off. Raises ValueError, naming the file, for values that can't be used.
    """
    file = path / _FILE
    config = {k: v for k, v in (read_object(file, ValueError) if file.is_file() else {}).items() if v is not None}
    fields: dict[str, Any] = {"temperature": 1.0}
    for name in _NUMBERS:
        if name in config:
            fields[name] = config[name]
            if type(config[name]) not in (int, float):
                raise ValueError(f"{name} in {file} is {config[name]!r}, expected a number")
    if "top_k" in config:
        fields["top_k"] = config["top_k"]
        if type(config["top_k"]) is not int:
            raise ValueError(f"top_k in {file} is {config['top_k']!r}, expected a count")
    if "suppress_tokens" in config:
        ids = config["suppress_tokens"]
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"suppress_tokens in {file} is {ids!r}, expected a list of ids")
        fields["suppress_tokens"] = tuple(ids)
    if config.get("do_sample") is False:
        fields["temperature"] = 0.0
    try:
        return SamplingParams(**fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
