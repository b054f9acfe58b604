"""What the converter writes, loaded by mlx-lm (targets) and mlx-vlm (drafters): the same logits, in float32.

mlx-vlm is no dependency: MLX_GEMMA_MTP_VLM_PYTHON names a Python that has it, else this one is tried.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp.convert import convert
from mlx_gemma_mtp.convert.recipes import RECIPES
from mlx_gemma_mtp.loading import load_pair
from mlx_gemma_mtp.models.drafter import CentroidHead, Drafter
from mlx_gemma_mtp.models.linear import rms_norm
from mlx_gemma_mtp.runtime import load
from mlx_gemma_mtp.views import attention
from tests import tiny
from tests.cases import kinds_with

PROMPT = [5, 9, 11, 300, 42, 17, 8, 99, 3, 271]
TOLERANCE = 1e-4  # of the largest logit
FLOATING = ("mxfp4", "nvfp4", "mxfp8")
ROUNDED = 1e-2
"""For stock embeddings in floating-point formats: MLX's layer gives their rows in bfloat16, whatever the model's type,
so scaling them by the root of the width is rounded to 8 bits. `widen_lookups` takes that away."""


@pytest.fixture(autouse=True, scope="module")
def eager() -> Iterator[None]:
    mx.disable_compile()
    yield
    mx.enable_compile()


def difference(found: mx.array, expected: mx.array) -> float:
    return float((mx.abs(found - expected).max() / mx.abs(expected).max()).item())  # type: ignore[arg-type]


def widen_lookups(inner: Any) -> None:
    """Let rows of embeddings in floating-point formats come in float32."""
    nn = import_module("mlx.nn")
    for name in ("embed_tokens", "embed_tokens_per_layer"):
        table = inner.get(name)
        if isinstance(table, nn.QuantizedEmbedding) and table.mode != "affine":
            plain = nn.Embedding(1, 1)
            plain.weight = mx.dequantize(
                table.weight,
                table.scales,
                None,
                group_size=table.group_size,
                bits=table.bits,
                mode=table.mode,
                dtype=mx.float32,
            )
            inner[name] = plain


@pytest.mark.parametrize(
    ("kind", "recipe", "style"),
    [
        *(pytest.param(*case.values, "google", marks=case.marks) for case in kinds_with(RECIPES)),
        *((kind, recipe, "hf") for kind in tiny.KINDS for recipe in ("bf16", "4bit")),
    ],
)
def test_mlx_lm_gives_the_same_logits(tmp_path: Path, kind: tiny.Kind, recipe: str, style: tiny.Style) -> None:
    """Also of a source whose config has transformers' form, which mlx-lm doesn't know."""
    from mlx_lm.utils import load_model

    source, _ = tiny.write_pair(tmp_path / "source", kind, style=style, dtype="bfloat16", extras=kind != "text")
    convert(source, tmp_path / "out", quantize=recipe, measure=False)
    model, _ = load_model(tmp_path / "out")
    model.set_dtype(mx.float32)
    found = load(str(tmp_path / "out"), drafter=None, dtype="float32").logits(PROMPT)
    if recipe in FLOATING:
        assert difference(found, model(mx.array([PROMPT]))[0]) < ROUNDED
        widen_lookups(model.model if kind == "text" else model.language_model.model)
    expected = model(mx.array([PROMPT]))[0]
    assert found.shape == expected.shape
    assert difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("recipe", ["bf16", "nvfp4"])
def test_mlx_lm_loads_a_converted_pair(tmp_path: Path, recipe: str) -> None:
    """`mlx_lm.load`, as its users call it: weights, tokenizer and chat template of the demo."""
    from mlx_lm import load as load_theirs

    convert("demo", tmp_path / "out", quantize=recipe, measure=False)
    model, tokenizer = load_theirs(str(tmp_path / "out"))[:2]
    ours = load(str(tmp_path / "out"), dtype="float32")
    assert ours.text is not None
    messages = [{"role": "user", "content": "Count from 3 to 9."}]
    ids = ours.text.render(messages)
    theirs = tokenizer.apply_chat_template(  # type: ignore[no-untyped-call]
        messages, add_generation_prompt=True, enable_thinking=False
    )
    assert theirs == ids
    model.set_dtype(mx.float32)
    assert difference(ours.logits(ids), model(mx.array([ids]))[0]) < (TOLERANCE if recipe == "bf16" else ROUNDED)


def test_what_mlx_vlm_converted_is_read(vlm: str, tmp_path: Path) -> None:
    """Its config also holds the generation config; it copies our record, which says nothing of its files."""
    convert("demo", tmp_path / "bf16", drafter=None, measure=False)
    (tmp_path / "bf16" / "conversion.json").unlink()
    options = ["--hf-path", tmp_path / "bf16", "--mlx-path", tmp_path / "theirs", "-q", "--q-group-size", "32"]
    subprocess.run([vlm, "-m", "mlx_vlm", "convert", *map(str, options)], check=True, capture_output=True)
    (tmp_path / "same.toml").write_text("default = { bits = 4, group_size = 32 }")
    convert(tmp_path / "theirs", tmp_path / "ours", quantize=str(tmp_path / "same.toml"), drafter=None, measure=False)
    found = [load(str(tmp_path / n), drafter=None, dtype="float32").logits(PROMPT) for n in ("theirs", "ours")]
    assert difference(*found) < TOLERANCE
    assert difference(found[0], load("demo", drafter=None, dtype="float32").logits(PROMPT)) > ROUNDED


class View:
    """Random K/V of each kind of layer, all of it seen, and queries at one position."""

    def __init__(self, drafter: Drafter, length: int, position: int) -> None:
        self.positions = mx.array([[position]])
        self.kv: dict[str, tuple[mx.array, mx.array]] = {}
        self._slots: dict[int, tuple[mx.array, mx.array]] = {}
        for i, spec in enumerate(s.spec for s in drafter.layers):
            shape = (1, spec.kv_heads, length, spec.head_dim)
            if spec.kv_slot not in self._slots:
                keys = mx.random.key(10 + i)
                self._slots[spec.kv_slot] = (mx.random.normal(shape, key=keys), mx.random.normal(shape, key=keys + 1))
            self.kv[f"{spec.kind}_attention"] = self._slots[spec.kv_slot]

    def attend(self, slot: int, q: mx.array, pair: tuple[mx.array, mx.array] | None) -> mx.array:
        assert pair is None
        k, v = self._slots[slot]
        return attention(q, k, v, mx.ones((1, 1, q.shape[2], k.shape[2]), mx.bool_))


def our_logits(drafter: Drafter, view: View, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Projected hidden state, logits and the token ids they are for, of one step."""
    ropes = drafter._ropes.at(view.positions)
    x = drafter.into(x)
    for layer in drafter.layers:
        x = layer(x, view, ropes)  # type: ignore[arg-type]
    x = rms_norm(x, drafter.norm, drafter.config.norm_eps)
    if isinstance(drafter.head, CentroidHead):
        scores, ids = drafter.head.scores(x[:, 0])
    else:
        scores = drafter.head.embedding(x[:, 0])
        ids = mx.arange(scores.shape[-1])[None]
    return drafter.out(x), scores, ids


THEIRS = textwrap.dedent(
    """
    import sys
    import mlx.core as mx
    from mlx_vlm.speculative.drafters import load_drafter
    for directory in sys.argv[1:]:
        given = mx.load(directory + "/given.safetensors")
        model, kind = load_drafter(directory)
        assert kind == "mtp", kind
        model.set_dtype(mx.float32)
        kv = {k: (given[k + ".k"], given[k + ".v"]) for k in ("sliding_attention", "full_attention")}
        model.set_shared_kv(kv, given["full_attention.k"].shape[2])
        if model.masked_embedding is not None:
            masked, embedding = model.masked_embedding, model.model.embed_tokens.weight
            model._lm_head_fn = lambda h: masked(h, embedding)
        hidden, logits = model(given["x"], kv, given["position"])
        mx.save_safetensors(directory + "/found.safetensors", {"hidden": hidden, "logits": logits})
    """
)


@pytest.fixture(scope="module")
def vlm() -> str:
    python = os.environ.get("MLX_GEMMA_MTP_VLM_PYTHON", sys.executable)
    test = subprocess.run([python, "-c", "import mlx_vlm.speculative.drafters"], capture_output=True, check=False)
    if test.returncode:
        pytest.skip(f"{python} has no mlx-vlm: name one that has with MLX_GEMMA_MTP_VLM_PYTHON")
    return python


@pytest.mark.parametrize("kind", ["dense", "moe", "edge", "edge2", "unified"])
def test_mlx_vlm_gives_the_same_logits_of_drafters(vlm: str, tmp_path: Path, kind: tiny.Kind) -> None:
    """Also from a config in transformers' form, which mlx-vlm doesn't know."""
    cases: list[tuple[tiny.Style, str]] = [*(("google", r) for r in RECIPES), ("hf", "4bit")]
    expected = {}
    for style, recipe in cases:
        tiny.write_pair(tmp_path / style, kind, style=style, dtype="bfloat16")
        out = tmp_path / f"{style}-{recipe}"
        convert(tmp_path / style, out, drafter_quantize=recipe, measure=False)
        drafter = load_pair(str(out), dtype="float32").drafter
        assert drafter is not None
        view = View(drafter, length=12, position=12)
        x = mx.random.normal((1, 1, 2 * drafter.config.backbone_hidden), key=mx.random.key(3))
        expected[out / "drafter"] = our_logits(drafter, view, x)
        given = {f"{k}.{n}": a for k, pair in view.kv.items() for n, a in zip("kv", pair, strict=True)}
        mx.save_safetensors(str(out / "drafter" / "given.safetensors"), given | {"x": x, "position": view.positions})
    subprocess.run([vlm, "-c", THEIRS, *map(str, expected)], check=True)
    for directory, (hidden, scores, ids) in expected.items():
        theirs = mx.load(str(directory / "found.safetensors"))
        assert isinstance(theirs, dict)
        assert difference(hidden, theirs["hidden"]) < TOLERANCE, directory
        logits = theirs["logits"].reshape(-1)
        assert difference(scores[0], logits[ids[0]]) < TOLERANCE, directory
        others = np.delete(np.array(logits), np.array(ids[0]))
        assert not others.size or others.max() < np.array(scores[0]).min() + 1e-3, directory


TARGETS = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_vlm.utils import load_model

    def logits(model, ids):
        out = model(mx.array([ids]))
        return getattr(out, "logits", out)[0].astype(mx.float32)

    def widen(inner):
        for name in ("embed_tokens", "embed_tokens_per_layer"):
            table = inner.get(name)
            if isinstance(table, nn.QuantizedEmbedding) and table.mode != "affine":
                plain = nn.Embedding(1, 1)
                sizes = {"group_size": table.group_size, "bits": table.bits, "mode": table.mode}
                plain.weight = mx.dequantize(table.weight, table.scales, None, dtype=mx.float32, **sizes)
                inner[name] = plain

    ids = json.loads(sys.argv[1])
    for directory in map(Path, sys.argv[2:]):
        model = load_model(directory)
        model.set_dtype(mx.float32)
        found = {"stock": logits(model, ids)}
        widen(model.language_model.model)
        found["wide"] = logits(model, ids)
        mx.save_safetensors(str(directory / "found.safetensors"), found)
    """
)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_mlx_vlm_gives_the_same_logits_of_targets(vlm: str, tmp_path: Path, kind: tiny.Kind) -> None:
    """Without vision and audio, which the tiny pairs have in name only."""
    source, _ = tiny.write_pair(tmp_path / "source", kind, dtype="bfloat16", extras=kind != "text")
    for recipe in RECIPES:
        convert(source, tmp_path / recipe, drafter=None, quantize=recipe, text_only=True, measure=False)
    subprocess.run([vlm, "-c", TARGETS, json.dumps(PROMPT), *(str(tmp_path / r) for r in RECIPES)], check=True)
    for recipe in RECIPES:
        found = load(str(tmp_path / recipe), drafter=None, dtype="float32").logits(PROMPT)
        theirs = mx.load(str(tmp_path / recipe / "found.safetensors"))
        assert isinstance(theirs, dict)
        assert difference(found, theirs["wide"]) < TOLERANCE, recipe
        assert difference(found, theirs["stock"]) < (ROUNDED if recipe in FLOATING else TOLERANCE), recipe
