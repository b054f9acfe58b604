"""Rows of a matrix, as bytes, to packed rows. Rows are independent: a chunk gives the bits that the whole would.

Knows nothing of files, names or recipes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from ..config import QuantSpec

DTYPES = {
    "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "I64": mx.int64, "I32": mx.int32, "I16": mx.int16,
    "I8": mx.int8, "U64": mx.uint64, "U32": mx.uint32, "U16": mx.uint16, "U8": mx.uint8, "BOOL": mx.bool_,
}  # fmt: skip
_WORDS = {8: mx.uint64, 4: mx.uint32, 2: mx.uint16, 1: mx.uint8}
_FORMATS: dict[int, Literal["Q", "I", "H", "B"]] = {8: "Q", 4: "I", 2: "H", 1: "B"}
# The bits of a float without its sign, and those of infinity: more than that is NaN.
_SPECIAL = {"BF16": (0x7FFF, 0x7F80), "F16": (0x7FFF, 0x7C00), "F32": (0x7FFFFFFF, 0x7F800000)}


@dataclass(frozen=True)
class Packed:
    """What a chunk of rows became, not evaluated yet: `parts` to be written, and what tells if a value was special.

    `highest` is the largest magnitude's bits; compare it with `infinity`.
    """

    parts: tuple[mx.array, ...]
    highest: mx.array | None
    infinity: int


def array_of(data: bytearray, dtype: str, columns: int, stream: mx.Stream | None = None) -> mx.array:
    """Rows of `columns` values from their bytes (copied)."""
    size = DTYPES[dtype].size
    words = mx.array(memoryview(data).cast(_FORMATS[size]))  # type: ignore[arg-type]
    return words.view(DTYPES[dtype], stream=stream).reshape(-1, columns, stream=stream)


def bytes_of(x: mx.array) -> memoryview:
    """The bytes of an evaluated array."""
    words = x if x.dtype in _WORDS.values() else x.view(_WORDS[x.dtype.size])
    return memoryview(words).cast("B")  # type: ignore[arg-type]


def highest_bits(x: mx.array, dtype: str, stream: mx.Stream | None = None) -> tuple[mx.array | None, int]:
    """The largest magnitude in `x` as bits, and infinity's: reading bits is ten times faster than `isfinite`."""
    if dtype not in _SPECIAL or not x.size:
        return None, 0
    mask, infinity = _SPECIAL[dtype]
    words = x.view(_WORDS[x.dtype.size], stream=stream)
    return mx.max(mx.bitwise_and(words, mask, stream=stream), stream=stream), infinity


def pack(x: mx.array, spec: QuantSpec, grid: str, stream: mx.Stream | None = None) -> tuple[mx.array, ...]:
    """Quantize rows (rows, columns): packed weights and scales, and biases if affine."""
    if grid == "q4_0" and (spec.bits, spec.group_size, spec.mode) == (4, 32, "affine"):
        return _pack_q4_0(x, stream)
    return tuple(mx.quantize(x, group_size=spec.group_size, bits=spec.bits, mode=spec.mode, stream=stream))


def unpack(parts: Sequence[mx.array], spec: QuantSpec, stream: mx.Stream | None = None) -> mx.array:
    """The rows that packed ones stand for, in bfloat16 or their scales' type."""
    dtype = parts[1].dtype if spec.mode == "affine" else mx.bfloat16
    return mx.dequantize(
        parts[0],
        parts[1],
        parts[2] if len(parts) > 2 else None,
        group_size=spec.group_size,
        bits=spec.bits,
        mode=spec.mode,
        dtype=dtype,
        stream=stream,
    )


def packed_shapes(rows: int, columns: int, spec: QuantSpec) -> list[tuple[int, int]]:
    """Shapes of weights and scales (and biases, if affine) of a packed matrix."""
    groups = (rows, columns // spec.group_size)
    return [(rows, columns * spec.bits // 32), groups, *([groups] if spec.mode == "affine" else [])]


def _pack_q4_0(x: mx.array, stream: mx.Stream | None) -> tuple[mx.array, ...]:
    """GGUF's q4_0: value = d * (q - 8), where -8 d is the value of a group with the largest magnitude.

    MLX's own choice, scales from minimum and maximum, misses this grid wherever a group doesn't use both its ends.
    """
    with mx.stream(stream or mx.default_stream(mx.default_device())):
        rows, columns = x.shape
        groups = x.reshape(rows, columns // 32, 32).astype(mx.float32)
        at = mx.argmax(mx.abs(groups), axis=-1, keepdims=True)
        extreme = mx.take_along_axis(groups, at, axis=-1)
        # An eighth is exact in every float type, so no rounding of the scale moves the grid.
        scale = -extreme / 8
        inverse = mx.where(scale == 0, mx.zeros_like(scale), 1 / mx.where(scale == 0, mx.ones_like(scale), scale))
        codes = mx.clip(mx.floor(groups * inverse + 8.5), 0, 15).astype(mx.uint32)
        shifts = mx.arange(0, 32, 4, dtype=mx.uint32)
        words = mx.sum(mx.left_shift(codes.reshape(rows, columns // 8, 8), shifts), axis=-1).astype(mx.uint32)
        return words, scale[..., 0].astype(x.dtype), extreme[..., 0].astype(x.dtype)
