"""One arm of a benchmark: a library that decodes, in a process of its own, driven by JSON lines on stdin and stdout.

    python arms.py LIBRARY --target DIR [--drafter DIR] [--depth K] [--dtype float32]     ours, mlx-lm or mlx-vlm

Knows nothing of other arms, repeats or results. A script that imports the library it runs and nothing else of this
project, so that it works in any environment that has that library.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
Events = Iterator[list[tuple[int, list[int]]]]
"""What came, as it came: (row, new tokens) of every row that got some."""
Counts = tuple[int, float, int]
"""Rounds, accepted drafts and drafts offered, since the process began."""


class Arm(Protocol):
    """A library with a pair in memory that decodes greedily and ignores stop tokens."""

    def one(self, prompt: list[int], new: int) -> Events:
        """Decode one prompt."""

    def batch(self, prompts: list[list[int]], new: int) -> Events:
        """Decode all prompts together."""

    def counts(self) -> Counts:
        """Rounds, accepted drafts and drafts so far."""

    def drain(self) -> None:
        """Wait for what the library still computes after its last token."""

    @property
    def prefill_s(self) -> float | None:
        """The library's own clock of the last prefill, where tokens come all at once; else None."""


class Ours:
    """mlx_gemma_mtp; depth 0 is plain decoding. A request may name another `depth`, or "auto"."""

    def __init__(self, target: str, drafter: str | None, depth: int, dtype: str) -> None:
        from mlx_gemma_mtp.runtime import load

        self._runtime = load(target, drafter=drafter, dtype=dtype)
        self._runtime.text = None  # token ids alone, as the others get them
        self.depth: int | str = depth
        self.by_position: list[list[int]] = []  # accepted and drafted by the last generation
        self._counts: Counts = (0, 0.0, 0)
        self.prefill_s: float | None = None

    def one(self, prompt: list[int], new: int) -> Events:
        """Through `stream`."""
        stats = self.prefill_s = None
        for step in self._runtime.stream(prompt, max_tokens=new, depth=self.depth, ignore_eos=True):
            stats = step.stats
            yield [(0, list(step.tokens))]
        self._add([] if stats is None else [stats])

    def batch(self, prompts: list[list[int]], new: int) -> Events:
        """Through `generate_batch`, which gives all tokens at once and tells the time of its prefill."""
        outputs = self._runtime.generate_batch(prompts, max_tokens=new, depth=self.depth, ignore_eos=True)
        self._add([o.stats for o in outputs])
        self.prefill_s = outputs[0].timing.prefill_seconds
        yield [(row, output.tokens) for row, output in enumerate(outputs)]

    def counts(self) -> Counts:
        """Per row and round."""
        return self._counts

    def drain(self) -> None:
        """Nothing runs on."""
        mx.synchronize()

    def margin(self, tokens: list[int], a: int, b: int) -> float:
        """By how much the logit of `a` exceeds that of `b` after `tokens`."""
        last = self._runtime.logits(tokens)[-1]
        gap: float = (last[a] - last[b]).item()  # type: ignore[assignment]
        return gap

    def _add(self, stats: Sequence[Any]) -> None:
        counters = [s.accepted_per_position for s in stats], [s.drafted_per_position for s in stats]
        self.by_position = [[sum(p) for p in zip_longest(*rows, fillvalue=0)] for rows in counters]
        rounds, accepted, drafted = self._counts
        self._counts = (
            rounds + sum(s.rounds for s in stats),
            accepted + sum(s.accepted for s in stats),
            drafted + sum(s.drafted for s in stats),
        )


class MlxLm:
    """mlx-lm, plain."""

    prefill_s = None

    def __init__(self, target: str, drafter: str | None, depth: int, dtype: str) -> None:
        from mlx_lm.generate import generation_stream
        from mlx_lm.utils import load_model

        self._model, _ = load_model(Path(target))
        self._model.set_dtype(DTYPES[dtype])
        self._stream = generation_stream

    def one(self, prompt: list[int], new: int) -> Events:
        """Through `generate_step`."""
        from mlx_lm.generate import generate_step

        for token, _ in generate_step(mx.array(prompt), self._model, max_tokens=new):
            yield [(0, [int(token)])]

    def batch(self, prompts: list[list[int]], new: int) -> Events:
        """Through `BatchGenerator`."""
        from mlx_lm.generate import BatchGenerator

        rows = len(prompts)
        generator = BatchGenerator(self._model, completion_batch_size=rows, prefill_batch_size=rows)
        order = {uid: row for row, uid in enumerate(generator.insert(prompts, [new] * rows))}
        left = rows
        while left:
            responses = generator.next()[1]  # type: ignore[no-untyped-call]
            left -= sum(r.finish_reason is not None for r in responses)
            yield [(order[r.uid], [int(r.token)]) for r in responses]
        generator.close()  # type: ignore[no-untyped-call]

    def counts(self) -> Counts:
        """No drafts."""
        return (0, 0.0, 0)

    def drain(self) -> None:
        """It computes one token ahead."""
        mx.synchronize(self._stream)
        mx.synchronize()


class _NeverStop:
    """Stands in for the tokenizer's stop tokens."""

    def __call__(self, token: int) -> bool:
        return False

    def add_eos_token_ids(self, *_: object) -> None:
        """Ignore them."""


class _Tokenizer:
    stopping_criteria = _NeverStop()


class _Processor:
    tokenizer = _Tokenizer()


class MlxVlm:
    """mlx-vlm, plain (depth 0) or with its drafter at a block of depth + 1."""

    prefill_s = None

    def __init__(self, target: str, drafter: str | None, depth: int, dtype: str) -> None:
        from mlx_vlm.generate.ar import generation_stream
        from mlx_vlm.utils import load_model

        self._model = load_model(Path(target))
        self._model.set_dtype(DTYPES[dtype])
        self._stream, self._drafter, self._options = generation_stream, None, dict[str, Any]()
        if depth:
            from mlx_vlm.speculative.drafters import load_drafter

            found = load_drafter(drafter, kind="mtp")
            self._drafter = found[0] if isinstance(found, tuple) else found
            self._drafter.set_dtype(DTYPES[dtype])
            self._options = {"draft_model": self._drafter, "draft_kind": "mtp", "draft_block_size": depth + 1}

    def one(self, prompt: list[int], new: int) -> Events:
        """Through `generate_step`."""
        from mlx_vlm.generate.ar import generate_step

        ids = mx.array([prompt])
        for token, _ in generate_step(ids, self._model, None, None, max_tokens=new, temperature=0.0, **self._options):
            yield [(0, [int(token)])]

    def batch(self, prompts: list[list[int]], new: int) -> Events:
        """Through `BatchGenerator`."""
        from mlx_vlm.generate.ar import BatchGenerator

        rows = len(prompts)
        generator = BatchGenerator(
            self._model.language_model,
            _Processor(),
            prefill_batch_size=rows,
            completion_batch_size=rows,
            compute_logprobs=False,
            **self._options,
        )
        inputs = []
        for prompt in prompts:
            embedded = self._model.get_input_embeddings(mx.array([prompt]), None).to_dict()
            inputs.append({k: v for k, v in embedded.items() if v is not None})
        order = {uid: row for row, uid in enumerate(generator.insert(prompts, new, prompt_kwargs=inputs))}
        while generator.has_work:
            yield [(order[r.uid], [int(r.token)]) for r in generator.next()[1] if r.token is not None]
        generator.close()

    def counts(self) -> Counts:
        """Its own counters: in a batch, a round's accepted drafts are the mean of the rows."""
        found = {} if self._drafter is None else vars(self._drafter)
        rounds, accepted, drafted = (found.get(f"speculative_total_{n}", 0) for n in ("rounds", "accepted", "drafted"))
        return int(rounds), float(accepted), int(drafted)

    def drain(self) -> None:
        """It computes one token ahead."""
        mx.synchronize(self._stream)
        mx.synchronize()


LIBRARIES: dict[str, Callable[[str, str | None, int, str], Arm]]
LIBRARIES = {"ours": Ours, "mlx-lm": MlxLm, "mlx-vlm": MlxVlm}


def collect(arm: Arm, events: Events, rows: int, new: int) -> dict[str, Any]:
    """Run one generation: `prefill_s` until every row has its first token, `wall_s` until the last row's last."""
    mx.reset_peak_memory()
    before, cpu, begin = arm.counts(), time.process_time(), time.perf_counter()
    tokens: list[list[int]] = [[] for _ in range(rows)]
    prefill_s, early, now = 0.0, 0, begin
    for event in events:
        now = time.perf_counter()
        for row, ids in event:
            tokens[row] += ids
        if not early and all(tokens):
            prefill_s, early = now - begin, sum(map(len, tokens))
        if all(len(t) >= new for t in tokens):
            break
    wall_s = now - begin
    cpu_s = time.process_time() - cpu
    for _ in events:  # a generator counts and closes behind its last token
        pass
    if arm.prefill_s is not None:
        prefill_s, early = arm.prefill_s, rows
    arm.drain()
    rounds, accepted, drafted = (a - b for a, b in zip(arm.counts(), before, strict=True))
    return {
        "wall_s": wall_s,
        "prefill_s": prefill_s,
        "cpu_s": cpu_s,
        "decode_tokens": sum(map(len, tokens)) - early,
        "tokens": tokens,
        "rounds": rounds,
        "accepted": accepted,
        "drafted": drafted,
        "peak_bytes": mx.get_peak_memory(),
        "by_position": arm.by_position if isinstance(arm, Ours) else [],
    }


def answer(arm: Arm, request: dict[str, Any]) -> dict[str, Any]:
    """Do what a request asks: `one` (each prompt by itself), `batch` or `margin`."""
    if request["op"] == "margin":
        assert isinstance(arm, Ours)
        return {"margin": arm.margin(request["tokens"], request["a"], request["b"])}
    prompts, new = request["prompts"], request["new"]
    if isinstance(arm, Ours) and "depth" in request:
        arm.depth = request["depth"]
    if request["op"] == "batch":
        return {"parts": [collect(arm, arm.batch(prompts, new), len(prompts), new)]}
    return {"parts": [collect(arm, arm.one(p, new), 1, new) for p in prompts]}


def about(packages: Iterable[str]) -> dict[str, Any]:
    """What this process runs on."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    maps = Path("/proc/self/maps")
    openblas = os.environ.get("LD_PRELOAD", "") if maps.exists() else ""
    return {
        "versions": found,
        "device": str(mx.default_device()),
        "preloaded": openblas if openblas and os.path.realpath(openblas) in maps.read_text() else None,
    }


def main() -> None:
    """Load, say "ready", then answer one JSON line with another until stdin ends."""
    parser = argparse.ArgumentParser(description="One arm of a benchmark; see the module.")
    parser.add_argument("library", choices=list(LIBRARIES))
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter")
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    args = parser.parse_args()
    # What libraries print must not end up among the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(data: dict[str, Any]) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    try:
        arm = LIBRARIES[args.library](args.target, args.drafter, args.depth, args.dtype)
        say(about(("mlx", "mlx-lm", "mlx-vlm", "mlx-gemma-mtp", "transformers")))
    except Exception:
        say({"error": traceback.format_exc()})
        return
    for line in sys.stdin:
        try:
            say(answer(arm, json.loads(line)))
        except Exception:
            say({"error": traceback.format_exc()})


if __name__ == "__main__":
    main()
