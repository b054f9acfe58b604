"""Where weights come from: hashes of files, revisions, versions. Knows nothing of tensors or recipes."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from .checkpoint import ConvertError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Hasher:
    """SHA-256 of files, in a thread of its own while others work. A context manager; leaving it early stops it."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash")
        self._results: dict[Path, Future[str]] = {}

    def add(self, files: Sequence[Path]) -> None:
        """Begin with these files."""
        for file in files:
            if file not in self._results:
                self._results[file] = self._pool.submit(_sha256, file, self._stop)

    def result(self, file: Path) -> str:
        """The hash of an added file, waiting for it."""
        return self._results[file].result()

    def __enter__(self) -> Hasher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)


def _sha256(file: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as f:
        buffer = memoryview(bytearray(1 << 22))
        while (n := f.readinto(buffer)) and not stop.is_set():
            digest.update(buffer[:n])
    return digest.hexdigest()


def checked_hashes(hasher: Hasher, files: Sequence[Path], given: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Size and hash of each file by name; ConvertError for one that isn't what its origin says."""
    out = {}
    for file in files:
        found, expected = hasher.result(file), given.get(file.name)
        if expected is not None and found != expected:
            raise ConvertError(
                f"{file} is damaged: its SHA-256 is {found}, its origin (the hub, or the conversion.json that came "
                f"with it) says {expected}"
            )
        out[file.name] = {"bytes": file.stat().st_size, "sha256": found}
    return out


def known_hashes(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of files as their origin states it: the hub's cache and downloads, or our own conversion's record."""
    out: dict[str, str] = {}
    for file in files:
        # The hub's cache names a file's content after its hash; its downloads into a directory note it.
        blob = file.resolve().name
        etag = _download_note(file)[1:2]
        for found in (blob, *etag):
            if _SHA256.fullmatch(found):
                out[file.name] = found
    for directory in {f.parent for f in files}:
        out = _recorded(directory) | out
    return out


def _recorded(directory: Path) -> dict[str, str]:
    path, role = directory / "conversion.json", "target"
    if not path.is_file() and directory.resolve().name == "drafter":
        path, role = directory.resolve().parent / "conversion.json", "drafter"
    if not path.is_file():
        return {}
    try:
        model = json.loads(path.read_text(encoding="utf-8"))[role]
        # A drafter that a conversion without one got later is nothing that its record knows.
        return {} if model is None else {name: entry["sha256"] for name, entry in model["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConvertError(f"{path} isn't a conversion's record: {e}") from e


def revision_of(directory: Path) -> str | None:
    """The commit of a directory in the hub's cache, or of one that the hub's client filled, or None."""
    if directory.parent.name == "snapshots" and _COMMIT.fullmatch(directory.name):
        return directory.name
    note = _download_note(directory / "config.json")
    return note[0] if note and _COMMIT.fullmatch(note[0]) else None


def _download_note(file: Path) -> list[str]:
    """What the hub's client notes beside a file that it fetched into a directory: commit, hash or tag, time."""
    note = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    return note.read_text(encoding="utf-8").splitlines() if note.is_file() else []


def versions() -> dict[str, str]:
    """What made a conversion."""
    from .. import __version__

    return {
        "mlx_gemma_mtp": __version__,
        "mlx": version("mlx"),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
