"""Gemma 4's MTP drafters ("assistants"). Knows nothing of verification, sampling laws or text."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..config import CentroidSpec, DrafterConfig
from ..views import HeldView
from .layers import Layer, Rotaries
from .linear import Linear, Weights, rms_norm

Choose = Callable[[mx.array, "mx.array | None"], mx.array]
"""Picks a token (R,) from scores (R, C) and the ids (R, C) they belong to (None: C is the vocabulary)."""


class Drafter:
    """A drafter bound to its target's `embed`: a chain of guesses from a token and the hidden state before it.

    It keeps no state and no K/V of its own: its layers read the target's cache.
    """

    def __init__(self, config: DrafterConfig, w: Weights, embed: Callable[[mx.array], mx.array]) -> None:
        self.config, self._embed = config, embed
        hidden = config.hidden_size
        self.into = w.linear("pre_projection", hidden, 2 * config.backbone_hidden)
        self.out = w.linear("post_projection", config.backbone_hidden, hidden)
        self.layers = [Layer(w, f"layers.{i}", spec, hidden, config.norm_eps) for i, spec in enumerate(config.layers)]
        self.norm = w.take("norm.weight", hidden)
        embedding = w.table("embed_tokens", config.vocab_size, hidden)
        self.head: CentroidHead | FullHead
        if config.centroids:
            self.head = CentroidHead(config.centroids, w, embedding, config)
        else:
            self.head = FullHead(embedding.for_products())
        self._ropes = Rotaries(config.layers)
        self.parameters = w.parameters

    @property
    def arrays(self) -> list[list[mx.array]]:
        """What it keeps in memory, in portions that may be loaded one after the other."""
        return [
            [*self.into.arrays, *self.out.arrays, self.norm],
            *(layer.arrays for layer in self.layers),
            self.head.arrays,
        ]

    def draft(self, token: mx.array, hidden: mx.array, view: HeldView, depth: int, choose: Choose) -> mx.array:
        """A chain of guesses (R, depth) after `token` (R,), which the cache doesn't hold yet.

        `hidden` (R, backbone) is the target's after its final norm at the last position held. Every step asks from
        the view's one position; the next step takes the guess's target embedding and the projected hidden state.
        `choose` makes the guess of scores (R, C) of the tokens ids (R, C), or of all (None).
        """
        ropes = self._ropes.at(view.positions)
        chain: list[mx.array] = []
        for _ in range(depth):
            x = self.into(mx.concatenate([self._embed(token), hidden], axis=-1))
            for layer in self.layers:
                x = layer(x, view, ropes)
            x = rms_norm(x, self.norm, self.config.norm_eps)
            hidden = self.out(x)
            token = choose(*self.head.scores(x))
            chain.append(token)
        return mx.stack(chain, axis=1) if chain else mx.zeros((token.shape[0], 0), mx.int32)


class FullHead:
    """Scores every token (12B, 26B-A4B, 31B)."""

    def __init__(self, embedding: Linear) -> None:
        self.embedding = embedding

    @property
    def arrays(self) -> list[mx.array]:
        """What it keeps in memory."""
        return self.embedding.arrays

    def scores(self, x: mx.array) -> tuple[mx.array, None]:
        """Scores (R, vocab) of all tokens for x (R, hidden)."""
        return self.embedding(x), None


class CentroidHead:
    """Scores only the tokens of the clusters whose centroids fit best (E2B, E4B).

    The embedding is kept in cluster order, so that a cluster is a small matrix and its scores one gathered product.
    """

    def __init__(self, spec: CentroidSpec, w: Weights, embedding: Linear, config: DrafterConfig) -> None:
        self.spec = spec
        self.centroids = w.linear("masked_embedding.centroids", spec.count, config.hidden_size)
        order = w.take("masked_embedding.token_ordering", config.vocab_size).astype(mx.int32)
        self.ids = order.reshape(spec.count, -1)
        self.clusters = embedding.map(lambda a: a[order].reshape(spec.count, -1, a.shape[-1]))

    @property
    def arrays(self) -> list[mx.array]:
        """What it keeps in memory."""
        return [*self.centroids.arrays, *self.clusters.arrays, self.ids]

    def scores(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Scores and token ids, (R, top_k * tokens per cluster) each, for x (R, hidden)."""
        fit = self.centroids(x)
        best = mx.argpartition(-fit, self.spec.top_k - 1, axis=-1)[:, : self.spec.top_k]
        scores = self.clusters.gathered(x[:, None, None, :], best)
        return scores.reshape(x.shape[0], -1), self.ids[best].reshape(x.shape[0], -1)
