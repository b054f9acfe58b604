"""What a benchmark ran on: chip, cores, memory, system, BLAS. Knows no models."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

_OPENBLAS = ("/usr/lib/*-linux-gnu/openblas-pthread/libopenblas.so.0", "/usr/lib64/libopenblasp.so.0")


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
        return output_of("sysctl", "-n", "machdep.cpu.brand_string")
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1].strip() if found else platform.machine()


def output_of(*command: str) -> str:
    """What a command prints; "" where it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
