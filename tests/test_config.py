"""Configs in all the forms in which they come, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import partial
from typing import Any

import pytest

from mlx_gemma_mtp.config import (
    ConfigError,
    DrafterConfig,
    LayerSpec,
    MoESpec,
    Quantization,
    QuantSpec,
    RopeSpec,
    TargetConfig,
)
from tests import tiny

WINDOW = 16
Data = dict[str, Any]


def target_data(kind: tiny.Kind, style: tiny.Style = "google") -> Data:
    return tiny.target_config(tiny.SHAPES[kind], style, WINDOW, "bfloat16", extras=False)


def drafter_data(kind: tiny.Kind, style: tiny.Style = "google") -> Data:
    return tiny.drafter_config(tiny.SHAPES[kind], style, WINDOW, "bfloat16")


def text_of(data: Data) -> Data:
    """The text config, nested or not."""
    value: Data = data.get("text_config", data)
    return value


def with_text(data: Data, **fields: Any) -> Data:
    """A copy with fields of its text config changed; `...` removes one."""
    out = copy.deepcopy(data)
    text = text_of(out)
    for key, value in fields.items():
        if value is ...:
            text.pop(key, None)
        else:
            text[key] = value
    return out


def with_rope(data: Data, kind: str, **fields: Any) -> Data:
    out = copy.deepcopy(data)
    text_of(out)["rope_parameters"][kind] |= fields
    return out


def refused(data: Data, *said: str, target: TargetConfig | None = None) -> None:
    parse = TargetConfig.from_hf if target is None else partial(DrafterConfig.from_hf, target=target)
    with pytest.raises(ConfigError) as caught:
        parse(data)
    for part in said:
        assert part in str(caught.value)


# Forms


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_both_forms_mean_the_same(kind: tiny.Kind) -> None:
    google, hf = (TargetConfig.from_hf(target_data(kind, style)) for style in ("google", "hf"))
    assert google == hf
    drafters = [DrafterConfig.from_hf(drafter_data(kind, style), google) for style in ("google", "hf")]
    assert drafters[0] == drafters[1]


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_layers_are_resolved(kind: tiny.Kind) -> None:
    shape = tiny.SHAPES[kind]
    config = TargetConfig.from_hf(target_data(kind))
    assert len(config.layers) == len(shape.layers)
    assert len(config.kv_slots) == shape.first_shared
    for i, (letter, spec) in enumerate(zip(shape.layers, config.layers, strict=True)):
        full = letter == "f"
        kv_heads = shape.kv_heads
        if full and shape.k_eq_v and shape.global_kv_heads is not None:
            kv_heads = shape.global_kv_heads
        writes = i < shape.first_shared
        slot = i if writes else max(j for j in range(shape.first_shared) if shape.layers[j] == letter)
        head_dim = shape.global_head_dim if full else shape.head_dim
        assert spec == LayerSpec(
            window=None if full else WINDOW,
            heads=shape.heads,
            head_dim=head_dim,
            kv_heads=kv_heads,
            rope=RopeSpec(
                theta=1e6 if full else 1e4,
                head_dim=head_dim,
                rotated=head_dim // 8 if full else head_dim // 2,
                factor=1.0,
            ),
            mlp_hidden=shape.mlp * (2 if shape.double_wide and not writes else 1),
            k_eq_v=full and shape.k_eq_v,
            kv_slot=slot,
            writes_kv=writes,
            moe=MoESpec(experts=8, top_k=2, hidden=32) if kind == "moe" else None,
        )
    assert config.last_slot("full") == shape.layers[: shape.first_shared].rindex("f")
    assert config.last_slot("sliding") == shape.layers[: shape.first_shared].rindex("s")


def test_a_config_can_not_be_changed() -> None:
    config = TargetConfig.from_hf(target_data("moe"))
    drafter = DrafterConfig.from_hf(drafter_data("edge"), TargetConfig.from_hf(target_data("edge")))
    moe, rope = config.layers[0].moe, config.layers[0].rope
    for value in (config, config.layers[0], config.kv_slots[0], rope, moe, drafter, drafter.centroids):
        field = dataclasses.fields(value)[0].name  # type: ignore[arg-type]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, 1)
    assert isinstance(config.layers, tuple)
    assert len({config, TargetConfig.from_hf(target_data("moe", "hf"))}) == 1


def test_no_field_has_a_default() -> None:
    for kind in (TargetConfig, DrafterConfig, LayerSpec, RopeSpec, MoESpec, QuantSpec):
        for field in dataclasses.fields(kind):
            assert field.default is field.default_factory is dataclasses.MISSING, f"{kind.__name__}.{field.name}"


def test_text_only_form_is_flat() -> None:
    nested, flat = target_data("dense"), dict(text_of(target_data("dense")), dtype="bfloat16")
    parsed = TargetConfig.from_hf(flat)
    assert parsed.model_type == "gemma4_text"
    assert dataclasses.replace(parsed, model_type="gemma4") == TargetConfig.from_hf(nested)
    refused(with_text(flat, text_config={}, num_hidden_layers=9), "num_hidden_layers is 9")
    refused(flat | {"text_config": text_of(nested)}, "text_config")


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_harmless_fields_may_differ_or_be_missing(kind: tiny.Kind) -> None:
    data = target_data(kind)
    plain = TargetConfig.from_hf(data)
    more = with_text(
        data, attention_dropout=0.1, initializer_range=1.0, use_cache=False, eos_token_id=[7], some_token_id=3
    )
    more |= {"transformers_version": "9.9", "image_token_id": 5, "vision_config": {"hidden_size": 3}}
    more |= {"generation_config": {"top_k": 64}, "top_k": 64, "do_sample": True, "temperature": 1.0}  # mlx-vlm's own
    more |= {"id2label": {"0": "a"}, "chunk_size_feed_forward": 0, "future_flag": False, "future_list": []}
    assert TargetConfig.from_hf(more) == plain
    less = with_text(data, attention_dropout=..., initializer_range=..., use_cache=..., eos_token_id=...)
    assert TargetConfig.from_hf(less) == plain


# What transformers writes for layers that differ from the rest


def test_numbers_of_layers_may_be_padded_with_zeros() -> None:
    data = target_data("edge2", "hf")
    table = text_of(data)["per_layer_config"]
    assert sorted(table) == ["03", "07", "11"]
    config = TargetConfig.from_hf(data)
    bare = with_text(data, per_layer_config={str(int(k)): v for k, v in table.items()})
    assert TargetConfig.from_hf(bare) == config
    assert [spec.head_dim for spec in config.layers[2:5]] == [16, 32, 16]


def test_a_layer_that_is_not_listed_has_the_common_values() -> None:
    data = with_text(target_data("dense", "hf"), per_layer_config={})
    config = TargetConfig.from_hf(data)
    assert {(spec.head_dim, spec.kv_heads) for spec in config.layers} == {(16, 4)}
    some = with_text(data, per_layer_config={"1": {"num_key_value_heads": 8}, "2": {"head_dim": 64}})
    shapes = [(spec.head_dim, spec.kv_heads) for spec in TargetConfig.from_hf(some).layers]
    assert shapes == [(16, 4), (16, 8), (64, 4), (16, 4), (16, 4), (16, 4)]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"6": {"head_dim": 32}}, "per_layer_config.6"),
        ({"-1": {"head_dim": 32}}, "per_layer_config.-1"),
        ({"full_attention": {"head_dim": 32}}, "per_layer_config.full_attention"),
        ({"2": {"head_dim": 32}, "02": {"head_dim": 32}}, "per_layer_config.02"),
        ({"2": 32}, "per_layer_config.2 is 32"),
        ({"2": {"head_dim": "32"}}, "per_layer_config.2.head_dim is '32'"),
        ({"2": {"head_dim": 32.5}}, "per_layer_config.2.head_dim is 32.5"),
        ({"2": {"head_dim": 0}}, "per_layer_config.2.head_dim is 0"),
        ({"2": {"head_dim": 33}}, "a head of 33"),
        ({"2": {"intermediate_size": 7}}, "per_layer_config.2.intermediate_size"),
        ({"2": {"skip": ["mlp"]}}, "per_layer_config.2.skip"),
        ([], "per_layer_config is []"),
    ],
)
def test_bad_tables_of_layers_are_named(table: object, said: str) -> None:
    refused(with_text(target_data("dense", "hf"), per_layer_config=table), said)


def test_the_two_forms_may_not_contradict_each_other() -> None:
    google, hf = text_of(target_data("dense")), target_data("dense", "hf")
    both = with_text(hf, global_head_dim=32, num_global_key_value_heads=2)
    assert TargetConfig.from_hf(both) == TargetConfig.from_hf(hf)
    refused(with_text(both, global_head_dim=64), "per_layer_config", "global_head_dim", "(32, 2)", "(64, 2)")
    refused(with_text(both, num_global_key_value_heads=4), "num_global_key_value_heads", "(32, 2)", "(32, 4)")
    refused(with_text(hf, num_global_key_value_heads=2), "global_head_dim")
    neither = {k: v for k, v in google.items() if not k.startswith(("global_", "num_global_"))}
    refused(neither, "global_head_dim and per_layer_config are both missing")


def test_layers_that_share_must_have_the_shape_of_what_they_share() -> None:
    table = {"2": {"head_dim": 32}, "5": {"head_dim": 32}, "9": {"head_dim": 64}}
    refused(with_text(target_data("edge", "hf"), per_layer_config=table), "layer 9", "layer 5", "64", "32")


# What is refused


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("attention_bias", True, "attention_bias is True, expected False"),
        ("use_bidirectional_attention", "all", "use_bidirectional_attention is 'all'"),
        ("use_bidirectional_attention", True, "use_bidirectional_attention is True"),
        ("tie_word_embeddings", False, "tie_word_embeddings is False, expected True"),
        ("hidden_activation", "silu", "hidden_activation is 'silu', expected 'gelu_pytorch_tanh'"),
        ("layer_types", ["sliding_attention"] * 5 + ["full_attention"] * 2, "layer_types has 7 entries"),
        ("layer_types", ["full_attention"] * 5 + ["sliding_attention"], "layer_types[-1]"),
        ("layer_types", ["chunked_attention"] + ["full_attention"] * 5, "layer_types[0] is 'chunked_attention'"),
        ("layer_types", [], "layer_types is []"),
        ("layer_types", None, "layer_types is None"),
        ("num_hidden_layers", 5, "num_hidden_layers is 5"),
        ("num_hidden_layers", "6", "num_hidden_layers is '6', expected a whole number"),
        ("num_hidden_layers", True, "num_hidden_layers is True"),
        ("hidden_size", ..., "hidden_size is None, expected a whole number of at least 1"),
        ("hidden_size", 0, "hidden_size is 0"),
        ("vocab_size", -1, "vocab_size is -1"),
        ("intermediate_size", 1.5, "intermediate_size is 1.5"),
        ("num_attention_heads", 6, "6 attention heads can't be shared by 4"),
        ("num_key_value_heads", None, "num_key_value_heads is None"),
        ("head_dim", ..., "head_dim is None"),
        ("sliding_window", None, "sliding_window is None"),
        ("sliding_window", 0, "sliding_window is 0"),
        ("rms_norm_eps", 0, "rms_norm_eps is 0"),
        ("rms_norm_eps", math.nan, "rms_norm_eps is nan"),
        ("rms_norm_eps", True, "rms_norm_eps is True"),
        ("final_logit_softcapping", -30.0, "final_logit_softcapping is -30.0"),
        ("attention_k_eq_v", "yes", "attention_k_eq_v is 'yes', expected true or false"),
        ("num_kv_shared_layers", 6, "num_kv_shared_layers is 6, expected fewer than 6"),
        ("num_kv_shared_layers", 4, "no layer of kind {'full'}"),
        ("num_experts", 8, "num_experts is 8, expected null as enable_moe_block is false"),
        ("top_k_experts", 2, "top_k_experts is 2"),
        ("moe_intermediate_size", 32, "moe_intermediate_size is 32"),
        ("expert_intermediate_size", 32, "expert_intermediate_size is 32"),
        ("enable_moe_block", True, "num_experts is None"),
        ("max_position_embeddings", None, "max_position_embeddings is None"),
        ("rope_parameters", None, "rope_parameters is None, expected an object"),
        ("rope_parameters", {"rope_theta": 1e4}, "rope_parameters.rope_theta"),
        ("rope_parameters", {"sliding_attention": {"rope_theta": 1e4}}, "rope_parameters.full_attention is None"),
        # Fields of other Gemmas, or of ones to come: they would change what is computed.
        ("rope_theta", 1e4, "text_config.rope_theta = 10000.0 is a field"),
        ("rope_scaling", {"factor": 8.0}, "rope_scaling"),
        ("query_pre_attn_scalar", 256, "query_pre_attn_scalar"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping"),
        ("sliding_window_pattern", 6, "sliding_window_pattern"),
        ("laurel_rank", 64, "laurel_rank"),
        ("quantization", {"bits": 4, "group_size": 64}, "text_config.quantization"),
        ("model_type", "gemma3_text", "text_config.model_type is 'gemma3_text', expected 'gemma4_text'"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(field: str, value: object, said: str) -> None:
    refused(with_text(target_data("dense"), **{field: value}), said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gemma3"}, "model_type is 'gemma3', expected one of gemma4, gemma4_unified"),
        ({"model_type": "gemma4_assistant"}, "model_type is 'gemma4_assistant'"),
        ({"model_type": None}, "model_type is 'None'"),
        ({"model_type": "gemma4_unified"}, "text_config.model_type is 'gemma4_text'"),
        ({"text_config": None}, "text_config is None, expected an object"),
        ({"text_config": [1]}, "text_config is [1]"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False, expected True"),
        ({"quantize_activations": True}, "quantize_activations = True"),
        ({"num_hidden_layers": 6}, "num_hidden_layers = 6 is a field"),
    ],
)
def test_a_bad_field_around_the_text_config_is_named(change: Data, said: str) -> None:
    refused(target_data("dense") | change, said)


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("full_attention", {"rope_type": "yarn"}, "full_attention.rope_type is 'yarn'"),
        ("sliding_attention", {"rope_type": "dynamic"}, "sliding_attention.rope_type is 'dynamic'"),
        ("sliding_attention", {"rope_type": None}, "sliding_attention.rope_type is None"),
        ("sliding_attention", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("sliding_attention", {"factor": 8.0}, "factor 8.0"),
        ("full_attention", {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ("full_attention", {"partial_rotary_factor": "0.25"}, "partial_rotary_factor is '0.25'"),
        ("full_attention", {"factor": 0}, "factor is 0"),
        ("full_attention", {"rope_theta": None}, "full_attention.rope_theta is None"),
        ("full_attention", {"attention_factor": 2.0}, "full_attention.attention_factor = 2.0"),
        ("full_attention", {"type": "linear"}, "full_attention.type = 'linear'"),
    ],
)
def test_bad_rope_is_named(kind: str, fields: Data, said: str) -> None:
    refused(with_rope(target_data("dense"), kind, **fields), "rope_parameters", said)


def test_rope_frequencies() -> None:
    data = with_rope(target_data("dense"), "full_attention", factor=8.0, partial_rotary_factor=0.5)
    sliding, full = (TargetConfig.from_hf(data).layers[i].rope for i in (0, 2))
    assert sliding.inverse_frequencies() == pytest.approx([1e4 ** (-i / 8) for i in range(8)])
    # The exponent's denominator is the whole head, not the part that turns.
    expected = [1e6 ** (-i / 16) / 8 for i in range(8)] + [0.0] * 8
    assert full.inverse_frequencies() == pytest.approx(expected)


def test_experts() -> None:
    data = target_data("moe")
    other = with_text(data, moe_intermediate_size=None, expert_intermediate_size=32)
    assert TargetConfig.from_hf(other) == TargetConfig.from_hf(data)
    assert TargetConfig.from_hf(with_text(data, expert_intermediate_size=32)) == TargetConfig.from_hf(data)
    refused(with_text(data, expert_intermediate_size=64), "moe_intermediate_size is 32", "64")
    refused(with_text(data, top_k_experts=9), "top_k_experts is 9, expected at most num_experts = 8")
    refused(with_text(data, enable_moe_block=False), "num_experts is 8")
    refused(with_text(data, moe_intermediate_size=None), "moe_intermediate_size is None")


def test_per_layer_tables_need_a_row_for_every_token() -> None:
    data = target_data("edge")
    refused(
        with_text(data, vocab_size_per_layer_input=511),
        "vocab_size_per_layer_input is 511",
        "vocab_size = 512",
    )
    assert TargetConfig.from_hf(with_text(data, vocab_size_per_layer_input=600)).per_layer_vocab == 600
    assert TargetConfig.from_hf(with_text(data, vocab_size_per_layer_input=...)).per_layer_vocab == 512
    none = with_text(data, hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)
    assert TargetConfig.from_hf(none).per_layer_hidden == 0


def test_wide_layers_are_those_that_share() -> None:
    widths = [spec.mlp_hidden for spec in TargetConfig.from_hf(target_data("edge")).layers]
    assert widths == [96] * 6 + [192] * 4
    unshared = with_text(target_data("edge"), num_kv_shared_layers=0)
    assert {spec.mlp_hidden for spec in TargetConfig.from_hf(unshared).layers} == {96}


# Drafters and their targets


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_drafter_reads_the_last_layers_that_store(kind: tiny.Kind) -> None:
    shape = tiny.SHAPES[kind]
    target = TargetConfig.from_hf(target_data(kind))
    drafter = DrafterConfig.from_hf(drafter_data(kind), target)
    stored = shape.layers[: shape.first_shared]
    assert [spec.kv_slot for spec in drafter.layers] == [stored.rindex("s")] * 3 + [stored.rindex("f")]
    assert not any(spec.writes_kv for spec in drafter.layers)
    assert {spec.mlp_hidden for spec in drafter.layers} == {shape.drafter_mlp}
    assert drafter.backbone_hidden == target.hidden_size
    if shape.centroids:
        assert drafter.centroids is not None
        assert (drafter.centroids.count, drafter.centroids.top_k) == (shape.centroids, shape.centroids_top)
    else:
        assert drafter.centroids is None


@pytest.mark.parametrize(
    ("change", "both"),
    [
        ({"hidden_size": 128}, ("backbone_hidden_size is 96", "hidden_size is 128")),
        ({"vocab_size": 1024}, ("vocab_size is 512", "vocab_size is 1024")),
        ({"head_dim": 32}, ("head_dim in sliding layers is 16", "is 32")),
        ({"global_head_dim": 64}, ("head_dim in full layers is 32", "is 64")),
        ({"num_key_value_heads": 2}, ("key/value heads in sliding layers is 4", "is 2")),
        ({"num_global_key_value_heads": 1}, ("key/value heads in full layers is 2", "is 1")),
        ({"sliding_window": 32}, ("sliding window is 16", "sliding window is 32")),
        (
            {"layer_types": ["full_attention"] * 6},
            ("layer 0 is sliding", "the target stores K/V only in other layer kinds"),
        ),
    ],
)
def test_a_drafter_that_does_not_fit_is_refused_with_both_values(change: Data, both: tuple[str, ...]) -> None:
    target = TargetConfig.from_hf(with_text(target_data("dense"), **change))
    refused(drafter_data("dense"), *both, target=target)


def test_a_drafter_with_other_rope_is_refused_with_both_values() -> None:
    data = target_data("dense")
    for kind, theta, was in (("sliding_attention", 2e4, "10000.0"), ("full_attention", 2e6, "1000000.0")):
        target = TargetConfig.from_hf(with_rope(data, kind, rope_theta=theta))
        refused(drafter_data("dense"), "RoPE", f"theta={was}", f"theta={theta}", target=target)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gemma4"}, "model_type is 'gemma4', expected gemma4_assistant or gemma4_unified_assistant"),
        ({"model_type": "gemma4_unified_assistant"}, "text_config.model_type is 'gemma4_text'"),
        ({"backbone_hidden_size": None}, "backbone_hidden_size is None"),
        ({"use_ordered_embeddings": 1}, "use_ordered_embeddings is 1"),
        ({"num_centroids": 30}, "num_centroids is 30, expected a divisor of vocab_size = 512"),
        ({"num_centroids": None}, "num_centroids is None"),
        ({"centroid_intermediate_top_k": 33}, "centroid_intermediate_top_k is 33, expected at most 32"),
        ({"centroid_intermediate_top_k": 0}, "centroid_intermediate_top_k is 0"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"block_size": 4}, "block_size = 4 is a field"),
        ({"text_config": None}, "text_config is None"),
    ],
)  # fmt: skip
def test_a_bad_field_of_a_drafter_is_named(change: Data, said: str) -> None:
    target = TargetConfig.from_hf(target_data("edge"))
    refused(drafter_data("edge") | change, said, target=target)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_kv_shared_layers", 3, "num_kv_shared_layers is 3, expected all 4 layers"),
        ("hidden_size_per_layer_input", 32, "hidden_size_per_layer_input is 32"),
        ("enable_moe_block", True, "enable_moe_block is True"),
        ("attention_bias", True, "attention_bias is True"),
        ("num_attention_heads", 3, "3 attention heads can't be shared by 2"),
        ("some_new_field", "x", "text_config.some_new_field = 'x'"),
    ],
)
def test_a_bad_text_field_of_a_drafter_is_named(field: str, value: object, said: str) -> None:
    target = TargetConfig.from_hf(target_data("edge"))
    refused(with_text(drafter_data("edge"), **{field: value}), said, target=target)


def test_an_assistant_without_a_count_of_shared_layers_shares_all() -> None:
    target = TargetConfig.from_hf(target_data("edge"))
    plain = DrafterConfig.from_hf(drafter_data("edge"), target)
    for value in (0, None, ...):
        data = with_text(drafter_data("edge"), num_kv_shared_layers=value)
        assert DrafterConfig.from_hf(data, target) == plain


# Quantization

DEFAULT: Data = {"group_size": 64, "bits": 4}
PATH = "language_model.model.layers.0.mlp.down_proj"


def spec(bits: int, group_size: int, mode: str = "affine") -> QuantSpec:
    return QuantSpec(bits=bits, group_size=group_size, mode=mode)


@pytest.mark.parametrize(
    ("entry", "default", "overrides"),
    [
        (DEFAULT, spec(4, 64), {}),
        (DEFAULT | {"mode": "affine", PATH: {"bits": 8, "group_size": 32}}, spec(4, 64), {PATH: spec(8, 32)}),
        (DEFAULT | {PATH: {"bits": 8}}, spec(4, 64), {PATH: spec(8, 64)}),
        (DEFAULT | {PATH: {"group_size": 128}}, spec(4, 64), {PATH: spec(4, 128)}),
        (DEFAULT | {PATH: True, "x": False}, spec(4, 64), {}),
        (
            {"group_size": 32, "bits": 4, "mode": "mxfp4", PATH: {"group_size": 64, "bits": 8}},
            spec(4, 32, "mxfp4"),
            {PATH: spec(8, 64)},
        ),
        (
            {"group_size": 16, "bits": 4, "mode": "nvfp4", PATH: {"group_size": 32, "bits": 8, "mode": "mxfp8"}},
            spec(4, 16, "nvfp4"),
            {PATH: spec(8, 32, "mxfp8")},
        ),
    ],
)  # fmt: skip
def test_quantization_with_overrides(entry: Data, default: QuantSpec, overrides: dict[str, QuantSpec]) -> None:
    expected = Quantization(default=default, overrides=tuple(overrides.items()))
    for given in (
        {"quantization": entry},
        {"quantization_config": entry},
        {"quantization": entry, "quantization_config": copy.deepcopy(entry)},
        # A conversion may keep what was said of the checkpoint that it was made from.
        {"quantization": entry, "quantization_config": {"quant_method": "compressed-tensors"}},
    ):
        assert TargetConfig.from_hf(target_data("dense") | given).quantization == expected
    target = TargetConfig.from_hf(target_data("dense"))
    drafter = DrafterConfig.from_hf(drafter_data("dense") | {"quantization": entry}, target)
    assert drafter.quantization == expected
    assert target.quantization is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"quantization": "4bit"}, ("quantization is '4bit', expected an object",)),
        ({"quantization": {}}, ("quantization.bits is None",)),
        ({"quantization": {"bits": 4}}, ("quantization.group_size is None",)),
        ({"quantization": {"bits": "4", "group_size": 64}}, ("quantization.bits is '4'",)),
        ({"quantization": {"bits": 7, "group_size": 64}}, ("quantization", "bits=7")),
        ({"quantization": {"bits": 4, "group_size": 48}}, ("group_size=48",)),
        ({"quantization": {"bits": 4, "group_size": 0}}, ("quantization.group_size is 0",)),
        ({"quantization": DEFAULT | {"mode": "gguf"}}, ("mode='gguf'", "affine", "mxfp4", "nvfp4", "mxfp8")),
        ({"quantization": {"bits": 4, "group_size": 64, "mode": "mxfp4"}}, ("mxfp4", "(4, 32)")),
        ({"quantization": {"bits": 8, "group_size": 16, "mode": "nvfp4"}}, ("nvfp4", "(4, 16)")),
        ({"quantization": DEFAULT | {PATH: {"bits": 9}}}, (PATH, "bits=9")),
        ({"quantization": DEFAULT | {PATH: {"group_size": "64"}}}, (f"quantization.{PATH}.group_size is '64'",)),
        ({"quantization": DEFAULT | {PATH: {"global_scale": True}}}, (f"quantization.{PATH}.global_scale",)),
        ({"quantization": DEFAULT | {"linear_class": "BitLinear"}}, ("quantization.linear_class",)),
        (
            {"quantization": DEFAULT, "quantization_config": DEFAULT | {"bits": 8}},
            ("quantization and quantization_config differ",),
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, ("'gptq'",)),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "x"}}, ("compressed-tensors",)),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, ("bitsandbytes",)),
        ({"quantization_config": {"load_in_8bit": True}}, ("quantization_config.quant_method is None",)),
        ({"quantization_config": 4}, ("quantization_config is 4",)),
    ],
)  # fmt: skip
def test_bad_quantization_is_named(given: Data, said: tuple[str, ...]) -> None:
    refused(target_data("dense") | given, *said)
    target = TargetConfig.from_hf(target_data("dense"))
    refused(drafter_data("dense") | given, *said, target=target)
