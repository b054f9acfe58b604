"""Safetensors shards of tensors whose sizes are known, written piece by piece. Knows nothing of models or MLX."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

from .checkpoint import INDEX, ITEM_BYTES

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def assign(slots: Sequence[Slot], limit: int = SHARD_BYTES) -> list[list[Slot]]:
    """Slots by shard, in order; a shard exceeds `limit` bytes only where one tensor alone does."""
    shards: list[list[Slot]] = [[]]
    filled = 0
    for slot in slots:
        if shards[-1] and filled + slot.size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(slot)
        filled += slot.size
    return shards


def shard_names(count: int) -> list[str]:
    """File names as mlx-lm and mlx-vlm look for them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


class ShardWriter:
    """Files of a whole checkpoint in `directory`, each of its full size from the beginning.

    A context manager; `finish` writes the index and makes all of it durable. Parts may come in any order.
    """

    def __init__(self, directory: Path, slots: Sequence[Slot], limit: int = SHARD_BYTES) -> None:
        self._directory = directory
        shards = assign(slots, limit)
        self._names = shard_names(len(shards))
        self._places: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []
        self._weight_map: dict[str, str] = {}
        self._total = sum(s.size for s in slots)
        self._left = self._total
        try:
            for name, shard in zip(self._names, shards, strict=True):
                self._create(name, shard)
        except BaseException:
            self._close()
            raise

    @property
    def files(self) -> list[Path]:
        """What is written."""
        return [self._directory / n for n in self._names]

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Put `data` at `offset` bytes into the tensor `name`."""
        descriptor, begin = self._places[name]
        data = data.cast("B")
        done = 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done:], begin + offset + done)
        self._left -= len(data)

    def finish(self) -> None:
        """Write the index and wait until everything is on the disk."""
        if self._left:
            raise AssertionError(f"{self._left} bytes were planned and never written")
        for descriptor in self._descriptors:
            os.fsync(descriptor)
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(self._weight_map.items()))}
        write_durably(self._directory / INDEX, json.dumps(index, indent=2) + "\n")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def _close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def _create(self, file: str, shard: Sequence[Slot]) -> None:
        # Larger items first keeps every tensor aligned, as the format's own library does.
        ordered = sorted(shard, key=lambda s: -ITEM_BYTES[s.dtype])
        header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
        end = 0
        for slot in ordered:
            header[slot.name] = {
                "dtype": slot.dtype,
                "shape": list(slot.shape),
                "data_offsets": [end, end + slot.size],
            }
            end += slot.size
        head = json.dumps(header, separators=(",", ":")).encode()
        head += b" " * (-len(head) % 8)
        descriptor = os.open(self._directory / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._descriptors.append(descriptor)
        begin = 8 + len(head)
        _reserve(descriptor, begin + end)
        start = memoryview(len(head).to_bytes(8, "little") + head)
        done = 0
        while done < len(start):
            done += os.pwrite(descriptor, start[done:], done)
        for slot in ordered:
            self._places[slot.name] = descriptor, begin
            self._weight_map[slot.name] = file
            begin += slot.size


def _reserve(descriptor: int, size: int) -> None:
    """Take the whole space now, where the system can, so that a full disk is found before the work."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def write_durably(path: Path, text: str) -> None:
    """Write a small file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def make_durable(path: Path) -> None:
    """Wait until a file's content or a directory's names are on the disk, of directories where the system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
