"""Prompts to measure on: the user's own from a file, or a small built-in set. Knows nothing of models."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import ConvertError

Prompt = str | list[int] | list[Mapping[str, str]]

BUILT_IN: tuple[str, ...] = (
    "Explain in three sentences why the sky is blue.",
    "What is the capital of France, and what is it known for?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Tell me a short story about a fox.",
    "Translate into German: The train to Munich leaves at nine in the morning.",
    "List five fruits.",
    "A shop sells pens at 3 for 2 euros. What do 12 pens cost? Show the steps.",
    "Summarize the plot of Romeo and Juliet in two sentences.",
)


@dataclass(frozen=True, kw_only=True)
class PromptSet:
    """Prompts under a name. `ids`: they are token ids, and answers go on past a stop token."""

    name: str
    ids: bool
    prompts: Callable[[int], Sequence[Prompt]]


def built_in(*, has_tokenizer: bool) -> PromptSet:
    """The built-in texts; for a model without a tokenizer, ids in a fixed disorder."""
    if has_tokenizer:
        return PromptSet(name="built-in", ids=False, prompts=lambda _: BUILT_IN)
    return PromptSet(name="built-in ids", ids=True, prompts=_disordered)


def read_prompts(path: Path, *, has_tokenizer: bool) -> PromptSet:
    """A file of prompts: .json (a list), .jsonl (a value a line) or text (a prompt a line). Raises ConvertError.

    JSON values: a text, a list of chat messages or of token ids, or {"prompt": text} or {"messages": list}.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            lines = [line for line in text.splitlines() if line.strip()]
            values = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines
    except (OSError, ValueError) as e:
        raise ConvertError(f"the prompts {path} can't be read: {e}") from e
    if not isinstance(values, list) or not values:
        raise ConvertError(f"the prompts {path} hold {type(values).__name__}, expected a list of at least one")
    found = [_prompt(v, f"prompt {i + 1} of {path}") for i, v in enumerate(values)]
    ids = [not isinstance(p, str) and all(isinstance(t, int) for t in p) for p in found]
    if not has_tokenizer and not all(ids):
        raise ConvertError(f"the prompts {path} are text, and the model has no tokenizer: expected token ids")
    return PromptSet(name=path.name, ids=all(ids), prompts=lambda _: found)


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, dict):
        value = value.get("messages", value.get("prompt"))
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value:
        if all(type(t) is int for t in value):
            return list(value)
        if all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in value):
            return list(value)
    raise ConvertError(f"{where} is {str(value)[:60]!r}, expected a text, chat messages or token ids")


def _disordered(vocabulary: int) -> list[Prompt]:
    state, out = 12345, list[Prompt]()
    for _ in range(4):
        row = []
        for _ in range(24):
            state = (1103515245 * state + 12345) % (1 << 31)
            row.append((state >> 8) % vocabulary)
        out.append(row)
    return out
