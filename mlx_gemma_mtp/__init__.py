"""Gemma 4 with its MTP drafters in MLX. Public names load lazily, so that importing this package is cheap."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .engine import Engine, EngineClosed, EngineStats, QueueFull
    from .generation import Generation
    from .handle import Handle, RequestFailed
    from .request import Request, SamplingParams, TokenEvent
    from .runtime import Runtime, load
    from .stats import SpecStats

_HOMES = {
    "Engine": "engine",
    "EngineClosed": "engine",
    "EngineStats": "engine",
    "Generation": "generation",
    "Handle": "handle",
    "QueueFull": "engine",
    "Request": "request",
    "RequestFailed": "handle",
    "Runtime": "runtime",
    "SamplingParams": "request",
    "SpecStats": "stats",
    "TokenEvent": "request",
    "load": "runtime",
}

__all__ = [
    "Engine",
    "EngineClosed",
    "EngineStats",
    "Generation",
    "Handle",
    "QueueFull",
    "Request",
    "RequestFailed",
    "Runtime",
    "SamplingParams",
    "SpecStats",
    "TokenEvent",
    "__version__",
    "load",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
