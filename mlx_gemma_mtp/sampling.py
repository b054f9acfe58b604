"""How tokens are chosen and drafts accepted. Knows nothing of models, caches or requests' lives."""

from __future__ import annotations

import mlx.core as mx

from .request import SamplingParams


def check_supported(params: SamplingParams) -> None:
    """Refuse, by name, parameters that this version can't honour: it decodes greedily."""
    if params.temperature != 0:
        raise ValueError(f"temperature is {params.temperature}, expected 0: this version decodes greedily only")
    if params.changed_logits:
        raise ValueError(f"{params.changed_logits[0]} isn't supported yet: this version decodes greedily only")


def accept_greedy(logits: mx.array, drafts: mx.array, offered: mx.array) -> tuple[mx.array, mx.array]:
    """Greedy acceptance: the longest prefix of drafts that the target would have chosen itself.

    logits (R, K + 1, V) are the target's after the last token and after each draft; drafts (R, K), of which the
    first offered (R,) count. Returns the target's own choices (R, K + 1), of which the first accepted + 1 are the
    row's new tokens, and accepted (R,).
    """
    chosen = mx.argmax(logits, axis=-1).astype(mx.int32)
    depth = drafts.shape[1]
    right = (chosen[:, :depth] == drafts) & (mx.arange(depth)[None] < offered[:, None])
    return chosen, mx.cumprod(right.astype(mx.int32), axis=1).sum(axis=1).astype(mx.int32)
