"""What benchmarks share: pairs on disk, prompts, records; and what the command `bench` shares with them.

Knows nothing of any one benchmark.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_gemma_mtp
from mlx_gemma_mtp.benchmark.machine import describe_machine, find_openblas, host_class, output_of
from mlx_gemma_mtp.benchmark.peers import copy_for_mlx_lm, copy_for_mlx_vlm, weights_of
from mlx_gemma_mtp.benchmark.workers import Spread, Worker, WorkerError

__all__ = [
    "ARMS", "DEMO", "LENGTHS", "RESULTS", "ROOT", "Pair", "Spread", "Worker", "WorkerError", "copy_for_mlx_lm",
    "copy_for_mlx_vlm", "describe_checkpoint", "describe_commit", "describe_machine", "find_openblas", "find_pair",
    "host_class", "make_prompts", "result_file", "tensors_of", "weights_of",
]  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGE = Path(mlx_gemma_mtp.__file__).resolve().parent
DEMO = PACKAGE / "demo"
ARMS = PACKAGE / "benchmark" / "arms.py"
"""One library in a process of its own; run as a script, in any environment that has the library."""
LENGTHS = (25, 44, 72, 106, 150, 204, 262, 331)
"""Lengths of the prompts of random ids; the chats in prompts.json are about as long."""

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


def describe_commit() -> str | None:
    """The commit of this checkout, "+changes" behind it when files differ; None where it is none."""
    head = output_of("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changes = output_of("git", "--no-optional-locks", "-C", str(ROOT), "status", "--porcelain")
    return None if not head else head + ("+changes" if changes else "")


def result_file(name: str) -> Path:
    """Where a record goes: bench/results/NAME-<date>-<host class>.json."""
    return RESULTS / f"{name}-{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}-{host_class()}.json"
