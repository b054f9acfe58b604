"""Architectures, resolved once from a checkpoint's config.json. Knows nothing of MLX, tensors or files.

Every layer is described completely by its `LayerSpec`; no other module derives anything from a config again.
Hugging Face's key names appear only in the `from_hf` functions of this module and in `convert/names.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


class ConfigError(ValueError):
    """A config.json that can't be run: names the field, its value and what was expected."""


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding of one layer: pairs (i, i + head_dim / 2) for i < `rotated` turn, the others don't."""

    theta: float
    head_dim: int
    rotated: int
    factor: float

    def inverse_frequencies(self) -> list[float]:
        """`head_dim / 2` angles per position: theta^(-2i / head_dim) / factor, and 0 for pairs that don't turn."""
        turning = [self.theta ** (-2 * i / self.head_dim) / self.factor for i in range(self.rotated)]
        return turning + [0.0] * (self.head_dim // 2 - self.rotated)


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """Experts beside a dense MLP: `top_k` of `experts`, each of width `hidden`."""

    experts: int
    top_k: int
    hidden: int


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One decoder layer of a target or a drafter.

    `window` is the number of keys a query sees (itself included) or None for all; `kv_slot` is the index of the
    K/V buffer it attends to (`TargetConfig.kv_slots`), which it fills itself if `writes_kv`.
    """

    window: int | None
    heads: int
    head_dim: int
    kv_heads: int
    rope: RopeSpec
    mlp_hidden: int
    k_eq_v: bool
    kv_slot: int
    writes_kv: bool
    moe: MoESpec | None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ConfigError(f"{self.heads} attention heads can't be shared by {self.kv_heads} key/value heads")

    @property
    def kind(self) -> str:
        """"sliding" or "full"."""
        return "full" if self.window is None else "sliding"


@dataclass(frozen=True, kw_only=True)
class KVSlotSpec:
    """One K/V buffer: what a row keeps for one layer that writes. `layer` is that layer's index."""

    layer: int
    window: int | None
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How one weight matrix is quantized, in MLX's terms. `mode`: affine, mxfp4, mxfp8 or nvfp4."""

    bits: int
    group_size: int
    mode: str

    def __post_init__(self) -> None:
        fixed = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
        if self.mode in fixed and (self.bits, self.group_size) != fixed[self.mode]:
            raise ConfigError(f"quantization mode {self.mode} has bits, group_size {fixed[self.mode]}, got {self}")
        if self.mode not in fixed and (self.mode != "affine" or self.bits not in (2, 3, 4, 5, 6, 8)):
            raise ConfigError(f"quantization {self} isn't supported: expected affine (2-6, 8 bits), {', '.join(fixed)}")


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """The `quantization` entry of an MLX checkpoint: a default and overrides by module path, as written there."""

    default: QuantSpec
    overrides: tuple[tuple[str, QuantSpec], ...]

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Quantization | None:
        """Read `quantization` (MLX's); refuse other frameworks' `quantization_config`."""
        entry = data.get("quantization")
        if entry is None:
            other = data.get("quantization_config")
            if other is None:
                return None
            if "quant_method" in other or "group_size" not in other:
                raise ConfigError(
                    f"quantization_config.quant_method is {other.get('quant_method')!r}: expected unquantized weights "
                    "or an MLX checkpoint's `quantization`"
                )
            entry = other
        default = _quant_spec("quantization", entry)
        overrides = [
            (path, _quant_spec(f"quantization.{path}", value, default))
            for path, value in entry.items()
            if isinstance(value, Mapping)
        ]
        return cls(default=default, overrides=tuple(overrides))


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """A Gemma 4 text model. `per_layer_hidden` is 0 for models without per-layer embeddings."""

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    kv_slots: tuple[KVSlotSpec, ...]
    norm_eps: float
    softcap: float | None
    per_layer_hidden: int
    per_layer_vocab: int
    max_positions: int
    quantization: Quantization | None

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> TargetConfig:
        """Resolve a parsed config.json: Google's form, transformers' `per_layer_config` form, MLX conversions'."""
        model_type = str(data.get("model_type"))
        nested = {"gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text"}
        if model_type in nested:
            _check_unknown(data, _TOP_HARMLESS | {"text_config"}, "")
            text = _mapping(data, "text_config")
            if (inner := text.get("model_type", nested[model_type])) != nested[model_type]:
                raise ConfigError(f"text_config.model_type is {inner!r}, expected {nested[model_type]!r}")
            where = "text_config."
        elif model_type in nested.values():
            text, where = data, ""
        else:
            expected = ", ".join([*nested, *nested.values()])
            raise ConfigError(f"model_type is {model_type!r}, expected one of {expected}")
        reader = _Reader(text, where)
        reader.check(allow=_TOP_HARMLESS if not where else frozenset())
        layers, slots = reader.target_layers()
        return cls(
            model_type=model_type,
            vocab_size=reader.count("vocab_size"),
            hidden_size=reader.count("hidden_size"),
            layers=layers,
            kv_slots=slots,
            norm_eps=reader.number("rms_norm_eps"),
            softcap=reader.optional_number("final_logit_softcapping"),
            per_layer_hidden=reader.count("hidden_size_per_layer_input", 0, least=0),
            per_layer_vocab=reader.count("vocab_size_per_layer_input", reader.count("vocab_size"), least=0),
            max_positions=reader.count("max_position_embeddings"),
            quantization=Quantization.from_hf(data),
        )

    def last_slot(self, kind: str) -> int | None:
        """Index of the K/V buffer that the last writing layer of a kind ("sliding", "full") fills, or None."""
        found = [i for i, s in enumerate(self.kv_slots) if (s.window is None) == (kind == "full")]
        return found[-1] if found else None


@dataclass(frozen=True, kw_only=True)
class CentroidSpec:
    """A drafter head that scores only the tokens of the `top_k` best of `count` equally large token clusters."""

    count: int
    top_k: int


@dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """An MTP drafter, bound to its target: every layer reads a K/V buffer of the target's."""

    model_type: str
    vocab_size: int
    hidden_size: int
    backbone_hidden: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    centroids: CentroidSpec | None
    quantization: Quantization | None

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], target: TargetConfig) -> DrafterConfig:
        """Resolve a parsed config.json for `target`; refuse, with both values, a drafter that doesn't fit it."""
        model_type = str(data.get("model_type"))
        if model_type not in ("gemma4_assistant", "gemma4_unified_assistant"):
            raise ConfigError(f"model_type is {model_type!r}, expected gemma4_assistant or gemma4_unified_assistant")
        _check_unknown(data, _TOP_HARMLESS | _ASSISTANT_KEYS | {"text_config"}, "")
        reader = _Reader(_mapping(data, "text_config"), "text_config.")
        reader.check()
        top = _Reader(data, "")
        vocab = reader.count("vocab_size")
        _fits("backbone_hidden_size", top.count("backbone_hidden_size"), "hidden_size", target.hidden_size)
        _fits("vocab_size", vocab, "vocab_size", target.vocab_size)
        centroids = None
        if top.flag("use_ordered_embeddings"):
            centroids = CentroidSpec(count=top.count("num_centroids"), top_k=top.count("centroid_intermediate_top_k"))
            if vocab % centroids.count:
                raise ConfigError(f"num_centroids is {centroids.count}, expected a divisor of vocab_size = {vocab}")
            if centroids.top_k > centroids.count:
                raise ConfigError(f"centroid_intermediate_top_k is {centroids.top_k}, expected at most {centroids.count}")
        return cls(
            model_type=model_type,
            vocab_size=vocab,
            hidden_size=reader.count("hidden_size"),
            backbone_hidden=target.hidden_size,
            layers=reader.drafter_layers(target),
            norm_eps=reader.number("rms_norm_eps"),
            centroids=centroids,
            quantization=Quantization.from_hf(data),
        )


# Fields that don't change what the text model computes: ids, training and generation settings, other towers.
_TOP_HARMLESS = frozenset(
    "architectures audio_config vision_config dtype torch_dtype eos_token_id bos_token_id pad_token_id initializer_range "
    "model_type tie_word_embeddings transformers_version vision_soft_tokens_per_image quantization quantization_config "
    "_name_or_path is_encoder_decoder use_cache mlx_lm_version mlx_vlm_version text_model_type processor_class".split()
)
_ASSISTANT_KEYS = frozenset(
    "backbone_hidden_size use_ordered_embeddings num_centroids centroid_intermediate_top_k".split()
)
_TEXT_KNOWN = frozenset(
    "attention_bias attention_k_eq_v enable_moe_block final_logit_softcapping global_head_dim head_dim "
    "hidden_activation hidden_size hidden_size_per_layer_input intermediate_size layer_types max_position_embeddings "
    "moe_intermediate_size expert_intermediate_size num_attention_heads num_experts num_global_key_value_heads "
    "num_hidden_layers num_key_value_heads num_kv_shared_layers per_layer_config rms_norm_eps rope_parameters "
    "sliding_window tie_word_embeddings top_k_experts use_bidirectional_attention use_double_wide_mlp vocab_size "
    "vocab_size_per_layer_input".split()
)
_TEXT_HARMLESS = frozenset(
    "_name_or_path architectures attention_dropout bos_token_id chunk_size_feed_forward dtype torch_dtype eos_token_id "
    "id2label label2id initializer_range is_encoder_decoder model_type output_attentions output_hidden_states "
    "pad_token_id problem_type return_dict use_cache transformers_version".split()
)
_ID_FIELD = re.compile(r".*_token_(id|index)$")


def _check_unknown(data: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    for key, value in data.items():
        unset = value is None or value is False or value in ({}, [])
        if key not in known and not unset and not _ID_FIELD.match(key):
            raise ConfigError(f"{where}{key} = {value!r} is a field this runtime doesn't know, so it can't honour it")


def _mapping(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} is {value!r}, expected an object")
    return value


def _fits(name: str, value: object, of_target: str, expected: object) -> None:
    if value != expected:
        raise ConfigError(f"the drafter's {name} is {value}, the target's {of_target} is {expected}: not a pair")


def _quant_spec(where: str, entry: Mapping[str, Any], default: QuantSpec | None = None) -> QuantSpec:
    mode = entry.get("mode", "affine" if default is None or "bits" in entry else default.mode)
    for field in ("bits", "group_size"):
        if default is None and not isinstance(entry.get(field), int):
            raise ConfigError(f"{where}.{field} is {entry.get(field)!r}, expected a whole number")
    return QuantSpec(
        bits=entry.get("bits", default.bits if default else 0),
        group_size=entry.get("group_size", default.group_size if default else 0),
        mode=mode,
    )


class _Reader:
    """Reads typed fields of one config object and resolves its layers."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def _get(self, key: str, default: Any, ok: Callable[[Any], bool], expected: str) -> Any:
        value = self.data.get(key)
        value = default if value is None else value
        if value is None or not ok(value):
            raise ConfigError(f"{self.where}{key} is {value!r}, expected {expected}")
        return value

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        def is_count(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= least

        return int(self._get(key, default, is_count, f"a whole number of at least {least}"))

    def number(self, key: str) -> float:
        return float(self._get(key, None, lambda v: isinstance(v, (int, float)) and v > 0, "a number above 0"))

    def optional_number(self, key: str) -> float | None:
        return None if self.data.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        return bool(self._get(key, False, lambda v: isinstance(v, bool), "true or false"))

    def check(self, allow: frozenset[str] = frozenset()) -> None:
        """Refuse what would change the computation and isn't implemented, and what contradicts itself."""
        _check_unknown(self.data, _TEXT_KNOWN | _TEXT_HARMLESS | allow, self.where)
        fixed: dict[str, tuple[Any, ...]] = {
            "hidden_activation": ("gelu_pytorch_tanh", None),
            "attention_bias": (False, None),
            "tie_word_embeddings": (True, None),
            "use_bidirectional_attention": (None, "vision", False),
        }
        for key, allowed in fixed.items():
            if (value := self.data.get(key)) not in allowed:
                raise ConfigError(f"{self.where}{key} is {value!r}, expected {allowed[0]!r}")
        if not self.flag("enable_moe_block"):
            for key in ("num_experts", "top_k_experts", "moe_intermediate_size", "expert_intermediate_size"):
                if (value := self.data.get(key)) not in (None, 0):
                    raise ConfigError(f"{self.where}{key} is {value!r}, expected null as enable_moe_block is false")

    def kinds(self) -> list[str]:
        names = {"sliding_attention": "sliding", "full_attention": "full"}
        types = self._get("layer_types", None, lambda v: isinstance(v, list) and len(v) > 0, "a list of layer types")
        for i, name in enumerate(types):
            if name not in names:
                raise ConfigError(f"{self.where}layer_types[{i}] is {name!r}, expected one of {', '.join(names)}")
        if len(types) != (n := self.count("num_hidden_layers")):
            raise ConfigError(f"{self.where}layer_types has {len(types)} entries, num_hidden_layers is {n}")
        if types[-1] != "full_attention":
            raise ConfigError(f"{self.where}layer_types[-1] is {types[-1]!r}, expected 'full_attention'")
        return [names[t] for t in types]

    def rope(self, kind: str, head_dim: int) -> RopeSpec:
        key = f"{kind}_attention"
        table = self._get("rope_parameters", None, lambda v: isinstance(v, Mapping), "an object")
        params, where = table.get(key), f"{self.where}rope_parameters.{key}"
        if not isinstance(params, Mapping):
            raise ConfigError(f"{where} is {params!r}, expected an object")
        _check_unknown(params, frozenset(("rope_type", "rope_theta", "partial_rotary_factor", "factor")), where + ".")
        reader, kind_of_rope = _Reader(params, where + "."), params.get("rope_type", "default")
        share, factor = params.get("partial_rotary_factor", 1.0), params.get("factor", 1.0)
        if kind_of_rope == "default" and (share, factor) != (1.0, 1.0):
            raise ConfigError(f"{where} has partial_rotary_factor {share}, factor {factor}: expected 1 for rope_type default")
        if kind_of_rope not in ("default", "proportional"):
            raise ConfigError(f"{where}.rope_type is {kind_of_rope!r}, expected 'default' or 'proportional'")
        return RopeSpec(
            theta=reader.number("rope_theta"), head_dim=head_dim, rotated=int(share * head_dim // 2), factor=float(factor)
        )

    def attention_shape(self, index: int, kind: str) -> tuple[int, int]:
        """(head_dim, kv_heads) of a layer, from either of the two forms, which must agree if both are there."""
        head_dim, kv_heads = self.count("head_dim"), self.count("num_key_value_heads")
        google: tuple[int, int] | None = None
        if kind == "full" and self.data.get("global_head_dim") is not None:
            shared = self.data.get("num_global_key_value_heads") is not None and self.flag("attention_k_eq_v")
            google = (
                self.count("global_head_dim"),
                self.count("num_global_key_value_heads") if shared else kv_heads,
            )
        overrides = self.data.get("per_layer_config")
        if overrides is None:
            if kind == "full" and google is None:
                raise ConfigError(f"{self.where}global_head_dim and per_layer_config are both missing: expected one")
            return google or (head_dim, kv_heads)
        entry = overrides.get(str(index), overrides.get(index, {})) if isinstance(overrides, Mapping) else None
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{self.where}per_layer_config[{index}] is {entry!r}, expected an object")
        _check_unknown(entry, frozenset(("head_dim", "num_key_value_heads")), f"{self.where}per_layer_config[{index}].")
        layer = (int(entry.get("head_dim", head_dim)), int(entry.get("num_key_value_heads", kv_heads)))
        if google is not None and google != layer:
            raise ConfigError(
                f"{self.where}per_layer_config[{index}] says (head_dim, key/value heads) = {layer}, "
                f"global_head_dim and num_global_key_value_heads say {google}"
            )
        return layer

    def moe(self) -> MoESpec | None:
        if not self.flag("enable_moe_block"):
            return None
        spec = MoESpec(
            experts=self.count("num_experts"),
            top_k=self.count("top_k_experts"),
            hidden=self.count("moe_intermediate_size", self.data.get("expert_intermediate_size")),
        )
        if spec.top_k > spec.experts:
            raise ConfigError(f"{self.where}top_k_experts is {spec.top_k}, expected at most num_experts = {spec.experts}")
        return spec

    def _layer(self, index: int, kind: str, *, kv_slot: int, writes_kv: bool, mlp_hidden: int) -> LayerSpec:
        head_dim, kv_heads = self.attention_shape(index, kind)
        return LayerSpec(
            window=self.count("sliding_window") if kind == "sliding" else None,
            heads=self.count("num_attention_heads"),
            head_dim=head_dim,
            kv_heads=kv_heads,
            rope=self.rope(kind, head_dim),
            mlp_hidden=mlp_hidden,
            k_eq_v=kind == "full" and self.flag("attention_k_eq_v"),
            kv_slot=kv_slot,
            writes_kv=writes_kv,
            moe=self.moe(),
        )

    def target_layers(self) -> tuple[tuple[LayerSpec, ...], tuple[KVSlotSpec, ...]]:
        kinds = self.kinds()
        shared = self.count("num_kv_shared_layers", 0, least=0)
        writing = len(kinds) - shared
        if writing < 1:
            raise ConfigError(f"{self.where}num_kv_shared_layers is {shared}, expected fewer than {len(kinds)} layers")
        if missing := set(kinds[writing:]) - set(kinds[:writing]):
            raise ConfigError(f"{self.where}num_kv_shared_layers leaves no layer of kind {missing} that stores K/V")
        width = self.count("intermediate_size")
        wide = 2 * width if self.flag("use_double_wide_mlp") else width
        layers, slots = [], []
        for i, kind in enumerate(kinds):
            writes = i < writing
            slot = i if writes else max(j for j in range(writing) if kinds[j] == kind)
            layer = self._layer(i, kind, kv_slot=slot, writes_kv=writes, mlp_hidden=width if writes else wide)
            layers.append(layer)
            if writes:
                slots.append(
                    KVSlotSpec(layer=i, window=layer.window, kv_heads=layer.kv_heads, head_dim=layer.head_dim)
                )
        return tuple(layers), tuple(slots)

    def drafter_layers(self, target: TargetConfig) -> tuple[LayerSpec, ...]:
        kinds, layers = self.kinds(), []
        if (shared := self.data.get("num_kv_shared_layers")) not in (None, 0, len(kinds)):
            raise ConfigError(f"{self.where}num_kv_shared_layers is {shared}, expected all {len(kinds)} layers")
        if self.flag("enable_moe_block") or self.data.get("hidden_size_per_layer_input"):
            raise ConfigError(f"{self.where}: a drafter with experts or per-layer embeddings isn't supported")
        for i, kind in enumerate(kinds):
            slot = target.last_slot(kind)
            if slot is None:
                raise ConfigError(f"the drafter's layer {i} is {kind}, the target stores K/V only in other layer kinds")
            layer = self._layer(i, kind, kv_slot=slot, writes_kv=False, mlp_hidden=self.count("intermediate_size"))
            spec, rope = target.kv_slots[slot], target.layers[target.kv_slots[slot].layer].rope
            _fits(f"head_dim in {kind} layers", layer.head_dim, "head_dim there", spec.head_dim)
            _fits(f"key/value heads in {kind} layers", layer.kv_heads, "key/value heads there", spec.kv_heads)
            _fits("sliding window", layer.window, "sliding window", spec.window)
            _fits(f"RoPE in {kind} layers", layer.rope, "RoPE there", rope)
            layers.append(layer)
        return tuple(layers)
