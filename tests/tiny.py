"""Tiny random Gemma 4 pairs, written as real Hugging Face checkpoints without torch or transformers.

It knows the names, shapes and config keys of the official checkpoints, and no runtime. Every value comes
from `numpy.random.RandomState` through arithmetic that IEEE 754 rounds one way, one stream per tensor: a
pair has the same bytes on every machine, and keeps them when another tensor is added.

Random weights alone give a drafter that is never right. So a *rule* is planted: `follow`, a signed
permutation of the residual coordinates, leads from a token's embedding to that of the token that tends to
come next. The target applies it in the MLP of its last layer, the drafter in its `pre_projection`; all
else is random and depends on the context.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["dense", "moe", "edge", "edge2", "unified", "text"]
Style = Literal["google", "hf"]
DType = Literal["float32", "bfloat16"]
Array = npt.NDArray[Any]

KINDS: tuple[Kind, ...] = ("dense", "moe", "edge", "edge2", "unified", "text")
VOCAB = 512

_FULL = "full_attention"
_SLIDING = "sliding_attention"
_EPS = 1e-6
_RULE_SHARE = 0.8  # how much of a token's embedding the rule gives; the rest is its own
_CERTAIN = 8.0  # weight of the rule in the last layer, against a residual stream of about 2
# Coordinate 0 of all embeddings, twice the others' deviation. It holds the planted MLP's gate open, and little
# is added to it: with a closed gate the MLP's output would be near 0 and its norm amplify rounding.
_OPEN = 0.6


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one kind of pair. `layers` has one letter per layer: s (sliding) or f (full)."""

    family: Literal["gemma4", "gemma4_unified", "gemma4_text"]
    layers: str
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    global_kv_heads: int | None = None
    head_dim: int = 16
    global_head_dim: int = 32
    k_eq_v: bool = False
    ple: int = 0
    shared: int = 0
    stores_shared: bool = False
    double_wide: bool = False
    experts: int | None = None
    experts_top: int | None = None
    expert_mlp: int | None = None
    drafter_hidden: int
    drafter_mlp: int
    drafter_heads: int
    centroids: int = 0
    centroids_top: int = 8

    @property
    def first_shared(self) -> int:
        """Index of the first layer that has no keys and values of its own."""
        return len(self.layers) - self.shared


SHAPES: Mapping[Kind, Shape] = {
    # 31B: keys are values on full layers, which have fewer heads.
    "dense": Shape(
        family="gemma4", layers="ssfssf", hidden=96, mlp=192, heads=8, kv_heads=4, global_kv_heads=2,
        k_eq_v=True,
        drafter_hidden=32, drafter_mlp=96, drafter_heads=8,
    ),
    # 26B-A4B: a router and experts next to the dense MLP of every layer.
    "moe": Shape(
        family="gemma4", layers="sssfsf", hidden=64, mlp=128, heads=4, kv_heads=2, global_kv_heads=1,
        k_eq_v=True, experts=8, experts_top=2, expert_mlp=32,
        drafter_hidden=32, drafter_mlp=64, drafter_heads=4,
    ),
    # E4B: per-layer embeddings, shared keys and values. The two edge kinds cover both values of double_wide,
    # and shared layers with and without stored (unused) k_proj, v_proj and k_norm.
    "edge": Shape(
        family="gemma4", layers="ssfssfsssf", hidden=96, mlp=96, heads=4, kv_heads=2, ple=32, shared=4,
        double_wide=True, drafter_hidden=64, drafter_mlp=96, drafter_heads=4, centroids=32,
    ),
    # E2B: one key-value head, more than half of the layers share; layer indices of two digits.
    "edge2": Shape(
        family="gemma4", layers="sssfsssfsssf", hidden=64, mlp=96, heads=4, kv_heads=1, ple=32, shared=8,
        stores_shared=True, drafter_hidden=32, drafter_mlp=64, drafter_heads=2, centroids=32,
    ),
    # 12B: the dense decoder under other names, with one head on full layers.
    "unified": Shape(
        family="gemma4_unified", layers="ssfssf", hidden=64, mlp=128, heads=4, kv_heads=2, global_kv_heads=1,
        k_eq_v=True, drafter_hidden=32, drafter_mlp=64, drafter_heads=4,
    ),
    # A text-only export: flat config, no `language_model` in the names, v_proj in every layer.
    "text": Shape(
        family="gemma4_text", layers="sssfssf", hidden=64, mlp=96, heads=4, kv_heads=2,
        drafter_hidden=32, drafter_mlp=64, drafter_heads=4,
    ),
}  # fmt: skip


def write_pair(
    out: Path,
    kind: Kind,
    *,
    seed: int = 0,
    style: Style = "google",
    window: int = 16,
    dtype: DType = "float32",
    shards: int = 1,
    extras: bool = False,
    shape: Shape | None = None,
) -> tuple[Path, Path]:
    """Write a target into `out` and its drafter into `out/drafter`; return both directories.

    `shape`: sizes other than those of `kind`, for benchmarks.

    `style` "google" writes the config keys of the official checkpoints, "hf" those of transformers 5.17.
    `extras` adds tensors of vision and audio parts (and a vision config), which a text runtime has to skip.
    `shards` > 1 splits the target's weights and writes an index.
    """
    if kind not in SHAPES:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if style not in ("google", "hf"):
        raise ValueError(f"style is {style!r}, expected 'google' or 'hf'")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}, expected 'float32' or 'bfloat16'")
    if shards < 1:
        raise ValueError(f"shards is {shards}, expected at least 1")
    shape = shape or SHAPES[kind]
    maker = _Maker(f"{kind}:{seed}", shape)
    target = maker.target()
    if extras:
        target |= maker.extras()
    drafter = maker.drafter()
    drafter_dir = out / "drafter"
    drafter_dir.mkdir(parents=True, exist_ok=True)
    _write_weights(out, target, dtype, shards)
    _write_weights(drafter_dir, drafter, dtype, 1)
    _write_json(out / "config.json", target_config(shape, style, window, dtype, extras))
    _write_json(drafter_dir / "config.json", drafter_config(shape, style, window, dtype))
    sampling = {
        "bos_token_id": 2,
        "do_sample": True,
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
        "transformers_version": "5.5.0.dev0",
    }
    _write_json(out / "generation_config.json", sampling)
    assistant = {"is_assistant": True, "num_assistant_tokens": 6, "num_assistant_tokens_schedule": "constant"}
    _write_json(drafter_dir / "generation_config.json", sampling | assistant)
    return out, drafter_dir


def fingerprint(directory: Path) -> str:
    """SHA-256 over the weight files of a pair's target and drafter: equal only for the same bytes."""
    files = sorted(directory.glob("*.safetensors")) + sorted((directory / "drafter").glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory} has no *.safetensors, expected a pair made by write_pair")
    total = hashlib.sha256()
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()


def target_config(shape: Shape, style: Style, window: int, dtype: DType, extras: bool) -> dict[str, Any]:
    """The target's config.json."""
    text = _text_config(
        shape,
        window,
        layers=shape.layers,
        hidden=shape.hidden,
        mlp=shape.mlp,
        heads=shape.heads,
        shared=shape.shared,
    )
    text |= {
        "enable_moe_block": shape.experts is not None,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": shape.ple,
        "moe_intermediate_size": shape.expert_mlp,
        "num_experts": shape.experts,
        "top_k_experts": shape.experts_top,
        "use_bidirectional_attention": "vision" if shape.k_eq_v else None,
        "use_double_wide_mlp": shape.double_wide,
        "vocab_size_per_layer_input": VOCAB,
    }
    text = _styled(text, shape, style)
    version = {"transformers_version": "5.5.0.dev0" if style == "google" else "5.17.0"}
    if shape.family == "gemma4_text":
        return text | {"architectures": ["Gemma4ForCausalLM"], "dtype": dtype} | version
    unified = shape.family == "gemma4_unified"
    config = {
        "architectures": [f"Gemma4{'Unified' if unified else ''}ForConditionalGeneration"],
        "audio_config": None,
        "audio_token_id": 258881,
        "boa_token_id": 256000,
        "boi_token_id": 255999,
        "dtype": dtype,
        "eoa_token_index": 258883,
        "eoi_token_id": 258882,
        "eos_token_id": [1, 106],
        "image_token_id": 258880,
        "initializer_range": 0.02,
        "model_type": shape.family,
        "text_config": text,
        "tie_word_embeddings": True,
        "video_token_id": 258884,
        "vision_config": None,
    } | version
    if not unified:
        config |= {"eoa_token_id": 258883, "vision_soft_tokens_per_image": 280}
    if extras:
        kind = "gemma4_unified_vision" if unified else "gemma4_vision"
        config["vision_config"] = {
            "model_type": kind,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "rms_norm_eps": _EPS,
        }
    return config


def drafter_config(shape: Shape, style: Style, window: int, dtype: DType) -> dict[str, Any]:
    """The drafter's config.json."""
    text = _text_config(
        shape,
        window,
        layers="sssf",
        hidden=shape.drafter_hidden,
        mlp=shape.drafter_mlp,
        heads=shape.drafter_heads,
        shared=4,
    )
    text |= {
        "enable_moe_block": False,
        "final_logit_softcapping": None,
        "hidden_size_per_layer_input": 0,
        "moe_intermediate_size": None,
        "num_experts": None,
        "top_k_experts": None,
        "use_bidirectional_attention": None,
        "use_double_wide_mlp": False,
        "vocab_size_per_layer_input": 0,
    }
    text = _styled(text, shape, style)
    unified = shape.family == "gemma4_unified"
    return {
        "architectures": [f"Gemma4{'Unified' if unified else ''}AssistantForCausalLM"],
        "audio_token_id": 258881,
        "backbone_hidden_size": shape.hidden,
        "boa_token_id": 256000,
        "boi_token_id": 255999,
        "centroid_intermediate_top_k": shape.centroids_top if shape.centroids else 32,
        "dtype": dtype,
        "eoi_token_id": 258882,
        "image_token_id": 258880,
        "model_type": "gemma4_unified_assistant" if unified else "gemma4_assistant",
        "num_centroids": shape.centroids or 2048,
        "text_config": text,
        "tie_word_embeddings": True,
        "transformers_version": "5.7.0.dev0" if style == "google" else "5.17.0",
        "use_ordered_embeddings": bool(shape.centroids),
    }


def _text_config(
    shape: Shape, window: int, *, layers: str, hidden: int, mlp: int, heads: int, shared: int
) -> dict[str, Any]:
    """The text config's keys that target and drafter have alike, Google's and the checkpoint's own."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": shape.k_eq_v,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "global_head_dim": shape.global_head_dim,
        "head_dim": shape.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "layer_types": [{"s": _SLIDING, "f": _FULL}[x] for x in layers],
        "max_position_embeddings": 4096,
        "model_type": "gemma4_unified_text" if shape.family == "gemma4_unified" else "gemma4_text",
        "num_attention_heads": heads,
        "num_global_key_value_heads": shape.global_kv_heads,
        "num_hidden_layers": len(layers),
        "num_key_value_heads": shape.kv_heads,
        "num_kv_shared_layers": shared,
        "pad_token_id": 0,
        "rms_norm_eps": _EPS,
        "rope_parameters": {
            _FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            _SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "sliding_window": window,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": VOCAB,
    }


def _styled(text: dict[str, Any], shape: Shape, style: Style) -> dict[str, Any]:
    """`text` with the keys of its style: "hf" lists each full layer's differences from the top-level keys.

    As transformers does, it leaves out a value equal to the top-level one and pads layer numbers with 0.
    """
    if style == "google":
        return text
    text = {k: v for k, v in text.items() if k not in ("global_head_dim", "num_global_key_value_heads")}
    override = {}
    if shape.global_head_dim != shape.head_dim:
        override["head_dim"] = shape.global_head_dim
    if shape.k_eq_v and shape.global_kv_heads not in (None, shape.kv_heads):
        override["num_key_value_heads"] = shape.global_kv_heads
    full = [i for i, x in enumerate(text["layer_types"]) if x == _FULL]
    width = len(str(full[-1]))
    return text | {"per_layer_config": {str(i).zfill(width): dict(override) for i in full if override}}


class _Maker:
    """Makes the tensors of one pair, float64 (and int64), by checkpoint name."""

    def __init__(self, key: str, shape: Shape) -> None:
        self.key = key
        self.shape = shape
        self.prefix = "model." if shape.family == "gemma4_text" else "model.language_model."
        # Centre of the norms after a block: the more layers, the less each adds, so that the rule shows.
        self.context = 3.6 / len(shape.layers)
        hidden = shape.hidden
        stream = self._stream("rule")
        # The rule leaves coordinate 0 alone: see _OPEN.
        self.follow = np.concatenate([[0], 1 + stream.permutation(hidden - 1)])
        self.signs = np.concatenate([[1.0], 1.0 - 2.0 * (stream.random_sample(hidden - 1) < 0.5)])
        self.kept = 1 + stream.permutation(hidden - 1)[: shape.drafter_hidden]
        self.embedding = self._embedding()

    def target(self) -> dict[str, Array]:
        """The target's text tensors."""
        shape, prefix = self.shape, self.prefix
        out = {prefix + "embed_tokens.weight": self.embedding}
        norm = self._around(prefix + "norm.weight", shape.hidden, 1.3)
        norm[0] *= 0.2  # coordinate 0 adds the same to every logit
        out[prefix + "norm.weight"] = norm
        if shape.ple:
            packed = len(shape.layers) * shape.ple
            for name, dims, std in (
                ("embed_tokens_per_layer.weight", (VOCAB, packed), 0.15),
                ("per_layer_model_projection.weight", (packed, shape.hidden), 0.3),
            ):
                out[prefix + name] = self._noise(prefix + name, dims, std)
            name = prefix + "per_layer_projection_norm.weight"
            out[name] = self._around(name, shape.ple, 0.8)
        for i in range(len(shape.layers)):
            out |= self._target_layer(i)
        return out

    def drafter(self) -> dict[str, Array]:
        """The drafter's tensors."""
        shape, hidden, backbone = self.shape, self.shape.drafter_hidden, self.shape.hidden
        # Names are those of the target for some tensors: the key keeps the streams apart.
        out = {"model.embed_tokens.weight": self.embedding[:, self.kept].copy()}
        out["model.embed_tokens.weight"] += self._noise("drafter.embed_tokens", (VOCAB, hidden), 0.03)
        out["model.norm.weight"] = self._around("drafter.norm", hidden, 1.2)
        pre = self._noise("drafter.pre_projection", (hidden, 2 * backbone), 0.04)
        pre[np.arange(hidden), self.follow[self.kept]] += self.signs[self.kept]
        out["pre_projection.weight"] = pre
        out["post_projection.weight"] = self._noise("drafter.post_projection", (backbone, hidden), 0.12)
        for i, letter in enumerate("sssf"):
            head_dim = shape.head_dim if letter == "s" else shape.global_head_dim
            layer = self._attention(f"drafter.{i}.", hidden, shape.drafter_heads, head_dim)
            layer |= self._norms(f"drafter.{i}.", hidden, 0.4)
            layer |= self._mlp(f"drafter.{i}.", hidden, shape.drafter_mlp)
            out |= {f"model.layers.{i}." + name.removeprefix(f"drafter.{i}."): x for name, x in layer.items()}
        if shape.centroids:
            order, centroids = self._clusters(out["model.embed_tokens.weight"])
            out["masked_embedding.token_ordering"] = order
            out["masked_embedding.centroids.weight"] = centroids
        return out

    def extras(self) -> dict[str, Array]:
        """A few tensors of the parts that are not text, named as in the official checkpoints."""
        hidden = self.shape.hidden
        names: dict[str, tuple[int, ...]] = {
            "model.embed_audio.embedding_projection.weight": (hidden, 24),
            "model.embed_vision.embedding_projection.weight": (hidden, 32),
        }
        if self.shape.family == "gemma4_unified":
            names |= {
                "model.vision_embedder.patch_dense.bias": (hidden,),
                "model.vision_embedder.patch_dense.weight": (hidden, 48),
                "model.vision_embedder.patch_ln1.weight": (48,),
                "model.vision_embedder.pos_embedding": (8, 2, hidden),
            }
        else:
            layer = "model.vision_tower.encoder.layers.0."
            names |= {
                "model.vision_tower.patch_embedder.input_proj.weight": (32, 48),
                "model.vision_tower.std_bias": (32,),
                layer + "input_layernorm.weight": (32,),
                layer + "self_attn.q_proj.linear.weight": (32, 32),
                layer + "self_attn.q_proj.input_max": (),
                layer + "self_attn.q_proj.input_min": (),
                "model.audio_tower.layers.0.self_attn.q_proj.linear.weight": (24, 24),
                "model.audio_tower.output_proj.bias": (24,),
            }
        return {name: self._noise(name, dims, 0.1) for name, dims in names.items()}

    def _target_layer(self, index: int) -> dict[str, Array]:
        shape, hidden = self.shape, self.shape.hidden
        prefix = f"{self.prefix}layers.{index}."
        full = shape.layers[index] == "f"
        head_dim = shape.global_head_dim if full else shape.head_dim
        kv_heads = shape.kv_heads
        if full and shape.k_eq_v and shape.global_kv_heads:
            kv_heads = shape.global_kv_heads
        is_shared = index >= shape.first_shared
        last = index == len(shape.layers) - 1
        out = self._attention(prefix, hidden, shape.heads, head_dim)
        if not is_shared or shape.stores_shared:
            for projection in ("k_proj",) if full and shape.k_eq_v else ("k_proj", "v_proj"):
                name = f"{prefix}self_attn.{projection}.weight"
                out[name] = self._linear(name, kv_heads * head_dim, hidden)
            name = prefix + "self_attn.k_norm.weight"
            out[name] = self._around(name, head_dim, 0.7)
        out |= self._norms(prefix, hidden, self.context)
        out |= self._mlp(prefix, hidden, shape.mlp * (2 if shape.double_wide and is_shared else 1))
        if shape.experts and shape.expert_mlp:
            out |= self._experts(prefix, shape.experts, shape.expert_mlp)
        if shape.ple:
            name = prefix + "per_layer_input_gate.weight"
            out[name] = self._linear(name, shape.ple, hidden)
            name = prefix + "per_layer_projection.weight"
            out[name] = self._linear(name, hidden, shape.ple)
            name = prefix + "post_per_layer_input_norm.weight"
            out[name] = self._after_block(name, hidden, self.context)
        if last:
            self._plant(out, prefix)
        return out

    def _experts(self, prefix: str, experts: int, mlp: int) -> dict[str, Array]:
        hidden = self.shape.hidden
        out = {}
        for name, dims in (
            ("experts.gate_up_proj", (experts, 2 * mlp, hidden)),
            ("experts.down_proj", (experts, hidden, mlp)),
        ):
            out[prefix + name] = self._linear(prefix + name, *dims)
        name = prefix + "router.proj.weight"
        out[name] = self._noise(name, (experts, hidden), 1.5)
        for name, size, centre in (
            ("router.scale", hidden, 1.0),
            ("router.per_expert_scale", experts, 0.9),
            ("pre_feedforward_layernorm_2.weight", hidden, 1.1),
            ("post_feedforward_layernorm_1.weight", hidden, 1.2),
            ("post_feedforward_layernorm_2.weight", hidden, 0.7),
        ):
            out[prefix + name] = self._around(prefix + name, size, centre)
        return out

    def _plant(self, out: dict[str, Array], prefix: str) -> None:
        """Make the layer's MLP follow the rule: coordinate 0 opens the gate, up copies, down permutes."""
        hidden = self.shape.hidden
        gate, up, down = (out[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        gate *= 0.3
        up *= 0.3
        down *= 0.3
        gate[:, 0] += 3.0
        rows = np.arange(gate.shape[0])
        up[rows, rows % hidden] += 1.0
        # down @ up applies the rule: coordinate i of the result is signs[i] * x[follow[i]].
        for row in rows:
            target = np.flatnonzero(self.follow == row % hidden)[0]
            down[target, row] += self.signs[target]
        out[prefix + "post_feedforward_layernorm.weight"] *= _CERTAIN / self.context

    def _attention(self, prefix: str, hidden: int, heads: int, head_dim: int) -> dict[str, Array]:
        """The parts of attention that every layer has."""
        query, output = f"{prefix}self_attn.q_proj.weight", f"{prefix}self_attn.o_proj.weight"
        norm = f"{prefix}self_attn.q_norm.weight"
        return {
            query: self._linear(query, heads * head_dim, hidden),
            output: self._linear(output, hidden, heads * head_dim),
            norm: self._around(norm, head_dim, 0.8),
        }

    def _norms(self, prefix: str, hidden: int, post: float) -> dict[str, Array]:
        """The four norms of a layer and its scalar; `post` is the centre of the norms after a block."""
        out = {}
        for name, centre in (
            ("input_layernorm", 1.0),
            ("pre_feedforward_layernorm", 1.1),
        ):
            out[f"{prefix}{name}.weight"] = self._around(f"{prefix}{name}.weight", hidden, centre)
        for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
            out[f"{prefix}{name}.weight"] = self._after_block(f"{prefix}{name}.weight", hidden, post)
        out[prefix + "layer_scalar"] = self._around(prefix + "layer_scalar", 1, 0.88, spread=0.12)
        return out

    def _mlp(self, prefix: str, hidden: int, mlp: int) -> dict[str, Array]:
        gate, up, down = (f"{prefix}mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        return {
            gate: self._linear(gate, mlp, hidden),
            up: self._linear(up, mlp, hidden),
            down: self._linear(down, hidden, mlp),
        }

    def _embedding(self) -> Array:
        """Token embeddings (vocab, hidden): each has a share of what the rule makes of another one."""
        noise = self._noise("embedding", (VOCAB, self.shape.hidden), 0.3)
        order = self._stream("succession").permutation(VOCAB)
        out: Array = noise.copy()
        out[:, 0] = _OPEN
        own = math.sqrt(1.0 - _RULE_SHARE**2)
        for before, after in pairwise(order.tolist()):
            out[after] = _RULE_SHARE * (self.signs * out[before][self.follow]) + own * noise[after]
            out[after, 0] = _OPEN
        return out

    def _clusters(self, embedding: Array) -> tuple[Array, Array]:
        """Tokens ordered by cluster (vocab,) and the clusters' centroids (centroids, hidden)."""
        count = self.shape.centroids
        size = VOCAB // count
        code = np.zeros(VOCAB, dtype=np.int64)
        for bit in range(count.bit_length() - 1):
            code += (embedding[:, bit] > 0).astype(np.int64) << bit
        order = np.argsort(code, kind="stable").astype(np.int64)
        centroids: Array = np.zeros((count, embedding.shape[1]))
        for member in range(size):
            centroids = centroids + embedding[order[member::size]]
        return order, centroids / size

    def _stream(self, name: str) -> np.random.RandomState:
        digest = hashlib.sha256(f"{self.key}:{name}".encode()).digest()
        return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))

    def _after_block(self, name: str, size: int, centre: float) -> Array:
        """The weight of a norm whose output joins the residual stream; it adds little to coordinate 0."""
        weight = self._around(name, size, centre)
        weight[0] *= 0.2
        return weight

    def _linear(self, name: str, *dims: int) -> Array:
        """A random matrix (..., out, in) that keeps the size of what it is applied to."""
        return self._noise(name, dims, 1 / math.sqrt(dims[-1]))

    def _noise(self, name: str, dims: tuple[int, ...], std: float) -> Array:
        """Uniform values around 0 with standard deviation `std`, float64."""
        values = np.asarray(self._stream(name).random_sample(dims))
        return (values * 2.0 - 1.0) * (std * math.sqrt(3.0))

    def _around(self, name: str, size: int, centre: float, *, spread: float = 0.3) -> Array:
        """Uniform values within `spread` (a share) of `centre`, float64."""
        values = self._stream(name).random_sample((size,))
        return centre * (1.0 + spread * (values * 2.0 - 1.0))


def _write_weights(directory: Path, tensors: Mapping[str, Array], dtype: DType, shards: int) -> None:
    tensors = {name: x if x.dtype == np.int64 else x.astype(np.float32) for name, x in tensors.items()}
    names = sorted(tensors)
    if shards == 1:
        _write_safetensors(directory / "model.safetensors", tensors, dtype)
        return
    files: dict[str, str] = {}
    for shard in range(shards):
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        _write_safetensors(directory / file, {name: tensors[name] for name in part}, dtype)
        files |= dict.fromkeys(part, file)
    total = sum(len(_encode(x, dtype)[1]) for x in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    _write_json(directory / "model.safetensors.index.json", index)


def _write_safetensors(path: Path, tensors: Mapping[str, Array], dtype: DType) -> None:
    """Write the format by hand: an 8-byte header length, a JSON header, the data, larger item sizes first."""
    encoded = {name: _encode(x, dtype) for name, x in tensors.items()}
    names = sorted(encoded, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        kind, data = encoded[name]
        begin, end = end, end + len(data)
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in names:
            file.write(encoded[name][1])


def _encode(x: Array, dtype: DType) -> tuple[str, bytes]:
    """The safetensors type and bytes of an array: integers as they are, floats as `dtype`, ties to even."""
    if x.dtype == np.int64:
        return "I64", x.astype("<i8").tobytes()
    bits = x.astype("<f4")
    if dtype == "float32":
        return "F32", bits.tobytes()
    words = bits.view("<u4")
    rounded = (words + np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return "BF16", rounded.astype("<u2").tobytes()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
