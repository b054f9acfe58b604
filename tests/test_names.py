"""The mapping of tensor names: every layout's names become one, and nothing is dropped without a rule."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_gemma_mtp.convert.names import Skipped, canonical, canonical_path

LAYER = [
    "input_layernorm.weight",
    "layer_scalar",
    "self_attn.q_proj.weight",
    "self_attn.k_norm.weight",
    "mlp.gate_proj.weight",
    "mlp.down_proj.scales",
    "per_layer_input_gate.biases",
    "router.per_expert_scale",
    "router.proj.weight",
]
NAMES = ["embed_tokens.weight", "norm.weight", "per_layer_model_projection.weight", "embed_tokens_per_layer.scales"]
NAMES += [f"layers.{i}.{name}" for i in (0, 7, 41) for name in LAYER]
PREFIXES = ["model.language_model.", "language_model.model.", "language_model.", "model.", ""]
# However busy the machine is.
UNHURRIED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def all_write(_: int) -> bool:
    return True


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_all_layouts_are_taken_off(prefix: str) -> None:
    assert [canonical(prefix + name, all_write) for name in NAMES] == NAMES


@pytest.mark.parametrize(
    "name",
    [
        "pre_projection.weight",
        "post_projection.scales",
        "masked_embedding.centroids.weight",
        "masked_embedding.token_ordering",
    ],
)
def test_names_that_only_drafters_have_stay(name: str) -> None:
    assert canonical(name, all_write) == name


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("experts.gate_up_proj", "experts.gate_up_proj.weight"),
        ("experts.down_proj", "experts.down_proj.weight"),
        ("experts.gate_up_proj.scales", "experts.gate_up_proj.scales"),
        ("experts.switch_glu.gate_proj.weight", "experts.gate_proj.weight"),
        ("experts.switch_glu.up_proj.scales", "experts.up_proj.scales"),
        ("experts.switch_glu.down_proj.biases", "experts.down_proj.biases"),
        ("experts.down_proj.weight", "experts.down_proj.weight"),
    ],
)
def test_experts_of_all_layouts(prefix: str, stored: str, expected: str) -> None:
    assert canonical(f"{prefix}layers.12.{stored}", all_write) == f"layers.12.{expected}"


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.experts.switch_glu.other_proj.weight",
        "layers.0.experts.0.gate_proj.weight",
        "layers.0.experts.bias",
        "lm_head.weight",
        "something.else",
        "",
    ],
)
def test_unknown_names_stay_for_the_loader_to_refuse(name: str) -> None:
    assert canonical(name, all_write) == name


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight", "vision"),
        ("vision_tower.std_bias", "vision"),
        ("model.embed_vision.embedding_projection.weight", "vision"),
        ("embed_vision.embedding_projection.scales", "vision"),
        ("model.vision_embedder.pos_embedding", "vision"),
        ("multi_modal_projector.mm_soft_emb_norm.weight", "vision"),
        ("model.audio_tower.layers.0.self_attn.k_proj.linear.weight", "audio"),
        ("audio_tower.output_proj.bias", "audio"),
        ("embed_audio.embedding_projection.weight", "audio"),
        ("model.language_model.layers.3.self_attn.rotary_emb.inv_freq", "RoPE"),
    ],
)
def test_what_text_does_not_need_is_skipped_by_a_rule(name: str, word: str) -> None:
    found = canonical(name, all_write)
    assert isinstance(found, Skipped)
    assert word in found.rule


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("part", ["k_proj.weight", "v_proj.weight", "k_norm.weight", "k_proj.scales", "v_proj.biases"])
def test_keys_and_values_are_skipped_in_layers_that_share_only(prefix: str, part: str) -> None:
    asked: list[int] = []

    def first_fifteen_write(layer: int) -> bool:
        asked.append(layer)
        return layer < 15

    for layer in (0, 14):
        name = f"layers.{layer}.self_attn.{part}"
        assert canonical(prefix + name, first_fifteen_write) == name
    for layer in (15, 34):
        found = canonical(f"{prefix}layers.{layer}.self_attn.{part}", first_fifteen_write)
        assert isinstance(found, Skipped)
        assert "shares" in found.rule
    assert asked == [0, 14, 15, 34]


@pytest.mark.parametrize("part", ["q_proj.weight", "o_proj.weight", "q_norm.weight"])
def test_queries_are_never_skipped(part: str) -> None:
    name = f"layers.20.self_attn.{part}"
    assert canonical(f"model.language_model.{name}", lambda _: False) == name


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("language_model.model.layers.0.mlp.gate_proj", "layers.0.mlp.gate_proj"),
        ("model.language_model.layers.29.router.proj", "layers.29.router.proj"),
        ("language_model.model.layers.0.experts.switch_glu.up_proj", "layers.0.experts.up_proj"),
        ("model.language_model.layers.0.experts.gate_up_proj", "layers.0.experts.gate_up_proj"),
        ("language_model.model.embed_tokens", "embed_tokens"),
        ("model.embed_tokens", "embed_tokens"),
        ("pre_projection", "pre_projection"),
        ("masked_embedding.centroids", "masked_embedding.centroids"),
        ("language_model.model.layers.20.self_attn.k_proj", "layers.20.self_attn.k_proj"),
        ("vision_tower.patch_embedder.input_proj", "vision_tower.patch_embedder.input_proj"),
    ],
)
def test_paths_of_quantization_overrides(path: str, expected: str) -> None:
    assert canonical_path(path) == expected
    # An override reaches the very tensors that are stored under its path.
    for suffix in ("weight", "scales", "biases"):
        found = canonical(f"{path}.{suffix}", all_write)
        assert isinstance(found, Skipped) if path.startswith("vision") else found == f"{expected}.{suffix}"


PARTS = st.sampled_from(
    ["model", "language_model", "layers", "3", "experts", "switch_glu", "gate_up_proj", "self_attn", "k_proj", "x"]
)


@UNHURRIED
@given(st.one_of(st.text(max_size=40), st.lists(PARTS, max_size=9).map(".".join)), st.booleans())
def test_it_is_total_and_drops_nothing_silently(name: str, writes: bool) -> None:
    found = canonical(name, lambda _: writes)
    if isinstance(found, Skipped):
        assert found.rule
        return
    # All that is ever added or taken off: a prefix, `switch_glu` and the suffix of experts.
    before, after = (
        [part for part in path.removesuffix(".weight").split(".") if part != "switch_glu"] for path in (name, found)
    )
    assert before[len(before) - len(after) :] == after


@UNHURRIED
@given(st.lists(PARTS, max_size=7).map(".".join))
def test_layouts_agree_on_every_name(name: str) -> None:
    found = {canonical(prefix + "layers.0." + name, all_write) for prefix in PREFIXES}
    assert len(found) == 1
