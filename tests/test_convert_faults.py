"""Broken sources, full disks, interrupts and kills: a clear error, and a destination as it was."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_gemma_mtp.config import ConfigError
from mlx_gemma_mtp.convert import convert
from mlx_gemma_mtp.convert.checkpoint import Checkpoint, ConvertError
from mlx_gemma_mtp.convert.provenance import known_hashes
from mlx_gemma_mtp.loading import LoadError
from tests import tiny

ROOT = Path(__file__).parents[1]
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A pair of 26B's kind in two shards."""
    return tiny.write_pair(tmp_path / "source", "moe", dtype="bfloat16", shards=2)[0]


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


@pytest.fixture
def refused(source: Path, tmp_path: Path) -> Callable[..., str]:
    """Converts over an existing output, which has to fail and leave it as it was; returns the message."""
    out = tmp_path / "place" / "out"
    out.mkdir(parents=True)
    (out / "config.json").write_text('{"the": "old one"}')

    def check(kind: type[BaseException] = ConvertError, **options: Any) -> str:
        with pytest.raises(kind) as caught:
            convert(source, out, quantize="4bit", measure=False, force=True, **options)
        assert snapshot(tmp_path / "place") == {"out/config.json": b'{"the": "old one"}'}
        return str(caught.value)

    return check


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_file(file: Path, header: dict[str, Any], data: bytes) -> None:
    head = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head + data)


def change_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    header, data = header_of(file)
    change(header)
    write_file(file, header, data)


def change_index(source: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def first(header: dict[str, Any]) -> str:
    return next(name for name in header if name != "__metadata__")


def test_a_truncated_shard(source: Path, refused: Callable[..., str]) -> None:
    data = (source / SHARD).read_bytes()
    (source / SHARD).write_bytes(data[:-100])
    message = refused()
    assert SHARD in message
    assert "truncated" in message
    assert "tensor model." in message


@pytest.mark.parametrize("size", [0, 5, 8, 40])
def test_a_shard_cut_in_its_header(source: Path, refused: Callable[..., str], size: int) -> None:
    (source / SHARD).write_bytes((source / SHARD).read_bytes()[:size])
    assert f"{SHARD} is not a safetensors file" in refused()


def test_flipped_bytes_in_a_header(source: Path, refused: Callable[..., str]) -> None:
    data = bytearray((source / SHARD).read_bytes())
    data[8] ^= 0xFF
    (source / SHARD).write_bytes(data)
    assert f"{SHARD} is not a safetensors file" in refused()


def test_flipped_bytes_in_a_tensor_of_known_hash(source: Path, tmp_path: Path) -> None:
    """Whatever the bytes say: the hub's hash and that of an earlier conversion's record tell the damage."""
    convert(source, tmp_path / "made", measure=False)
    file = tmp_path / "made" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ConvertError, match=r"made/model\.safetensors is damaged: its SHA-256 is"):
        convert(tmp_path / "made", tmp_path / "again", quantize="4bit", measure=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "source"]


def test_hashes_that_the_hub_states(tmp_path: Path) -> None:
    blob, note = "ab" * 32, "cd" * 32
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / blob).write_text("x")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "a.safetensors").symlink_to(tmp_path / "blobs" / blob)
    (tmp_path / "snapshot" / "b.safetensors").write_text("x")
    notes = tmp_path / "snapshot" / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "b.safetensors.metadata").write_text(f"{'0' * 40}\n{note}\n1234.5\n")
    files = [tmp_path / "snapshot" / f"{n}.safetensors" for n in "ab"]
    assert known_hashes(files) == {"a.safetensors": blob, "b.safetensors": note}


@pytest.mark.parametrize(("word", "complaint"), [(0x7FC0, "holds NaN"), (0xFF80, "holds an infinite value")])
def test_a_value_that_is_none(source: Path, refused: Callable[..., str], word: int, complaint: str) -> None:
    header, data = header_of(source / SHARD)
    name = next(n for n in header if n.endswith("q_proj.weight"))
    at = header[name]["data_offsets"][1] - 2
    write_file(source / SHARD, header, data[:at] + struct.pack("<H", word) + data[at + 2 :])
    message = refused()
    assert f"tensor {name} of " in message
    assert SHARD in message
    assert complaint in message


def test_a_missing_shard(source: Path, refused: Callable[..., str]) -> None:
    (source / SHARD).unlink()
    assert f"names {SHARD} (for model." in refused()


def test_a_missing_tensor(source: Path, refused: Callable[..., str]) -> None:
    change_index(source, lambda table: table.__delitem__("model.language_model.norm.weight"))
    assert "model.language_model.norm.weight" in refused()


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "x.bin", 7])
def test_a_path_in_an_index(source: Path, refused: Callable[..., str], name: Any) -> None:
    change_index(source, lambda table: table.update({"model.language_model.norm.weight": name}))
    assert "expected a *.safetensors file name" in refused()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda h: h[first(h)].update(dtype="F8_E4M3"), "has dtype 'F8_E4M3', expected one of F64"),
        (lambda h: h[first(h)].update(dtype=["BF16"]), "has dtype ['BF16'], expected one of F64"),
        (lambda h: h[first(h)].update(dtype="F32"), "can't hold F32 of shape"),
        (lambda h: h[first(h)].update(shape=[-1, -4]), "can't hold BF16"),
        (lambda h: h[first(h)].update(data_offsets=[0, 1 << 62]), "can't hold BF16"),
        (lambda h: h[first(h)].pop("shape"), "its header entry is"),
        (lambda h: h.update({first(h): [1, 2]}), "its header entry is"),
    ],
)
def test_a_wrong_header_entry(
    source: Path, refused: Callable[..., str], change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    change_header(source / SHARD, change)
    message = refused()
    assert complaint in message
    assert SHARD in message


def test_tensors_that_overlap(source: Path, refused: Callable[..., str]) -> None:
    def overlap(header: dict[str, Any]) -> None:
        names = [n for n in header if n.endswith("norm.weight") and header[n]["shape"] == [64]]
        header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]

    change_header(source / SHARD, overlap)
    assert "overlaps another one" in refused()


@pytest.mark.parametrize("part", ["q_proj.weight", "vision_tower"])
def test_doubles(tmp_path: Path, part: str) -> None:
    source, _ = tiny.write_pair(tmp_path / "source", "moe", dtype="bfloat16", extras=True)
    header, data = header_of(source / "model.safetensors")
    name = next(n for n in header if part in n)
    size = len(data)
    entry = header[name]
    begin, end = entry["data_offsets"]
    wide = {"dtype": "F64", "shape": entry["shape"], "data_offsets": [size, size + 4 * (end - begin)]}
    filler = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
    header |= {name: wide, "model.audio_tower.filler": filler}
    write_file(source / "model.safetensors", header, data + bytes(4 * (end - begin)))
    with pytest.raises(ConvertError, match=rf"{name} of .*/model\.safetensors has dtype F64"):
        convert(source, tmp_path / "out", dry_run=True)


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_packed_weights_with_nan(source: Path, tmp_path: Path, part: str) -> None:
    convert(source, tmp_path / "made", quantize="4bit", drafter=None, measure=False)
    (tmp_path / "made" / "conversion.json").unlink()
    file = tmp_path / "made" / "model.safetensors"
    header, data = header_of(file)
    name = next(n for n in header if n.endswith(f"q_proj.{part}"))
    at = header[name]["data_offsets"][0]
    write_file(file, header, data[:at] + struct.pack("<H", 0x7FC0) + data[at + 2 :])
    for recipe in ("4bit", "bf16"):
        with pytest.raises(ConvertError, match=r"q_proj\.weight of .*made/model\.safetensors holds NaN"):
            convert(tmp_path / "made", tmp_path / "out", quantize=recipe, drafter=None, measure=False)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda header, name: header.__delitem__(f"{name}.biases"), "expected 2 such tensors for affine"),
        (lambda header, name: header[f"{name}.scales"].update(dtype="F16"), "expected F16 and"),
        (lambda header, name: header[f"{name}.biases"].update(shape=[1, 64]), r"has dtype BF16 and shape \(1, 64\)"),
    ],
)
def test_parts_of_packed_weights_that_do_not_fit(
    source: Path, tmp_path: Path, change: Callable[[dict[str, Any], str], None], complaint: str
) -> None:
    convert(source, tmp_path / "made", quantize="4bit", drafter=None, measure=False)
    file = tmp_path / "made" / "model.safetensors"
    header, data = header_of(file)
    name = "language_model.model.layers.0.self_attn.q_proj"
    filler = header[f"{name}.biases"]
    assert filler["shape"] == [64, 1]
    change(header, name)
    (tmp_path / "made" / "model.safetensors.index.json").unlink()
    if f"{name}.biases" not in header:
        header["vision_tower.filler"] = filler
    write_file(file, header, data)
    with pytest.raises(ConvertError, match=complaint):
        convert(tmp_path / "made", tmp_path / "out", quantize="8bit", drafter=None, measure=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "source"]


def test_integers_where_weights_belong(source: Path, refused: Callable[..., str]) -> None:
    def change(header: dict[str, Any]) -> None:
        header[next(n for n in header if n.endswith("q_proj.weight"))]["dtype"] = "I16"

    change_header(source / SHARD, change)
    assert "has dtype I16, expected floating point" in refused()


def test_an_unknown_tensor(source: Path, refused: Callable[..., str]) -> None:
    header, data = header_of(source / "drafter" / "model.safetensors")
    header["model.surprise.weight"] = {"dtype": "BF16", "shape": [2], "data_offsets": [len(data), len(data) + 4]}
    write_file(source / "drafter" / "model.safetensors", header, data + b"\0\0\0\0")
    message = refused()
    assert "surprise" in message
    assert "drafter" in message


def test_a_wrong_shape(source: Path, refused: Callable[..., str]) -> None:
    def change(header: dict[str, Any]) -> None:
        entry = header[next(n for n in header if n.endswith("mlp.gate_proj.weight"))]
        entry["shape"] = entry["shape"][::-1]

    change_header(source / SHARD, change)
    assert "has shape (64, " in refused()


def test_pickles_and_other_frameworks_are_refused(source: Path, refused: Callable[..., str]) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "gptq" in refused(ConfigError)
    (source / "config.json").write_text(json.dumps(config))
    for file in [*source.glob("*.safetensors"), source / "model.safetensors.index.json"]:
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    assert "pytorch_model.bin is not read, as pickles can run code" in refused()


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="is not a directory"):
        convert(tmp_path / "nowhere", tmp_path / "out")


def test_a_disk_that_is_full_from_the_start(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert "0.00 MB free" in refused()


@pytest.mark.parametrize("call", ["pwrite", "fsync", "posix_fallocate"])
def test_a_disk_that_fills_up(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    if not hasattr(os, call):
        pytest.skip(f"this system has no {call}")
    real, left = getattr(os, call), 2 if call == "pwrite" else 0

    def fail(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, call, fail)
    assert "No space left on device" in refused(OSError)


def test_an_interrupt(source: Path, tmp_path: Path) -> None:
    seen = 0

    def interrupt(_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "place" / "out", quantize="4bit", measure=False, progress=interrupt)
    assert list((tmp_path / "place").iterdir()) == []


def test_an_output_that_comes_meanwhile(source: Path, tmp_path: Path) -> None:
    """Another run's, say: it isn't replaced without force."""
    out = tmp_path / "place" / "out"

    def make(_: object) -> None:
        out.mkdir(exist_ok=True)
        (out / "config.json").write_text("theirs")

    with pytest.raises(ConvertError, match="--force"):
        convert(source, out, quantize="4bit", measure=False, progress=make)
    assert snapshot(tmp_path / "place") == {"out/config.json": b"theirs"}
    assert [p.name for p in (tmp_path / "place").iterdir()] == ["out"]


def test_an_interrupt_between_two_renames(
    source: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Path.rename, 0

    def rename(self: Path, to: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    refused(KeyboardInterrupt)
    assert calls == 3


def test_kill_minus_nine(source: Path, tmp_path: Path) -> None:
    """Nothing at the destination; what lies beside it goes with the next run."""
    place = tmp_path / "place"
    script = textwrap.dedent(
        f"""
        import sys, time
        from mlx_gemma_mtp.convert import convert
        def progress(at):
            if at.tensors_done == 30:
                print("working", flush=True)
                time.sleep(60)
        convert({str(source)!r}, {str(place / "out")!r}, quantize="4bit", measure=False, progress=progress)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == b"working\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [p.name for p in place.iterdir()] == [f".out.partial-{process.pid}"]
    convert(source, place / "out", quantize="4bit", measure=False)
    assert [p.name for p in place.iterdir()] == ["out"]


def test_a_plain_kill_cleans_up(source: Path, tmp_path: Path) -> None:
    """SIGTERM to the command: what it has written so far goes at once."""
    place = tmp_path / "place"
    script = textwrap.dedent(
        f"""
        import sys, time
        from mlx_gemma_mtp.cli import app
        from mlx_gemma_mtp.convert import stream
        land = stream._Stream._land
        def slowly(self):
            land(self)
            if self._done == 30:
                print("working", flush=True)
                time.sleep(60)
        stream._Stream._land = slowly
        app(["convert", {str(source)!r}, "--out", {str(place / "out")!r}, "--no-measure"])
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == b"working\n"
    assert len(list(place.iterdir())) == 1
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    process.stdout.close()
    assert list(place.iterdir()) == []


def test_files_that_shrink_meanwhile(source: Path) -> None:
    with Checkpoint(source) as checkpoint:
        entry = max((e for e in checkpoint.tensors.values() if e.file.name == SHARD), key=lambda e: e.begin)
        os.truncate(source / SHARD, entry.begin + entry.size - 2)
        with pytest.raises(ConvertError, match="the file ended 2 bytes early"):
            checkpoint.read(entry, 0, entry.rows)
