"""What `limits.py` measures in one process: ideal and achieved rounds, parts, memory, the host's share.

Knows nothing of processes, records or tables.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import common
import mlx.core as mx
import pairs
from common import Spread
from parts import Parts, counts

from mlx_gemma_mtp.cache import KVCache
from mlx_gemma_mtp.depth import FixedDepth
from mlx_gemma_mtp.loading import Loaded, load_pair
from mlx_gemma_mtp.prefix import PrefixCache
from mlx_gemma_mtp.request import Request
from mlx_gemma_mtp.scheduler import Scheduler
from mlx_gemma_mtp.speculative import Block
from mlx_gemma_mtp.stats import SpecStats

_LONGEST = 16  # tokens of a forward in one row; rounds' are at most 9
_NEW = 400
"""Tokens that a request decodes at most: its rows keep the capacity that they begin with."""
_SLOW = 0.1  # seconds from which on one sample of a part has to do
_WARM, _FEWEST = 3, 3  # rounds before the first sample; repeats, however long they take


class Decoding:
    """One batch at one depth, decoding through a scheduler, which lasts for as many samples as its rows have room."""

    def __init__(self, parts: Parts, prefixes: PrefixCache, prompts: list[list[int]], depth: int) -> None:
        self._parts, self._prefixes, self._prompts, self._depth = parts, prefixes, prompts, depth
        self._scheduler: Scheduler | None = None
        self._stats: list[SpecStats] = []
        self.tokens = self.rounds = 0

    def sample(self, rounds: int) -> float:
        """Seconds per round of `rounds` rounds of all rows."""
        scheduler = self._scheduler
        if scheduler is None or _NEW - max(s.tokens for s in self._stats) < (rounds + 4) * (self._depth + 1):
            scheduler = self._scheduler = self._begun()
        before, tokens, begin = self._count(), sum(s.tokens for s in self._stats), time.perf_counter()
        for _ in range(rounds):
            scheduler.step()
        spent = time.perf_counter() - begin
        done = self._count() - before
        self.tokens += sum(s.tokens for s in self._stats) - tokens
        self.rounds += done
        return spent * len(self._prompts) / done

    def _begun(self) -> Scheduler:
        config = self._parts.loaded.config
        scheduler = Scheduler(
            self._parts.speculator,
            vocab_size=config.vocab_size,
            max_positions=config.max_positions,
            depth=FixedDepth(self._depth),
            max_batch=len(self._prompts),
            prefix_cache=self._prefixes,
        )
        requests = [Request(prompt=tuple(p), max_tokens=_NEW, ignore_eos=True) for p in self._prompts]
        self._stats = [scheduler.add(request)[1] for request in requests]
        while scheduler.running < len(self._prompts) or scheduler.next_is_prefill:
            scheduler.step()
        for _ in range(_WARM):
            scheduler.step()
        return scheduler

    def _count(self) -> int:
        return sum(s.rounds for s in self._stats)


def configuration(parts: Parts, decoding: Decoding, rows: int, depth: int, args: Any, seconds: float) -> dict[str, Any]:
    """Ideal and achieved rounds of one batch at one depth, and what lies between them, sampled for so many seconds."""
    context = args.context

    def rounds() -> int:
        most: int = args.rounds
        return max(min(most, parts.count(parts.last["forward", rows, depth + 1, context])), 1)

    measures: dict[str, Callable[[], float]] = {
        "forward": lambda: parts.forward(rows, depth + 1, context),
        "step": lambda: parts.step(rows, context) if depth else 0.0,
        "achieved": lambda: decoding.sample(rounds()),
        "queued": lambda: parts.queued_round(rows, depth, context),
        "read": lambda: parts.read_round(rows, depth, context),
    }
    for measure in measures.values():
        measure()  # compiles
    samples: dict[str, list[float]] = {name: [] for name in measures}
    end = time.perf_counter() + seconds
    for repeat in range(args.repeats):
        if repeat >= _FEWEST and time.perf_counter() > end:
            break
        # There and back again: what gets slower or faster meanwhile does so for all of them.
        for name in list(measures)[:: -1 if repeat % 2 else 1]:
            samples[name].append(measures[name]())
    ideal = [f + depth * s for f, s in zip(samples["forward"], samples["step"], strict=True)]
    ratios = [i / a for i, a in zip(ideal, samples["achieved"], strict=True)]
    per_round = decoding.tokens / decoding.rounds
    return {
        "batch": rows,
        "depth": depth,
        "context": context,
        "repeats": len(ratios),
        "tokens_per_round": round(per_round, 4),
        "ideal_ms": _ms(ideal),
        "achieved_ms": _ms(samples["achieved"]),
        "ideal_tokens_per_second": round(rows * per_round / Spread.of(ideal).median, 2),
        "achieved_tokens_per_second": round(rows * per_round / Spread.of(samples["achieved"]).median, 2),
        "ratio": Spread.of(ratios).to_dict(),
        "ms": {name: _ms(values) for name, values in samples.items()},
        "rest_ms": {
            "round_beyond_parts": _gap(samples["queued"], ideal),
            "reading": _gap(samples["read"], samples["queued"]),
            "scheduler": _gap(samples["achieved"], samples["read"]),
        },
    }


def _ms(seconds: Sequence[float]) -> dict[str, float]:
    return Spread.of([1000 * s for s in seconds]).to_dict()


def _gap(more: Sequence[float], less: Sequence[float]) -> float:
    """Median difference in milliseconds: negative where rounds are launched before the last one is read."""
    return round(Spread.of([1000 * (a - b) for a, b in zip(more, less, strict=True)]).median, 4)


def part_costs(parts: Parts, args: Any) -> dict[str, Any]:
    """Milliseconds of each part by rows, by tokens of a block, and by context."""

    def best(measure: Any, *shape: int) -> dict[str, float]:
        first = measure(*shape)
        repeats = min(args.repeats, 3 if first < _SLOW else 1)
        return _ms([measure(*shape) for _ in range(repeats)])

    near = args.context
    return {
        "forward_by_rows": {n: best(parts.forward, n, 1, near) for n in counts(_LONGEST)},
        "forward_by_block": {n: best(parts.forward, 1, n, near) for n in range(1, _LONGEST + 1)},
        "forward_by_context": {
            c: {n: best(parts.forward, 1, n, c) for n in (1, 4)} for c in _reached(parts, args.contexts)
        },
        "step_by_rows": {n: best(parts.step, n, near) for n in counts(_LONGEST)},
        "step_by_context": {c: best(parts.step, 1, c) for c in _reached(parts, args.contexts)},
        "head_by_block": {n: best(parts.head, 1, n) for n in (1, 4, 8, 16)},
        "write_by_block": {n: best(parts.write, 1, n, near) for n in (1, 4, 8)},
        "write_of_8_rows": best(parts.write, 8, 4, near),
    }


def _reached(parts: Parts, contexts: Sequence[int]) -> list[int]:
    return [c for c in contexts if c + 64 <= parts.loaded.config.max_positions]


def memory(parts: Parts, args: Any) -> list[dict[str, Any]]:
    """Bytes at the peak of plain rounds and of rounds with 3 drafts, by context, beside what they need."""
    found = []
    for context in _reached(parts, args.contexts):
        for depth in (0, 3):
            gc.collect()
            mx.clear_cache()
            cache = parts.filled(1, context)
            held, kv = mx.get_active_memory(), cache.nbytes
            mx.reset_peak_memory()
            _some_rounds(parts, cache, depth)
            found.append(
                {"context": context, "depth": depth, "kv_bytes": kv, "held_bytes": held}
                | {"peak_bytes": mx.get_peak_memory()}
            )
    return found


def _some_rounds(parts: Parts, cache: KVCache, depth: int) -> None:
    block = Block.empty(1)
    for _ in range(4):
        block = parts.speculator.run_round(cache, block, [depth]).block


def host(args: Any) -> dict[str, float]:
    """Milliseconds for which Python builds a round's parts: 35 layers, so narrow that they cost nothing else."""
    with pairs.random_pair(pairs.SHAPE_35_LAYERS, window=64) as path:
        parts = Parts(load_pair(str(path), dtype="float32"), queue=args.queue, sample_s=args.sample)
        found = [parts.host(1, 4, args.context) for _ in range(min(args.repeats, 5))]
    return {
        "forward_35_layers_ms": round(1000 * Spread.of([f["forward"] for f in found]).median, 4),
        "drafter_step_ms": round(1000 * Spread.of([f["step"] for f in found]).median, 4),
    }


@contextmanager
def opened(name: str, args: Any) -> Iterator[tuple[Loaded, list[list[int]]]]:
    """A pair, and eight prompts for it of at most args.context tokens."""
    if name == "random":
        with pairs.random_pair(pairs.SHAPE_60M) as path:
            loaded, draw = load_pair(str(path), dtype="float32"), random.Random(7)
        vocab = loaded.config.vocab_size
        # Short ones: what a round costs doesn't depend on them, and here a prefill takes long.
        yield loaded, [[draw.randrange(5, vocab) for _ in range(min(args.context, 8))] for _ in range(8)]
        return
    pair = common.find_pair(None if name == "demo" else name, None)
    loaded = load_pair(str(pair.target), drafter=str(pair.drafter), dtype="float32")
    yield loaded, [p[-args.context :] for p in common.make_prompts(pair.target)[1]]


def measure(what: str, pair: str, args: Any) -> Iterator[dict[str, Any]]:
    """`ratios` or `parts` of a pair, or `host`, of none: all that there is so far, time and again."""
    if what == "host":
        yield {"host": host(args)}
        return
    with opened(pair, args) as (loaded, prompts):
        parts = Parts(loaded, queue=args.queue, sample_s=args.sample)
        if what == "parts":
            yield {"parts": part_costs(parts, args), "memory": memory(parts, args)}
            return
        shapes = [(batch, depth) for batch in args.batches for depth in args.depths]
        prefixes, rows = PrefixCache(parts.spec, 1 << 30), list[dict[str, Any]]()
        sizes = {"target": loaded.target.parameters, "drafter": _parameters(loaded)}
        for batch, depth in shapes:
            asked = [prompts[i % len(prompts)] for i in range(batch)]
            decoding = Decoding(parts, prefixes, asked, depth)
            rows.append(configuration(parts, decoding, batch, depth, args, args.seconds / len(shapes)))
            yield {"parameters": sizes, "configurations": rows}


def _parameters(loaded: Loaded) -> int:
    return 0 if loaded.drafter is None else loaded.drafter.parameters
