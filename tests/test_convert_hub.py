"""Hub ids as sources: checked from their headers, fetched, verified and named. No network."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_gemma_mtp.convert import convert
from mlx_gemma_mtp.convert.checkpoint import Checkpoint, ConvertError
from mlx_gemma_mtp.convert.pipeline import TooLargeError
from tests import tiny

NAME = "google/gemma-4-E2B-it"
COMMITS = {NAME: "0123456789abcdef" * 2 + "01234567", f"{NAME}-assistant": "f" * 40}


class Hub:
    """A hub of one pair, with a cache laid out as its client does: snapshots of links to files named by hash."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub
        from huggingface_hub import constants

        self.cache = cache
        self.fetched: list[tuple[str, str | None]] = []
        self.local: dict[str, Path] = {}
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, **_: str(self.local[name] / file))
        monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", self.headers)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.fetch)

    def headers(self, name: str, **_: object) -> SimpleNamespace:
        parts: dict[str, SimpleNamespace] = {}
        for e in Checkpoint(self.local[name]).tensors.values():
            part = parts.setdefault(e.file.name, SimpleNamespace(tensors={}))
            part.tensors[e.name] = SimpleNamespace(dtype=e.dtype, shape=list(e.shape), data_offsets=(0, e.size))
        return SimpleNamespace(files_metadata=parts)

    def fetch(self, name: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        self.fetched.append((name, revision))
        place = self.cache / f"models--{name.replace('/', '--')}"
        snapshot = place / "snapshots" / COMMITS[name]
        for folder in (snapshot, place / "blobs", place / "refs"):
            folder.mkdir(parents=True, exist_ok=True)
        (place / "refs" / "main").write_text(COMMITS[name])
        for file in self.local[name].iterdir():
            if file.is_file() and any(file.match(p) for p in allow_patterns):
                blob = place / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
                shutil.copyfile(file, blob)
                (snapshot / file.name).unlink(missing_ok=True)
                (snapshot / file.name).symlink_to(blob)
        return str(snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "cache", monkeypatch)
    target, drafter = tiny.write_pair(tmp_path / "local", "edge2", dtype="bfloat16", shards=2)
    shutil.move(drafter, tmp_path / "assistant")
    made.local = {NAME: target, f"{NAME}-assistant": tmp_path / "assistant"}
    return made


def test_size_and_fit_are_checked_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    """From configs and headers alone."""
    record = convert(NAME, tmp_path / "out", quantize="4bit", fit="8GB", dry_run=True)
    local = hub.local[NAME], hub.local[f"{NAME}-assistant"]
    expected = convert(local[0], tmp_path / "out", drafter=local[1], quantize="4bit", fit="8GB", dry_run=True)
    assert record["drafter"]["source"] == f"{NAME}-assistant"
    for key in ("bytes", "tensors", "unquantized", "skipped"):
        assert record["target"][key] == expected["target"][key]
        assert record["drafter"][key] == expected["drafter"][key]
    with pytest.raises(TooLargeError, match="nor does any other"):
        convert(NAME, tmp_path / "out", fit="1GB", context="4096k")
    with pytest.raises(ConvertError, match="can't be read"):
        convert(NAME, tmp_path / "out", prompts=tmp_path / "nowhere.txt")
    assert hub.fetched == []


def test_a_pair_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    record = convert(NAME, tmp_path / "out", quantize="4bit", revision="main", measure=False)
    assert hub.fetched == [(NAME, "main"), (f"{NAME}-assistant", None)]
    assert [record[role]["revision"] for role in ("target", "drafter")] == list(COMMITS.values())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"base_model: {NAME}\n" in card
    assert f"| drafter | {NAME}-assistant | {'f' * 40} | 8bit |" in card


def test_a_damaged_download(hub: Hub, tmp_path: Path) -> None:
    """The hub's cache names files after their hashes, so that a flipped bit shows."""
    shard = hub.local[NAME] / "model-00002-of-00002.safetensors"
    name = hashlib.sha256(shard.read_bytes()).hexdigest()
    fetch = hub.fetch(NAME, allow_patterns=["*"])
    blob = (Path(fetch) / shard.name).resolve()
    assert blob.name == name
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(ConvertError, match=rf"{shard.name} is damaged: its SHA-256 is .* its origin .* says {name}"):
        convert(fetch, tmp_path / "out", drafter=None, measure=False)
    assert not (tmp_path / "out").exists()


def test_room_for_the_download(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the cache counts no more, nor the part of a file that a broken download has left."""
    sizes = {n: sum(e.size for e in Checkpoint(p).tensors.values()) for n, p in hub.local.items()}
    output = convert(NAME, tmp_path / "out", dry_run=True)["bytes"]

    def free(count: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=count))

    free(output + sum(sizes.values()) - 1)
    with pytest.raises(ConvertError, match="the files to fetch and the output take"):
        convert(NAME, tmp_path / "out", dry_run=True)
    free(output + sum(sizes.values()))
    convert(NAME, tmp_path / "out", dry_run=True)
    hub.fetch(NAME, allow_patterns=["*.safetensors"])
    free(output + sizes[f"{NAME}-assistant"])
    convert(NAME, tmp_path / "out", dry_run=True)
    free(output + sizes[f"{NAME}-assistant"] - 100)
    with pytest.raises(ConvertError, match="the files to fetch"):
        convert(NAME, tmp_path / "out", dry_run=True)
    blobs = hub.cache / f"models--{NAME.replace('/', '--')}-assistant" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.incomplete").write_bytes(bytes(100))
    convert(NAME, tmp_path / "out", dry_run=True)


def test_a_directory_that_the_hubs_client_filled(hub: Hub, tmp_path: Path) -> None:
    source = hub.local[NAME]
    notes = source / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (notes / "config.json.metadata").write_text(f"{COMMITS[NAME]}\n{'a' * 40}\n1234.5\n")
    record = convert(source, tmp_path / "out", drafter=None, measure=False)
    assert record["target"]["revision"] == COMMITS[NAME]
    # Its own path is nobody else's business.
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()
