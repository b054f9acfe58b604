"""Processes that answer JSON lines, and statistics of what they measure. Knows no libraries and no models."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class WorkerError(Exception):
    """A worker that can't start or failed; the message is fit to be shown."""


class Worker:
    """A process that answers JSON lines; its first line says what it runs on. Else it writes to a log, for errors."""

    def __init__(
        self, command: Sequence[str], preload: Path | None = None, *, env: Mapping[str, str] | None = None
    ) -> None:
        env = {**os.environ, **(env or {}), **({"LD_PRELOAD": str(preload)} if preload else {})}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=env
        )
        try:
            self.about = self._read()
        except WorkerError:
            self.close()
            raise

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
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        self._process.stdout.close()
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
