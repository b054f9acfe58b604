"""Tensor names of every layout of a Gemma 4 checkpoint, as one total, pure mapping. Knows nothing of tensors.

Google's and transformers' names (`model.language_model.layers.0…`), text-only ones (`model.layers.0…`), those of
MLX conversions (`language_model.model.layers.0…`, experts under `switch_glu`) and the drafters' become the same:
`layers.0.self_attn.q_proj.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Skipped:
    """A tensor that the text model doesn't need, and the rule that says so."""

    rule: str


# Longest first: the first that fits is taken off.
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.")
_OTHER_TOWERS = (
    ("vision", re.compile(r"^(model\.)?(vision_tower|vision_embedder|embed_vision|multi_modal_projector)\.")),
    ("audio", re.compile(r"^(model\.)?(audio_tower|embed_audio)\.")),
)
_SHARED_KV = re.compile(r"^layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")
_EXPERTS = re.compile(r"^(layers\.\d+\.experts)\.(?:switch_glu\.)?(gate_up_proj|gate_proj|up_proj|down_proj)(\..+)?$")


def canonical(name: str, writes_kv: Callable[[int], bool]) -> str | Skipped:
    """The name that models use for a checkpoint's tensor `name`, or the rule by which it is skipped.

    `writes_kv(layer)` tells whether a layer stores K/V: the others' key and value matrices, which real E2B and E4B
    checkpoints still hold, are never read. A name of no known form comes back as it is, for the loader to refuse.
    """
    for tower, pattern in _OTHER_TOWERS:
        if pattern.match(name):
            return Skipped(f"{tower} tower: this runtime is for text")
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    if (shared := _SHARED_KV.match(name)) and not writes_kv(int(shared.group(1))):
        return Skipped("key/value weights of a layer that shares another's K/V")
    if name.endswith("rotary_emb.inv_freq"):
        return Skipped("RoPE frequencies, computed from the config")
    if experts := _EXPERTS.match(name):
        # Google's stacks carry no suffix.
        return f"{experts[1]}.{experts[2]}{experts[3] or '.weight'}"
    return name


def canonical_path(path: str) -> str:
    """The models' path for a module path of a checkpoint's `quantization` overrides."""
    mapped = canonical(f"{path}.weight", lambda _: True)
    return path if isinstance(mapped, Skipped) else mapped.removesuffix(".weight")


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where a converted tensor goes: its name in MLX's layout, and which of `parts` equal slices of its rows it is.

    `canonical` is the models' name; None for vision and audio tensors, which are copied as they are.
    """

    name: str
    canonical: str | None
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class MlxNames:
    """The names that mlx-lm and mlx-vlm use for a kind of checkpoint; every name has a destination or a rule."""

    prefix: str
    bare: tuple[str, ...] = ()

    def of(self, canonical_name: str) -> str:
        """MLX's name for a canonical one."""
        return canonical_name if canonical_name.startswith(self.bare) and self.bare else self.prefix + canonical_name

    def destinations(
        self, name: str, writes_kv: Callable[[int], bool], *, text_only: bool = False
    ) -> tuple[Destination, ...] | Skipped:
        """Where the checkpoint's tensor `name` goes: one place, two for gate and up in one, or none by a rule."""
        for tower, pattern in _OTHER_TOWERS:
            if pattern.match(name):
                if text_only:
                    return Skipped(f"{tower} tower: left out on request")
                return (Destination(name=name.removeprefix("model."), canonical=None),)
        found = canonical(name, writes_kv)
        if isinstance(found, Skipped):
            return found
        experts = _EXPERTS.match(found)
        if experts is None:
            return (Destination(name=self.of(found), canonical=found),)
        base, kind, suffix = f"{experts[1]}.switch_glu.", experts[2], experts[3] or ".weight"
        names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
        return tuple(
            Destination(
                name=self.of(f"{base}{n}{suffix}"),
                canonical=f"{base}{n}{suffix}",
                part=i,
                parts=len(names),
            )
            for i, n in enumerate(names)
        )


MLX_NAMES = {
    "gemma4": MlxNames("language_model.model."),
    "gemma4_unified": MlxNames("language_model.model."),
    "gemma4_text": MlxNames("model."),
    "gemma4_unified_text": MlxNames("model."),
    "gemma4_assistant": MlxNames("model.", ("pre_projection.", "post_projection.", "masked_embedding.")),
    "gemma4_unified_assistant": MlxNames("model.", ("pre_projection.", "post_projection.", "masked_embedding.")),
}
