"""Gemma 4's mixture of experts, beside a dense MLP. Knows nothing of attention or caches."""

from __future__ import annotations

import mlx.core as mx

from ..config import MoESpec
from .linear import Stacked, Weights, gelu_gate, rms_norm

# From this many (token, expert) pairs on, sorting them by expert lets a matrix be read once for all of its tokens.
_SORT_FROM = 64


class Experts:
    """Router and experts of one layer. The router reads the residual stream itself, the experts its normed value."""

    def __init__(self, w: Weights, path: str, spec: MoESpec, hidden: int, eps: float) -> None:
        self.spec, self.eps, self.hidden = spec, eps, hidden
        self.router = w.linear(f"{path}.router.proj", spec.experts, hidden)
        self.router_scale = w.take(f"{path}.router.scale", hidden) * hidden**-0.5
        self.expert_scale = w.take(f"{path}.router.per_expert_scale", spec.experts)
        if w.has(f"{path}.experts.gate_up_proj.weight"):
            joined = w.table(f"{path}.experts.gate_up_proj", 2 * spec.hidden, hidden, spec.experts)
            self.gate_up = Stacked([joined], [spec.hidden] * 2)
        else:
            names = [f"{path}.experts.{n}_proj" for n in ("gate", "up")]
            self.gate_up = w.stacked(names, [spec.hidden] * 2, hidden, spec.experts)
        self.down = w.table(f"{path}.experts.down_proj", hidden, spec.hidden, spec.experts)
        names = [
            "post_feedforward_layernorm_1",
            "pre_feedforward_layernorm_2",
            "post_feedforward_layernorm_2",
        ]
        self.norms = [w.take(f"{path}.{n}.weight", hidden) for n in names]

    @property
    def arrays(self) -> list[mx.array]:
        """What it keeps in memory."""
        scales = [self.router_scale, self.expert_scale, *self.norms]
        return [*self.router.arrays, *self.gate_up.arrays, *self.down.arrays, *scales]

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Experts (N, top_k) of each token x (N, hidden) and their weights (N, top_k), float32.

        Weights are the softmax over all experts, renormalised over those chosen, times each expert's scale.
        """
        scores = self.router(rms_norm(x, None, self.eps) * self.router_scale)
        shares = mx.softmax(scores.astype(mx.float32), axis=-1)
        chosen = mx.argpartition(-shares, self.spec.top_k - 1, axis=-1)[:, : self.spec.top_k]
        weights = mx.take_along_axis(shares, chosen, axis=-1)
        return chosen, weights / weights.sum(axis=-1, keepdims=True) * self.expert_scale[chosen]

    def __call__(self, x: mx.array, dense: mx.array) -> mx.array:
        """x (..., hidden): the residual stream; dense: the dense MLP's output. Returns both branches' sum, normed."""
        after_dense, before_experts, after_experts = self.norms
        flat = x.reshape(-1, self.hidden)
        chosen, weights = self.route(flat)
        tokens = rms_norm(flat, before_experts, self.eps)
        order = None
        pairs, index = tokens[:, None, None, :], chosen
        if chosen.size >= _SORT_FROM:
            order = mx.argsort(chosen.reshape(-1))
            pairs, index = tokens[order // self.spec.top_k][:, None, :], chosen.reshape(-1)[order]
        gate, up = self.gate_up.gathered(pairs, index, in_order=order is not None)
        out = self.down.gathered(gelu_gate(gate, up), index, in_order=order is not None)
        if order is not None:
            out = out[mx.argsort(order)]
        out = out.reshape(*chosen.shape, self.hidden)
        mixed = (out * weights[..., None].astype(out.dtype)).sum(axis=1).reshape(x.shape)
        return rms_norm(dense, after_dense, self.eps) + rms_norm(mixed, after_experts, self.eps)
