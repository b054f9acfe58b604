"""Launcher for a checkout: `python convert SOURCE --out DIR` is `mlx-gemma-mtp convert SOURCE --out DIR`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlx_gemma_mtp.cli import app

app(["convert", *sys.argv[1:]])
