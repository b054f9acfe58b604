"""Copies of a target's directory that mlx-lm and mlx-vlm load right. Knows no processes and no speed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def weights_of(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    return sorted(directory.glob("*.safetensors"))


def copy_for_mlx_lm(target: Path, into: Path) -> Path:
    """A directory that mlx-lm loads right: it takes the vocabulary's size from the outer config alone."""
    config = json.loads((target / "config.json").read_text())
    config.setdefault("vocab_size", config.get("text_config", config)["vocab_size"])
    return _linked_copy(target, into, config)


def copy_for_mlx_vlm(target: Path, into: Path) -> Path:
    """A directory that mlx-vlm loads: it wants a vision tower, so one without gets a tiny one that nothing uses."""
    config = json.loads((target / "config.json").read_text())
    if config.get("model_type") != "gemma4" or config.get("vision_config"):
        return target
    config["vision_config"] = _VISION
    into = _linked_copy(target, into, config)
    _save_vision_tower(into / "vision.safetensors", config["text_config"]["hidden_size"])
    return into


_VISION: dict[str, Any] = {
    "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 16,
    "position_embedding_size": 64, "pooling_kernel_size": 3, "rms_norm_eps": 1e-6,
    "use_clipped_linears": False, "standardize": False,
    "hidden_activation": "gelu_pytorch_tanh", "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
}  # fmt: skip


def _linked_copy(target: Path, into: Path, config: Mapping[str, Any]) -> Path:
    into.mkdir(parents=True)
    for file in weights_of(target):
        (into / file.name).symlink_to(file.resolve())
    (into / "config.json").write_text(json.dumps(config))
    return into


def _save_vision_tower(file: Path, text_hidden: int) -> None:
    import mlx.core as mx

    hidden, mlp, head = _VISION["hidden_size"], _VISION["intermediate_size"], _VISION["head_dim"]
    places = _VISION["position_embedding_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embed_vision.embedding_projection.weight": (text_hidden, hidden),
        "vision_tower.patch_embedder.input_proj.weight": (hidden, 3 * _VISION["patch_size"] ** 2),
        "vision_tower.patch_embedder.position_embedding_table": (2, places, hidden),
    }
    layer = "vision_tower.encoder.layers.0"
    for name, shape in (("gate", (mlp, hidden)), ("up", (mlp, hidden)), ("down", (hidden, mlp))):
        shapes[f"{layer}.mlp.{name}_proj.linear.weight"] = shape
    shapes |= {f"{layer}.self_attn.{n}_proj.linear.weight": (hidden, hidden) for n in "qkvo"}
    shapes |= {f"{layer}.self_attn.{n}_norm.weight": (head,) for n in "qk"}
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        shapes[f"{layer}.{norm}_layernorm.weight"] = (hidden,)
    mx.random.seed(0)
    mx.save_safetensors(str(file), {f"model.{n}": 0.02 * mx.random.normal(s) for n, s in shapes.items()})
