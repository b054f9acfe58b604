"""Could rounding explain that another token was chosen? Knows neither requests nor models."""

from __future__ import annotations

import math
import os

import mlx.core as mx

from ..sampling import History, Rows, Sampler

_IMPOSSIBLE = -1e29
_EPS = {d: float(mx.finfo(d).eps) for d in (mx.float32, mx.bfloat16, mx.float16)}


def rounding(scale: float, dtype: mx.Dtype, layers: int, hidden: int) -> float:
    """How far rounding may move one logit, where the largest at its position has magnitude `scale`.

    bfloat16 and float16: scale * eps * sqrt(layers) / 2. Products are accumulated in float32, so that each layer
    rounds its results only, and independent roundings add up as their root. float32: scale * eps * sqrt(layers *
    hidden) * 4, as the sums round, too. On a GPU that multiplies float32 as TF32, eps is 2**-10 and the first rule
    holds. Two tokens may change places where they are closer than twice this.
    """
    scale = max(scale, 1.0)
    if dtype != mx.float32:
        return scale * _EPS[dtype] * math.sqrt(layers) / 2
    if mx.default_device().type == mx.gpu and os.environ.get("MLX_ENABLE_TF32", "1") != "0":
        return scale * 2.0**-10 * math.sqrt(layers) / 2
    return scale * _EPS[mx.float32] * math.sqrt(layers * hidden) * 4


def number(x: mx.array) -> float:
    """The value of a single number."""
    value: float = x.item()  # type: ignore[assignment]
    return value


class Choice:
    """The choice of one token: logits (V,) after a history's edits, and the scores whose highest is chosen."""

    def __init__(self, logits: mx.array, history: History, allowed: mx.array | None = None) -> None:
        """`allowed` (V,): whether a constraint lets a token come."""
        self._size = int(logits.shape[-1])
        self._position = len(history.prompt) + len(history.output)
        self.temperature = history.params.temperature or 1.0
        self._rows: Rows | None = None
        self.logits = logits.astype(mx.float32)
        sampler = Sampler([history], self._size, mx.random.key(0))
        if sampler.layout is not None:
            self._rows = Rows(sampler.layout, sampler.arrays)
            self.logits = self._rows.edit(self.logits[None, None], mx.zeros((1, 0), mx.int32))[0, 0]
        if allowed is not None:
            self.logits = mx.where(allowed, self.logits, -1e30)

    def scores(self, logits: mx.array | None = None) -> mx.array:
        """Scores (V,) of edited logits (default: its own), -1e30 for tokens that can't be chosen."""
        logits = self.logits if logits is None else logits
        if self._rows is None:
            return logits
        x, ids = self._rows.filtered(logits[None, None])
        x = x + self._rows.noise(mx.array([[self._position]]), ids, x.shape[-1])
        if ids is None:
            return x[0, 0]
        scores = mx.full((self._size,), -1e30)
        scores[ids[0, 0]] = x[0, 0]
        return scores

    def within_reach(self, token: int, tolerance: float) -> bool:
        """Whether logits that are each off by at most `tolerance` could have made `token` the choice.

        The two ways that help a token most are tried: it rises while all others sink; or those before it sink while
        it and all behind it rise, which is what brings a token into top-p.
        """
        own = self.logits[token]
        alone = mx.where(mx.arange(self._size) == token, tolerance, -tolerance)
        together = mx.where(self.logits > own, -tolerance, tolerance)
        for nudge in (alone, together):
            scores = self.scores(self.logits + nudge)
            if (scores[token] >= scores.max()).item() and (scores[token] > _IMPOSSIBLE).item():
                return True
        return False

    def margin(self, a: int, b: int) -> tuple[float, bool]:
        """By how much `a` leads `b`, in logits, and whether sampling leaves one of them out; see `Difference`."""
        scores = self.scores()
        excluded = bool((mx.minimum(scores[a], scores[b]) < _IMPOSSIBLE).item())
        gap = (self.logits[a] - self.logits[b]) if excluded else (scores[a] - scores[b]) * self.temperature
        return number(gap), excluded
