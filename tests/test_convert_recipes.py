"""Recipes as data and in TOML, and the q4_0 grid."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.config import QuantSpec
from mlx_gemma_mtp.convert import convert
from mlx_gemma_mtp.convert.checkpoint import ConvertError
from mlx_gemma_mtp.convert.quantize import pack, unpack
from mlx_gemma_mtp.convert.recipes import EXCEPTIONS, RECIPES, find_recipe
from tests import tiny

Q4_0 = QuantSpec(bits=4, group_size=32, mode="affine")
MOE, CENTROIDS = frozenset({"target", "moe"}), frozenset({"drafter", "centroids"})


def test_every_exception_has_a_reason_and_can_apply() -> None:
    kinds = {"target", "drafter", "moe", "per_layer", "centroids"}
    for exception in EXCEPTIONS:
        assert set(exception.kinds) <= kinds
        assert len(exception.reason) > 20
    for recipe in RECIPES.values():
        spec, reason = recipe.spec_of("layers.3.router.proj", MOE)
        assert (spec is None) == (recipe.name == "bf16")
        assert spec is None or (spec.bits == 8 and reason)


def test_exceptions_belong_to_their_architecture() -> None:
    recipe = RECIPES["4bit"]
    assert recipe.spec_of("layers.0.mlp.up_proj", frozenset({"target"}))[0] == recipe.default
    assert recipe.spec_of("layers.0.mlp.up_proj", MOE)[0] == recipe.high
    assert recipe.spec_of("layers.0.experts.switch_glu.up_proj", MOE)[0] == recipe.default
    assert recipe.spec_of("embed_tokens", CENTROIDS)[0] is None
    assert recipe.spec_of("embed_tokens", frozenset({"drafter"}))[0] == recipe.default
    assert recipe.spec_of("masked_embedding.centroids", CENTROIDS)[0] == recipe.high
    for every in RECIPES.values():
        assert every.spec_of("embed_tokens", CENTROIDS)[0] is None


def exact(parts: tuple[mx.array, ...]) -> mx.array:
    """What packed rows stand for, computed in float32 as products with them are, and rounded once."""
    wide = (parts[0], *(p.astype(mx.float32) for p in parts[1:]))
    return unpack(wide, Q4_0).astype(mx.bfloat16)


def test_q4_0_reproduces_its_grid() -> None:
    """Weights d * (q - 8), each group with its -8, come back bit by bit; MLX's own scales miss them."""
    mx.random.seed(7)
    d = (mx.random.normal((64, 8, 1)) * 0.01).astype(mx.bfloat16).astype(mx.float32)
    codes = mx.random.randint(3, 12, (64, 8, 32))
    codes = mx.where(mx.arange(32) == 5, 0, codes)
    weights = (d * (codes - 8)).astype(mx.bfloat16).reshape(64, 256)
    packed = pack(weights, Q4_0, "q4_0")
    assert packed[0].dtype == mx.uint32
    assert mx.array_equal(exact(packed), weights)
    theirs = exact(tuple(mx.quantize(weights, group_size=32, bits=4)))
    assert np.mean(np.array(theirs != weights)) > 0.1


def test_q4_0_is_ggufs() -> None:
    """Any weights: code = floor(x / d + 8.5), at most 15, with d an eighth of the value farthest from 0, negated."""
    mx.random.seed(8)
    weights = mx.random.normal((4, 64))
    weights[0] = 0
    words, scales, biases = (np.array(a) for a in pack(weights, Q4_0, "q4_0"))
    for r, row in enumerate(np.array(weights)):
        for g in range(2):
            group = [float(x) for x in row[32 * g : 32 * g + 32]]
            d = -max(group, key=abs) / 8
            assert scales[r, g] == d
            assert biases[r, g] == -8 * d
            for i, x in enumerate(group):
                code = int(words[r, 4 * g + i // 8]) >> (4 * (i % 8)) & 15
                assert code == (8 if d == 0 else min(15, int(x / d + 8.5)))


TOML = """
base = "4bit"
about = "attention at 6 bits"
default = { bits = 4, group_size = 32 }
[[rules]]
match = "layers.*.self_attn.*"
bits = 6
reason = "attention is small"
[[rules]]
match = "embed_tokens"
keep = true
[[rules]]
match = "layers.0.mlp.down_proj"
mode = "mxfp8"
"""


def test_a_toml_recipe(tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    (tmp_path / "mine.toml").write_text(TOML)
    recipe = find_recipe(str(tmp_path / "mine.toml"))
    assert recipe.name == "mine"
    target = frozenset({"target"})
    six = QuantSpec(bits=6, group_size=64, mode="affine")
    assert recipe.spec_of("layers.3.self_attn.q_proj", target) == (six, "attention is small")
    assert recipe.spec_of("embed_tokens", target)[0] is None
    assert recipe.spec_of("layers.1.mlp.up_proj", target)[0] == QuantSpec(bits=4, group_size=32, mode="affine")
    assert recipe.spec_of("layers.3.router.proj", MOE)[0] == RECIPES["4bit"].high
    tiny.write_pair(tmp_path / "source", "text", dtype="bfloat16")
    record = convert(tmp_path / "source", tmp_path / "out", quantize=str(tmp_path / "mine.toml"), measure=False)
    found = record["target"]["tensors"]
    assert found["model.embed_tokens"]["dtype"] == "BF16"
    assert found["model.layers.0.self_attn.q_proj"]["bits"] == 6.5
    assert found["model.layers.0.mlp.down_proj"]["dtype"] == "mxfp8"
    assert found["model.layers.1.mlp.down_proj"]["bits"] == 5.0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("bits = 4", "bits is unknown, expected base"),
        ('base = "5bit"', "base is '5bit', expected one of bf16"),
        ("default = { bits = 7 }", "isn't supported"),
        ("default = { bits = 4.5 }", "expected whole numbers"),
        ('default = { mode = "mxfp4", bits = 8 }', "mode mxfp4 has bits"),
        ("[[rules]]\nbits = 4", "expected a table with a pattern"),
        ('[[rules]]\nmatch = "x"\nkeep = true\nbits = 4', "bits is unknown, expected nothing else"),
        ('grid = "q4_0"', "with affine 4 bits in groups of 32"),
        ("base = ", "is not valid TOML"),
    ],
)
def test_a_wrong_toml_recipe(tmp_path: Path, text: str, complaint: str) -> None:
    pytest.importorskip("tomllib")
    (tmp_path / "wrong.toml").write_text(text)
    with pytest.raises(ConvertError, match=complaint):
        find_recipe(str(tmp_path / "wrong.toml"))


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(ConvertError, match=r"5bit.*bf16, 8bit"):
        find_recipe("5bit")
    with pytest.raises(ConvertError, match="is not there"):
        find_recipe("/nowhere/recipe.toml")
