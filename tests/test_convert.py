"""The converter on tiny pairs of every architecture: bits, names, configs, records, and that the output runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_gemma_mtp import load
from mlx_gemma_mtp.config import TargetConfig
from mlx_gemma_mtp.convert import convert, stream, trial
from mlx_gemma_mtp.convert.checkpoint import Checkpoint, ConvertError
from mlx_gemma_mtp.convert.fit import Fit, kv_bytes, parse_context, parse_memory, smallest_mac
from mlx_gemma_mtp.convert.options import Options
from mlx_gemma_mtp.convert.output import appearing
from mlx_gemma_mtp.convert.pipeline import TooLargeError, accepted_share, run
from mlx_gemma_mtp.convert.recipes import RECIPES
from tests import tiny
from tests.cases import kinds_with

Sources = Callable[[tiny.Kind], Path]
PROMPT = [5, 9, 11, 300, 42, 17, 8, 99]


@pytest.fixture(autouse=True, scope="module")
def eager() -> Iterator[None]:
    """Compiling rounds would take longer than everything else here."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """A bfloat16 pair of each kind, in two shards, with vision and audio tensors where a kind has them."""

    @cache
    def make(kind: tiny.Kind) -> Path:
        out = tmp_path_factory.mktemp(f"source-{kind}")
        tiny.write_pair(out, kind, dtype="bfloat16", shards=2, extras=kind != "text")
        return out

    return make


def tensors(directory: Path) -> dict[str, mx.array]:
    """All tensors of a checkpoint."""
    out: dict[str, mx.array] = {}
    for file in directory.glob("*.safetensors"):
        part = mx.load(str(file))
        assert isinstance(part, dict)
        out |= part
    return out


def same_bits(a: mx.array, b: mx.array) -> bool:
    words = {2: mx.uint16, 4: mx.uint32}.get(a.dtype.size)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(mx.array_equal(a.view(words), b.view(words)) if words else mx.array_equal(a, b))


def digests(directory: Path) -> dict[str, str]:
    files = sorted(directory.rglob("*.safetensors"))
    return {str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize(("kind", "recipe"), kinds_with(RECIPES))
def test_every_recipe_converts_loads_and_decodes(
    sources: Sources, tmp_path: Path, kind: tiny.Kind, recipe: str
) -> None:
    record = convert(sources(kind), tmp_path / "out", quantize=recipe, drafter_quantize=recipe, measure=False)
    runtime = load(str(tmp_path / "out"))
    assert runtime.drafter_config is not None
    plain = runtime.generate(PROMPT, max_tokens=6, depth=0, ignore_eos=True)
    drafted = runtime.generate(PROMPT, max_tokens=6, depth=2, ignore_eos=True)
    assert plain.tokens == drafted.tokens
    assert len(plain.tokens) == 6
    assert drafted.stats.drafted > 0
    packed = {p for p, t in record["target"]["tensors"].items() if t["dtype"] in ("affine", "mxfp4", "nvfp4", "mxfp8")}
    assert bool(packed) == (recipe != "bf16")
    assert not packed & set(record["target"]["unquantized"])


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_bf16_is_bit_identical(sources: Sources, tmp_path: Path, kind: tiny.Kind) -> None:
    source = sources(kind)
    record = convert(source, tmp_path / "out", measure=False)
    for before, after in ((source, tmp_path / "out"), (source / "drafter", tmp_path / "out" / "drafter")):
        given, made = tensors(before), tensors(after)
        used = set()
        for name, x in made.items():
            for old in (name, f"model.{name}", name.replace("language_model.model.", "model.language_model.")):
                if old in given:
                    used.add(old)
                    assert same_bits(x, given[old]), name
                    break
            else:
                stack = name.replace("language_model.model.", "model.language_model.").replace("switch_glu.", "")
                whole = stack.replace("gate_proj.weight", "gate_up_proj").replace("up_proj.weight", "gate_up_proj")
                whole = whole.replace("down_proj.weight", "down_proj").replace("gate_gate_", "gate_")
                used.add(whole)
                half = given[whole].shape[1] // 2
                expected = {"gate": given[whole][:, :half], "up_pr": given[whole][:, half:]}.get(
                    name.rsplit(".", 2)[1][:5].removesuffix("_"), given[whole]
                )
                assert same_bits(x, expected), name
        skipped = sum(record["target" if before == source else "drafter"]["skipped"].values())
        assert len(given) - len(used) == skipped


def test_a_chunk_has_the_bits_of_the_whole(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for recipe in ("4bit", "nvfp4", "q4_0"):
        convert(sources("moe"), tmp_path / f"whole-{recipe}", quantize=recipe, measure=False)
        monkeypatch.setattr(stream, "_CHUNK", 700)
        convert(sources("moe"), tmp_path / f"rows-{recipe}", quantize=recipe, measure=False)
        monkeypatch.undo()
        assert digests(tmp_path / f"whole-{recipe}") == digests(tmp_path / f"rows-{recipe}")


@pytest.mark.parametrize("recipe", ["bf16", "4bit", "nvfp4"])
def test_memory_does_not_grow_with_the_model(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """MLX's own peak, in pieces far smaller than a model of 1.3 MB."""
    monkeypatch.setattr(stream, "_CHUNK", 4000)
    monkeypatch.setattr(stream, "_SLOW_CHUNK", 400)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    convert(sources("moe"), tmp_path / "out", quantize=recipe, measure=False)
    assert mx.get_peak_memory() - before < 100_000


def mxfp4(rows: mx.array) -> tuple[mx.array, ...]:
    return tuple(mx.quantize(rows, group_size=32, bits=4, mode="mxfp4"))


def test_the_bits_are_mlxs_own(sources: Sources, tmp_path: Path) -> None:
    """Every matrix at once through mx.quantize, experts one by one."""
    convert(sources("moe"), tmp_path / "out", quantize="mxfp4", measure=False)
    given, made = tensors(sources("moe")), tensors(tmp_path / "out")
    stack = given["model.language_model.layers.1.experts.gate_up_proj"]
    base = "language_model.model.layers.1.experts.switch_glu"
    for expert in range(stack.shape[0]):
        for part, rows in (("gate_proj", stack[expert, :32]), ("up_proj", stack[expert, 32:])):
            words, scales = mxfp4(rows)
            assert same_bits(made[f"{base}.{part}.weight"][expert], words)
            assert same_bits(made[f"{base}.{part}.scales"][expert], scales)
    words, scales = mxfp4(given["model.language_model.embed_tokens.weight"])
    assert same_bits(made["language_model.model.embed_tokens.weight"], words)
    assert same_bits(made["language_model.model.embed_tokens.scales"], scales)


def test_exceptions_are_in_the_config_and_the_record(sources: Sources, tmp_path: Path) -> None:
    record = convert(sources("moe"), tmp_path / "out", quantize="4bit", measure=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    entry = config["quantization"]
    assert entry == config["quantization_config"]
    assert {k: entry[k] for k in ("bits", "group_size", "mode")} == {"bits": 4, "group_size": 64, "mode": "affine"}
    layers = range(6)
    eight = {f"language_model.model.layers.{i}.router.proj" for i in layers}
    eight |= {f"language_model.model.layers.{i}.mlp.{n}_proj" for i in layers for n in ("gate", "up", "down")}
    assert {k for k, v in entry.items() if isinstance(v, dict)} == eight
    assert all(entry[path] == {"bits": 8, "group_size": 64, "mode": "affine"} for path in eight)
    assert "expert" in record["target"]["exceptions"]["language_model.model.layers.0.router.proj"]


def test_what_no_group_divides_stays_and_is_listed(sources: Sources, tmp_path: Path) -> None:
    record = convert(sources("edge"), tmp_path / "out", quantize="8bit", measure=False)
    left = record["target"]["unquantized"]
    assert "embed_tokens" in left  # 96 wide
    assert "96" in left["embed_tokens"]
    made = tensors(tmp_path / "out")
    assert made["language_model.model.embed_tokens.weight"].dtype == mx.bfloat16
    assert "language_model.model.embed_tokens.scales" not in made
    assert made["language_model.model.embed_tokens_per_layer.weight"].dtype == mx.uint32  # 320 wide
    assert "embed_tokens_per_layer" not in left
    assert "layers.*.per_layer_projection (10)" in (tmp_path / "out" / "README.md").read_text()


def test_towers_are_copied_or_left_out(sources: Sources, tmp_path: Path) -> None:
    def is_tower(name: str) -> bool:
        return any(part in name for part in ("vision", "audio"))

    given = {k.removeprefix("model."): v for k, v in tensors(sources("dense")).items() if is_tower(k)}
    convert(sources("dense"), tmp_path / "all", quantize="mxfp8", measure=False)
    made = {k: v for k, v in tensors(tmp_path / "all").items() if is_tower(k)}
    assert given.keys() == made.keys()
    assert len(given) > 2
    assert all(same_bits(made[k], given[k]) for k in given)
    record = convert(sources("dense"), tmp_path / "text", quantize="mxfp8", text_only=True, measure=False)
    assert not any(is_tower(k) for k in tensors(tmp_path / "text"))
    assert sum(n for rule, n in record["target"]["skipped"].items() if "on request" in rule) == len(given)
    assert "vision_config" not in json.loads((tmp_path / "text" / "config.json").read_text())
    assert load(str(tmp_path / "text")).generate(PROMPT, max_tokens=2, ignore_eos=True).tokens


def test_shards_are_small_and_indexed(sources: Sources, tmp_path: Path) -> None:
    options = Options(source=str(sources("edge2")), out=tmp_path / "out", measure=False, shard_bytes=200_000)
    record = run(options)
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 4
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f.name for f in files} == set(record["target"]["files"])
    assert index["metadata"]["total_size"] == record["target"]["bytes"]
    whole = convert(sources("edge2"), tmp_path / "one", measure=False)
    assert whole["target"]["bytes"] == record["target"]["bytes"]
    many, one = tensors(tmp_path / "out"), tensors(tmp_path / "one")
    assert many.keys() == one.keys()
    assert all(same_bits(many[k], one[k]) for k in one)


def test_float32_becomes_bfloat16(tmp_path: Path) -> None:
    tiny.write_pair(tmp_path / "source", "text", dtype="float32")
    convert(tmp_path / "source", tmp_path / "out", measure=False)
    made, given = tensors(tmp_path / "out"), tensors(tmp_path / "source")
    assert all(same_bits(made[k], given[k].astype(mx.bfloat16)) for k in given)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("kind", ["dense", "moe", "edge", "edge2", "unified", "text"])
def test_configs_of_both_forms_become_googles(tmp_path: Path, kind: tiny.Kind) -> None:
    """mlx-lm and mlx-vlm know nothing of `per_layer_config`, and guess a vocabulary that isn't at the top."""
    fields = (
        "global_head_dim", "num_global_key_value_heads", "attention_k_eq_v", "num_kv_shared_layers", "vocab_size",
        "hidden_size_per_layer_input", "vocab_size_per_layer_input", "use_double_wide_mlp", "enable_moe_block",
    )  # fmt: skip
    found = []
    for style in ("google", "hf"):
        tiny.write_pair(tmp_path / style, kind, style=style, dtype="bfloat16")
        convert(tmp_path / style, tmp_path / f"{style}-out", measure=False)
        configs = []
        for place in (tmp_path / f"{style}-out", tmp_path / f"{style}-out" / "drafter"):
            config = json.loads((place / "config.json").read_text())
            text = config.get("text_config", config)
            configs.append([text[key] for key in fields] + [config.get("vocab_size")])
        assert configs[0][-1] == tiny.VOCAB
        assert (configs[1][-1] is None) or kind == "text"
        found.append(configs)
    assert found[0] == found[1]


def test_what_a_config_leaves_out_is_written_out(tmp_path: Path) -> None:
    source, _ = tiny.write_pair(tmp_path / "source", "unified", dtype="bfloat16")
    data = json.loads((source / "config.json").read_text())
    for key in ("num_kv_shared_layers", "hidden_size_per_layer_input", "use_double_wide_mlp"):
        del data["text_config"][key]
    (source / "config.json").write_text(json.dumps(data))
    convert(source, tmp_path / "out", measure=False)
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert [text[k] for k in ("num_kv_shared_layers", "hidden_size_per_layer_input")] == [0, 0]
    assert text["use_double_wide_mlp"] is False


def test_mlx_checkpoints_are_read(sources: Sources, tmp_path: Path) -> None:
    """Our output is mlx-lm's layout: the same recipe copies its bits, others start from what it stands for."""
    convert(sources("moe"), tmp_path / "4bit", quantize="4bit", drafter_quantize="4bit", measure=False)
    convert(tmp_path / "4bit", tmp_path / "again", quantize="4bit", drafter_quantize="4bit", measure=False)
    first, again = tensors(tmp_path / "4bit"), tensors(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(same_bits(first[k], again[k]) for k in first)
    record = convert(tmp_path / "4bit", tmp_path / "bf16", measure=False)
    plain, base = tensors(tmp_path / "bf16"), "language_model.model.layers.2.self_attn.q_proj"
    weight, scales, biases = (first[f"{base}.{n}"] for n in ("weight", "scales", "biases"))
    assert same_bits(plain[f"{base}.weight"], mx.dequantize(weight, scales, biases, group_size=64, bits=4))
    assert "quantization" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    # The source's record knows its hashes: they were compared.
    known = json.loads((tmp_path / "4bit" / "conversion.json").read_text())["target"]["files"]
    assert record["target"]["source_files"] == known


def test_the_record_says_what_was_made(sources: Sources, tmp_path: Path) -> None:
    (sources("text") / "tokenizer_config.json").write_text("{}")
    record = convert(sources("text"), tmp_path / "out", quantize="4bit", measure=False)
    (sources("text") / "tokenizer_config.json").unlink()
    assert record == json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["drafter"]["recipe"]["name"] == "4bit"
    assert record["target"]["side_files"] == ["generation_config.json", "tokenizer_config.json"]
    for role, place, source in (
        ("target", tmp_path / "out", sources("text")),
        ("drafter", tmp_path / "out" / "drafter", sources("text") / "drafter"),
    ):
        for key, directory in (("files", place), ("source_files", source)):
            expected = {
                f.name: {"bytes": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()}
                for f in directory.glob("*.safetensors")
            }
            assert record[role][key] == expected
        held = sum(x.nbytes for x in tensors(place).values())
        assert record[role]["bytes"] == held == sum(t["bytes"] for t in record[role]["tensors"].values())
    assert record["target"]["tensors"]["model.layers.0.self_attn.q_proj"]["bits"] == 4.5
    assert record["versions"]["mlx"] == version("mlx")


def test_progress_counts_everything(sources: Sources, tmp_path: Path) -> None:
    seen: list[Any] = []
    convert(sources("dense"), tmp_path / "out", drafter=None, measure=False, progress=seen.append)
    assert seen[-1].tensors_done == seen[-1].tensors
    assert seen[-1].bytes_done == seen[-1].bytes
    assert [s.bytes_done for s in seen] == sorted(s.bytes_done for s in seen)
    assert not (tmp_path / "out" / "drafter").exists()


def test_the_drafters_default(sources: Sources, tmp_path: Path) -> None:
    for kind, recipe, expected in (
        ("dense", "bf16", "bf16"), ("dense", "6bit", "4bit"), ("dense", "nvfp4", "mxfp4"),
        ("edge", "4bit", "8bit"), ("edge", "mxfp4", "mxfp8"),
    ):  # fmt: skip
        assert kind in ("dense", "edge")
        record = convert(sources(kind), tmp_path / "out", quantize=recipe, dry_run=True)  # type: ignore[arg-type]
        assert record["drafter"]["recipe"]["name"] == expected
    assert not (tmp_path / "out").exists()


def test_fit_counts_weights_and_kv(sources: Sources, tmp_path: Path) -> None:
    config = TargetConfig.from_hf(Checkpoint(sources("edge2")).config)
    # 12 layers, 8 of them sharing: layers 0 to 2 slide (window 16), layer 3 sees everything; one head each.
    assert kv_bytes(config, 1000) == 2 * 2 * (3 * 16 * (16 + 32) + 32 * 1000)
    assert kv_bytes(config, 10) == 2 * 2 * (3 * 16 * (10 + 32) + 32 * 10)
    assert (parse_memory("32GB"), parse_context("32k"), parse_context("8192")) == (32 << 30, 32768, 8192)
    assert Fit(memory=32 << 30, context=1, weights=0, kv=0).usable == (64 << 30) // 3
    assert Fit(memory=64 << 30, context=1, weights=0, kv=0).usable == 48 << 30
    record = convert(sources("edge2"), tmp_path / "out", fit="8GB", context="4k", dry_run=True)
    assert record["fit"]["fits"] is True
    assert record["fit"]["weights_bytes"] == record["target"]["text_bytes"] + record["drafter"]["text_bytes"]
    assert record["target"]["text_bytes"] < record["target"]["bytes"]
    record = convert(sources("edge2"), tmp_path / "out", context="4k", dry_run=True)
    assert record["fit"]["memory_bytes"] == 8 << 30  # without a size: the smallest Mac that will do
    assert smallest_mac(config, 20 << 30, 4096) == Fit(
        memory=32 << 30, context=4096, weights=20 << 30, kv=kv_bytes(config, 4096)
    )
    assert smallest_mac(config, 2000 << 30, 4096) is None
    for bad in ("x", "0GB", "12TB"):
        with pytest.raises(ConvertError, match="expected a size"):
            convert(sources("edge2"), tmp_path / "out", fit=bad, dry_run=True)


def test_fit_suggests_the_recipe_that_fits(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx_gemma_mtp.convert.fit as fit

    sizes = {
        name: sum(
            convert(sources("unified"), tmp_path / "x", quantize=name, dry_run=True)[role]["text_bytes"]
            for role in ("target", "drafter")
        )
        for name in ("bf16", "6bit")
    }
    config = TargetConfig.from_hf(Checkpoint(sources("unified")).config)
    usable = Fit(memory=1 << 30, context=1, weights=0, kv=0).usable
    # Just enough is left for the 6-bit pair.
    monkeypatch.setattr(fit, "WORK", usable - sizes["6bit"] - kv_bytes(config, 64))
    assert sizes["6bit"] < sizes["bf16"]
    with pytest.raises(TooLargeError, match="--quantize 6bit would"):
        convert(sources("unified"), tmp_path / "out", fit="1GB", context=64)
    assert convert(sources("unified"), tmp_path / "out", quantize="6bit", fit="1GB", context=64, dry_run=True)["fit"]
    monkeypatch.setattr(fit, "WORK", usable)
    with pytest.raises(TooLargeError, match=r"nor does any other .* its GPU \([^()]*\)$"):
        convert(sources("unified"), tmp_path / "out", fit="1GB", context=64)
    monkeypatch.setattr(fit, "WORK", usable - sizes["6bit"] - kv_bytes(config, 2048))
    with pytest.raises(TooLargeError, match=r"--quantize mxfp4 with --context 2k would$"):
        convert(sources("unified"), tmp_path / "out", fit="1GB", context=65536)
    assert list(tmp_path.iterdir()) == []


def test_measuring(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "ids.jsonl").write_text("[5, 9, 11, 300, 42]\n[17, 8, 99]\n")
    record = convert(
        sources("unified"),
        tmp_path / "out",
        quantize="mxfp4",
        prompts=tmp_path / "ids.jsonl",
        compare=["8bit"],
        compare_drafter=["nvfp4"],
    )
    measured = record["measured"]
    assert (measured["prompts"], measured["answer_tokens"], measured["scored_tokens"]) == (2, 128, 134)
    assert list(measured["fidelity"]) == ["source", "mxfp4", "8bit"]
    own = measured["fidelity"]["source"]
    assert (own["mean_kl"], own["top1_agreement"], own["perplexity_ratio"]) == (0, 1, 1)
    assert 0 < measured["fidelity"]["8bit"]["mean_kl"] < measured["fidelity"]["mxfp4"]["mean_kl"]
    assert measured["fidelity"]["mxfp4"]["top1_agreement"] < 1
    pairs = [(row["target"], row["drafter"]) for row in measured["acceptance"]]
    names = ("source", "mxfp4", "8bit"), ("source", "mxfp4", "nvfp4")
    assert pairs == [(t, d) for t in names[0] for d in names[1]]
    assert all(len(row["acceptance_per_position"]) == 4 for row in measured["acceptance"])
    written = measured["acceptance"][4]
    assert accepted_share(record) == written["acceptance"] == written["accepted"] / written["drafted"]
    # The written pair again, through the runtime alone.
    prompts = [[5, 9, 11, 300, 42], [17, 8, 99]]
    outputs = load(str(tmp_path / "out")).generate_batch(prompts, max_tokens=64, depth=4, ignore_eos=True)
    assert sum(o.stats.accepted for o in outputs) == written["accepted"]
    assert "| mxfp4  | nvfp4   |" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / ".measure").exists()


def test_what_does_not_fit_in_memory_is_not_measured(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "memory_limit", lambda: 1 << 20)
    assert convert(sources("text"), tmp_path / "out")["measured"] is None
    for options in ({"measure": True}, {"min_acceptance": 0.5}, {"compare": ["8bit"]}):
        with pytest.raises(ConvertError, match=r"measuring takes .* this machine has 1\.05 MB"):
            convert(sources("text"), tmp_path / "other", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_recipes_of_one_name_are_refused(sources: Sources, tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    for folder, bits in (("a", 4), ("b", 8)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.toml").write_text(f"default = {{ bits = {bits} }}")
    (tmp_path / "source.toml").write_text("default = { bits = 4 }")
    mine, other = str(tmp_path / "a" / "mine.toml"), str(tmp_path / "b" / "mine.toml")
    with pytest.raises(ConvertError, match="a recipe is called mine"):
        convert(sources("text"), tmp_path / "out", quantize=mine, compare=[other])
    with pytest.raises(ConvertError, match="a recipe is called source"):
        convert(sources("text"), tmp_path / "out", compare_drafter=[str(tmp_path / "source.toml")])
    convert(sources("text"), tmp_path / "out", quantize=mine, compare=[mine], dry_run=True)


def test_an_existing_output_needs_force(sources: Sources, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(sources("text"), out, measure=False)
    before = digests(out)
    with pytest.raises(ConvertError, match="--force"):
        convert(sources("text"), out, quantize="4bit", measure=False)
    assert digests(out) == before
    convert(sources("text"), out, quantize="4bit", force=True, measure=False)
    assert digests(out) != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(ConvertError, match="is not a model"):
        convert(sources("text"), tmp_path / "letters", force=True, measure=False)
    assert (tmp_path / "letters" / "a.txt").read_text() == "dear"
    with pytest.raises(ConvertError, match="holds the source"):
        convert(out, out, force=True, measure=False)


def test_leftovers_of_killed_runs_are_put_right(tmp_path: Path) -> None:
    dead = 2**22 + 1  # above Linux's highest process id
    (tmp_path / f".out.partial-{dead}").mkdir()
    (tmp_path / f".out.replaced-{dead}").mkdir()
    (tmp_path / f".out.replaced-{dead}" / "config.json").write_text("old")
    (tmp_path / ".out.partial-notes").mkdir()
    made = appearing(tmp_path / "out", force=True)
    assert made.__enter__().name.startswith(".out.partial-")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert made.__exit__(ValueError, ValueError("no"), None) is not True
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial-notes", "out"]
    (tmp_path / "out").rename(tmp_path / f".out.replaced-{dead}")
    with pytest.raises(ConvertError, match="--force"), appearing(tmp_path / "out", force=False):
        pytest.fail("it doesn't begin")
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_all_of_the_output_is_on_the_disk(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and every directory was synchronized before the output took its name, and its parent after."""
    synced, real = set(), os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    out = tmp_path / "place" / "out"
    convert(sources("text"), out, measure=False)
    assert [p.name for p in (out.parent, out, *out.rglob("*")) if p.stat().st_ino not in synced] == []


def test_sources_are_recorded_by_their_whole_path(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card has the last part alone."""
    source = sources("text")
    monkeypatch.chdir(source.parent)
    relative = f"../{source.parent.name}/{source.name}"
    record = convert(relative, tmp_path / "out", drafter=f"{relative}/drafter", measure=False)
    assert Path(record["target"]["source"]).is_absolute()
    assert Path(record["drafter"]["source"]).samefile(source / "drafter")
    assert ".." not in (tmp_path / "out" / "README.md").read_text()


def test_a_drafter_added_to_a_conversion_without_one(sources: Sources, tmp_path: Path) -> None:
    """The target's record says nothing of it; a record's drafter is only what is called so."""
    convert(sources("text"), tmp_path / "out", drafter=None, measure=False)
    shutil.copytree(sources("text") / "drafter", tmp_path / "out" / "drafter")
    convert(tmp_path / "out", tmp_path / "again", measure=False)
    shutil.copytree(sources("text"), tmp_path / "again" / "other")
    assert convert(tmp_path / "again" / "other", tmp_path / "third", measure=False)["drafter"] is not None
