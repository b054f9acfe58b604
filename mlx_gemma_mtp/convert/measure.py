"""How far converted models are from their source, on prompts: KL, top-1, perplexity, and what drafters still guess.

Uses the runtime's public interface alone. Knows nothing of recipes or tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..runtime import Runtime, load
from ..stats import SpecStats
from .prompts import PromptSet

_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model on disk under the name that its row in a table has."""

    name: str
    path: Path


Note = Callable[[str], None]


def measure_pairs(
    targets: Sequence[Candidate],
    drafters: Sequence[Candidate],
    prompts: PromptSet,
    *,
    scratch: Path,
    depth: int = 4,
    tokens: int = 64,
    limit: int = 512,
    note: Note | None = None,
) -> dict[str, Any]:
    """Compare every target with the first, the reference, and try every drafter with every target.

    The reference answers each prompt greedily with up to `tokens` tokens; all targets are scored on prompt and
    answer, `limit` tokens at most. `scratch` is a directory for the reference's distributions, which large
    vocabularies make large.
    """
    reference = _Reference(targets[0], prompts, tokens, limit, scratch)
    fidelity: dict[str, Any] = {}
    acceptance: list[dict[str, Any]] = []
    for target in targets:
        for drafter in _or_none(drafters):
            if note:
                note(f"measuring {target.name}" + (f" with drafter {drafter.name}" if drafter else ""))
            runtime = load(str(target.path), drafter=None if drafter is None else str(drafter.path))
            if target.name not in fidelity:
                fidelity[target.name] = reference.compare(runtime)
            if drafter is not None:
                acceptance.append(
                    {"target": target.name, "drafter": drafter.name}
                    | _accepted(runtime, reference.ids, tokens, depth, prompts.ids)
                )
            del runtime
            mx.clear_cache()
    return {
        "prompt_set": prompts.name,
        "prompts": len(reference.ids),
        "scored_tokens": reference.count,
        "answer_tokens": reference.answered,
        "depth": depth,
        "reference": targets[0].name,
        "fidelity": fidelity,
        "acceptance": acceptance,
    }


def _or_none(drafters: Sequence[Candidate]) -> Sequence[Candidate | None]:
    return drafters or [None]


class _Reference:
    """The source's answers, and its log-probabilities on disk."""

    def __init__(self, source: Candidate, prompts: PromptSet, tokens: int, limit: int, scratch: Path) -> None:
        runtime = load(str(source.path), drafter=None)
        self.ids = [prompt_ids(runtime, p) for p in prompts.prompts(runtime.config.vocab_size)]
        outputs = runtime.generate_batch(self.ids, max_tokens=tokens, depth=0, ignore_eos=prompts.ids, max_batch=8)
        self.sequences = [(ids + o.tokens)[:limit] for ids, o in zip(self.ids, outputs, strict=True)]
        self.answered = sum(len(o.tokens) for o in outputs)
        self.count = sum(len(s) - 1 for s in self.sequences)
        self._files = [scratch / f"reference-{i}.npy" for i in range(len(self.ids))]
        for file, sequence in zip(self._files, self.sequences, strict=True):
            mx.save(str(file), _log_probabilities(runtime, sequence))

    def compare(self, runtime: Runtime) -> dict[str, float]:
        """Means over all scored tokens."""
        kl = agreed = theirs = ours = 0.0
        for file, sequence in zip(self._files, self.sequences, strict=True):
            whole, own = mx.load(str(file)), _log_probabilities(runtime, sequence)
            assert isinstance(whole, mx.array)
            for first in range(0, len(sequence) - 1, _ROWS):
                p, q = whole[first : first + _ROWS], own[first : first + _ROWS]
                following = mx.array(sequence[first + 1 : first + 1 + p.shape[0]])[:, None]
                kl += _sum(mx.exp(p) * (p - q))
                agreed += _sum(mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1))
                theirs -= _sum(mx.take_along_axis(p, following, axis=-1))
                ours -= _sum(mx.take_along_axis(q, following, axis=-1))
        return {
            "mean_kl": max(kl / self.count, 0.0),
            "top1_agreement": agreed / self.count,
            "perplexity_ratio": math.exp((ours - theirs) / self.count),
            "perplexity": math.exp(ours / self.count),
        }


def prompt_ids(runtime: Runtime, prompt: str | Sequence[int] | Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a text, of chat messages, or of ids."""
    if not isinstance(prompt, str) and all(isinstance(t, int) for t in prompt):
        return [t for t in prompt if isinstance(t, int)]
    assert runtime.text is not None
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not runtime.text.has_chat_template:
        return runtime.text.encode(" ".join(m["content"] for m in messages if isinstance(m, dict)))
    return runtime.text.render(messages)  # type: ignore[arg-type]


def _log_probabilities(runtime: Runtime, sequence: list[int]) -> mx.array:
    """Log-probabilities (L - 1, vocabulary) of every token after the first."""
    logits = runtime.logits(sequence[:-1])
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(found)
    return found


def _sum(x: mx.array) -> float:
    return float(x.sum().item())  # type: ignore[arg-type]


def _accepted(runtime: Runtime, ids: list[list[int]], tokens: int, depth: int, endless: bool) -> dict[str, Any]:
    total = SpecStats()
    for output in runtime.generate_batch(ids, max_tokens=tokens, depth=depth, ignore_eos=endless, max_batch=8):
        total.add(output.stats)
    return {
        "rounds": total.rounds,
        "drafted": total.drafted,
        "accepted": total.accepted,
        "acceptance": total.accepted / total.drafted if total.drafted else 0.0,
        "accepted_per_round": total.accepted_per_round,
        "acceptance_per_position": total.acceptance_per_position,
    }
