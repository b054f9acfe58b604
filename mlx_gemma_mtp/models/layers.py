"""The decoder layer that targets and drafters share. Knows nothing of files, how caches grow, or loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import mlx.core as mx

from ..config import LayerSpec, RopeSpec
from ..views import KVView
from .linear import Linear, Weights, fused_kernels, gelu_gate, rms_norm
from .moe import Experts


class Rotary:
    """Rotary position embedding (Su et al., arXiv 2104.09864), halves paired, with per-row positions."""

    def __init__(self, spec: RopeSpec) -> None:
        self.spec = spec
        angles = spec.inverse_frequencies()
        self._frequencies = mx.array(angles, mx.float32)
        self._periods = mx.array([1 / a if a else float("inf") for a in angles], mx.float32)

    def at(self, positions: mx.array, runs: Sequence[int] = ()) -> Callable[[mx.array], mx.array]:
        """A function that turns x (R, H, L, D) to `positions` (R, L), consecutive within `runs` of L (none: in all)."""
        if fused_kernels():
            runs = runs or [positions.shape[1]]
            ends = [sum(runs[: i + 1]) for i in range(len(runs))]
            offsets = [positions[:, end - run] for run, end in zip(runs, ends, strict=True)]
            return partial(self._fused_runs, ends[:-1], offsets)
        angles = positions[:, None, :, None].astype(mx.float32) * self._frequencies
        return partial(self._formula, mx.cos(angles), mx.sin(angles))

    def _fused_runs(self, ends: Sequence[int], offsets: Sequence[mx.array], x: mx.array) -> mx.array:
        if not ends:
            return self._fused(offsets[0], x)
        parts = mx.split(x, ends, axis=2)
        return mx.concatenate([self._fused(o, part) for o, part in zip(offsets, parts, strict=True)], axis=2)

    def _fused(self, offset: mx.array, x: mx.array) -> mx.array:
        return mx.fast.rope(
            x, self.spec.head_dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._periods
        )

    def _formula(self, cos: mx.array, sin: mx.array, x: mx.array) -> mx.array:
        low, high = mx.split(x.astype(mx.float32), 2, axis=-1)
        return mx.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


class Rotaries:
    """The RoPE of each distinct spec in a model, computed once per forward."""

    def __init__(self, layers: Sequence[LayerSpec]) -> None:
        self._all = {layer.rope: Rotary(layer.rope) for layer in layers}

    def at(self, positions: mx.array, runs: Sequence[int] = ()) -> dict[RopeSpec, Callable[[mx.array], mx.array]]:
        """The function to apply, by spec; see `Rotary.at`."""
        return {spec: rotary.at(positions, runs) for spec, rotary in self._all.items()}


class Layer:
    """One decoder layer: attention, MLP (with experts beside it), per-layer input, a scalar over the whole stream."""

    def __init__(self, w: Weights, path: str, spec: LayerSpec, hidden: int, eps: float, per_layer: int = 0) -> None:
        self.spec, self.eps = spec, eps
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        names, sizes = ["q_proj"], [queries]
        if spec.writes_kv:
            names.append("k_proj")
            sizes.append(keys)
            if not spec.k_eq_v:
                names.append("v_proj")
                sizes.append(keys)
        self.qkv = w.stacked([f"{path}.self_attn.{n}" for n in names], sizes, hidden)
        self.out = w.linear(f"{path}.self_attn.o_proj", hidden, queries)
        self.q_norm = w.take(f"{path}.self_attn.q_norm.weight", spec.head_dim)
        self.k_norm = w.take(f"{path}.self_attn.k_norm.weight", spec.head_dim) if spec.writes_kv else None
        norms = [
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ]
        self.norms = [w.take(f"{path}.{n}.weight", hidden) for n in norms]
        self.gate_up = w.stacked([f"{path}.mlp.{n}_proj" for n in ("gate", "up")], [spec.mlp_hidden] * 2, hidden)
        self.down = w.linear(f"{path}.mlp.down_proj", hidden, spec.mlp_hidden)
        self.experts = Experts(w, path, spec.moe, hidden, eps) if spec.moe else None
        self.per_layer: tuple[Linear, Linear, mx.array] | None = None
        if per_layer:
            self.per_layer = (
                w.linear(f"{path}.per_layer_input_gate", per_layer, hidden),
                w.linear(f"{path}.per_layer_projection", hidden, per_layer),
                w.take(f"{path}.post_per_layer_input_norm.weight", hidden),
            )
        self.scalar = w.take(f"{path}.layer_scalar", 1)

    @property
    def arrays(self) -> list[mx.array]:
        """What it keeps in memory."""
        parts = [*self.qkv.arrays, *self.out.arrays, *self.gate_up.arrays, *self.down.arrays, *self.norms]
        parts += [self.q_norm, self.scalar, *([] if self.k_norm is None else [self.k_norm])]
        if self.per_layer:
            parts += [*self.per_layer[0].arrays, *self.per_layer[1].arrays, self.per_layer[2]]
        return parts + (self.experts.arrays if self.experts else [])

    def __call__(
        self,
        x: mx.array,
        view: KVView,
        ropes: Mapping[RopeSpec, Callable[[mx.array], mx.array]],
        per_layer_input: mx.array | None = None,
        last_ropes: Mapping[RopeSpec, Callable[[mx.array], mx.array]] | None = None,
    ) -> mx.array:
        """x (R * L, hidden) at the view's positions, per_layer_input (R * L, P); returns (R * L, hidden).

        With `last_ropes`, those of the view's last positions, only their outputs are computed, (R * runs, hidden),
        from their own per_layer_input (R * runs, P); the K/V of all positions are written all the same. Rows and
        positions are one axis, as every product would else join and part them.
        """
        before_attention, after_attention, before_mlp, after_mlp = self.norms
        rope, last = self.spec.rope, last_ropes is not None
        query_rope = ropes[rope] if last_ropes is None else last_ropes[rope]
        attended = self._attend(rms_norm(x, before_attention, self.eps), view, ropes[rope], query_rope, last)
        if last:
            x = view.last(x.reshape(view.positions.shape[0], -1, x.shape[-1]), 1).reshape(-1, x.shape[-1])
        x = x + rms_norm(attended, after_attention, self.eps)
        gate, up = self.gate_up(rms_norm(x, before_mlp, self.eps))
        y = self.down(gelu_gate(gate, up))
        if self.experts:
            y = self.experts(x, y)
        x = x + rms_norm(y, after_mlp, self.eps)
        if self.per_layer and per_layer_input is not None:
            into, out, norm = self.per_layer
            x = x + rms_norm(out(gelu_gate(into(x), per_layer_input)), norm, self.eps)
        return x * self.scalar

    def _attend(
        self,
        x: mx.array,
        view: KVView,
        rope: Callable[[mx.array], mx.array],
        query_rope: Callable[[mx.array], mx.array],
        last: bool,
    ) -> mx.array:
        q, *kv = (self._heads(y, view.positions.shape[0]) for y in self.qkv(x))
        q = query_rope(rms_norm(view.last(q, 2) if last else q, self.q_norm, self.eps))
        pair = None
        if self.k_norm is not None:
            # Where keys and values share a projection (k_eq_v) they still differ: only keys are scaled and turned.
            pair = rope(rms_norm(kv[0], self.k_norm, self.eps)), rms_norm(kv[-1], None, self.eps)
        out = view.attend(self.spec.kv_slot, q, pair)
        return self.out(out.swapaxes(1, 2).reshape(out.shape[0] * out.shape[2], -1))

    def _heads(self, x: mx.array, rows: int) -> mx.array:
        return x.reshape(rows, x.shape[0] // rows, -1, self.spec.head_dim).swapaxes(1, 2)
