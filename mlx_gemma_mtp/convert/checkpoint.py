"""Safetensors checkpoints on disk, read by row ranges with `pread`. Knows nothing of models, recipes or MLX.

Nothing is mapped into memory: mapped pages count as the process's own, and a converter's memory must not grow with
the model. Only safetensors are read: no pickle, no code. Every header is checked completely before any tensor is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

from ..json_file import read_object

ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"

_MAX_HEADER = 100_000_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class ConvertError(Exception):
    """A conversion that can't be done: says which file, tensor or option, what was found and what was expected."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a checkpoint. `begin` is its offset in the file; `rows` x `columns` is its shape made flat."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    size: int

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    def __str__(self) -> str:
        return f"tensor {self.name} of {self.file}"


class Checkpoint:
    """The tensors of a directory: those of the shards its index names, or of all its *.safetensors files.

    A context manager: files stay open for `read` until it ends. Raises ConvertError for a file that is missing,
    truncated or not what its header says.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_object(directory / "config.json", ConvertError)
        self.files, index = _shards(directory)
        self._descriptors: dict[Path, int] = {}
        self.tensors: dict[str, Entry] = {}
        for file in self.files:
            for entry in _entries(file):
                if entry.name in self.tensors:
                    raise ConvertError(f"{entry}: {self.tensors[entry.name].file} holds one of that name, too")
                self.tensors[entry.name] = entry
        for name, shard in index.items():
            if name not in self.tensors or self.tensors[name].file.name != shard:
                raise ConvertError(f"{directory / INDEX} says that {shard} holds the tensor {name}; it doesn't")
        if index and (extra := self.tensors.keys() - index.keys()):
            raise ConvertError(f"{self.tensors[min(extra)]} is not in {INDEX}")

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, entry: Entry, first: int, last: int) -> bytearray:
        """Bytes of the rows `first` to `last` - 1."""
        row = entry.size // entry.rows if entry.rows else 0
        buffer = bytearray((last - first) * row)
        read_into(self._descriptor(entry.file), memoryview(buffer), entry.begin + first * row, str(entry))
        return buffer

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        return self._descriptors[file]


def read_into(descriptor: int, buffer: memoryview, offset: int, what: str) -> None:
    """Fill `buffer` from `offset` on. One call may read less than asked: 2 GB at most, on Linux and macOS."""
    done = 0
    while done < len(buffer):
        got = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not got:
            raise ConvertError(f"{what}: the file ended {len(buffer) - done} bytes early; it was cut meanwhile")
        done += got


def _shards(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a checkpoint, and its index (tensor to file name; empty where there is none)."""
    if not (directory / INDEX).is_file():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            found = [p.name for pattern in _PICKLES for p in sorted(directory.glob(pattern))]
            why = f": {found[0]} is not read, as pickles can run code" if found else ""
            raise ConvertError(f"{directory} has no *.safetensors file{why}")
        return files, {}
    table = read_object(directory / INDEX, ConvertError).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ConvertError(f"{directory / INDEX}: weight_map is {table!r}, expected names of tensors and files")
    for tensor, name in table.items():
        plain = isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")
        if not plain or "\\" in name:
            raise ConvertError(f"{directory / INDEX} puts {tensor} into {name!r}, expected a *.safetensors file name")
        if not (directory / name).is_file():
            raise ConvertError(f"{directory / INDEX} names {name} (for {tensor}), which is not there")
    return [directory / n for n in sorted(set(table.values()))], table


def _entries(file: Path) -> Iterator[Entry]:
    """The header of a file, checked: every tensor's type, shape and place, which together must fill the file."""
    total = file.stat().st_size
    with file.open("rb") as f:
        size = int.from_bytes(f.read(8), "little")
        if total < 8 or not 2 <= size <= min(_MAX_HEADER, total - 8):
            raise ConvertError(f"{file} is not a safetensors file: {total} bytes, with a header of {size}")
        try:
            header = json.loads(f.read(size))
        except ValueError as e:
            raise ConvertError(f"{file} is not a safetensors file: its header is not JSON: {e}") from e
    if not isinstance(header, dict):
        raise ConvertError(f"{file} is not a safetensors file: its header is not an object")
    header.pop("__metadata__", None)
    found = [_entry(file, name, value, 8 + size) for name, value in header.items()]
    found.sort(key=lambda e: (e.begin, e.size))
    end = 8 + size
    for entry in found:
        if entry.begin != end:
            kind = "overlaps another one" if entry.begin < end else f"leaves {entry.begin - end} bytes unused"
            raise ConvertError(f"{entry} begins at byte {entry.begin} and {kind}")
        end += entry.size
        if end > total:
            raise ConvertError(f"{entry} ends at byte {end}, the file at {total}: it is truncated")
    if end != total:
        raise ConvertError(f"{file} has {total - end} bytes behind its last tensor")
    yield from found


def _entry(file: Path, name: str, value: Any, data: int) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as e:
        raise ConvertError(f"tensor {name} of {file}: its header entry is {value!r}") from e
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ConvertError(f"tensor {name} of {file} has dtype {dtype!r}, expected one of {', '.join(ITEM_BYTES)}")
    if not whole or end - begin != prod(shape) * ITEM_BYTES[dtype]:
        raise ConvertError(f"tensor {name} of {file}: bytes {begin} to {end} can't hold {dtype} of shape {shape}")
    return Entry(name=name, dtype=dtype, shape=tuple(shape), file=file, begin=data + begin, size=end - begin)
