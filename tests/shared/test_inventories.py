"""All tensors of the ten official checkpoints, and of their MLX conversions, without a single weight.

Arrays are lazy zeros that nothing evaluates: what is tested is that every name and shape is taken or skipped by a rule.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import pytest

from mlx_gemma_mtp.config import DrafterConfig, QuantSpec, TargetConfig
from mlx_gemma_mtp.loading import build_drafter, build_target
from mlx_gemma_mtp.models.drafter import CentroidHead, Drafter
from mlx_gemma_mtp.models.linear import Linear, WeightsError
from mlx_gemma_mtp.models.target import Target
from tests.shared import CHECKPOINTS, SIZES, config, inventory, needs_shared

pytestmark = needs_shared

Tensors = dict[str, tuple[str, tuple[int, ...]]]
Quantizer = Callable[[str], QuantSpec | None]

TYPES = {"BF16": mx.bfloat16, "F32": mx.float32, "I64": mx.int64, "I32": mx.int32, "U32": mx.uint32, "U8": mx.uint8}
TARGETS = [name for name in CHECKPOINTS if not name.endswith("-assistant")]
AFFINE4 = QuantSpec(bits=4, group_size=64, mode="affine")
AFFINE8 = QuantSpec(bits=8, group_size=64, mode="affine")
FLOAT_MODES = [
    QuantSpec(bits=4, group_size=32, mode="mxfp4"),
    QuantSpec(bits=4, group_size=16, mode="nvfp4"),
    QuantSpec(bits=8, group_size=32, mode="mxfp8"),
]


@pytest.fixture(autouse=True)
def nothing_is_evaluated() -> Iterator[None]:
    """The 26B's experts alone would be 46 GB; tables of RoPE frequencies are all that may exist."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    yield
    assert mx.get_peak_memory() - before < 4 << 20


def lazy(tensors: Tensors) -> dict[str, mx.array]:
    return {name: mx.zeros(shape, TYPES[kind]) for name, (kind, shape) in tensors.items()}


def used_bytes(tensors: Tensors) -> int:
    """Bytes once loaded: token ids become int32, all else keeps its type."""
    arrays = lazy(tensors).values()
    return sum(a.nbytes // 2 if a.dtype == mx.int64 else a.nbytes for a in arrays)


def held_bytes(model: Target | Drafter) -> int:
    return sum(a.nbytes for portion in model.arrays for a in portion)


def build(
    name: str, tensors: Tensors, quantization: Mapping[str, Any] | None = None
) -> tuple[Target | Drafter, Counter[str]]:
    """A checkpoint's model (a drafter with its official target) and what was skipped."""
    skipped: Counter[str] = Counter()
    entry = {} if quantization is None else {"quantization": quantization, "quantization_config": quantization}
    if not name.endswith("-assistant"):
        parsed = TargetConfig.from_hf(config(name) | entry)
        return build_target(parsed, lazy(tensors), mx.bfloat16, skipped), skipped
    of_target = name.removesuffix("-assistant")
    target_config = TargetConfig.from_hf(config(of_target))
    target = build_target(target_config, lazy(inventory(of_target)), mx.bfloat16)
    drafter_config = DrafterConfig.from_hf(config(name) | entry, target_config)
    return build_drafter(drafter_config, lazy(tensors), target, mx.bfloat16, skipped), skipped


def rule_of(name: str, data: Mapping[str, Any]) -> str | None:
    """Why an official tensor isn't needed, told from its name alone; None if it is."""
    if re.search(r"\.(vision_tower|vision_embedder|embed_vision)\.", name):
        return "vision"
    if re.search(r"\.(audio_tower|embed_audio)\.", name):
        return "audio"
    found = re.search(r"language_model\.layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm)\.", name)
    text = data["text_config"]
    if found and int(found[1]) >= text["num_hidden_layers"] - text["num_kv_shared_layers"]:
        return "shares"
    return None


def text_only(name: str) -> Tensors:
    """The tensors of an inventory that the text model has to use."""
    data = config(name)
    return {tensor: entry for tensor, entry in inventory(name).items() if rule_of(tensor, data) is None}


def mlx_names(name: str, towers: bool) -> Tensors:
    """The tensors as mlx-lm and, with its vision and audio `towers`, mlx-vlm store them."""
    out: Tensors = {}
    data = config(name)
    for tensor, (kind, shape) in inventory(name).items():
        rule = rule_of(tensor, data)
        if rule == "shares" or (rule and not towers):
            continue
        renamed = tensor
        if not name.endswith("-assistant"):
            renamed = tensor.removeprefix("model.")
            renamed = re.sub(r"^language_model\.", "language_model.model.", renamed)
        if renamed.endswith(".experts.gate_up_proj"):
            base = renamed.removesuffix("gate_up_proj") + "switch_glu."
            half = (shape[0], shape[1] // 2, shape[2])
            out |= {f"{base}{part}_proj.weight": (kind, half) for part in ("gate", "up")}
        elif renamed.endswith(".experts.down_proj"):
            out[renamed.removesuffix("down_proj") + "switch_glu.down_proj.weight"] = kind, shape
        elif renamed.endswith(".token_ordering"):
            out[renamed] = "I32", shape
        else:
            out[renamed] = kind, shape
    return out


def packed(tensors: Tensors, spec_of: Quantizer) -> Tensors:
    """Every matrix of the text model as MLX packs it: words of 32 bits, and a scale (and bias) per group."""
    out: Tensors = {}
    for name, (kind, shape) in tensors.items():
        path = name.removesuffix(".weight")
        spec = spec_of(path) if path != name and len(shape) > 1 else None
        if spec is None:
            out[name] = kind, shape
            continue
        assert shape[-1] % spec.group_size == 0
        groups = (*shape[:-1], shape[-1] // spec.group_size)
        out[name] = "U32", (*shape[:-1], shape[-1] * spec.bits // 32)
        out[f"{path}.scales"] = ("BF16" if spec.mode == "affine" else "U8"), groups
        if spec.mode == "affine":
            out[f"{path}.biases"] = "BF16", groups
    return out


def entry_of(spec: QuantSpec) -> dict[str, Any]:
    return {"group_size": spec.group_size, "bits": spec.bits, "mode": spec.mode}


def one_of_each(tensors: Tensors) -> list[str]:
    """A tensor of every kind: names that differ in layer numbers only, and have the same shape, are one kind."""
    kinds: dict[tuple[str, tuple[int, ...]], str] = {}
    for name in sorted(tensors, key=len, reverse=True):
        kinds.setdefault((re.sub(r"\d+", "#", name), tensors[name][1]), name)
    return sorted(kinds.values())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_tensor_is_used_or_skipped_by_a_rule(name: str) -> None:
    tensors, data = inventory(name), config(name)
    model, skipped = build(name, tensors)
    expected = Counter(rule for tensor in tensors if (rule := rule_of(tensor, data)))
    found = Counter({word: n for rule, n in skipped.items() for word in expected if word in rule})
    assert found == expected
    assert sum(skipped.values()) == sum(expected.values())
    # What is held, and so read by `load`, is all the rest.
    assert held_bytes(model) == used_bytes(text_only(name))


def test_skipped_tensors_of_each_size() -> None:
    """Counts from the layout notes: 3 tensors in each of the 20 and 18 sharing layers, and the other towers."""
    skipped = {name: build(name, inventory(name))[1] for name in TARGETS}
    shares = "key/value weights of a layer that shares another's K/V"
    assert {name: n for name, rules in skipped.items() if (n := rules[shares])} == {
        "gemma-4-E2B-it": 60,
        "gemma-4-E4B-it": 54,
    }
    assert len(inventory("gemma-4-26B-A4B-it")) - sum(skipped["gemma-4-26B-A4B-it"].values()) == 657
    assert len(inventory("gemma-4-31B-it")) - sum(skipped["gemma-4-31B-it"].values()) == 832


@pytest.mark.parametrize("towers", [False, True], ids=["mlx-lm", "mlx-vlm"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_names_of_mlx_conversions(name: str, towers: bool) -> None:
    tensors = mlx_names(name, towers)
    model, skipped = build(name, tensors)
    assert held_bytes(model) == used_bytes(text_only(name))
    assert bool(skipped) == (towers and not name.endswith("-assistant"))
    if name == "gemma-4-26B-A4B-it":
        assert sum("switch_glu" in tensor for tensor in tensors) == 90


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("role", ["", "-assistant"], ids=["target", "drafter"])
def test_affine_4_bit_conversions(size: str, role: str) -> None:
    """The mlx-community form: 4 bits in groups of 64; in the 26B, MLPs and routers have 8 bits."""
    name = f"gemma-4-{size}-it{role}"

    def spec_of(path: str) -> QuantSpec:
        eight = size == "26B-A4B" and not role and re.search(r"\.(mlp\.\w+_proj|router\.proj)$", path)
        return AFFINE8 if eight else AFFINE4

    plain = mlx_names(name, towers=False)
    tensors = packed(plain, spec_of)
    overrides = {
        path: {"group_size": 64, "bits": 8}
        for tensor in plain
        if (path := tensor.removesuffix(".weight")) != tensor and spec_of(path) == AFFINE8
    }
    assert len(overrides) == (4 * 30 if size == "26B-A4B" and not role else 0)
    model, skipped = build(name, tensors, entry_of(AFFINE4) | overrides)
    assert not skipped
    assert held_bytes(model) == used_bytes(tensors)
    layer = model.layers[0]
    assert {part.spec for part in layer.qkv.parts} == {layer.out.spec} == {AFFINE4}
    assert {layer.down.spec, *(part.spec for part in layer.gate_up.parts)} == {spec_of("x.mlp.down_proj")}
    if layer.experts is not None:
        assert layer.experts.router.spec == AFFINE8
        assert {part.spec for part in layer.experts.gate_up.parts} == {layer.experts.down.spec} == {AFFINE4}
    if isinstance(model, Target):
        assert model.embedding.spec == AFFINE4
        assert model.per_layer is None or model.per_layer.table.spec == AFFINE4
    else:
        head = model.head
        table = head.clusters if isinstance(head, CentroidHead) else head.embedding
        assert {model.into.spec, model.out.spec, table.spec} == {AFFINE4}
    if overrides:
        with pytest.raises(WeightsError, match=r"layers\.0\.\S+\.weight has shape .* for 4 bits in groups of 64"):
            build(name, tensors, entry_of(AFFINE4))


@pytest.mark.parametrize("spec", FLOAT_MODES, ids=lambda spec: spec.mode)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_floating_point_modes(name: str, spec: QuantSpec) -> None:
    """mxfp4, nvfp4 and mxfp8; routers stay affine with 8 bits, as mlx-lm writes them."""

    def spec_of(path: str) -> QuantSpec:
        return AFFINE8 if path.endswith("router.proj") else spec

    plain = mlx_names(name, towers=False)
    tensors = packed(plain, spec_of)
    routers = [tensor.removesuffix(".weight") for tensor in plain if tensor.endswith("router.proj.weight")]
    overrides = {path: {"group_size": 64, "bits": 8} for path in routers}
    model, _ = build(name, tensors, entry_of(spec) | overrides)
    assert held_bytes(model) == used_bytes(tensors)
    layer = model.layers[-1]
    assert isinstance(layer.out, Linear)
    assert (layer.out.spec, layer.out.biases) == (spec, None)
    assert layer.experts is None or layer.experts.router.spec == AFFINE8


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_missing_or_misshaped_tensor_is_named(name: str) -> None:
    tensors = text_only(name)
    arrays = lazy(tensors)
    data = config(name.removesuffix("-assistant"))
    target_config = TargetConfig.from_hf(data)
    make: Callable[[dict[str, mx.array]], Target | Drafter]
    if name.endswith("-assistant"):
        target = build_target(target_config, lazy(inventory(name.removesuffix("-assistant"))), mx.bfloat16)
        drafter_config = DrafterConfig.from_hf(config(name), target_config)

        def make(named: dict[str, mx.array]) -> Target | Drafter:
            return build_drafter(drafter_config, named, target, mx.bfloat16)
    else:

        def make(named: dict[str, mx.array]) -> Target | Drafter:
            return build_target(target_config, named, mx.bfloat16)

    kinds = one_of_each(tensors)
    assert len(kinds) > 15
    for tensor in kinds:
        own = re.sub(r"^model\.(language_model\.)?", "", tensor)
        rest = {k: v for k, v in arrays.items() if k != tensor}
        expected = f"missing tensor: {own}"
        if own.endswith("experts.gate_up_proj"):
            # Without the fused stack the split form is looked for.
            expected = f"missing tensor: {own.replace('gate_up', 'gate')}"
        with pytest.raises(WeightsError, match=re.escape(expected)):
            make(rest)
        kind, shape = tensors[tensor]
        wrong = mx.zeros((*shape[:-1], shape[-1] + 64), TYPES[kind])
        with pytest.raises(WeightsError, match=re.escape(own)) as caught:
            make(arrays | {tensor: wrong})
        assert str(wrong.shape) in str(caught.value)
        assert str(shape) in str(caught.value)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_extra_tensor_is_named(name: str) -> None:
    prefix = "model." if name.endswith("-assistant") else "model.language_model."
    for extra in (
        "lm_head.weight",
        f"{prefix}layers.0.self_attn.v_norm_extra.weight",
        f"{prefix}layers.0.self_attn.q_proj.bias",
        f"{prefix}layers.77.self_attn.k_proj.weight",
        f"{prefix}layers.0.mlp.down_proj.biases",
    ):
        tensors = inventory(name) | {extra: ("BF16", (8,))}
        with pytest.raises(WeightsError, match="unexpected tensors: " + re.escape(extra.removeprefix(prefix))):
            build(name, tensors)


def test_both_names_of_one_tensor_are_refused() -> None:
    name = "gemma-4-E2B-it"
    twice = inventory(name) | {"language_model.model.norm.weight": ("BF16", (1536,))}
    with pytest.raises(WeightsError, match=r"two tensors of the checkpoint are norm\.weight"):
        build(name, twice)
