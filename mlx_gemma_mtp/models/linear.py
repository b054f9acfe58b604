"""Named tensors, the matrices made of them, and the pointwise formulas of Gemma 4. Knows nothing of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import mlx.core as mx

from ..config import QuantSpec


class WeightsError(ValueError):
    """A checkpoint whose tensors don't match its config: names the tensor, what was found and what was expected."""


class Weights:
    """Named tensors, each taken once, with its shape checked; `finish` refuses what nobody took.

    `parameters` counts those of the tensors taken, packed ones as what they stand for.

    Names are those of `convert.names`. `quantized(path)` says how a matrix with scales is packed. Floating-point
    tensors, scales included, become `dtype`.
    """

    def __init__(
        self, tensors: Mapping[str, mx.array], quantized: Callable[[str], QuantSpec | None], dtype: mx.Dtype
    ) -> None:
        self._left = dict(tensors)
        self._quantized = quantized
        self.dtype = dtype
        self.parameters = 0

    def take(self, name: str, *shape: int) -> mx.array:
        """The tensor `name`, of exactly this shape: floating-point values, cast to `dtype`, or token ids."""
        x = self._pop(name, shape)
        if x.dtype in (mx.int32, mx.int64):
            return x
        self.parameters += x.size
        return self._typed(name, x, "floating point").astype(self.dtype)

    def linear(self, path: str, outputs: int, inputs: int) -> Linear:
        """The matrix `path`.weight (outputs, inputs), plain or quantized, laid out for products."""
        return self.table(path, outputs, inputs).for_products()

    def table(self, path: str, outputs: int, inputs: int, *batch: int) -> Linear:
        """The matrix `path`.weight, or a stack of them, as stored: for taking rows, or for `Linear.gathered`."""
        if f"{path}.scales" not in self._left:
            name = f"{path}.weight"
            weight = self._typed(name, self._pop(name, (*batch, outputs, inputs)), "floating point")
            self.parameters += weight.size
            return Linear(weight.astype(self.dtype))
        spec = self._quantized(path)
        if spec is None:
            raise WeightsError(f"{path}.scales is there, but the config has no `quantization`")
        weight = self._pop(f"{path}.weight", (*batch, outputs, inputs * spec.bits // 32), spec)
        self.parameters += weight.size * 32 // spec.bits
        groups = (*batch, outputs, inputs // spec.group_size)
        scales = self._pop(f"{path}.scales", groups, spec)
        biases = None
        self._typed(f"{path}.weight", weight, "uint32")
        if spec.mode == "affine":
            biases = self._pop(f"{path}.biases", groups, spec)
            biases = self._typed(f"{path}.biases", biases, "floating point").astype(self.dtype)
            scales = self._typed(f"{path}.scales", scales, "floating point").astype(self.dtype)
        else:
            self._typed(f"{path}.scales", scales, "uint8")
        return Linear(weight, scales, biases, spec, self.dtype)

    def stacked(self, paths: Sequence[str], outputs: Sequence[int], inputs: int, *batch: int) -> Stacked:
        """Several matrices with the same inputs as one, so that they cost one product (if packed alike)."""
        return Stacked([self.table(p, n, inputs, *batch) for p, n in zip(paths, outputs, strict=True)], outputs)

    def has(self, name: str) -> bool:
        """True if the tensor is there and not taken yet."""
        return name in self._left

    def finish(self) -> None:
        """Raise WeightsError if tensors are left that no layer asked for."""
        if self._left:
            names = sorted(self._left)
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            raise WeightsError(f"unexpected tensors: {', '.join(names[:8])}{more}")

    def _typed(self, name: str, x: mx.array, expected: str) -> mx.array:
        """x, if it is of the kind `expected`: other frameworks' packed weights may well have a plain one's shape."""
        found = str(x.dtype).removeprefix("mlx.core.")
        if not (expected == found or (expected == "floating point" and mx.issubdtype(x.dtype, mx.floating))):
            raise WeightsError(f"tensor {name} has dtype {found}, expected {expected}")
        return x

    def _pop(self, name: str, shape: tuple[int, ...], spec: QuantSpec | None = None) -> mx.array:
        if name not in self._left:
            raise WeightsError(f"missing tensor: {name} of shape {shape}")
        x = self._left.pop(name)
        if x.shape != shape:
            how = f" for {spec.bits} bits in groups of {spec.group_size}" if spec else ""
            raise WeightsError(f"tensor {name} has shape {tuple(x.shape)}, expected {shape}{how}")
        return x


class Linear:
    """x @ W.T for a plain or quantized W (outputs, inputs); also a table of rows, for embeddings."""

    def __init__(
        self,
        weight: mx.array,
        scales: mx.array | None = None,
        biases: mx.array | None = None,
        spec: QuantSpec | None = None,
        dtype: mx.Dtype | None = None,
    ) -> None:
        self.weight, self.scales, self.biases, self.spec = weight, scales, biases, spec
        self.dtype = dtype or weight.dtype
        self._turned: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """What it keeps in memory."""
        return [a for a in (self.weight, self.scales, self.biases) if a is not None]

    def __call__(self, x: mx.array) -> mx.array:
        """x (..., inputs) -> (..., outputs)."""
        if self.spec is None or self.scales is None:
            return x @ self._transposed()
        return mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.biases,
            transpose=True,
            group_size=self.spec.group_size,
            bits=self.spec.bits,
            mode=self.spec.mode,
        )

    def for_products(self) -> Linear:
        """The same matrix, stored as the backend multiplies fastest.

        The CPU backend's own BLAS reads W.T row by row up to twice as fast as W column by column, with the same bits.
        """
        if self.spec is None and self.weight.ndim == 2 and self.dtype == mx.float32 and not fused_kernels():
            return Linear(mx.contiguous(self.weight.T).T)
        return self

    def rows(self, index: mx.array) -> mx.array:
        """Rows of W: index (...) -> (..., inputs)."""
        if self.spec is None or self.scales is None:
            return self.weight[index]
        return mx.dequantize(
            self.weight[index],
            self.scales[index],
            None if self.biases is None else self.biases[index],
            group_size=self.spec.group_size,
            bits=self.spec.bits,
            mode=self.spec.mode,
            dtype=self.dtype,
        )

    def map(self, f: Callable[[mx.array], mx.array]) -> Linear:
        """The same matrix with its rows rearranged by `f`, applied to every array it is made of."""
        parts = (None if a is None else f(a) for a in (self.weight, self.scales, self.biases))
        weight, scales, biases = parts
        assert weight is not None
        return Linear(weight, scales, biases, self.spec, self.dtype)

    def joined(self, others: Sequence[Linear]) -> Linear:
        """One matrix with the rows of this one and then of `others`, which are packed alike."""

        def join(parts: Sequence[mx.array | None]) -> mx.array | None:
            there = [p for p in parts if p is not None]
            return mx.concatenate(there, axis=-2) if there else None

        all_parts = [self, *others]
        weight = join([p.weight for p in all_parts])
        assert weight is not None
        scales, biases = join([p.scales for p in all_parts]), join([p.biases for p in all_parts])
        return Linear(weight, scales, biases, self.spec, self.dtype)

    def gathered(self, x: mx.array, index: mx.array, *, in_order: bool = False) -> mx.array:
        """For a stack (E, outputs, inputs): x (..., 1, inputs) by matrices index (...) -> (..., 1, outputs)."""
        if self.spec is None or self.scales is None:
            if self.dtype != mx.float32 and mx.default_device().type == mx.cpu:
                # MLX's CPU backend gathers float32 matrices only; those that are used are copied out instead.
                return x @ self.weight[index].swapaxes(-1, -2)
            return mx.gather_mm(x, self._transposed(), rhs_indices=index, sorted_indices=in_order)
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.biases,
            rhs_indices=index,
            transpose=True,
            group_size=self.spec.group_size,
            bits=self.spec.bits,
            mode=self.spec.mode,
            sorted_indices=in_order,
        )

    def _transposed(self) -> mx.array:
        """W.T, a view: evaluated, as every product in every graph would else begin by making it."""
        if self._turned is None:
            self._turned = self.weight.swapaxes(-1, -2)
            mx.eval(self._turned)
        return self._turned


class Stacked:
    """Matrices with common inputs, computed by as few products as their packing allows."""

    def __init__(self, parts: Sequence[Linear], outputs: Sequence[int]) -> None:
        self.bounds = [sum(outputs[: i + 1]) for i in range(len(outputs) - 1)]
        alike = len(parts) > 1 and all(p.spec == parts[0].spec for p in parts)
        self.parts = [p.for_products() for p in ([parts[0].joined(parts[1:])] if alike else parts)]

    @property
    def arrays(self) -> list[mx.array]:
        """What it keeps in memory."""
        return [a for p in self.parts for a in p.arrays]

    def __call__(self, x: mx.array) -> list[mx.array]:
        """x (..., inputs) -> one output per matrix."""
        return self._split([p(x) for p in self.parts])

    def gathered(self, x: mx.array, index: mx.array, *, in_order: bool = False) -> list[mx.array]:
        """As `Linear.gathered`, one output per matrix."""
        return self._split([p.gathered(x, index, in_order=in_order) for p in self.parts])

    def _split(self, outputs: list[mx.array]) -> list[mx.array]:
        if len(outputs) == 1 and self.bounds:
            return list(mx.split(outputs[0], self.bounds, axis=-1))
        return outputs


def fused_kernels() -> bool:
    """Whether the default device is a GPU, where MLX's fused norm and RoPE kernels beat formulas under compile."""
    return bool(mx.default_device().type == mx.gpu)


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """x / rms(x) over the last axis, times `weight` (D,) if given; computed in float32, returned in x's dtype."""
    return mx.fast.rms_norm(x, weight, eps)


@partial(mx.compile, shapeless=True)
def gelu_gate(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up with the tanh approximation of gelu (Hendrycks and Gimpel, arXiv 1606.08415)."""
    x = gate.astype(mx.float32)
    # 0.5 * (1 + tanh(y)) is 1 / (1 + exp(-2 * y)), whose exponential a CPU computes in half of the time.
    return (x / (1 + mx.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))).astype(up.dtype) * up
