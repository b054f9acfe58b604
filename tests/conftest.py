"""What all tests share: nothing is kept in the user's cache folder."""

from __future__ import annotations

import os
import tempfile

os.environ["MLX_GEMMA_MTP_CACHE"] = tempfile.mkdtemp(prefix="mlx-gemma-mtp-tests-")
