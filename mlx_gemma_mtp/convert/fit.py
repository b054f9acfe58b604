"""Whether a pair fits a Mac: weights, K/V of a context, and what macOS lets a GPU use. Knows nothing of files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..config import TargetConfig
from .checkpoint import ConvertError

_GIB = 1 << 30
_MACS = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)
_KV_BYTES = 2
_RING_SLACK = 32
WORK = 3 * _GIB // 4
"""Activations, a prefill chunk's logits and Python: an allowance, not a measurement."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Bytes needed and what a Mac of `memory` gives to a GPU."""

    memory: int
    context: int
    weights: int
    kv: int

    @property
    def usable(self) -> int:
        """macOS's default limit for a GPU: two thirds of the memory, three quarters above 36 GB."""
        return self.memory * 3 // 4 if self.memory > 36 * _GIB else self.memory * 2 // 3

    @property
    def needed(self) -> int:
        return self.weights + self.kv + WORK

    @property
    def fits(self) -> bool:
        return self.needed <= self.usable

    def to_dict(self) -> Mapping[str, object]:
        return {
            "memory_bytes": self.memory,
            "usable_bytes": self.usable,
            "context": self.context,
            "weights_bytes": self.weights,
            "kv_bytes": self.kv,
            "working_bytes": WORK,
            "needed_bytes": self.needed,
            "fits": self.fits,
        }

    def __str__(self) -> str:
        return (
            f"{self.needed / 1e9:.1f} of the {self.usable / 1e9:.1f} GB that a Mac of {self.memory // _GIB} GB gives "
            f"to its GPU (weights {self.weights / 1e9:.2f}, K/V of {self.context:,} tokens {self.kv / 1e9:.2f}, "
            f"work {WORK / 1e9:.1f})"
        )


def kv_bytes(config: TargetConfig, context: int) -> int:
    """K/V of one request of `context` tokens in 16 bits; the drafter reads the target's and adds none."""
    total = 0
    for slot in config.kv_slots:
        tokens = context if slot.window is None else min(context, slot.window) + _RING_SLACK
        total += 2 * slot.kv_heads * slot.head_dim * _KV_BYTES * tokens
    return total


def smallest_mac(config: TargetConfig, weights: int, context: int) -> Fit | None:
    """The fit on the Mac with the least memory that takes it, or None if none does."""
    kv = kv_bytes(config, context)
    fits = (Fit(memory=size * _GIB, context=context, weights=weights, kv=kv) for size in _MACS)
    return next((fit for fit in fits if fit.fits), None)


def longest_context(memory: int, config: TargetConfig, weights: int) -> int:
    """The most tokens, a multiple of 1,024 and at most the model's own limit, that fit beside `weights`; or 0."""

    def fits(context: int) -> bool:
        return Fit(memory=memory, context=context, weights=weights, kv=kv_bytes(config, context)).fits

    return max((n for n in range(1024, config.max_positions + 1, 1024) if fits(n)), default=0)


def parse_memory(text: str) -> int:
    """Bytes of "32GB", "32 GB" or "32", as Apple counts memory. Raises ConvertError."""
    found = re.fullmatch(r"(\d+)\s*(?:gb|gib|g)?", text.strip().lower())
    if not found or not int(found[1]):
        raise ConvertError(f"--fit is {text!r}, expected a size like 32GB")
    return int(found[1]) * _GIB


def parse_context(text: str) -> int:
    """Tokens of "32k" (32,768) or "8192". Raises ConvertError."""
    found = re.fullmatch(r"(\d+)(k?)", text.strip().lower())
    if not found or not int(found[1]):
        raise ConvertError(f"--context is {text!r}, expected a number of tokens like 8192 or 32k")
    return int(found[1]) * (1024 if found[2] else 1)
