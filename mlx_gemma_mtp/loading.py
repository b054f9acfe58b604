"""From a directory or a hub id to models: finds files, checks every tensor and the memory they need, loads once.

Knows nothing of text, requests or decoding.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .config import DrafterConfig, LayerSpec, Quantization, QuantSpec, TargetConfig
from .convert.names import Skipped, canonical, canonical_path
from .json_file import read_object
from .models.drafter import Drafter
from .models.linear import Weights, WeightsError
from .models.target import Target

log = logging.getLogger(__name__)

DEMO = "demo"
_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it done, 0 to 1."""


class LoadError(Exception):
    """A model that can't be loaded: says which file or id, what was found and what was expected."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A pair in memory. `skipped` counts the tensors left out, by the rule that says why."""

    path: Path
    config: TargetConfig
    target: Target
    drafter_path: Path | None
    drafter_config: DrafterConfig | None
    drafter: Drafter | None
    dtype: mx.Dtype
    skipped: Mapping[str, int]


def load_pair(
    source: str,
    *,
    drafter: str | None = "auto",
    dtype: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Load a target and its drafter.

    `source` and `drafter`: a directory, a hub id or "demo"; drafter "auto" looks beside the target (see
    `find_drafter`), None decodes plainly. dtype None: the checkpoint's own on a GPU, float32 on the CPU backend,
    where bfloat16 products of quantized weights are slow and inexact. Raises LoadError, ConfigError or WeightsError.
    """
    path = resolve(source, revision, progress)
    drafter_path = _drafter_path(source, path, drafter, progress)
    data, drafter_data = _config(path), None if drafter_path is None else _config(drafter_path)
    config = TargetConfig.from_hf(data)
    drafter_config = None if drafter_data is None else DrafterConfig.from_hf(drafter_data, config)
    compute = _compute_dtype(dtype, data)
    files = _shards(path), _shards(drafter_path) if drafter_path else []
    _check_memory([*files[0], *files[1]], compute)
    skipped: Counter[str] = Counter()
    target = build_target(config, _tensors(files[0]), compute, skipped)
    _evaluate("loading the target", target.arrays, progress)
    model = None
    if drafter_config is not None:
        model = build_drafter(drafter_config, _tensors(files[1]), target, compute, skipped)
        _evaluate("loading the drafter", model.arrays, progress)
    return Loaded(
        path=path,
        config=config,
        target=target,
        drafter_path=drafter_path,
        drafter_config=drafter_config,
        drafter=model,
        dtype=compute,
        skipped=dict(skipped),
    )


def _drafter_path(source: str, path: Path, drafter: str | None, progress: Progress | None) -> Path | None:
    if drafter != "auto":
        return None if drafter is None else resolve(drafter, None, progress)
    found = find_drafter(source, path)
    if found is None:
        return None
    try:
        return resolve(found, None, progress)
    except LoadError as e:
        # Nobody asked for this one: an answer without drafts is better than none.
        log.warning("no drafts: %s", e)
        return None


def resolve(source: str, revision: str | None, progress: Progress | None = None) -> Path:
    """The directory of a model: the bundled demo, a local one, or a hub id's files (downloaded once, then cached)."""
    if source == DEMO:
        return Path(__file__).parent / "demo"
    local = Path(source).expanduser()
    if local.is_dir():
        return local
    looks_local = source.startswith((".", "/", "~")) or source.count("/") != 1
    if looks_local:
        raise LoadError(f"{source} is not a directory, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    # The hub's own error derives from that of its HTTP library, which differs between its versions.
    transport: type[Exception] = HfHubHTTPError.__bases__[0]
    if progress:
        progress(f"fetching {source}", 0.0)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=_FILES))
    except RepositoryNotFoundError as e:
        raise LoadError(f"{source} is neither a directory nor a model on the hub (or one that needs a login)") from e
    except (HFValidationError, OSError, transport) as e:
        raise LoadError(f"{source} is not a directory, and fetching it from the hub failed: {e}") from e


def find_drafter(source: str, path: Path) -> str | None:
    """Where a target's drafter is, or None: DIR/drafter, a sibling of DIR, or for a hub id the official one.

    Siblings: `assistant`, `drafter` or `<name>-assistant`. Two of them are an error: the caller must choose.
    """
    if (path / "drafter" / "config.json").is_file():
        return str(path / "drafter")
    if not Path(source).expanduser().is_dir():
        name = source.rsplit("/", 1)[-1].lower()
        for official in ("E2B", "E4B", "12B", "26B-A4B", "31B"):
            if f"gemma-4-{official.lower()}-it" in name:
                # Targets trained for quantization have drafters that were trained with them.
                trained = "-qat-q4_0-unquantized" if "-it-qat" in name else ""
                return f"google/gemma-4-{official}-it{trained}-assistant"
        return None
    full = path.resolve()
    siblings = [full.parent / n for n in ("assistant", "drafter", f"{full.name}-assistant")]
    found = [s for s in siblings if (s / "config.json").is_file() and s != full]
    if len(found) > 1:
        raise LoadError(f"two drafters beside {path}: {', '.join(map(str, found))}: name one")
    return str(found[0]) if found else None


def build_target(
    config: TargetConfig,
    tensors: Mapping[str, mx.array],
    dtype: mx.Dtype,
    skipped: Counter[str] | None = None,
) -> Target:
    """The target from a checkpoint's tensors, every one of them used or skipped by a rule. Nothing is evaluated."""
    weights = _weights(tensors, config.layers, config.quantization, dtype, skipped)
    model = Target(config, weights)
    weights.finish()
    return model


def build_drafter(
    config: DrafterConfig,
    tensors: Mapping[str, mx.array],
    target: Target,
    dtype: mx.Dtype,
    skipped: Counter[str] | None = None,
) -> Drafter:
    """The drafter, bound to `target`'s embedding, from a checkpoint's tensors."""
    weights = _weights(tensors, config.layers, config.quantization, dtype, skipped)
    model = Drafter(config, weights, target.embed)
    weights.finish()
    return model


def _weights(
    tensors: Mapping[str, mx.array],
    layers: Sequence[LayerSpec],
    quantization: Quantization | None,
    dtype: mx.Dtype,
    skipped: Counter[str] | None,
) -> Weights:
    named: dict[str, mx.array] = {}
    for name, x in tensors.items():
        mapped = canonical(name, lambda i: i >= len(layers) or layers[i].writes_kv)
        if isinstance(mapped, Skipped):
            if skipped is not None:
                skipped[mapped.rule] += 1
        elif mapped in named:
            raise WeightsError(f"two tensors of the checkpoint are {mapped}; one of them is {name}")
        else:
            named[mapped] = x
    overrides: dict[str, QuantSpec] = {}
    if quantization is not None:
        overrides = {canonical_path(path): spec for path, spec in quantization.overrides}

    def spec_of(path: str) -> QuantSpec | None:
        return None if quantization is None else overrides.get(path, quantization.default)

    return Weights(named, spec_of, dtype)


def _config(path: Path) -> dict[str, Any]:
    return read_object(path / "config.json", LoadError)


def _shards(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or all of them."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        table = read_object(index, LoadError).get("weight_map")
        if not isinstance(table, dict):
            raise LoadError(f"{index}: weight_map is {table!r}, expected an object")
        for name in table.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise LoadError(f"{index} names the file {name!r}, expected a plain file name")
            if not (path / name).is_file():
                raise LoadError(f"{index} names {name}, which is not there")
        return [path / n for n in sorted(set(table.values()))]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise LoadError(f"{path} has no *.safetensors file")
    return files


def _tensors(files: Sequence[Path]) -> dict[str, mx.array]:
    """All tensors of the files, not read yet: MLX reads them when they are evaluated."""
    tensors: dict[str, mx.array] = {}
    for file in files:
        try:
            part = mx.load(str(file))
        except RuntimeError as e:
            raise LoadError(f"{file} can't be read: {e}") from e
        assert isinstance(part, dict)
        if twice := tensors.keys() & part.keys():
            raise LoadError(f"{file} holds {min(twice)}, which an earlier file holds, too")
        tensors.update(part)
    return tensors


def _compute_dtype(dtype: str | None, data: Mapping[str, Any]) -> mx.Dtype:
    if dtype is not None:
        if dtype not in _DTYPES:
            raise LoadError(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    if mx.default_device().type == mx.cpu:
        return mx.float32
    text = data.get("text_config", data)
    return _DTYPES.get(str(text.get("dtype") or data.get("dtype") or data.get("torch_dtype")), mx.bfloat16)


def _check_memory(files: Sequence[Path], dtype: mx.Dtype) -> None:
    """Refuse, before reading, weights that don't fit in this machine's memory."""
    needed = sum(_bytes_in_memory(f, dtype) for f in files)
    limit = memory_limit()
    if needed > limit:
        raise LoadError(
            f"the weights need {needed / 1e9:.1f} GB as {str(dtype).removeprefix('mlx.core.')}, this machine has "
            f"{limit / 1e9:.1f} GB for them: choose a smaller or quantized model, or a narrower dtype"
        )


def memory_limit() -> int:
    """Bytes that weights and caches may take: the GPU's recommended working set, or the machine's memory."""
    info = mx.device_info()
    size = info.get("max_recommended_working_set_size") or info.get("memory_size")
    return int(size) if size else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _bytes_in_memory(file: Path, dtype: mx.Dtype) -> int:
    """What a safetensors file's text tensors take once loaded, from its header alone."""
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= 100_000_000:
            raise LoadError(f"{file} is not a safetensors file: its header would be {length} bytes")
        try:
            header = json.loads(f.read(length))
        except ValueError as e:
            raise LoadError(f"{file} is not a safetensors file: its header is not JSON") from e
    if not isinstance(header, dict):
        raise LoadError(f"{file} is not a safetensors file: its header is not an object")
    total, room = 0, file.stat().st_size - 8 - length
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            (begin, end), width = entry["data_offsets"], _FLOATS.get(entry["dtype"])
            if not 0 <= begin <= end <= room:
                raise ValueError(f"the file has {room} bytes of data")
        except (KeyError, TypeError, ValueError) as e:
            raise LoadError(f"{file} is damaged or incomplete: its header says {entry!r} of {name} ({e!r})") from e
        if not isinstance(canonical(name, lambda _: True), Skipped):
            total += end - begin if width is None else (end - begin) // width * dtype.size
    return total


def _evaluate(what: str, portions: Sequence[list[mx.array]], progress: Progress | None) -> None:
    """Read and arrange the weights, a portion at a time, so that no more than one portion exists twice."""
    for i, portion in enumerate(portions):
        mx.eval(portion)
        if progress:
            progress(what, (i + 1) / len(portions))
