"""The config.json of a conversion: the source's, and what its readers would guess wrong. Knows nothing of tensors.

mlx-lm and mlx-vlm take E2B's values for fields that are missing, and know Google's form of a config only; what
transformers leaves out or says per layer is therefore written out. Official configs come through unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import LayerSpec, QuantSpec

_MLX_LM_VOCABULARY = 262_144
"""What mlx-lm assumes for a multimodal config without a `vocab_size` of its own, whatever `text_config` says."""

_WRAPPED = ("gemma4", "gemma4_unified")


def output_config(
    data: Mapping[str, Any],
    layers: tuple[LayerSpec, ...],
    used: Mapping[str, QuantSpec],
    common: QuantSpec | None,
    *,
    text_only: bool,
) -> dict[str, Any]:
    """The config of a model whose matrices are packed as `used` says, by module path; `common` is the entry's default.

    `data` is the source's config, `layers` its resolved layers. float32 weights have become bfloat16.
    """
    config = {k: v for k, v in data.items() if k not in ("quantization", "quantization_config")}
    if "text_config" in config:
        config["text_config"] = dict(config["text_config"])
    text = config.get("text_config", config)
    for place in (config, text):
        for key in ("dtype", "torch_dtype"):
            if place.get(key) in ("float32", "float64"):
                place[key] = "bfloat16"
    _complete(text, layers)
    if config["model_type"] in _WRAPPED and text["vocab_size"] != _MLX_LM_VOCABULARY:
        config["vocab_size"] = text["vocab_size"]
    if text_only and "audio_config" in config:
        config["audio_config"] = None
    if text_only or config.get("vision_config") is None:
        # mlx-vlm can't read null here; without the key it builds a tower and drops it, as it has no weights.
        config.pop("vision_config", None)
    if used and common is not None:
        entry = _spec_entry(common)
        entry |= {path: _spec_entry(spec) for path, spec in sorted(used.items()) if spec != common}
        config["quantization"] = config["quantization_config"] = entry
    return config


def _complete(text: dict[str, Any], layers: tuple[LayerSpec, ...]) -> None:
    """Write out what is missing, and Google's fields for full layers where only `per_layer_config` says them."""
    missing = {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": text["vocab_size"],
        "num_kv_shared_layers": sum(not layer.writes_kv for layer in layers),
        "use_double_wide_mlp": False,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "final_logit_softcapping": None,
    }
    text |= {key: value for key, value in missing.items() if text.get(key) is None}
    shapes = {(s.head_dim, s.kv_heads, s.k_eq_v) for s in layers if s.window is None}
    if text.get("global_head_dim") is None and len(shapes) == 1:
        head_dim, kv_heads, k_eq_v = shapes.pop()
        # Google's form has key/value heads of full layers only where keys are values.
        if k_eq_v or kv_heads == text["num_key_value_heads"]:
            text["global_head_dim"] = head_dim
            text["num_global_key_value_heads"] = kv_heads if k_eq_v else None


def _spec_entry(spec: QuantSpec) -> dict[str, Any]:
    return {"group_size": spec.group_size, "bits": spec.bits, "mode": spec.mode}
