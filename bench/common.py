"""What benchmarks share: pairs on disk and copies of them for the peers, prompts, the machine, workers, statistics.

Knows nothing of any one benchmark.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DEMO = ROOT / "mlx_gemma_mtp" / "demo"
LENGTHS = (25, 44, 72, 106, 150, 204, 262, 331)
"""Lengths of the prompts of random ids; the chats in prompts.json are about as long."""

_OPENBLAS = ("/usr/lib/*-linux-gnu/openblas-pthread/libopenblas.so.0", "/usr/lib64/libopenblasp.so.0")
_NO_TEXT = ("vision_", "embed_vision", "audio_tower", "embed_audio", "multi_modal_projector")
_HIGHEST_RANDOM_ID = 200_000  # above are the marks of images and sounds


# --- pairs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A target and its drafter on disk."""

    target: Path
    drafter: Path


def find_pair(target: str | None, drafter: str | None) -> Pair:
    """The pair to measure: the demo without `target`; the drafter is looked for as `load` does. Raises ValueError."""
    path = Path(target).expanduser() if target else DEMO
    if not target and not (path / "model.safetensors").is_file():
        raise ValueError(f"the demo pair is not there ({path} has no weights): name one with --pair DIR")
    if (path / "target" / "config.json").is_file():
        path = path / "target"
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: expected a checkpoint, or a directory with one in target/")
    siblings = ("assistant", "drafter", f"{path.name}-assistant")
    places = [path / "drafter", *(path.parent / name for name in siblings)]
    found = [Path(drafter).expanduser()] if drafter else [p for p in places if (p / "config.json").is_file()]
    if not found:
        raise ValueError(f"{path} has no drafter: name one with --drafter DIR")
    return Pair(target=path.resolve(), drafter=found[0].resolve())


def weights_of(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    return sorted(directory.glob("*.safetensors"))


def tensors_of(file: Path) -> dict[str, dict[str, Any]]:
    """Name, dtype and shape of a safetensors file's tensors, from its header."""
    with file.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    header.pop("__metadata__", None)
    return dict(header)


def describe_checkpoint(directory: Path) -> dict[str, Any]:
    """Path, SHA-256 of the weights, the text model's parameters and the dtypes they are stored in."""
    tensors = {k: v for file in weights_of(directory) for k, v in tensors_of(file).items()}
    text = [v for k, v in tensors.items() if not any(part in k for part in _NO_TEXT)]
    return {
        "path": str(directory),
        "sha256": {file.name: _sha256(file) for file in weights_of(directory)},
        "parameters": sum(math.prod(t["shape"]) for t in text if t["dtype"].startswith(("F", "BF"))),
        "stored_as": sorted({t["dtype"] for t in text}),
    }


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def copy_for_mlx_lm(target: Path, into: Path) -> Path:
    """A directory that mlx-lm loads right: it takes the vocabulary's size from the outer config alone."""
    config = json.loads((target / "config.json").read_text())
    config.setdefault("vocab_size", config.get("text_config", config)["vocab_size"])
    return _linked_copy(target, into, config)


def copy_for_mlx_vlm(target: Path, into: Path) -> Path:
    """A directory that mlx-vlm loads: it wants a vision tower, so one without gets a tiny one that nothing uses."""
    config = json.loads((target / "config.json").read_text())
    if config.get("model_type") != "gemma4" or config.get("vision_config"):
        return target
    config["vision_config"] = _VISION
    into = _linked_copy(target, into, config)
    _save_vision_tower(into / "vision.safetensors", config["text_config"]["hidden_size"])
    return into


_VISION: dict[str, Any] = {
    "model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 16,
    "position_embedding_size": 64, "pooling_kernel_size": 3, "rms_norm_eps": 1e-6,
    "use_clipped_linears": False, "standardize": False,
    "hidden_activation": "gelu_pytorch_tanh", "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
}  # fmt: skip


def _linked_copy(target: Path, into: Path, config: Mapping[str, Any]) -> Path:
    into.mkdir(parents=True)
    for file in weights_of(target):
        (into / file.name).symlink_to(file.resolve())
    (into / "config.json").write_text(json.dumps(config))
    return into


def _save_vision_tower(file: Path, text_hidden: int) -> None:
    import mlx.core as mx

    hidden, mlp, head = _VISION["hidden_size"], _VISION["intermediate_size"], _VISION["head_dim"]
    places = _VISION["position_embedding_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embed_vision.embedding_projection.weight": (text_hidden, hidden),
        "vision_tower.patch_embedder.input_proj.weight": (hidden, 3 * _VISION["patch_size"] ** 2),
        "vision_tower.patch_embedder.position_embedding_table": (2, places, hidden),
    }
    layer = "vision_tower.encoder.layers.0"
    for name, shape in (("gate", (mlp, hidden)), ("up", (mlp, hidden)), ("down", (hidden, mlp))):
        shapes[f"{layer}.mlp.{name}_proj.linear.weight"] = shape
    shapes |= {f"{layer}.self_attn.{n}_proj.linear.weight": (hidden, hidden) for n in "qkvo"}
    shapes |= {f"{layer}.self_attn.{n}_norm.weight": (head,) for n in "qk"}
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        shapes[f"{layer}.{norm}_layernorm.weight"] = (hidden,)
    mx.random.seed(0)
    mx.save_safetensors(str(file), {f"model.{n}": 0.02 * mx.random.normal(s) for n, s in shapes.items()})


# --- prompts -----------------------------------------------------------------------------------------------------


def make_prompts(target: Path) -> tuple[str, list[list[int]]]:
    """Eight prompts and what they are: chats, or without a chat template random ids of a fixed seed."""
    from mlx_gemma_mtp.text import TextCodec

    codec = TextCodec.from_directory(target)
    if codec is not None and codec.has_chat_template:
        chats = json.loads((ROOT / "bench" / "prompts.json").read_text())
        return "chats (prompts.json)", [codec.render(chat) for chat in chats]
    config = json.loads((target / "config.json").read_text())
    top = min(int(config.get("text_config", config)["vocab_size"]), _HIGHEST_RANDOM_ID)
    draw = random.Random(0)
    return "random ids", [[draw.randrange(3, top) for _ in range(length)] for length in LENGTHS]


# --- the machine -------------------------------------------------------------------------------------------------


def find_openblas() -> Path | None:
    """OpenBLAS with threads (Debian: libopenblas0-pthread), to preload over MLX's own BLAS; None: not there."""
    if sys.platform != "linux":
        return None
    return next((path for pattern in _OPENBLAS for path in sorted(Path("/").glob(pattern[1:]))), None)


def describe_machine() -> dict[str, Any]:
    """Chip, cores, memory, system, and the load that others made at the start."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "chip": _chip(),
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 2**30, 1),
        "os": platform.platform(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def host_class() -> str:
    """A short name for machines of this kind, for file names: system, chip or architecture, cores."""
    name = _chip() if sys.platform == "darwin" else platform.machine()
    chip = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")
    return f"{platform.system().lower()}-{chip}-{os.cpu_count()}core"


def _chip() -> str:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.machine()


def describe_commit() -> str | None:
    """The commit of this checkout, "+changes" behind it when files differ; None where it is none."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changes = _output("git", "--no-optional-locks", "-C", str(ROOT), "status", "--porcelain")
    return None if not head else head + ("+changes" if changes else "")


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def result_file(name: str) -> Path:
    """Where a record goes: bench/results/NAME-<date>-<host class>.json."""
    return RESULTS / f"{name}-{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}-{host_class()}.json"


# --- workers -----------------------------------------------------------------------------------------------------


class WorkerError(Exception):
    """A worker that can't start or failed; the message is fit to be shown."""


class Worker:
    """A process that answers JSON lines; its first line says what it runs on. Else it writes to a log, for errors."""

    def __init__(self, command: Sequence[str], preload: Path | None = None) -> None:
        env = dict(os.environ) | ({"LD_PRELOAD": str(preload)} if preload else {})
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=env
        )
        self.about = self._read()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer. Raises WorkerError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # reading tells why
        return self._read()

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            tail = self._log.read().strip().splitlines()[-3:]
            raise WorkerError(f"it ended with status {self._process.returncode}: {' / '.join(tail) or 'no message'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"].strip().splitlines()[-1])
        return answer


# --- statistics --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """The median of some samples, and the smallest and largest."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """Of at least one sample."""
        return Spread(statistics.median(samples), min(samples), max(samples))

    def to_dict(self) -> dict[str, float]:
        """Ready for JSON."""
        return {"median": round(self.median, 4), "min": round(self.low, 4), "max": round(self.high, 4)}
