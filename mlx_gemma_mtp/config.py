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

    def __post_init__(self) -> None:
        if self.head_dim % 2 or not 0 <= self.rotated <= self.head_dim // 2:
            raise ConfigError(f"{self.rotated} pairs can't turn in a head of {self.head_dim}: expected an even size")

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
        """ "sliding" or "full"."""
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
        affine = self.mode == "affine" and self.bits in (2, 3, 4, 5, 6, 8) and self.group_size in (32, 64, 128)
        if self.mode not in fixed and not affine:
            raise ConfigError(
                f"quantization {self} isn't supported: expected affine (2-6, 8 bits in groups of 32, 64, 128), "
                f"{', '.join(fixed)}"
            )


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """The `quantization` entry of an MLX checkpoint: a default and overrides by module path, as written there."""

    default: QuantSpec
    overrides: tuple[tuple[str, QuantSpec], ...]

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> Quantization | None:
        """Read MLX's `quantization`, or its copy in `quantization_config`; refuse other frameworks' entries."""
        given = {key: _mapping(data, key) for key in _QUANTIZATIONS if data.get(key) is not None}
        if not given:
            return None
        entry, copy = given.get("quantization"), given.get("quantization_config")
        # Beside MLX's own entry, that of the checkpoint it was converted from says nothing about these weights.
        foreign = copy is not None and ("quant_method" in copy or "group_size" not in copy)
        if entry is not None and copy is not None and not foreign and entry != copy:
            raise ConfigError("quantization and quantization_config differ: expected one, or the same twice")
        if entry is None and copy is not None:
            if foreign:
                raise ConfigError(
                    f"quantization_config.quant_method is {copy.get('quant_method')!r}: expected unquantized weights "
                    "or an MLX checkpoint's `quantization`"
                )
            entry = copy
        assert entry is not None
        paths = [path for path, value in entry.items() if isinstance(value, Mapping)]
        # true and false: quantized by default, or not at all; the tensors tell as much.
        defaults = {k: v for k, v in entry.items() if k not in paths and not isinstance(v, bool)}
        default = _quant_spec("quantization", defaults)
        overrides = [(path, _quant_spec(f"quantization.{path}", entry[path], default)) for path in paths]
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
            _check_top(data, frozenset(("text_config",)))
            text, where = _text_config(data, nested[model_type]), "text_config."
        elif model_type in nested.values():
            text, where = data, ""
        else:
            expected = ", ".join([*nested, *nested.values()])
            raise ConfigError(f"model_type is {model_type!r}, expected one of {expected}")
        reader = _Reader(text, where)
        reader.check(allow=_TOP_HARMLESS if not where else frozenset())
        layers, slots = reader.target_layers()
        vocab = reader.count("vocab_size")
        per_layer_hidden = reader.count("hidden_size_per_layer_input", 0, least=0)
        per_layer_vocab = reader.count("vocab_size_per_layer_input", vocab, least=0)
        if per_layer_hidden and per_layer_vocab < vocab:
            raise ConfigError(
                f"{where}vocab_size_per_layer_input is {per_layer_vocab}, expected at least vocab_size = {vocab}"
            )
        return cls(
            model_type=model_type,
            vocab_size=vocab,
            hidden_size=reader.count("hidden_size"),
            layers=layers,
            kv_slots=slots,
            norm_eps=reader.number("rms_norm_eps"),
            softcap=reader.optional_number("final_logit_softcapping"),
            per_layer_hidden=per_layer_hidden,
            per_layer_vocab=per_layer_vocab,
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
        nested = {"gemma4_assistant": "gemma4_text", "gemma4_unified_assistant": "gemma4_unified_text"}
        if model_type not in nested:
            raise ConfigError(f"model_type is {model_type!r}, expected {' or '.join(nested)}")
        _check_top(data, _ASSISTANT_KEYS | {"text_config"})
        reader = _Reader(_text_config(data, nested[model_type]), "text_config.")
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
                raise ConfigError(
                    f"centroid_intermediate_top_k is {centroids.top_k}, expected at most {centroids.count}"
                )
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
    "architectures audio_config vision_config dtype torch_dtype eos_token_id bos_token_id pad_token_id "
    "initializer_range model_type tie_word_embeddings transformers_version vision_soft_tokens_per_image "
    "quantization quantization_config "
    "_name_or_path is_encoder_decoder use_cache mlx_lm_version mlx_vlm_version text_model_type processor_class "
    "attn_implementation _attn_implementation _attn_implementation_autoset image_seq_length model_name unsloth_version "
    "unsloth_fixed hidden_size vocab_size generation_config".split()
)
_QUANTIZATIONS = ("quantization", "quantization_config")
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
    "pad_token_id problem_type return_dict use_cache transformers_version max_length min_length do_sample "
    "early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p "
    "repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences".split()
)
_ID_FIELD = re.compile(r".*_token_(id|index)$")


def _check_unknown(data: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    for key, value in data.items():
        unset = value is None or value is False or value in ({}, [])
        if key not in known and not unset and not _ID_FIELD.match(key):
            raise ConfigError(f"{where}{key} = {value!r} is a field this runtime doesn't know, so it can't honour it")


def _check_top(data: Mapping[str, Any], known: frozenset[str]) -> None:
    """Check the level around a `text_config`."""
    _check_unknown(data, _TOP_HARMLESS | _TEXT_HARMLESS | known, "")
    _check_fixed(data, {"tie_word_embeddings": (True, None)}, "")


def _check_fixed(data: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]], where: str) -> None:
    for key, allowed in fixed.items():
        if (value := data.get(key)) not in allowed:
            raise ConfigError(f"{where}{key} is {value!r}, expected {allowed[0]!r}")


def _text_config(data: Mapping[str, Any], model_type: str) -> Mapping[str, Any]:
    text = _mapping(data, "text_config")
    _check_fixed(text, {"model_type": (model_type, None)}, "text_config.")
    return text


def _mapping(data: Mapping[str, Any], key: str, where: str = "") -> Mapping[str, Any]:
    value = data.get(key)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}{key} is {value!r}, expected an object")
    return value


def _fits(name: str, value: object, of_target: str, expected: object) -> None:
    if value != expected:
        raise ConfigError(f"the drafter's {name} is {value}, the target's {of_target} is {expected}: not a pair")


def _quant_spec(where: str, entry: Mapping[str, Any], default: QuantSpec | None = None) -> QuantSpec:
    _check_unknown(entry, frozenset(("bits", "group_size", "mode")), where + ".")
    reader = _Reader(entry, where + ".")
    try:
        return QuantSpec(
            bits=reader.count("bits", default.bits if default else None),
            group_size=reader.count("group_size", default.group_size if default else None),
            mode=entry.get("mode", "affine" if default is None or "bits" in entry else default.mode),
        )
    except ConfigError as e:
        raise e if where in str(e) else ConfigError(f"{where}: {e}") from e


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

    def number(self, key: str, default: float | None = None) -> float:
        def is_number(value: Any) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")

        return float(self._get(key, default, is_number, "a number above 0"))

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
        _check_fixed(self.data, fixed, self.where)
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
        table, where = _mapping(self.data, "rope_parameters", self.where), f"{self.where}rope_parameters"
        _check_unknown(table, frozenset(("sliding_attention", "full_attention")), where + ".")
        params, where = _mapping(table, key, where + "."), f"{where}.{key}"
        _check_unknown(params, frozenset(("rope_type", "rope_theta", "partial_rotary_factor", "factor")), where + ".")
        reader, kind_of_rope = _Reader(params, where + "."), params.get("rope_type", "default")
        share, factor = reader.number("partial_rotary_factor", 1.0), reader.number("factor", 1.0)
        if share > 1:
            raise ConfigError(f"{where}.partial_rotary_factor is {share}, expected at most 1")
        if kind_of_rope == "default" and (share, factor) != (1.0, 1.0):
            raise ConfigError(
                f"{where} has partial_rotary_factor {share}, factor {factor}: expected 1 for rope_type default"
            )
        if kind_of_rope not in ("default", "proportional"):
            raise ConfigError(f"{where}.rope_type is {kind_of_rope!r}, expected 'default' or 'proportional'")
        return RopeSpec(
            theta=reader.number("rope_theta"),
            head_dim=head_dim,
            rotated=int(share * head_dim // 2),
            factor=factor,
        )

    def attention_shape(self, index: int, kind: str) -> tuple[int, int]:
        """(head_dim, kv_heads) of a layer, from either of the two forms, which must agree if both are there."""
        head_dim, kv_heads = self.count("head_dim"), self.count("num_key_value_heads")
        google: tuple[int, int] | None = None
        named = any(self.data.get(k) is not None for k in ("global_head_dim", "num_global_key_value_heads"))
        if kind == "full" and named:
            shared = self.data.get("num_global_key_value_heads") is not None and self.flag("attention_k_eq_v")
            google = (
                self.count("global_head_dim"),
                self.count("num_global_key_value_heads") if shared else kv_heads,
            )
        overrides = self.overrides()
        if overrides is None:
            if kind == "full" and google is None:
                raise ConfigError(f"{self.where}global_head_dim and per_layer_config are both missing: expected one")
            return google or (head_dim, kv_heads)
        own = overrides.get(index, _Reader({}, self.where))
        layer = (own.count("head_dim", head_dim), own.count("num_key_value_heads", kv_heads))
        if google is not None and google != layer:
            raise ConfigError(
                f"{self.where}per_layer_config[{index}] says (head_dim, key/value heads) = {layer}, "
                f"global_head_dim and num_global_key_value_heads say {google}"
            )
        return layer

    def overrides(self) -> dict[int, _Reader] | None:
        """`per_layer_config`: what differs from the common fields, by layer (transformers pads numbers with zeros)."""
        if self.data.get("per_layer_config") is None:
            return None
        table, layers = _mapping(self.data, "per_layer_config", self.where), self.count("num_hidden_layers")
        found: dict[int, _Reader] = {}
        for key in table:
            where = f"{self.where}per_layer_config."
            index = int(key) if str(key).isdecimal() else layers
            if index >= layers or index in found:
                raise ConfigError(f"{where}{key}: expected numbers of layers, 0 to {layers - 1}, each once")
            entry = _mapping(table, key, where)
            _check_unknown(entry, frozenset(("head_dim", "num_key_value_heads")), f"{where}{key}.")
            found[index] = _Reader(entry, f"{where}{key}.")
        return found

    def moe(self) -> MoESpec | None:
        if not self.flag("enable_moe_block"):
            return None
        width, other = (self.data.get(k) for k in ("moe_intermediate_size", "expert_intermediate_size"))
        if None not in (width, other) and width != other:
            raise ConfigError(
                f"{self.where}moe_intermediate_size is {width}, {self.where}expert_intermediate_size is {other}: "
                "expected one width"
            )
        spec = MoESpec(
            experts=self.count("num_experts"),
            top_k=self.count("top_k_experts"),
            hidden=self.count("moe_intermediate_size", other),
        )
        if spec.top_k > spec.experts:
            raise ConfigError(
                f"{self.where}top_k_experts is {spec.top_k}, expected at most num_experts = {spec.experts}"
            )
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
            made = KVSlotSpec(layer=slot, window=layer.window, kv_heads=layer.kv_heads, head_dim=layer.head_dim)
            if writes:
                slots.append(made)
            elif made != slots[slot]:
                raise ConfigError(f"layer {i} shares the K/V of layer {slot}, {slots[slot]}, but is made for {made}")
        return tuple(layers), tuple(slots)

    def drafter_layers(self, target: TargetConfig) -> tuple[LayerSpec, ...]:
        kinds, layers = self.kinds(), []
        if (shared := self.data.get("num_kv_shared_layers")) not in (None, 0, len(kinds)):
            raise ConfigError(f"{self.where}num_kv_shared_layers is {shared}, expected all {len(kinds)} layers")
        for key in ("enable_moe_block", "hidden_size_per_layer_input"):
            if value := self.data.get(key):
                raise ConfigError(f"{self.where}{key} is {value!r}, expected a drafter without it")
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
