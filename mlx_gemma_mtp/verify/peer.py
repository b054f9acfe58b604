"""The same checkpoint in mlx-lm, to compare plain decoding with."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import mlx.core as mx

from ..loading import memory_limit
from ..runtime import Runtime
from .cases import Case
from .report import Output


class MlxLmError(Exception):
    """mlx-lm can't decode this checkpoint; says why."""


class MlxLm:
    """The same checkpoint in mlx-lm, which decodes greedily."""

    def __init__(self, rt: Runtime) -> None:
        """Load it in the pair's dtype. Raises MlxLmError."""
        path = Path(rt.info()["model"]["path"])
        self._check_memory(path)
        try:
            from mlx_lm.utils import load_model

            # It takes the vocabulary's size from the outer config alone, where official checkpoints don't have it.
            with contextlib.redirect_stdout(sys.stderr):
                self._model, _ = load_model(path, model_config={"vocab_size": rt.config.vocab_size})
                self._model.set_dtype(rt.dtype)
                mx.eval(self._model.parameters())
        except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            first = str(error).strip().splitlines() or [""]
            raise MlxLmError(f"mlx-lm can't load {path}: {type(error).__name__}: {first[0]}") from error

    @staticmethod
    def _check_memory(path: Path) -> None:
        needed = 2 * sum(file.stat().st_size for file in path.glob("*.safetensors"))
        if needed > memory_limit():
            have = f"{memory_limit() / 1e9:.1f} GB"
            raise MlxLmError(f"the weights twice over need {needed / 1e9:.1f} GB, this machine has {have} for them")

    def decode(self, case: Case, plain: Output, stop_ids: frozenset[int]) -> Output:
        """Its greedy output, as long as `plain`; past a stop token that `plain` ended with, one token more."""
        from mlx_lm.generate import generate_step

        stopped = plain.finish_reason == "stop"
        count = len(plain.tokens) + stopped
        steps = generate_step(mx.array(case.tokens), self._model, max_tokens=count)
        tokens = tuple(int(token) for token, _ in steps)
        if stopped and tokens[-1] in stop_ids:
            return Output(tokens[:-1], "stop")
        return Output(tokens, plain.finish_reason if not stopped else "length")
