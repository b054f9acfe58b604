"""The parts of the models, each against a plain formula of what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp import views
from mlx_gemma_mtp.config import CentroidSpec, DrafterConfig, MoESpec, QuantSpec, RopeSpec
from mlx_gemma_mtp.models.drafter import CentroidHead
from mlx_gemma_mtp.models.layers import Rotary
from mlx_gemma_mtp.models.linear import Linear, Stacked, Weights, WeightsError, gelu_gate, rms_norm
from mlx_gemma_mtp.models.moe import Experts
from mlx_gemma_mtp.sampling import greedy_choice
from mlx_gemma_mtp.views import attention

Array = npt.NDArray[Any]
EPS = 1e-6


def random(seed: int, *shape: int, scale: float = 1.0) -> mx.array:
    return mx.array(np.random.RandomState(seed).standard_normal(shape) * scale, mx.float32)


def wide(x: mx.array) -> Array:
    return np.array(x, dtype=np.float64)


def close(found: mx.array, expected: Array, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert np.abs(wide(found) - expected).max() <= tolerance * max(1.0, float(np.abs(expected).max()))


def weights(tensors: dict[str, mx.array], spec: QuantSpec | None = None) -> Weights:
    return Weights(tensors, lambda _: spec, mx.float32)


def pack(path: str, matrix: mx.array, spec: QuantSpec) -> dict[str, mx.array]:
    """A matrix as an MLX checkpoint stores it."""
    parts = mx.quantize(matrix, group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
    return {f"{path}.{name}": x for name, x in zip(("weight", "scales", "biases"), parts, strict=False)}


def unpack(tensors: dict[str, mx.array], path: str, spec: QuantSpec) -> Array:
    matrix = mx.dequantize(
        tensors[f"{path}.weight"],
        tensors[f"{path}.scales"],
        tensors.get(f"{path}.biases"),
        group_size=spec.group_size,
        bits=spec.bits,
        mode=spec.mode,
        dtype=mx.float32,
    )
    return wide(matrix)


AFFINE = QuantSpec(bits=4, group_size=32, mode="affine")
MXFP4 = QuantSpec(bits=4, group_size=32, mode="mxfp4")
NVFP4 = QuantSpec(bits=4, group_size=16, mode="nvfp4")
SPECS = [None, AFFINE, MXFP4, NVFP4]


def name_of(spec: QuantSpec | None) -> str:
    return "plain" if spec is None else spec.mode


# Centroid heads


def centroid_head(
    seed: int, vocab: int, hidden: int, count: int, top: int, spec: QuantSpec | None = None
) -> tuple[CentroidHead, Array, Array, Array]:
    """A random head with its embedding (vocab, hidden), centroids and the clusters' token ids."""
    order = np.random.RandomState(seed + 1).permutation(vocab)
    tensors = {
        "embed_tokens.weight": random(seed + 2, vocab, hidden),
        "masked_embedding.centroids.weight": random(seed + 3, count, hidden),
        "masked_embedding.token_ordering": mx.array(order, mx.int64),
    }
    embedding = wide(tensors["embed_tokens.weight"])
    if spec is not None:
        tensors |= pack("embed_tokens", tensors["embed_tokens.weight"], spec)
        embedding = unpack(tensors, "embed_tokens", spec)
    config = DrafterConfig(
        model_type="gemma4_assistant",
        vocab_size=vocab,
        hidden_size=hidden,
        backbone_hidden=hidden,
        layers=(),
        norm_eps=EPS,
        centroids=CentroidSpec(count=count, top_k=top),
        quantization=None,
    )
    w = weights(tensors, spec)
    assert config.centroids is not None
    head = CentroidHead(config.centroids, w, w.linear("embed_tokens", vocab, hidden), config)
    w.finish()
    centroids = wide(tensors["masked_embedding.centroids.weight"])
    return head, embedding, centroids, order.reshape(count, -1)


def over_the_vocabulary(x: Array, embedding: Array, centroids: Array, clusters: Array, top: int) -> Array:
    """Logits of all tokens, -inf for those whose cluster isn't among the `top` best fitting ones."""
    logits = x @ embedding.T
    out: Array = np.full_like(logits, -np.inf)
    for row, fit in enumerate(x @ centroids.T):
        for cluster in np.argsort(-fit, kind="stable")[:top]:
            ids = clusters[cluster]
            out[row, ids] = logits[row, ids]
    return out


@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 5),
    count=st.sampled_from([1, 2, 8, 16]),
    size=st.sampled_from([1, 3, 8]),
    data=st.data(),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_centroid_head_equals_a_masked_vocabulary(
    seed: int, rows: int, count: int, size: int, data: st.DataObject
) -> None:
    top = data.draw(st.integers(1, count))
    head, embedding, centroids, clusters = centroid_head(seed, count * size, 16, count, top)
    check_head(head, random(seed, rows, 16), embedding, centroids, clusters, top)


@pytest.mark.parametrize("spec", SPECS[1:], ids=name_of)
def test_centroid_head_of_a_quantized_embedding(spec: QuantSpec) -> None:
    head, embedding, centroids, clusters = centroid_head(5, 512, 64, 32, 4, spec)
    assert head.clusters.spec == spec
    check_head(head, random(6, 7, 64), embedding, centroids, clusters, 4)


def check_head(head: CentroidHead, x: mx.array, embedding: Array, centroids: Array, clusters: Array, top: int) -> None:
    expected = over_the_vocabulary(wide(x), embedding, centroids, clusters, top)
    scores, ids = head.scores(x)
    assert scores.shape == ids.shape == (x.shape[0], top * clusters.shape[1])
    for row in range(x.shape[0]):
        found = np.array(ids[row])
        assert sorted(found) == sorted(np.flatnonzero(expected[row] > -np.inf))
        assert np.abs(wide(scores[row]) - expected[row, found]).max() < 1e-4
    best = np.array(greedy_choice(*head.scores(x)))
    assert best.dtype == np.int32
    assert best.tolist() == expected.argmax(axis=-1).tolist()


def test_centroid_head_can_miss_the_best_token() -> None:
    """The restriction is real: with one cluster of many, the best of the whole vocabulary is often elsewhere."""
    head, embedding, *_ = centroid_head(1, 256, 16, 32, 1)
    x = random(2, 64, 16)
    best_of_all = (wide(x) @ embedding.T).argmax(axis=-1)
    assert (np.array(greedy_choice(*head.scores(x))) != best_of_all).sum() > 10


# Experts


def expert_tensors(seed: int, experts: int, inner: int, hidden: int) -> dict[str, mx.array]:
    """Google's form: gate and up rows in one stack."""
    norms = ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2")
    tensors = {f"layers.3.{name}.weight": 1 + random(seed + i, hidden, scale=0.2) for i, name in enumerate(norms)}
    return tensors | {
        "layers.3.router.proj.weight": random(seed + 5, experts, hidden, scale=2.0),
        "layers.3.router.scale": 1 + random(seed + 6, hidden, scale=0.2),
        "layers.3.router.per_expert_scale": 1 + random(seed + 7, experts, scale=0.3),
        "layers.3.experts.gate_up_proj.weight": random(seed + 8, experts, 2 * inner, hidden, scale=hidden**-0.5),
        "layers.3.experts.down_proj.weight": random(seed + 9, experts, hidden, inner, scale=inner**-0.5),
    }


def normed(x: Array, weight: Array | None = None) -> Array:
    y: Array = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS)
    return y if weight is None else y * weight


def gelu(x: Array) -> Array:
    value: Array = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return value


def expert_loop(tensors: dict[str, Array], x: Array, dense: Array, top: int) -> Array:
    """Token by token, expert by expert, in the order of transformers' modeling_gemma4.py."""
    t = {name.removeprefix("layers.3."): value for name, value in tensors.items()}
    hidden = x.shape[-1]
    out = np.zeros_like(x)
    for i, token in enumerate(x):
        scores = t["router.proj.weight"] @ (normed(token) * t["router.scale"] * hidden**-0.5)
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        chosen = np.argsort(-shares)[:top]
        fed = normed(token, t["pre_feedforward_layernorm_2.weight"])
        for expert in chosen:
            gate, up = np.split(t["experts.gate_up_proj.weight"][expert] @ fed, 2)
            value = t["experts.down_proj.weight"][expert] @ (gelu(gate) * up)
            out[i] += shares[expert] / shares[chosen].sum() * t["router.per_expert_scale"][expert] * value
    return normed(dense, t["post_feedforward_layernorm_1.weight"]) + normed(
        out, t["post_feedforward_layernorm_2.weight"]
    )


def split_stack(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    """MLX conversions' form: gate and up apart."""
    path = "layers.3.experts."
    gate, up = mx.split(tensors[f"{path}gate_up_proj.weight"], 2, axis=-2)
    rest = {name: x for name, x in tensors.items() if "gate_up" not in name}
    return rest | {f"{path}gate_proj.weight": gate, f"{path}up_proj.weight": up}


# Sorting starts at 64 pairs of a token and an expert: 63, 64, 65 and far more.
@pytest.mark.parametrize(
    ("experts", "top", "rows", "length"),
    [
        (8, 2, 1, 1),
        (8, 2, 3, 7),
        (7, 3, 3, 7),
        (8, 2, 2, 16),
        (8, 2, 1, 33),
        (16, 5, 1, 13),
        (8, 2, 4, 40),
        (1, 1, 2, 5),
        (1, 1, 2, 50),
        (4, 4, 1, 3),
        (4, 4, 1, 40),
        (6, 1, 1, 90),
    ],
)
@pytest.mark.parametrize("form", ["google", "mlx"])
def test_experts_equal_a_loop(experts: int, top: int, rows: int, length: int, form: str) -> None:
    hidden, inner = 24, 10
    tensors = expert_tensors(experts + length, experts, inner, hidden)
    expected_from = {name: wide(x) for name, x in tensors.items()}
    if form == "mlx":
        tensors = split_stack(tensors)
    w = weights(tensors)
    model = Experts(w, "layers.3", MoESpec(experts=experts, top_k=top, hidden=inner), hidden, EPS)
    w.finish()
    x, dense = random(1, rows, length, hidden, scale=3.0), random(2, rows, length, hidden)
    flat, flat_dense = wide(x).reshape(-1, hidden), wide(dense).reshape(-1, hidden)
    expected = expert_loop(expected_from, flat, flat_dense, top).reshape(rows, length, hidden)
    close(model(x, dense), expected, 2e-5)
    assert sum(a.nbytes for a in model.arrays) == sum(a.nbytes for a in tensors.values())


@pytest.mark.parametrize("spec", SPECS[1:], ids=name_of)
@pytest.mark.parametrize("form", ["google", "mlx"])
@pytest.mark.parametrize("length", [4, 48])
def test_quantized_experts_equal_a_loop(spec: QuantSpec, form: str, length: int) -> None:
    hidden, inner, experts, top = 64, 32, 8, 2
    tensors = expert_tensors(3, experts, inner, hidden)
    if form == "mlx":
        tensors = split_stack(tensors)
    dense_values = {name: wide(x) for name, x in tensors.items()}
    for name in list(tensors):
        path = name.removesuffix(".weight")
        if "_proj" in name or "router.proj" in name:
            tensors |= pack(path, tensors[name], spec)
            dense_values[name] = unpack(tensors, path, spec)
    if form == "mlx":
        parts = [dense_values.pop(f"layers.3.experts.{part}_proj.weight") for part in ("gate", "up")]
        dense_values["layers.3.experts.gate_up_proj.weight"] = np.concatenate(parts, axis=1)
    w = weights(tensors, spec)
    model = Experts(w, "layers.3", MoESpec(experts=experts, top_k=top, hidden=inner), hidden, EPS)
    w.finish()
    x, dense = random(1, 1, length, hidden), random(2, 1, length, hidden)
    expected = expert_loop(dense_values, wide(x)[0], wide(dense)[0], top)[None]
    close(model(x, dense), expected, 1e-4)


def test_routing_weights_are_renormalised_before_the_experts_own_scale() -> None:
    tensors = expert_tensors(11, 8, 10, 24)
    model = Experts(weights(tensors), "layers.3", MoESpec(experts=8, top_k=3, hidden=10), 24, EPS)
    chosen, found = model.route(random(12, 20, 24))
    assert all(len(set(row)) == 3 for row in chosen.tolist())  # type: ignore[arg-type,union-attr]
    scale = wide(tensors["layers.3.router.per_expert_scale"])
    close((found / mx.array(scale, mx.float32)[chosen]).sum(axis=-1), np.ones(20))


# RoPE


def turned(spec: RopeSpec, x: Array, positions: Array) -> Array:
    """Pair by pair, as a rotation in the plane."""
    half = spec.head_dim // 2
    out: Array = x.copy()
    for i in range(spec.rotated):
        angle = positions * (spec.theta ** (-2 * i / spec.head_dim) / spec.factor)
        cos, sin = np.cos(angle), np.sin(angle)
        low, high = x[..., i], x[..., i + half]
        out[..., i], out[..., i + half] = low * cos - high * sin, high * cos + low * sin
    return out


ROPES = [
    RopeSpec(theta=1e4, head_dim=16, rotated=8, factor=1.0),
    RopeSpec(theta=1e6, head_dim=32, rotated=4, factor=1.0),
    RopeSpec(theta=1e6, head_dim=64, rotated=8, factor=8.0),
    RopeSpec(theta=1e4, head_dim=8, rotated=0, factor=1.0),
]


@pytest.mark.parametrize("spec", ROPES, ids=lambda spec: f"{spec.head_dim}-{spec.rotated}")
@pytest.mark.parametrize("offsets", [[0], [7], [0, 1, 500], [3, 3000, 17, 40]])
def test_rope_equals_mlx_and_the_plane(spec: RopeSpec, offsets: list[int]) -> None:
    length, heads = 5, 3
    x = random(len(offsets), len(offsets), heads, length, spec.head_dim)
    positions = mx.array(offsets, mx.int32)[:, None] + mx.arange(length)[None]
    rotary = Rotary(spec)
    found = rotary.at(positions)(x)
    periods = mx.array([1 / a if a else float("inf") for a in spec.inverse_frequencies()], mx.float32)

    def fused(x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(x, spec.head_dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=periods)

    together = fused(x, mx.array(offsets, mx.int32))
    for row, offset in enumerate(offsets):
        expected = turned(spec, wide(x[row]), np.arange(offset, offset + length, dtype=np.float64))
        # Angles are float32: at position 3000 they are exact to 2e-4.
        tolerance = 2e-5 if offset < 100 else 1e-3
        close(found[row], expected, tolerance)
        close(found[row], wide(fused(x[row : row + 1], offset)[0]), tolerance)
        close(found[row], wide(together[row]), tolerance)
    untouched = [*range(spec.rotated, spec.head_dim // 2)]
    untouched += [i + spec.head_dim // 2 for i in untouched]
    assert (wide(found)[..., untouched] == wide(x)[..., untouched]).all()


def test_rope_keeps_the_type_and_depends_on_distance_alone() -> None:
    rotary = Rotary(ROPES[1])
    q, k = random(1, 1, 1, 1, 32), random(2, 1, 1, 1, 32)

    def score(i: int, j: int) -> float:
        at: Callable[[int], mx.array] = lambda p: mx.array([[p]], mx.int32)  # noqa: E731
        return float((rotary.at(at(i))(q) * rotary.at(at(j))(k)).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-3)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)
    assert rotary.at(mx.array([[3]]))(q.astype(mx.bfloat16)).dtype == mx.bfloat16


# Attention


@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    share=st.sampled_from([1, 2, 8]),
    length=st.integers(1, 5),
    keys=st.integers(1, 40),
    dim=st.sampled_from([16, 64]),
    common=st.booleans(),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_attention_equals_mlx(
    seed: int, batch: int, groups: int, share: int, length: int, keys: int, dim: int, common: bool
) -> None:
    q = random(seed, batch, groups * share, length, dim, scale=0.5)
    k, v = (random(seed + i, batch, groups, keys, dim) for i in (1, 2))
    seen = np.random.RandomState(seed).random_sample((1 if common else batch, 1, length, keys)) < 0.5
    seen[..., seed % keys] = True
    mask = mx.array(seen)
    found = attention(q, k, v, mask)
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=mask)
    close(found, wide(expected))
    # Keys that aren't seen don't matter, whatever they hold.
    hidden = np.asarray(~seen[:, 0].any(axis=1))
    noise = np.where(hidden[:, None, :, None], 1e4, 0.0)
    changed = attention(q, k + mx.array(noise, mx.float32), v + mx.array(noise, mx.float32), mask)
    assert (np.array(changed) == np.array(found)).all()


@pytest.mark.parametrize("share", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("length", [1, 2, 5, 9, 16, 17])
@pytest.mark.parametrize("dim", [64, 256, 512])
def test_blocks_are_split_for_the_vector_kernel(share: int, length: int, dim: int) -> None:
    """As on Metal, with what MLX does here: the parts are the whole, and none is too large."""
    calls = []
    whole = mx.fast.scaled_dot_product_attention

    def noted(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array) -> mx.array:
        calls.append(q.shape[2])
        return whole(q, k, v, scale=scale, mask=mask)

    q, (k, v) = random(1, 2, 2 * share, length, dim), (random(i, 2, 2, 40, dim) for i in (2, 3))
    mask = mx.arange(40)[None, None, None] <= (mx.arange(length) + 10)[None, None, :, None]
    with patch.object(mx.fast, "scaled_dot_product_attention", noted):
        found = views._fused(q, k, v, mask)
    close(found, wide(whole(q, k, v, scale=1.0, mask=mask)))
    assert sum(calls) == length
    if length <= 16 and dim <= 256:
        assert max(calls) <= 8
        assert max(calls) * share <= 32
    else:
        assert calls == [length], "a prompt's chunk, or heads that the kernel doesn't take"


def test_attention_gives_each_head_its_own_group() -> None:
    """Head h reads the keys of group h // (heads / groups)."""
    v = mx.broadcast_to(mx.arange(4, dtype=mx.float32)[None, :, None, None], (1, 4, 3, 8))
    out = attention(random(1, 1, 12, 2, 8), random(2, 1, 4, 3, 8), v, mx.ones((1, 1, 2, 3), mx.bool_))
    assert out[0, :, 0, 0].tolist() == pytest.approx([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])


# Matrices and pointwise formulas


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_rows_and_products_of_a_matrix(spec: QuantSpec | None) -> None:
    matrix = random(1, 48, 64)
    tensors, values = {"m.weight": matrix}, wide(matrix)
    if spec is not None:
        tensors = pack("m", matrix, spec)
        values = unpack(tensors, "m", spec)
    w = weights(tensors, spec)
    linear = w.linear("m", 48, 64)
    w.finish()
    x = random(2, 2, 3, 64)
    close(linear(x), wide(x) @ values.T)
    index = mx.array([[5, 0, 47], [5, 1, 2]])
    close(linear.rows(index), values[np.array(index)], 1e-6)
    assert linear.rows(index).dtype == mx.float32


def test_matrices_packed_alike_are_joined_and_others_are_not() -> None:
    eight = QuantSpec(bits=8, group_size=64, mode="affine")
    specs = {"a": AFFINE, "b": AFFINE, "c": eight, "e": AFFINE}
    sizes = {"a": 48, "b": 16, "c": 32, "e": 24}
    tensors: dict[str, mx.array] = {"d.weight": random(9, 8, 64)}
    values = {"d": wide(tensors["d.weight"])}
    for i, (path, spec) in enumerate(specs.items()):
        tensors |= pack(path, random(i, sizes[path], 64), spec)
        values[path] = unpack(tensors, path, spec)
    x = random(3, 2, 5, 64)
    for paths, products in (("ab", 1), ("abe", 1), ("ac", 2), ("abc", 3), ("d", 1), ("ad", 2)):
        w = Weights(tensors, specs.get, mx.float32)
        stacked: Stacked = w.stacked([*paths], [sizes.get(p, 8) for p in paths], 64)
        assert len(stacked.parts) == products
        for path, found in zip(paths, stacked(x), strict=True):
            close(found, wide(x) @ values[path].T)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, r"missing tensor: m\.weight of shape \(8, 64\)"),
        ({"m.weight": mx.zeros((64, 8))}, r"m\.weight has shape \(64, 8\), expected \(8, 64\)"),
        ({"m.weight": mx.zeros((8, 64), mx.uint8)}, r"m\.weight has dtype uint8, expected floating point"),
        ({"m.weight": mx.zeros((8, 64), mx.int32)}, r"m\.weight has dtype int32, expected floating point"),
        ({"m.weight": mx.zeros((8, 64))} | {"m.scales": mx.zeros((8, 2))}, r"expected \(8, 8\) for 4 bits"),
        ({"m.weight": mx.zeros((8, 8), mx.uint32), "m.scales": mx.zeros((8, 1))}, r"m\.scales has shape"),
        ({"m.weight": mx.zeros((8, 8), mx.uint32), "m.scales": mx.zeros((8, 2))}, r"missing tensor: m\.biases"),
        (
            {"m.weight": mx.zeros((8, 8)), "m.scales": mx.zeros((8, 2)), "m.biases": mx.zeros((8, 2))},
            r"m\.weight has dtype float32, expected uint32",
        ),
        (
            {
                "m.weight": mx.zeros((8, 8), mx.uint32),
                "m.scales": mx.zeros((8, 2), mx.uint8),
                "m.biases": mx.zeros((8, 2)),
            },
            r"m\.scales has dtype uint8, expected floating point",
        ),
    ],
)
def test_a_matrix_of_the_wrong_form_is_named(tensors: dict[str, mx.array], said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        weights(tensors, AFFINE).linear("m", 8, 64)


def test_scales_of_the_floating_point_modes_are_bytes() -> None:
    tensors = pack("m", random(1, 8, 64), MXFP4)
    assert weights(dict(tensors), MXFP4).linear("m", 8, 64).biases is None
    tensors["m.scales"] = tensors["m.scales"].astype(mx.float32)
    with pytest.raises(WeightsError, match=r"m\.scales has dtype float32, expected uint8"):
        weights(tensors, MXFP4).linear("m", 8, 64)


def test_what_no_layer_takes_is_named() -> None:
    w = weights({f"t{i:02}": mx.zeros(1) for i in range(11)})
    assert w.has("t00")
    w.take("t00", 1)
    assert not w.has("t00")
    with pytest.raises(WeightsError, match=r"unexpected tensors: t01, t02, .*t08 and 2 more"):
        w.finish()
    with pytest.raises(WeightsError, match="missing tensor: t00"):
        w.take("t00", 1)


def test_types_of_taken_tensors() -> None:
    tensors = {"f": mx.ones(2, mx.float16), "i": mx.array([3, 4], mx.int64), "u": mx.ones(2, mx.uint32)}
    w = Weights(tensors, lambda _: None, mx.bfloat16)
    assert w.take("f", 2).dtype == mx.bfloat16
    assert w.take("i", 2).tolist() == [3, 4]
    with pytest.raises(WeightsError, match="u has dtype uint32"):
        w.take("u", 2)


def test_pointwise_formulas() -> None:
    gate, up = random(1, 3, 40, scale=3.0), random(2, 3, 40)
    close(gelu_gate(gate, up), gelu(wide(gate)) * wide(up))
    far = mx.array([-1e13, -100.0, -10.0, -6.0, -0.0, 0.0, 6.0, 10.0, 100.0, 1e13])
    for dtype in (mx.float32, mx.bfloat16):
        x = far.astype(dtype)
        found = wide(gelu_gate(x, mx.ones(x.shape, dtype)).astype(mx.float32))
        assert np.allclose(
            found, gelu(wide(x.astype(mx.float32))), rtol=1e-6 if dtype == mx.float32 else 1e-2, atol=1e-6
        )
    weight = random(3, 40)
    close(rms_norm(gate, weight, EPS), normed(wide(gate), wide(weight)))
    close(rms_norm(gate, None, 0.5), wide(gate) / np.sqrt((wide(gate) ** 2).mean(-1, keepdims=True) + 0.5))
    assert gelu_gate(gate.astype(mx.bfloat16), up.astype(mx.bfloat16)).dtype == mx.bfloat16


def test_gathered_rows_of_a_mapped_matrix() -> None:
    """`map` rearranges packed matrices like plain ones."""
    order = mx.array([3, 1, 2, 0, 7, 6, 5, 4])
    matrix = random(1, 8, 64)
    tensors = pack("m", matrix, AFFINE)
    for linear in (Linear(matrix), weights(tensors, AFFINE).linear("m", 8, 64)):
        turned_rows = linear.map(lambda a: a[order])
        close(turned_rows.rows(mx.arange(8)), wide(linear.rows(order)), 1e-6)
        assert turned_rows.spec == linear.spec
