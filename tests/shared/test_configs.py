"""The config.json of the ten official checkpoints, in Google's form and as transformers writes it."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_gemma_mtp.config import CentroidSpec, ConfigError, DrafterConfig, MoESpec, TargetConfig
from tests.shared import SIZES, config, needs_shared

pytestmark = needs_shared

# Layers, those that store K/V, windowless ones, hidden size, MLP, window, query heads, K/V heads (sliding, full).
TARGETS = {
    "E2B": (35, 15, 7, 1536, 6144, 512, 8, 1, 1),
    "E4B": (42, 24, 7, 2560, 10240, 512, 8, 2, 2),
    "12B": (48, 48, 8, 3840, 15360, 1024, 16, 8, 1),
    "26B-A4B": (30, 30, 5, 2816, 2112, 1024, 16, 8, 2),
    "31B": (60, 60, 10, 5376, 21504, 1024, 32, 16, 4),
}
# Target layers read (sliding, full), hidden size, MLP, query heads.
DRAFTERS = {
    "E2B": (13, 14, 256, 2048, 4),
    "E4B": (22, 23, 256, 2048, 4),
    "12B": (46, 47, 1024, 8192, 16),
    "26B-A4B": (28, 29, 1024, 8192, 16),
    "31B": (58, 59, 1024, 8192, 32),
}


def pair(size: str) -> tuple[TargetConfig, DrafterConfig]:
    target = TargetConfig.from_hf(config(f"gemma-4-{size}-it"))
    return target, DrafterConfig.from_hf(config(f"gemma-4-{size}-it-assistant"), target)


def as_transformers_writes(data: dict[str, Any]) -> dict[str, Any]:
    """The form of transformers 5.17: per layer what differs from the common values, numbers padded with zeros."""
    text = dict(data["text_config"])
    own = {"head_dim": text.pop("global_head_dim")}
    heads = text.pop("num_global_key_value_heads")
    if text["attention_k_eq_v"] and heads is not None:
        own["num_key_value_heads"] = heads
    full = [i for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
    digits = len(str(full[-1]))
    text["per_layer_config"] = {str(i).zfill(digits): dict(own) for i in full}
    return data | {"text_config": text}


@pytest.mark.parametrize("size", SIZES)
def test_every_layer_of_a_target(size: str) -> None:
    target, _ = pair(size)
    layers, writing, full, hidden, mlp, window, heads, kv_sliding, kv_full = TARGETS[size]
    assert (len(target.layers), len(target.kv_slots)) == (layers, writing)
    assert (target.hidden_size, target.vocab_size) == (hidden, 262144)
    assert (target.norm_eps, target.softcap, target.quantization) == (1e-6, 30.0, None)
    assert target.max_positions == (131072 if size in ("E2B", "E4B") else 262144)
    assert target.per_layer_hidden == (256 if size in ("E2B", "E4B") else 0)
    assert sum(spec.window is None for spec in target.layers) == full
    for i, spec in enumerate(target.layers):
        # Four sliding layers to a full one in E2B, five in the others.
        is_full = i % (5 if size == "E2B" else 6) == (4 if size == "E2B" else 5)
        assert spec.kind == ("full" if is_full else "sliding")
        assert spec.window == (None if is_full else window)
        assert spec.heads == heads
        assert spec.head_dim == spec.rope.head_dim == (512 if is_full else 256)
        assert spec.kv_heads == (kv_full if is_full else kv_sliding)
        assert spec.k_eq_v == (is_full and size not in ("E2B", "E4B"))
        assert (spec.rope.theta, spec.rope.rotated, spec.rope.factor) == (
            (1e6, 64, 1.0) if is_full else (1e4, 128, 1.0)
        )
        assert spec.writes_kv == (i < writing)
        assert spec.mlp_hidden == (12288 if size == "E2B" and i >= 15 else mlp)
        assert spec.moe == (MoESpec(experts=128, top_k=8, hidden=704) if size == "26B-A4B" else None)
        last = max(j for j in range(writing) if target.layers[j].kind == spec.kind)
        assert spec.kv_slot == (i if i < writing else last)
        slot = target.kv_slots[spec.kv_slot]
        assert (slot.layer, slot.window) == (spec.kv_slot, spec.window)
        assert (slot.kv_heads, slot.head_dim) == (spec.kv_heads, spec.head_dim)


@pytest.mark.parametrize("size", SIZES)
def test_every_layer_of_a_drafter(size: str) -> None:
    target, drafter = pair(size)
    sliding, full, hidden, mlp, heads = DRAFTERS[size]
    assert [target.kv_slots[spec.kv_slot].layer for spec in drafter.layers] == [sliding] * 3 + [full]
    assert [spec.window for spec in drafter.layers] == [target.layers[0].window] * 3 + [None]
    assert (drafter.hidden_size, drafter.backbone_hidden) == (hidden, target.hidden_size)
    for spec in drafter.layers:
        read = target.layers[target.kv_slots[spec.kv_slot].layer]
        assert not spec.writes_kv
        assert (spec.heads, spec.mlp_hidden, spec.moe) == (heads, mlp, None)
        assert (spec.head_dim, spec.kv_heads, spec.rope) == (read.head_dim, read.kv_heads, read.rope)
    centroids = CentroidSpec(count=2048, top_k=32) if size in ("E2B", "E4B") else None
    assert drafter.centroids == centroids


@pytest.mark.parametrize("size", SIZES)
def test_transformers_form_means_the_same(size: str) -> None:
    target, drafter = pair(size)
    rewritten = as_transformers_writes(config(f"gemma-4-{size}-it"))
    assert len(next(iter(rewritten["text_config"]["per_layer_config"]))) == 2
    assert TargetConfig.from_hf(rewritten) == target
    assistant = as_transformers_writes(config(f"gemma-4-{size}-it-assistant"))
    assert DrafterConfig.from_hf(assistant, target) == drafter


def test_other_published_configs() -> None:
    base, _ = pair("12B")
    assert TargetConfig.from_hf(config("gemma-4-12B")) == base
    target, drafter = pair("26B-A4B")
    qat = config("gemma-4-26B-A4B-it-qat-q4_0-unquantized-assistant")
    assert DrafterConfig.from_hf(qat, target) == drafter


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("other", SIZES)
def test_a_drafter_fits_its_own_target_only(size: str, other: str) -> None:
    target = TargetConfig.from_hf(config(f"gemma-4-{size}-it"))
    assistant = config(f"gemma-4-{other}-it-assistant")
    if size == other:
        DrafterConfig.from_hf(assistant, target)
        return
    with pytest.raises(ConfigError, match="backbone_hidden_size") as caught:
        DrafterConfig.from_hf(assistant, target)
    assert str(TARGETS[size][3]) in str(caught.value)
    assert str(TARGETS[other][3]) in str(caught.value)
