"""From files to models: every layout and packing, drafters found by themselves, and what is refused."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import errors as hub_errors

from mlx_gemma_mtp import Runtime, load, loading
from mlx_gemma_mtp.config import ConfigError, QuantSpec
from mlx_gemma_mtp.loading import LoadError, load_pair
from mlx_gemma_mtp.models.drafter import CentroidHead
from mlx_gemma_mtp.models.linear import WeightsError
from tests import tiny
from tests.cases import LONG

PROMPT = [5, 17, 300, 44, 9, 211, 511, 0, 63, 128, 77]
Tensors = dict[str, mx.array]
Quantizer = Callable[[str], QuantSpec | None]


def affine(bits: int, group_size: int = 32) -> QuantSpec:
    return QuantSpec(bits=bits, group_size=group_size, mode="affine")


MODES = [affine(bits) for bits in (2, 3, 4, 5, 6, 8)]
MODES += [
    QuantSpec(bits=bits, group_size=group_size, mode=mode)
    for bits, group_size, mode in ((4, 32, "mxfp4"), (4, 16, "nvfp4"), (8, 32, "mxfp8"))
]
WRITTEN: dict[tuple[tiny.Kind, tiny.DType, int], Path] = {}


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Pairs as tests.tiny writes them, made once and not to be changed."""

    def write(kind: tiny.Kind = "moe", dtype: tiny.DType = "float32", shards: int = 1) -> Path:
        key = kind, dtype, shards
        if key not in WRITTEN:
            directory = tmp_path_factory.mktemp(f"{kind}-{dtype}-{shards}")
            WRITTEN[key] = tiny.write_pair(directory, kind, dtype=dtype, shards=shards)[0]
        return WRITTEN[key]

    return write


@pytest.fixture
def pair(originals: Callable[..., Path], tmp_path: Path) -> Path:
    """A pair of its own for a test that changes its files: DIR with DIR/drafter."""
    return Path(shutil.copytree(originals(), tmp_path / "model"))


def read(directory: Path) -> Tensors:
    tensors: Tensors = {}
    for file in directory.glob("*.safetensors"):
        part = mx.load(str(file))
        assert isinstance(part, dict)
        tensors |= part
    return tensors


def write(directory: Path, tensors: Tensors, config: Mapping[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(directory / "model.safetensors"), tensors, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def config_of(directory: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return value


def change_config(directory: Path, **fields: Any) -> None:
    (directory / "config.json").write_text(json.dumps(config_of(directory) | fields))


# Conversions


def mlx_name(name: str) -> str:
    return re.sub(r"^model\.language_model\.", "language_model.model.", name)


def convert(source: Path, packed: Path, plain: Path, spec_of: Quantizer, *, split_experts: bool = True) -> None:
    """Quantize a checkpoint: packed in MLX's layout, and in its own layout the same values as float32."""
    config, data = config_of(source), read(source)
    text = config.get("text_config", config)
    unshared = text["num_hidden_layers"] - text["num_kv_shared_layers"]
    default = spec_of("default")
    assert default is not None
    entry: dict[str, Any] = {"group_size": default.group_size, "bits": default.bits, "mode": default.mode}
    out: Tensors = {}
    values: Tensors = {}
    for name, x in data.items():
        path = name.removesuffix(".weight")
        is_stack = path.endswith((".experts.gate_up_proj", ".experts.down_proj"))
        spec = spec_of(path) if x.ndim > 1 else None
        parts: Tensors = {"weight": x} if is_stack or path != name else {"": x}
        values[name] = x
        if spec is not None:
            arrays = mx.quantize(x, group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
            parts = dict(zip(("weight", "scales", "biases"), arrays, strict=False))
            values[name] = dequantized(parts, spec)
        found = re.search(r"layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm)$", path)
        is_drafter = "backbone_hidden_size" in config
        if found and not is_drafter and int(found[1]) >= unshared:
            continue
        targets = [mlx_name(path)]
        if is_stack and split_experts:
            base, last = mlx_name(path).rsplit(".", 1)
            targets = [f"{base}.switch_glu.{n}_proj" for n in (("gate", "up") if last == "gate_up_proj" else ("down",))]
        for suffix, part in parts.items():
            for target, piece in zip(
                targets, mx.split(part, len(targets), axis=-2) if is_stack else [part], strict=True
            ):
                out[f"{target}.{suffix}".removesuffix(".")] = piece
        if spec is not None and spec != default:
            own = {"group_size": spec.group_size, "bits": spec.bits}
            entry |= dict.fromkeys(targets, own if spec.mode == "affine" else own | {"mode": spec.mode})
    write(packed, out, config | {"quantization": entry, "quantization_config": entry})
    write(plain, values, config)


def dequantized(parts: Tensors, spec: QuantSpec) -> mx.array:
    return mx.dequantize(
        parts["weight"],
        parts["scales"],
        parts.get("biases"),
        group_size=spec.group_size,
        bits=spec.bits,
        mode=spec.mode,
        dtype=mx.float32,
    )


def convert_pair(source: Path, out: Path, spec_of: Quantizer, **options: bool) -> tuple[Runtime, Runtime]:
    """The quantized pair and the pair of the dequantized values, loaded."""
    for part in ("", "drafter"):
        convert(source / part, out / "packed" / part, out / "plain" / part, spec_of, **options)
    packed, plain = (load(str(out / name), dtype="float32") for name in ("packed", "plain"))
    return packed, plain


def difference(a: mx.array, b: mx.array) -> float:
    """Largest difference, relative to the largest logit."""
    x, y = np.array(a, dtype=np.float64), np.array(b, dtype=np.float64)
    assert x.shape == y.shape
    return float(np.abs(x - y).max() / np.abs(y).max())


def quantizer(spec: QuantSpec) -> Quantizer:
    """Everything alike but the router, which mlx-lm gives 8 bits whatever the mode."""
    return lambda path: affine(8, 64) if path.endswith("router.proj") else spec


def _quantized() -> list[Any]:
    """All modes for experts and for per-layer tables with centroids, one of each sort without them."""
    usual = {"moe": MODES, "edge": MODES, "dense": [affine(4), *(s for s in MODES if s.mode == "mxfp4")]}
    return [
        pytest.param(kind, spec, marks=() if spec in some else LONG, id=f"{kind}-{spec.mode}-{spec.bits}")
        for kind, some in usual.items()
        for spec in MODES
    ]


@cache
def logits_of(directory: Path) -> mx.array:
    """The original's, for all modes."""
    return load(str(directory), drafter=None, dtype="float32").logits(PROMPT)


@pytest.mark.parametrize(("kind", "spec"), _quantized())
def test_quantized_weights_give_the_logits_of_their_values(
    originals: Callable[..., Path], tmp_path: Path, kind: tiny.Kind, spec: QuantSpec
) -> None:
    packed, plain = convert_pair(originals(kind), tmp_path, quantizer(spec))
    logits = packed.logits(PROMPT)
    assert difference(logits, plain.logits(PROMPT)) < 1e-4
    assert difference(logits, logits_of(originals(kind))) > 1e-3
    assert packed.draft(PROMPT, 4) == plain.draft(PROMPT, 4)
    target, drafter = packed._loaded.target, packed._loaded.drafter
    assert drafter is not None
    matrices = [target.embedding, target.layers[0].out, target.layers[-1].down, drafter.into, drafter.out]
    if target.per_layer is not None:
        matrices += [target.per_layer.table, target.per_layer.projection]
    if isinstance(drafter.head, CentroidHead):
        matrices += [drafter.head.clusters, drafter.head.centroids]
    if target.layers[0].experts is not None:
        assert target.layers[0].experts.router.spec == affine(8, 64)
        matrices += [target.layers[0].experts.down, *target.layers[0].experts.gate_up.parts]
    assert {matrix.spec for matrix in matrices} == {spec}
    assert {matrix.weight.dtype for matrix in matrices} == {mx.uint32}


@pytest.mark.parametrize("kind", ["edge2", "unified", "text"])
def test_quantized_weights_of_the_other_kinds(originals: Callable[..., Path], tmp_path: Path, kind: tiny.Kind) -> None:
    packed, plain = convert_pair(originals(kind), tmp_path, quantizer(affine(4)))
    assert difference(packed.logits(PROMPT), plain.logits(PROMPT)) < 1e-4
    assert packed.draft(PROMPT, 4) == plain.draft(PROMPT, 4)


def mixed_26b(path: str) -> QuantSpec:
    """The recipe of the mlx-community 26B: 8 bits for the target's MLPs and routers."""
    return affine(8, 64) if re.search(r"language_model.*(router\.proj|\.mlp\.\w+_proj)$", path) else affine(4)


def mixed_attention(path: str) -> QuantSpec | None:
    """Matrices that would be joined, each packed in its own way; some not at all."""
    table = {"q_proj": affine(6), "k_proj": affine(3), "v_proj": None, "o_proj": MODES[-1], "up_proj": MODES[-2]}
    return table.get(path.rsplit(".", 1)[-1], affine(4))


@pytest.mark.parametrize("spec_of", [mixed_26b, mixed_attention])
@pytest.mark.parametrize("split_experts", [True, False])
def test_overrides_by_path(
    originals: Callable[..., Path], tmp_path: Path, spec_of: Quantizer, split_experts: bool
) -> None:
    packed, plain = convert_pair(originals("moe"), tmp_path, spec_of, split_experts=split_experts)
    assert difference(packed.logits(PROMPT), plain.logits(PROMPT)) < 1e-4
    assert packed.draft(PROMPT, 4) == plain.draft(PROMPT, 4)
    layer = packed._loaded.target.layers[0]
    assert layer.out.spec == spec_of("o_proj")
    assert layer.down.spec == spec_of("language_model.layers.0.mlp.down_proj")
    entry = config_of(tmp_path / "packed")["quantization"]
    assert any(isinstance(value, dict) for value in entry.values())


def test_only_some_matrices_are_quantized(originals: Callable[..., Path], tmp_path: Path) -> None:
    def spec_of(path: str) -> QuantSpec | None:
        return affine(4) if "mlp" in path or path == "default" else None

    packed, plain = convert_pair(originals("edge"), tmp_path, spec_of)
    assert difference(packed.logits(PROMPT), plain.logits(PROMPT)) < 1e-4
    assert packed._loaded.target.embedding.spec is None


def test_packed_otherwise_than_the_config_says(originals: Callable[..., Path], tmp_path: Path) -> None:
    convert(originals("dense"), tmp_path / "packed", tmp_path / "plain", quantizer(affine(4)))
    path = tmp_path / "packed"
    for entry, said in (
        ({"group_size": 32, "bits": 8}, r"embed_tokens\.weight has shape .* for 8 bits in groups of 32"),
        ({"group_size": 64, "bits": 4}, r"embed_tokens\.scales has shape .* for 4 bits in groups of 64"),
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, r"embed_tokens\.scales has dtype float32, expected uint8"),
    ):
        change_config(path, quantization=entry, quantization_config=entry)
        with pytest.raises(WeightsError, match=said):
            load(str(path), drafter=None)
    (path / "config.json").write_text((originals("dense") / "config.json").read_text())
    with pytest.raises(WeightsError, match=r"embed_tokens\.scales is there, but the config has no `quantization`"):
        load(str(path), drafter=None)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_mlx_layout_without_quantization(originals: Callable[..., Path], tmp_path: Path, kind: tiny.Kind) -> None:
    """As mlx-lm saves a bfloat16 conversion: other names, split experts, nothing that isn't used."""
    source = originals(kind)
    convert(source, tmp_path / "packed", tmp_path / "plain", lambda path: affine(4) if path == "default" else None)
    renamed = {mlx_name(name) for name in read(source)} == set(read(tmp_path / "packed"))
    assert renamed == (kind in ("dense", "edge", "unified", "text"))
    runtime, original = (load(str(path), dtype="float32", drafter=None) for path in (tmp_path / "packed", source))
    assert (np.array(runtime.logits(PROMPT)) == np.array(original.logits(PROMPT))).all()


@pytest.mark.parametrize("kind", ["dense", "moe", "edge2"])
def test_both_forms_of_the_config_load_the_same(
    originals: Callable[..., Path], tmp_path: Path, kind: tiny.Kind
) -> None:
    path, _ = tiny.write_pair(tmp_path, kind, style="hf")
    assert "per_layer_config" in config_of(path)["text_config"]
    runtimes = [load(str(directory), dtype="float32") for directory in (path, originals(kind))]
    first, second = (np.array(runtime.logits(PROMPT)) for runtime in runtimes)
    assert (first == second).all()
    assert runtimes[0].draft(PROMPT, 3) == runtimes[1].draft(PROMPT, 3)


# Types of numbers


@pytest.mark.parametrize("kind", ["dense", "moe", "edge"])
def test_bfloat16_checkpoints(originals: Callable[..., Path], tmp_path: Path, kind: tiny.Kind) -> None:
    """float32 arithmetic on bfloat16 weights: the logits of those very values."""
    values = {name: x.astype(mx.bfloat16) for name, x in read(originals(kind)).items()}
    expected = {name: x.astype(mx.float32) for name, x in values.items()}
    write(tmp_path, expected, config_of(originals(kind)))
    stored = load(str(originals(kind, "bfloat16")), dtype="float32")
    rounded = load(str(tmp_path), drafter=None, dtype="float32")
    assert (np.array(stored.logits(PROMPT)) == np.array(rounded.logits(PROMPT))).all()
    assert len(stored.draft(PROMPT, 3)) == 3


@pytest.mark.parametrize(
    ("name", "dtype"), [("float32", mx.float32), ("bfloat16", mx.bfloat16), ("float16", mx.float16)]
)
def test_weights_become_the_dtype_asked_for(originals: Callable[..., Path], name: str, dtype: mx.Dtype) -> None:
    loaded = load_pair(str(originals("edge", "bfloat16")), dtype=name)
    assert loaded.dtype == dtype
    assert loaded.drafter is not None
    arrays = [a for model in (loaded.target, loaded.drafter) for portion in model.arrays for a in portion]
    assert {a.dtype for a in arrays} == {dtype, mx.int32}
    runtime = Runtime(loaded)
    assert runtime.generate(PROMPT, max_tokens=4, ignore_eos=True).stats.tokens == 4


def test_without_a_dtype_the_cpu_computes_in_float32(originals: Callable[..., Path]) -> None:
    on_cpu = mx.default_device().type == mx.cpu
    assert load_pair(str(originals("dense", "bfloat16"))).dtype == (mx.float32 if on_cpu else mx.bfloat16)
    with pytest.raises(LoadError, match="dtype is 'int8', expected one of float32, bfloat16, float16"):
        load_pair(str(originals()), dtype="int8")


def test_without_a_dtype_a_gpu_computes_in_the_checkpoints(
    originals: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    for fields, expected in (
        ({}, mx.bfloat16),
        ({"dtype": "float16"}, mx.float16),
        ({"dtype": None, "torch_dtype": "float32"}, mx.float32),
        ({"text_config": {"dtype": "float32"}}, mx.float32),
    ):
        assert loading._compute_dtype(None, fields) == expected


@pytest.mark.parametrize("kind", ["edge", "edge2"])
def test_token_ids_of_the_clusters(originals: Callable[..., Path], tmp_path: Path, kind: tiny.Kind) -> None:
    """int64 in official checkpoints, int32 in MLX conversions."""
    source = originals(kind)
    stored = read(source / "drafter")
    assert stored["masked_embedding.token_ordering"].dtype == mx.int64
    narrow = stored | {"masked_embedding.token_ordering": stored["masked_embedding.token_ordering"].astype(mx.int32)}
    write(tmp_path, narrow, config_of(source / "drafter"))
    drafts = []
    for drafter in (source / "drafter", tmp_path):
        runtime = load(str(source), drafter=str(drafter), dtype="float32")
        head = runtime._loaded.drafter.head  # type: ignore[union-attr]
        assert isinstance(head, CentroidHead)
        assert head.ids.dtype == mx.int32
        assert np.sort(np.array(head.ids), axis=None).tolist() == list(range(tiny.VOCAB))
        drafts.append([runtime.draft(PROMPT[:n], 6) for n in range(1, len(PROMPT))])
    assert drafts[0] == drafts[1]


# Files


def test_shards(originals: Callable[..., Path], tmp_path: Path) -> None:
    one, many = (load(str(originals("moe", shards=n)), dtype="float32") for n in (1, 3))
    assert len(list(originals("moe", shards=3).glob("*.safetensors"))) == 3
    assert (np.array(one.logits(PROMPT)) == np.array(many.logits(PROMPT))).all()
    # Without an index, all files there are.
    copy = Path(shutil.copytree(originals("moe", shards=3), tmp_path / "copy"))
    (copy / "model.safetensors.index.json").unlink()
    assert (np.array(load(str(copy), dtype="float32").logits(PROMPT)) == np.array(one.logits(PROMPT))).all()
    # With one, only those that it names.
    other = Path(shutil.copytree(originals("moe", shards=3), tmp_path / "other"))
    (other / "consolidated.safetensors").write_bytes((other / "model-00001-of-00003.safetensors").read_bytes())
    assert (np.array(load(str(other), dtype="float32").logits(PROMPT)) == np.array(one.logits(PROMPT))).all()
    (other / "model.safetensors.index.json").unlink()
    with pytest.raises(LoadError, match=r"model-00001-of-00003\.safetensors holds \S+, which an earlier file holds"):
        load(str(other))


def sharded(originals: Callable[..., Path], out: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a sharded checkpoint with its index changed."""
    path = Path(shutil.copytree(originals("moe", shards=3), out))
    index = path / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    change(table["weight_map"])
    index.write_text(json.dumps(table))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "drafter/model.safetensors",
        "sub/../model.safetensors",
        ".",
        7,
        None,
        ["a"],
    ],
)
def test_an_index_that_leaves_its_directory(originals: Callable[..., Path], tmp_path: Path, name: object) -> None:
    (tmp_path / "outside.safetensors").write_bytes(b"")
    path = sharded(originals, tmp_path / "model", lambda table: table.update(x=name))
    with pytest.raises(LoadError, match="expected a plain file name") as caught:
        load(str(path))
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["model-00004-of-00004.safetensors", "..", ""])
def test_an_index_that_names_a_missing_file(originals: Callable[..., Path], tmp_path: Path, name: str) -> None:
    path = sharded(originals, tmp_path / "model", lambda table: table.update(x=name))
    with pytest.raises(LoadError, match=r"index\.json names .*which is not there"):
        load(str(path))


def test_an_index_without_a_map(originals: Callable[..., Path], tmp_path: Path) -> None:
    path = sharded(originals, tmp_path / "model", lambda table: table.clear())
    with pytest.raises(WeightsError, match="missing tensor"):
        load(str(path))
    for text, said in (('{"weight_map": []}', "weight_map"), ("{}", "weight_map is None"), ("{", "not valid JSON")):
        (path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(LoadError, match=said):
            load(str(path))


def test_a_directory_without_weights(pair: Path) -> None:
    (pair / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"has no \*\.safetensors file"):
        load(str(pair))


def with_header(raw: bytes, change: Callable[[Any], object]) -> bytes:
    """A safetensors file with its header replaced by what `change` returns for it."""
    size = int.from_bytes(raw[:8], "little")
    head = json.dumps(change(json.loads(raw[8 : 8 + size]))).encode()
    return len(head).to_bytes(8, "little") + head + raw[8 + size :]


def entry_changed(**fields: Any) -> Callable[[bytes], bytes]:
    """A change to the first tensor's entry; None removes a field."""

    def change(header: Any) -> object:
        name = next(n for n in header if n != "__metadata__")
        entry = {k: v for k, v in (header[name] | fields).items() if v is not None}
        return header | {name: entry}

    return lambda raw: with_header(raw, change)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:100],
        lambda raw: raw[:7],
        lambda raw: b"",
        lambda raw: b"\xff" * 4096,
        lambda raw: (2).to_bytes(8, "little") + b"[]",
        lambda raw: (4).to_bytes(8, "little") + b"\xff\xfe\x00\x01" + raw,
        lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        lambda raw: with_header(raw, lambda header: list(header)),
        entry_changed(data_offsets=None),
        entry_changed(data_offsets=[0]),
        entry_changed(data_offsets=["0", "4"]),
        entry_changed(data_offsets=[0, 1 << 40]),
        entry_changed(dtype=None),
        entry_changed(dtype=["F32"]),
        entry_changed(dtype="F9"),
        entry_changed(shape=[1, 2, 3]),
    ],
)
@pytest.mark.parametrize("part", ["", "drafter"])
def test_a_damaged_file_is_named(pair: Path, part: str, damage: Callable[[bytes], bytes]) -> None:
    file = pair / part / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(LoadError, match=re.escape(str(file))):
        load(str(pair))


def test_packed_weights_of_other_frameworks_are_refused(pair: Path) -> None:
    """float8 tensors have a plain weight's shape; MLX reads them as bytes."""
    tensors = read(pair)
    name = "model.language_model.layers.0.mlp.gate_proj.weight"
    mx.save_safetensors(str(pair / "model.safetensors"), tensors | {name: tensors[name].astype(mx.uint8)})
    with pytest.raises(WeightsError, match=r"layers\.0\.mlp\.gate_proj\.weight has dtype uint8"):
        load(str(pair))


@pytest.mark.parametrize("part", ["", "drafter"])
def test_missing_extra_and_misshaped_tensors_are_named(pair: Path, part: str) -> None:
    path = pair / part
    tensors, config = read(path), config_of(path)
    name = next(n for n in tensors if n.endswith("layers.0.self_attn.q_proj.weight"))
    for changed, said in (
        ({k: v for k, v in tensors.items() if k != name}, r"missing tensor: layers\.0\.self_attn\.q_proj\.weight"),
        (tensors | {"lm_head.weight": mx.zeros(3)}, r"unexpected tensors: lm_head\.weight"),
        (tensors | {name: tensors[name][:-1]}, r"tensor layers\.0\.self_attn\.q_proj\.weight has shape \(63, "),
        (tensors | {"language_model.norm.weight": mx.zeros(3)}, r"two tensors of the checkpoint are norm\.weight"),
    ):
        write(path, changed, config)
        with pytest.raises(WeightsError, match=said):
            load(str(pair))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "config.json is missing"),
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "holds list, expected an object"),
        ("\xff", "not valid JSON"),
    ],
)
@pytest.mark.parametrize("part", ["", "drafter"])
def test_a_bad_config_file_is_named(pair: Path, part: str, text: str | None, said: str) -> None:
    file = pair / part / "config.json"
    file.unlink()
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(LoadError, match=said) as caught:
        load(str(pair), drafter=str(pair / "drafter"))
    assert str(file) in str(caught.value)


def test_a_bad_field_is_named_before_weights_are_read(pair: Path) -> None:
    (pair / "model.safetensors").write_bytes(b"")
    change_config(pair, tie_word_embeddings=False)
    with pytest.raises(ConfigError, match="tie_word_embeddings is False"):
        load(str(pair))


def test_other_towers_are_skipped_and_counted(tmp_path: Path) -> None:
    path, _ = tiny.write_pair(tmp_path, "edge2", extras=True)
    loaded = load_pair(str(path))
    by_word = {word: n for rule, n in loaded.skipped.items() for word in ("vision", "audio", "shares") if word in rule}
    names = list(read(path))
    assert by_word == {
        "vision": sum("vision" in name for name in names),
        "audio": sum("audio" in name for name in names),
        "shares": 3 * tiny.SHAPES["edge2"].shared,
    }
    assert by_word["vision"] > 0 < by_word["audio"]


# Memory


def needed_bytes(directory: Path, size: int) -> int:
    """Bytes of the text tensors, `size` each but for token ids of 8."""
    towers = re.compile("vision|audio")
    tensors = {name: x for name, x in read(directory).items() if not towers.search(name)}
    return sum(x.size * (8 if x.dtype == mx.int64 else size) for x in tensors.values())


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_weights_larger_than_memory_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, size: int
) -> None:
    path, drafter = tiny.write_pair(tmp_path, "edge", dtype="bfloat16", extras=True)
    needed = needed_bytes(path, size) + needed_bytes(drafter, size)
    monkeypatch.setattr(loading, "memory_limit", lambda: needed)
    assert load_pair(str(path), dtype=dtype).dtype.size == size
    monkeypatch.setattr(loading, "memory_limit", lambda: needed - 1)

    def read_all_the_same(*_: object) -> None:
        raise AssertionError("read before the check")

    monkeypatch.setattr(mx, "load", read_all_the_same)
    with pytest.raises(LoadError, match=rf"the weights need 0\.0 GB as {dtype}, this machine has 0\.0 GB"):
        load_pair(str(path), dtype=dtype)
    monkeypatch.setattr(loading, "memory_limit", lambda: needed)
    with pytest.raises(AssertionError, match="read before the check"):
        load_pair(str(path), dtype=dtype)


def test_the_limit_is_this_machines() -> None:
    assert 1 << 28 < loading.memory_limit() < 1 << 50


def test_all_is_read_at_load_and_progress_is_told(pair: Path) -> None:
    told: list[tuple[str, float]] = []
    loaded = load_pair(str(pair), progress=lambda what, share: told.append((what, share)))
    for what in ("loading the target", "loading the drafter"):
        shares = [share for said, share in told if said == what]
        assert shares == sorted(shares)
        assert shares[-1] == 1
    shutil.rmtree(pair)
    runtime = Runtime(loaded)
    assert runtime.generate(PROMPT, max_tokens=3, ignore_eos=True).stats.tokens == 3


# Where the drafter is


def place(pair: Path, target: Path, *drafters: Path) -> Path:
    """The target alone at `target`, its drafter at each of `drafters`."""
    for drafter in drafters:
        shutil.copytree(pair / "drafter", drafter)
    shutil.copytree(pair, target, ignore=shutil.ignore_patterns("drafter"), dirs_exist_ok=True)
    return target


@pytest.mark.parametrize("where", ["model/drafter", "assistant", "drafter", "model-assistant"])
@pytest.mark.parametrize("form", ["{}", "{}/", "{}/../model"])
def test_the_drafter_is_found(originals: Callable[..., Path], tmp_path: Path, where: str, form: str) -> None:
    target = place(originals(), tmp_path / "model", tmp_path / where)
    loaded = load_pair(form.format(target))
    assert loaded.drafter is not None
    assert loaded.drafter_path is not None
    assert loaded.drafter_path.resolve() == (tmp_path / where).resolve()


def test_inside_goes_before_beside(originals: Callable[..., Path], tmp_path: Path) -> None:
    target = place(originals(), tmp_path / "model", tmp_path / "model" / "drafter", tmp_path / "assistant")
    assert load_pair(str(target)).drafter_path == target / "drafter"


@pytest.mark.parametrize("names", [("assistant", "drafter"), ("drafter", "model-assistant")])
def test_two_drafters_beside_are_an_error(
    originals: Callable[..., Path], tmp_path: Path, names: tuple[str, str]
) -> None:
    target = place(originals(), tmp_path / "model", *(tmp_path / name for name in names))
    with pytest.raises(LoadError, match="two drafters beside") as caught:
        load_pair(str(target))
    assert all(str(tmp_path / name) in str(caught.value) for name in names)
    assert load_pair(str(target), drafter=str(tmp_path / names[1])).drafter_path == tmp_path / names[1]


def test_no_drafter_is_plain_decoding(
    originals: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = place(originals(), tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        runtime = load(str(target))
    assert "no drafter" in caplog.text
    assert runtime.drafter_config is None
    found = runtime.generate(PROMPT, max_tokens=8, ignore_eos=True)
    assert (found.stats.drafted, len(found.tokens)) == (0, 8)
    assert not any(found.drafted)
    paired = load(str(originals()))
    same = paired.generate(PROMPT, max_tokens=8, ignore_eos=True, depth=3)
    assert same.tokens == found.tokens
    assert same.stats.drafted > 0
    with pytest.raises(ValueError, match="no drafter"):
        runtime.draft(PROMPT)


def test_the_drafter_can_be_left_out(originals: Callable[..., Path]) -> None:
    loaded = load_pair(str(originals()), drafter=None)
    assert (loaded.drafter, loaded.drafter_path, loaded.drafter_config) == (None, None, None)


def test_a_directory_without_a_config_is_no_drafter(originals: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "assistant").mkdir()
    target = place(originals(), tmp_path / "model", tmp_path / "drafter")
    assert load_pair(str(target)).drafter_path == tmp_path / "drafter"


def test_a_target_is_not_its_own_drafter(originals: Callable[..., Path], tmp_path: Path) -> None:
    target = place(originals(), tmp_path / "drafter")
    assert load_pair(str(target)).drafter is None


def test_a_drafter_of_another_target(originals: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="backbone_hidden_size is 96, the target's hidden_size is 64: not a pair"):
        load_pair(str(originals("moe")), drafter=str(originals("dense") / "drafter"))
    with pytest.raises(ConfigError, match="model_type is 'gemma4', expected gemma4_assistant"):
        load_pair(str(originals("moe")), drafter=str(originals("moe")))
    with pytest.raises(ConfigError, match="model_type is 'gemma4_assistant'"):
        load_pair(str(originals("moe") / "drafter"))


# The hub


class Hub:
    """Stands in for `snapshot_download`: ids to directories, and what was asked."""

    def __init__(self, **places: Path) -> None:
        self.places = {name.replace("__", "/"): path for name, path in places.items()}
        self.asked: list[tuple[str, str | None]] = []
        self.patterns: list[str] = []
        self.error: Exception | None = None

    def __call__(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((repo_id, revision))
        self.patterns = allow_patterns
        if self.error is not None:
            raise self.error
        return str(self.places[repo_id])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, originals: Callable[..., Path], tmp_path: Path) -> Hub:
    target = place(originals(), tmp_path / "snapshots" / "model")
    found = Hub(owner__model=target, owner__drafter=originals() / "drafter")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    monkeypatch.chdir(tmp_path)
    return found


def test_a_hub_id_is_fetched_with_its_revision(hub: Hub) -> None:
    loaded = load_pair("owner/model", revision="v1.2")
    assert hub.asked == [("owner/model", "v1.2")]
    assert {"*.json", "*.safetensors", "*.jinja"} <= set(hub.patterns)
    assert loaded.path == hub.places["owner/model"]
    assert loaded.drafter is None


def test_a_drafters_hub_id_has_a_revision_of_its_own(hub: Hub, originals: Callable[..., Path]) -> None:
    loaded = load_pair("owner/model", drafter="owner/drafter", revision="v1.2")
    assert hub.asked == [("owner/model", "v1.2"), ("owner/drafter", None)]
    assert loaded.drafter is not None
    hub.asked.clear()
    load_pair(str(originals()), drafter="owner/drafter")
    assert hub.asked == [("owner/drafter", None)]


OFFICIAL = "google/gemma-4-{}-it-assistant"


@pytest.mark.parametrize(
    ("source", "size"),
    [
        *[(f"google/gemma-4-{size}-it", size) for size in ("E2B", "E4B", "12B", "26B-A4B", "31B")],
        ("mlx-community/gemma-4-e4b-it-4bit", "E4B"),
        ("mlx-community/gemma-4-e2b-it-bf16", "E2B"),
        ("mlx-community/gemma-4-26b-a4b-it-4bit", "26B-A4B"),
        ("mlx-community/gemma-4-31B-it-mxfp8", "31B"),
        ("google/gemma-4-26B-A4B-it-qat-q4_0-unquantized", "26B-A4B"),
        ("someone/gemma-4-12b-it-qat-4bit", "12B"),
    ],
)
def test_the_official_drafter_of_a_hub_id(
    hub: Hub, originals: Callable[..., Path], tmp_path: Path, source: str, size: str
) -> None:
    hub.places[source] = hub.places["owner/model"]
    drafter = OFFICIAL.format(size)
    if "-qat" in source:
        drafter = drafter.replace("-assistant", "-qat-q4_0-unquantized-assistant")
    hub.places[drafter] = originals() / "drafter"
    loaded = load_pair(source)
    assert hub.asked == [(source, None), (drafter, None)]
    assert loaded.drafter_path == originals() / "drafter"


@pytest.mark.parametrize(
    "source", ["google/gemma-4-31B", "google/gemma-3-12b-it", "owner/model", "owner/gemma-4-270m-it"]
)
def test_other_hub_ids_have_no_official_drafter(hub: Hub, source: str) -> None:
    hub.places[source] = hub.places["owner/model"]
    assert load_pair(source).drafter is None
    assert hub.asked == [(source, None)]


def test_a_pair_on_the_hub_brings_its_drafter(hub: Hub, originals: Callable[..., Path]) -> None:
    hub.places["google/gemma-4-E4B-it"] = originals()
    assert load_pair("google/gemma-4-E4B-it").drafter_path == originals() / "drafter"
    assert hub.asked == [("google/gemma-4-E4B-it", None)]


def test_a_directory_goes_before_a_hub_id(hub: Hub, originals: Callable[..., Path], tmp_path: Path) -> None:
    place(originals(), tmp_path / "google" / "gemma-4-E4B-it")
    assert load_pair("google/gemma-4-E4B-it").drafter is None
    assert hub.asked == []


@pytest.mark.parametrize("source", ["nowhere", "./owner/model", "/owner/model", "~/owner", "a/b/c", "../x"])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(hub: Hub, source: str) -> None:
    with pytest.raises(LoadError, match="is not a directory, and not a hub id"):
        load_pair(source)
    assert hub.asked == []


def hub_error(kind: type[hub_errors.HfHubHTTPError]) -> Exception:
    return kind("said the hub", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (hub_error(hub_errors.RepositoryNotFoundError), "neither a directory nor a model on the hub"),
        (hub_error(hub_errors.GatedRepoError), "needs a login"),
        (hub_error(hub_errors.RevisionNotFoundError), "fetching it from the hub failed: said the hub"),
        (hub_error(hub_errors.HfHubHTTPError), "fetching it from the hub failed: said the hub"),
        (hub_errors.LocalEntryNotFoundError("no network"), "no network"),
        (hub_errors.OfflineModeIsEnabled("offline"), "offline"),
        (hub_errors.HFValidationError("bad id"), "bad id"),
        (ConnectionResetError("reset"), "reset"),
        (OSError(28, "no space left"), "no space left"),
        # Of the HTTP library, in the middle of a download.
        (hub_errors.HfHubHTTPError.__bases__[0]("timed out"), "timed out"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_errors_of_the_hub(hub: Hub, error: Exception, said: str) -> None:
    hub.error = error
    with pytest.raises(LoadError, match=f"owner/model is .*{said}") as caught:
        load_pair("owner/model")
    assert caught.value.__cause__ is error


def test_fetching_is_told(hub: Hub) -> None:
    told: list[str] = []
    load_pair("owner/model", progress=lambda what, _: told.append(what))
    assert told[0] == "fetching owner/model"
