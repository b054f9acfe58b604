"""Does a block of tokens give the very logits that single steps give, on this machine, with these weights?

The `exact` contract promises plain decoding's tokens wherever it does. The probe compares bytes: one row decoded a
token at a time against the same tokens in blocks, in batches, and in caches one capacity step larger, as a longer
neighbour in the batch brings. Knows nothing of drafters, sampling, requests or text.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from .cache import KVCache, capacity_step, row_bucket
from .views import BlockView, CacheArrays, CacheSpec, KVView, Layout

_FORMAT = 2
_CHUNK = 512
_HIGHEST_RANDOM_ID = 200_000  # above are the marks of images and sounds
_LAYOUT = Layout(groups=1, mapped=False)
_BITS = {4: mx.uint32, 2: mx.uint16}


class TargetModel(Protocol):
    """What the probe asks of a target; see `models.target.Target`."""

    def __call__(self, tokens: mx.array, view: KVView) -> mx.array:
        """Hidden states (R, L, hidden), after the final norm, of tokens (R, L)."""

    def unembed(self, hidden: mx.array) -> mx.array:
        """Logits (..., vocab) of hidden states (..., hidden)."""


@dataclass(frozen=True, kw_only=True)
class Widths:
    """What to probe: every count of rows with every length of block, behind each number of keys.

    `larger`: by how many capacity steps the blocks' buffers exceed the tightest, which single steps get.
    `least`: a single step is computed in a block of so many tokens; above 1, this probes a decode path that pads steps
    into the kernels of wider blocks. `compiled`: through mx.compile, as rounds may be.
    """

    rows: tuple[int, ...]
    blocks: tuple[int, ...]
    keys: tuple[int, ...]
    larger: tuple[int, ...] = (0, 1)
    least: int = 1
    compiled: bool = False

    def __post_init__(self) -> None:
        for name, values in (("rows", self.rows), ("blocks", self.blocks), ("keys", self.keys)):
            if not values or min(values) < 1:
                raise ValueError(f"{name} is {values}, expected counts of at least 1")
        if not 1 <= self.least <= min(self.blocks):
            raise ValueError(f"least is {self.least}, expected 1 to the shortest of blocks, {min(self.blocks)}")

    @staticmethod
    def full(max_batch: int, depth: int, max_positions: int, *, least: int = 1, compiled: bool = False) -> Widths:
        """All that a batch of at most `max_batch` rows and drafts of at most `depth` can meet.

        Keys: few; and on either side of 1,024 and 4,096, where Metal's attention changes its kernels.
        """
        reached = [n for n in (48, 1000, 1056, 4056, 4128) if n + depth + 1 <= max_positions]
        return Widths(
            rows=tuple(sorted({row_bucket(n) for n in range(1, max_batch + 1)})),
            blocks=tuple(range(least, max(depth + 1, least) + 1)),
            keys=tuple(reached or [1]),
            least=least,
            compiled=compiled,
        )

    @staticmethod
    def quick(max_batch: int, depth: int, max_positions: int, *, compiled: bool = False) -> Widths:
        """Single tokens and the longest block, alone and in the largest batch, behind few keys: a few forwards."""
        keys = min(48, max(1, max_positions - depth - 1))
        rows = sorted({1, row_bucket(max_batch)})
        blocks = tuple(sorted({1, depth + 1}))
        return Widths(rows=tuple(rows), blocks=blocks, keys=(keys,), larger=(1,), compiled=compiled)


@dataclass(frozen=True, kw_only=True)
class Width:
    """One comparison: `rows` rows of `block` tokens behind `keys` keys, in buffers of `capacity` positions.

    `max_difference` is that of the logits; `positions` are those in the block, from 0, where a byte differs.
    """

    rows: int
    block: int
    keys: int
    capacity: int
    max_difference: float
    positions: tuple[int, ...]

    @property
    def bitwise(self) -> bool:
        """Whether no byte differs."""
        return not self.positions


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What the probe found. `skipped` says what it left out and why; `cached`: it was found earlier, and stored."""

    widths: tuple[Width, ...]
    skipped: tuple[str, ...]
    seconds: float
    cached: bool = False

    @property
    def bitwise(self) -> bool:
        """Whether something was compared, and nothing differs."""
        return bool(self.widths) and not self.differing

    @property
    def differing(self) -> tuple[Width, ...]:
        """The comparisons with a difference."""
        return tuple(w for w in self.widths if not w.bitwise)

    def holds(self, rows: int, block: int) -> bool:
        """Whether rows x block was compared, and found bitwise equal behind every number of keys."""
        found = [w.bitwise for w in self.widths if (w.rows, w.block) == (row_bucket(rows), block)]
        return bool(found) and all(found)

    @property
    def differing_shapes(self) -> tuple[str, ...]:
        """Names, rows x tokens, of the shapes with a difference."""
        return tuple(dict.fromkeys(f"{w.rows}x{w.block}" for w in self.differing))

    def describe(self) -> str:
        """One line: bitwise, or which widths (rows x tokens) differ and by how much at most."""
        left = f"; left out: {', '.join(self.skipped)}" if self.skipped else ""
        if not self.widths:
            return f"nothing was probed{left}"
        if self.bitwise:
            return f"bitwise in {len(self.widths)} comparisons{left}"
        largest = max(w.max_difference for w in self.differing)
        return f"logits differ (by {largest:.2g} at most) at rows x tokens {', '.join(self.differing_shapes)}{left}"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "bitwise": self.bitwise,
            "compared": len(self.widths),
            "differing": [asdict(w) for w in self.differing],
            "skipped": list(self.skipped),
            "seconds": round(self.seconds, 4),
            "cached": self.cached,
        }


def probe(
    target: TargetModel,
    spec: CacheSpec,
    widths: Widths,
    *,
    vocab_size: int,
    seconds: float = 60.0,
    max_bytes: int = 2 << 30,
) -> ProbeResult:
    """Compare blocks with single steps, byte by byte, at all `widths`, for about `seconds` at most.

    Each number of keys gets an equal share of the time. Batches whose K/V would take more than `max_bytes` are
    skipped. Tokens are random, with a fixed seed. Raises ValueError for blocks longer than the cache's.
    """
    if max(widths.blocks) > spec.max_block:
        raise ValueError(f"blocks are {widths.blocks}, expected at most {spec.max_block} tokens")
    begin = time.perf_counter()
    prober = _Prober(target, spec, widths, vocab_size)
    found: list[Width] = []
    skipped: dict[str, None] = {}
    for i, keys in enumerate(sorted(widths.keys), start=1):
        prober.deadline = begin + seconds * i / len(widths.keys)
        try:
            prober.prefill(keys)
            for rows, larger in product(widths.rows, widths.larger):
                if prober.bytes_of(rows, larger) > max_bytes:
                    skipped[f"{rows} rows behind {keys} keys (memory)"] = None
                    continue
                for width in prober.compare(rows, larger):
                    found.append(width)
        except TimeoutError:
            skipped[f"the rest behind {keys} keys (time)"] = None
    return ProbeResult(widths=tuple(found), skipped=tuple(skipped), seconds=time.perf_counter() - begin)


class _Prober:
    """One row of a cache that grows from one number of keys to the next, and what it is compared with.

    Past `deadline` its methods raise TimeoutError.
    """

    def __init__(self, target: TargetModel, spec: CacheSpec, widths: Widths, vocab_size: int) -> None:
        self._target, self._spec, self._widths = target, spec, widths
        self.deadline = math.inf
        self._longest = max(widths.blocks)
        draw, top = random.Random(0), min(vocab_size, _HIGHEST_RANDOM_ID)
        low = min(3, top - 1)
        self._tokens = [draw.randrange(low, top) for _ in range(max(widths.keys) + self._longest)]
        self._cache = KVCache.with_row(spec, self._capacity(max(widths.keys), max(widths.larger)))
        self._keys = 0
        self._singles: mx.array | None = None
        self._functions: dict[int, Callable[..., tuple[mx.array, list[mx.array]]]] = {}

    def prefill(self, keys: int) -> None:
        """Go on to `keys` keys."""
        while self._keys < keys:
            self._check_time()
            chunk = self._tokens[self._keys : min(keys, self._keys + _CHUNK)]
            view = self._cache.view(len(chunk), start=self._keys)
            self._target(mx.array([chunk], mx.int32), view)
            self._cache.arrays = view.arrays_after(mx.array([len(chunk)], mx.int32))
            mx.eval(self._cache.arrays)
            self._keys += len(chunk)
        self._singles = None

    def bytes_of(self, rows: int, larger: int) -> int:
        """K/V bytes of a batch."""
        per_row = self._spec.ring_bytes() + self._capacity(self._keys, larger) * self._spec.bytes_per_token()
        return rows * per_row

    def compare(self, rows: int, larger: int) -> Iterator[Width]:
        """Blocks of every length in `rows` rows, `larger` capacity steps above the tightest, with single steps."""
        if self._singles is None:
            self._singles = self._single_steps()
        arrays, capacity = self._batch(rows, larger), self._capacity(self._keys, larger)
        for block in self._widths.blocks:
            if rows == block == 1 and not larger:
                continue  # the single steps themselves
            self._check_time()
            tokens = self._tokens[self._keys : self._keys + block]
            logits, _ = self._forward(mx.array([tokens] * rows, mx.int32), arrays)
            same, gap = _compared(logits, self._singles[:block])
            yield Width(
                rows=rows,
                block=block,
                keys=self._keys,
                capacity=capacity,
                max_difference=gap,
                positions=tuple(i for i, equal in enumerate(same) if not equal),
            )

    def _check_time(self) -> None:
        if time.perf_counter() > self.deadline:
            raise TimeoutError

    def _capacity(self, keys: int, larger: int) -> int:
        # The last of the single steps is padded, too.
        size = capacity_step(keys + self._longest + self._widths.least - 1)
        for _ in range(larger):
            size = capacity_step(size + 1)
        return size

    def _single_steps(self) -> mx.array:
        """Logits (longest block, V) of single steps, from the tightest cache."""
        padding, arrays, logits = [0] * (self._widths.least - 1), self._batch(1, 0), []
        for token in self._tokens[self._keys : self._keys + self._longest]:
            self._check_time()
            step, arrays = self._forward(mx.array([[token, *padding]], mx.int32), arrays, count=1)
            mx.eval(step, arrays)
            logits.append(step[0, :1])
        return mx.concatenate(logits)

    def _batch(self, rows: int, larger: int) -> list[mx.array]:
        """The arrays of a cache with `rows` copies of the row, cut to a capacity."""
        parts = CacheArrays(self._spec, _LAYOUT, self._cache.arrays)
        size = self._capacity(self._keys, larger)
        parts.lengths, parts.alive = mx.full((rows,), self._keys, mx.int32), mx.ones((rows,), mx.int32)
        parts.rings = [mx.repeat(a, rows, axis=0) for a in parts.rings]
        parts.groups = [[mx.contiguous(mx.repeat(a[:, :, :size], rows, axis=0)) for a in g] for g in parts.groups]
        arrays = parts.flat()
        mx.eval(arrays)
        return arrays

    def _forward(self, tokens: mx.array, arrays: list[mx.array], *, count: int = 0) -> tuple[mx.array, list[mx.array]]:
        """Logits (R, L, V) and the cache behind the first `count` tokens."""
        if not self._widths.compiled:
            return self._plain_forward(count, tokens, arrays)
        if count not in self._functions:
            self._functions[count] = mx.compile(partial(self._plain_forward, count))
        return self._functions[count](tokens, arrays)

    def _plain_forward(self, count: int, tokens: mx.array, arrays: list[mx.array]) -> tuple[mx.array, list[mx.array]]:
        view = BlockView(self._spec, _LAYOUT, arrays, tokens.shape[1])
        logits = self._target.unembed(self._target(tokens, view))
        return logits, view.arrays_after(mx.full((tokens.shape[0],), count, mx.int32))


def _compared(logits: mx.array, expected: mx.array) -> tuple[list[bool], float]:
    """For logits (R, L, V) and expected (L, V): whether all bytes are equal at each l, and the largest difference."""
    bits = _BITS[logits.dtype.size]
    equal = (logits.view(bits) == expected.view(bits)[None]).all(axis=(0, 2))
    gap = mx.abs(logits.astype(mx.float32) - expected.astype(mx.float32)[None]).max()
    mx.eval(equal, gap)
    same: list[bool] = equal.tolist()  # type: ignore[assignment]
    largest: float = gap.item()  # type: ignore[assignment]
    return same, largest


# --- results kept between processes ------------------------------------------------------------------------------


def cache_folder() -> Path:
    """The user's folder for what can be found out again; MLX_GEMMA_MTP_CACHE names another."""
    if chosen := os.environ.get("MLX_GEMMA_MTP_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx-gemma-mtp"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mlx-gemma-mtp"


def fingerprint(arrays: Sequence[mx.array]) -> str:
    """A hash of weights: shapes, dtypes and a few values of each, which is cheap and tells checkpoints apart."""
    digest, samples = hashlib.sha256(), []
    for a in arrays:
        digest.update(f"{tuple(a.shape)} {a.dtype};".encode())
        middle = a[tuple(slice(n // 2, n // 2 + 4) for n in a.shape)]
        samples.append(mx.contiguous(middle).reshape(-1).view(mx.uint8))
    if samples:
        digest.update(bytes(mx.concatenate(samples).tolist()))  # type: ignore[arg-type]
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """What decides, besides weights, which kernels run: chip, versions, BLAS and its threads, MLX's variables."""
    from . import __version__

    prefix, own, threads = "MLX_", "MLX_GEMMA_MTP_", "_THREADS"  # BLAS's: OPENBLAS_NUM_THREADS, VECLIB_MAXIMUM_THREADS
    return {
        "chip": {k: str(v) for k, v in mx.device_info().items() if k in ("architecture", "device_name")},
        "device": str(mx.default_device()),
        "system": [platform.machine(), sys.platform, platform.mac_ver()[0]],
        "mlx": version("mlx"),
        "package": __version__,
        "preload": os.environ.get("LD_PRELOAD") or os.environ.get("DYLD_INSERT_LIBRARIES") or "",
        "variables": {
            k: v
            for k, v in sorted(os.environ.items())
            if (k.startswith(prefix) and not k.startswith(own)) or k.endswith(threads)
        },
    }


def cached_probe(
    target: TargetModel,
    spec: CacheSpec,
    widths: Widths,
    *,
    vocab_size: int,
    weights: Sequence[mx.array],
    folder: Path | None = None,
    seconds: float = 60.0,
    max_bytes: int = 2 << 30,
) -> ProbeResult:
    """As `probe`, but only once for the same machine, software, weights and widths: results are kept in `folder`.

    Default: `cache_folder()`. A file there that can't be read is replaced; a folder that can't be written is done
    without. What was skipped for lack of time is not kept.
    """
    file, about = _kept(spec, widths, vocab_size, weights, folder, max_bytes)
    if (known := _read(file, about)) is not None:
        return known
    result = probe(target, spec, widths, vocab_size=vocab_size, seconds=seconds, max_bytes=max_bytes)
    if not any(reason.endswith("(time)") for reason in result.skipped):
        with contextlib.suppress(OSError):
            _write(file, about, result)
    return result


def known_probe(
    spec: CacheSpec,
    widths: Widths,
    *,
    vocab_size: int,
    weights: Sequence[mx.array],
    folder: Path | None = None,
    max_bytes: int = 2 << 30,
) -> ProbeResult | None:
    """What `cached_probe` has kept; None if it has to probe."""
    return _read(*_kept(spec, widths, vocab_size, weights, folder, max_bytes))


def _kept(
    spec: CacheSpec,
    widths: Widths,
    vocab_size: int,
    weights: Sequence[mx.array],
    folder: Path | None,
    max_bytes: int,
) -> tuple[Path, dict[str, Any]]:
    """The file of a result, and all that it depends on."""
    about: dict[str, Any] = {
        "format": _FORMAT,
        "environment": environment(),
        "weights": fingerprint(weights),
        "cache": repr(spec),
        "widths": asdict(widths),
        "vocab_size": vocab_size,
        "max_bytes": max_bytes,
    }
    about = json.loads(json.dumps(about))
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    return (cache_folder() if folder is None else folder) / f"probe-{name}.json", about


def _read(file: Path, about: Mapping[str, Any]) -> ProbeResult | None:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["about"] != about:
            return None
        widths = [Width(**{**w, "positions": tuple(w["positions"])}) for w in data["widths"]]
        found = ProbeResult(widths=tuple(widths), skipped=tuple(data["skipped"]), seconds=float(data["seconds"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return replace(found, cached=True)


def _write(file: Path, about: Mapping[str, Any], result: ProbeResult) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    data = {
        "about": about,
        "widths": [asdict(w) for w in result.widths],
        "skipped": result.skipped,
        "seconds": result.seconds,
    }
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        part.write_text(json.dumps(data), encoding="utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
