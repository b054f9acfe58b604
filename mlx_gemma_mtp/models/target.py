"""Gemma 4 text models: 31B dense, 26B-A4B, 12B unified, E4B and E2B. Knows nothing of drafters, rounds or text."""

from __future__ import annotations

import mlx.core as mx

from ..config import TargetConfig
from ..views import KVView
from .layers import Layer, Rotaries
from .linear import Weights, rms_norm


class Target:
    """A target: tokens to hidden states through a view of the cache, hidden states to logits."""

    def __init__(self, config: TargetConfig, w: Weights) -> None:
        self.config = config
        hidden, per_layer = config.hidden_size, config.per_layer_hidden
        self.embedding = w.linear("embed_tokens", config.vocab_size, hidden)
        self.per_layer = PerLayerInputs(config, w) if per_layer else None
        self.layers = [
            Layer(w, f"layers.{i}", spec, hidden, config.norm_eps, per_layer) for i, spec in enumerate(config.layers)
        ]
        self.norm = w.take("norm.weight", hidden)
        self._ropes = Rotaries(config.layers)
        self.parameters = w.parameters
        # From this layer's queries on, nothing is stored any more: a prefill needs only the last position of it.
        self._last_writer = max(i for i, spec in enumerate(config.layers) if spec.writes_kv)

    @property
    def arrays(self) -> list[list[mx.array]]:
        """What it keeps in memory, in portions that may be loaded one after the other."""
        first = [*self.embedding.arrays, self.norm]
        return [
            first,
            self.per_layer.arrays if self.per_layer else [],
            *(layer.arrays for layer in self.layers),
        ]

    def embed(self, tokens: mx.array) -> mx.array:
        """Token embeddings times sqrt(hidden): tokens (...) -> (..., hidden)."""
        scale: float = self.config.hidden_size**0.5
        return self.embedding.rows(tokens) * scale

    def __call__(self, tokens: mx.array, view: KVView, *, last_only: bool = False) -> mx.array:
        """Hidden states after the final norm, (R, L, hidden), of tokens (R, L) at the view's positions.

        With `last_only`, just the view's last positions' (R, runs, hidden): the K/V of all are written all the same.
        """
        rows = tokens.shape[0]
        flat = tokens.reshape(-1)
        x = self.embed(flat)
        inputs = self.per_layer(flat, x) if self.per_layer else None
        ropes, last_ropes = self._ropes.at(view.positions, view.runs), None
        for i, layer in enumerate(self.layers):
            if last_only and i == self._last_writer:
                last_ropes = self._ropes.at(view.last(view.positions, 1), [1] * len(view.runs))
                if inputs is not None:
                    inputs = [view.last(y.reshape(rows, -1, y.shape[-1]), 1).reshape(-1, y.shape[-1]) for y in inputs]
            x = layer(x, view, ropes, None if inputs is None else inputs[i], last_ropes)
            if last_ropes is not None:
                ropes, last_ropes = last_ropes, None
        return rms_norm(x, self.norm, self.config.norm_eps).reshape(rows, -1, x.shape[-1])

    def unembed(self, hidden: mx.array) -> mx.array:
        """Logits (..., vocab) of hidden states (..., hidden), soft-capped: cap * tanh(logits / cap)."""
        logits = self.embedding(hidden)
        cap = self.config.softcap
        return logits if cap is None else mx.tanh(logits / cap) * cap


class PerLayerInputs:
    """The per-layer embeddings of E2B and E4B: a small input to every layer, from the token and its embedding."""

    def __init__(self, config: TargetConfig, w: Weights) -> None:
        self.config = config
        width = len(config.layers) * config.per_layer_hidden
        self.table = w.table("embed_tokens_per_layer", config.per_layer_vocab, width)
        self.projection = w.linear("per_layer_model_projection", width, config.hidden_size)
        self.norm = w.take("per_layer_projection_norm.weight", config.per_layer_hidden)

    @property
    def arrays(self) -> list[mx.array]:
        """What it keeps in memory."""
        return [*self.table.arrays, *self.projection.arrays, self.norm]

    def __call__(self, tokens: mx.array, embedded: mx.array) -> list[mx.array]:
        """tokens (N,), embedded (N, hidden) -> for each layer (N, P): the mean of both sources, times sqrt(2)."""
        layers = len(self.config.layers)
        shape = (tokens.shape[0], layers, -1)
        of_token: float = self.config.per_layer_hidden**0.5
        of_context: float = self.config.hidden_size**-0.5
        from_token = (self.table.rows(tokens) * of_token).reshape(shape)
        projected = (self.projection(embedded) * of_context).reshape(shape)
        half: float = 2.0**-0.5
        mean = (rms_norm(projected, self.norm, self.config.norm_eps) + from_token) * half
        return list(mx.split(mean.reshape(tokens.shape[0], -1), layers, axis=1))
