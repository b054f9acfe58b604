"""Runs a plan: reads rows, packs them, writes them, piece by piece and in constant memory. Knows no recipes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from .checkpoint import ConvertError
from .plan import ModelPlan, Output
from .quantize import DTYPES, Packed, array_of, bytes_of, highest_bits, pack, unpack
from .writer import SHARD_BYTES, ShardWriter

_CHUNK = 6_000_000
"""Source bytes of one piece. Above a few megabytes the allocator maps each buffer anew: twice the system time."""

_SLOW = ("mxfp4", "nvfp4")
"""Formats that MLX's CPU backend packs by comparing with every value: 40 times a piece's bytes, slow in large ones."""
_SLOW_CHUNK = _CHUNK // 16


@dataclass(frozen=True, kw_only=True)
class Advance:
    """How far a conversion is. `tensor` is the one being written; bytes are the source's."""

    tensor: str
    tensors_done: int
    tensors: int
    bytes_done: int
    bytes: int


Progress = Callable[[Advance], None]


def write_model(
    plan: ModelPlan, directory: Path, progress: Progress | None = None, *, shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write a planned model's weights into `directory`; returns the files, all on the disk.

    Raises ConvertError for a tensor with NaN, or with infinity where it is quantized, naming it and its file.
    """
    with plan.source, ShardWriter(directory, plan.slots, shard_bytes) as writer:
        _Stream(plan, writer, progress).run()
        writer.finish()
        return writer.files


@dataclass(frozen=True, kw_only=True)
class _Piece:
    output: Output
    row: int
    packed: Packed
    source_bytes: int
    last: bool


class _Stream:
    """Keeps a piece per stream in flight, so that reading, packing and writing overlap."""

    def __init__(self, plan: ModelPlan, writer: ShardWriter, progress: Progress | None) -> None:
        self._plan, self._writer, self._progress = plan, writer, progress
        device = mx.default_device()
        # MLX's CPU backend runs one stream per thread: two use two cores. A GPU needs one.
        self._on_cpu = device.type == mx.cpu
        self._streams = [mx.new_stream(device) for _ in range(2 if self._on_cpu else 1)]
        self._flight: deque[_Piece] = deque()
        self._done = self._bytes = 0

    def run(self) -> None:
        """Everything, in the order of the source's files."""
        count = 0
        for output in self._plan.outputs:
            ranges = list(output.row_ranges(self._limit(output)))
            if not ranges:
                self._done += 1
            for i, (first, last, to) in enumerate(ranges):
                stream = self._streams[count % len(self._streams)]
                count += 1
                packed = self._make(output, first, last, stream)
                share = output.source_bytes * (last - first) // max(output.rows, 1)
                self._flight.append(
                    _Piece(output=output, row=to, packed=packed, source_bytes=share, last=i == len(ranges) - 1)
                )
                if len(self._flight) > len(self._streams):
                    self._land()
        while self._flight:
            self._land()

    def _limit(self, output: Output) -> int:
        slow = self._on_cpu and output.spec is not None and output.spec.mode in _SLOW
        return min(_CHUNK, _SLOW_CHUNK) if slow else _CHUNK

    def _make(self, output: Output, first: int, last: int, stream: mx.Stream) -> Packed:
        """Start on rows `first` to `last` - 1 of the source."""
        arrays = []
        for entry in output.sources:
            data = self._plan.source.read(entry, first, last)
            arrays.append(array_of(data, entry.dtype, entry.columns, stream))
        # What can be special of packed weights is their scales and biases, which are of one type.
        checked = arrays[0] if output.source_spec is None else mx.concatenate(arrays[1:], axis=-1, stream=stream)
        highest, infinity = highest_bits(checked, output.sources[-1].dtype, stream)
        parts = tuple(arrays)
        if not output.copied:
            parts = _converted(output, arrays, stream)
        mx.async_eval(*parts, *([] if highest is None else [highest]))  # type: ignore[no-untyped-call]
        return Packed(parts=parts, highest=highest, infinity=infinity)

    def _land(self) -> None:
        """Write the oldest piece in flight."""
        piece = self._flight.popleft()
        output, packed = piece.output, piece.packed
        if packed.highest is not None:
            _refuse_special(output, packed.highest.item(), packed.infinity)
        mx.eval(*packed.parts)
        for slot, part in zip(output.slots, packed.parts, strict=True):
            row = slot.size // output.rows if output.rows else 0
            self._writer.write(slot.name, piece.row * row, bytes_of(part))
        self._bytes += piece.source_bytes
        self._done += piece.last
        if self._progress is not None:
            self._progress(
                Advance(
                    tensor=output.slots[0].name,
                    tensors_done=self._done,
                    tensors=len(self._plan.outputs),
                    bytes_done=self._bytes,
                    bytes=self._plan.source_bytes,
                )
            )


def _converted(output: Output, arrays: list[mx.array], stream: mx.Stream) -> tuple[mx.array, ...]:
    x = arrays[0] if output.source_spec is None else unpack(arrays, output.source_spec, stream)
    if output.spec is None:
        return (x.astype(DTYPES[output.slots[0].dtype], stream=stream),)
    if output.spec.mode == "affine":
        x = x.astype(DTYPES[output.slots[1].dtype], stream=stream)
    return pack(x, output.spec, output.grid, stream)


def _refuse_special(output: Output, highest: object, infinity: int) -> None:
    """NaN anywhere is an error; infinity only where it would spoil a group's scale."""
    assert isinstance(highest, int)
    if highest > infinity or (highest == infinity and output.spec is not None):
        what = "NaN" if highest > infinity else "an infinite value"
        raise ConvertError(f"{output.sources[0]} holds {what}: expected finite weights")
