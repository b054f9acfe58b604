"""A library that serves, in a process of its own, driven by JSON lines on stdin and stdout; see serve.py.

    python serving.py LIBRARY --target DIR [--drafter DIR] [--depth K]     LIBRARY: ours, ours-http, mlx-lm or mlx-vlm

Requests arrive at given times. Knows nothing of other arms, repeats or results.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the peers' environment need not have this project

from mlx_gemma_mtp.benchmark.arms import _Processor, about
from mlx_gemma_mtp.benchmark.workers import Worker

Marks = list[list[tuple[float, int]]]
"""For each request: when tokens came, in seconds since the start, and how many."""


class Arm(Protocol):
    """A library with a pair in memory, in float32, that decodes greedily and ignores stop tokens."""

    def serve(self, prompts: list[list[int]], new: int, arrivals: list[float], rows: int) -> dict[str, Any]:
        """Serve prompts that arrive at `arrivals`, at most `rows` at a time: `marks`, `tokens`, and its own counts."""


class Ours:
    """mlx_gemma_mtp's engine, read with asyncio."""

    def __init__(self, target: str, drafter: str | None, depth: str) -> None:
        from mlx_gemma_mtp import Engine, load

        self._runtime = load(target, drafter=drafter, dtype="float32")
        self._runtime.text = None  # token ids alone, as the others get them
        self._depth: int | str = depth if depth == "auto" else int(depth)
        self._new_engine, self._rows = Engine, 0
        self._engine: Any = None

    def tune(self, seconds: float) -> str:
        """Measure what rounds cost, as the command does, unless `seconds` is 0; where the costs come from."""
        if seconds:
            left_out = self._runtime.tune(seconds=seconds).left_out
            return f"measured now, but (rows, context) {left_out}" if left_out else "measured now"
        return "read from a profile" if self._runtime.depth_memory.costs.stored else "learned while serving"

    def serve(self, prompts: list[list[int]], new: int, arrivals: list[float], rows: int) -> dict[str, Any]:
        """One engine for all runs with the same number of rows."""
        if self._engine is None or rows != self._rows:
            if self._engine is not None:
                self._engine.shutdown()
            self._engine, self._rows = self._new_engine(self._runtime, max_batch=rows, depth=self._depth), rows
        marks, tokens, stats = asyncio.run(read_engine(self._engine, prompts, new, arrivals))
        rounds = sum(s.rounds for s in stats)
        return {
            "marks": marks,
            "tokens": tokens,
            "row_rounds": rounds,
            "tokens_per_forward": sum(s.tokens - s.prefills for s in stats) / max(rounds, 1),
            "drafted_per_round": sum(s.drafted for s in stats) / max(rounds, 1),
        }


async def read_engine(
    engine: Any, prompts: list[list[int]], new: int, arrivals: list[float]
) -> tuple[Marks, list[list[int]], list[Any]]:
    """Submit prompts at their times and read all events: marks, tokens and counters."""
    from mlx_gemma_mtp import Request

    marks: Marks = [[] for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    begin = time.perf_counter()

    async def one(i: int) -> Any:
        await asyncio.sleep(max(begin + arrivals[i] - time.perf_counter(), 0))
        handle = engine.submit(Request(prompt=prompts[i], max_tokens=new, ignore_eos=True))
        async for event in handle:
            marks[i].append((time.perf_counter() - begin, len(event.tokens)))
            tokens[i] += event.tokens
        return handle.stats

    stats = await asyncio.gather(*(one(i) for i in range(len(prompts))))
    return marks, tokens, stats


class OursHttp:
    """mlx_gemma_mtp's engine, straight and through the server over it; streams.py, a process, is the client."""

    def __init__(self, target: str, drafter: str | None, depth: str) -> None:
        from mlx_gemma_mtp import load, serve_cli

        options = serve_cli.Options(port=0, names=["bench"], depth=depth if depth == "auto" else int(depth))
        runtime = load(target, drafter=drafter, dtype="float32")
        self._engine = serve_cli.open_engine(runtime, options)
        service = serve_cli.make_service(runtime, self._engine, options)
        bound = serve_cli.open_socket(options)
        self._port: int = bound.getsockname()[1]
        app = serve_cli.make_app(service, options)
        serve_cli.show_logs()
        self._loop: asyncio.AbstractEventLoop | None = None

        async def known(scope: Any, receive: Any, send: Any) -> None:
            self._loop = asyncio.get_running_loop()
            await app(scope, receive, send)

        server = serve_cli.make_server(service, known, options)
        threading.Thread(target=server.run, args=([bound],), daemon=True).start()
        self._client = Worker([sys.executable, str(Path(__file__).with_name("streams.py"))])
        atexit.register(self._client.close)
        self._turns = 0

    def serve(self, prompts: list[list[int]], new: int, arrivals: list[float], rows: int) -> dict[str, Any]:
        """Once in each way, in turn; `rows` is the server's own, 8.

        Of each way: `marks` and `tokens`; processor seconds of the server's thread (`loop_s`), of this whole process
        (`process_s`) and of the client; the engine's `steps`: requests that come one after the other take more.
        """
        ways = [("engine", self._straight), ("http", self._streamed)]
        self._turns += 1
        found = {}
        for name, way in ways[:: 1 if self._turns % 2 else -1]:
            steps, loop, process = self._engine.stats().steps, self._loop_seconds(), time.process_time()
            data = way(prompts, new, arrivals)
            process, loop = time.process_time() - process, self._loop_seconds() - loop
            spent = {"process_s": process, "loop_s": loop, "steps": self._engine.stats().steps - steps}
            found[name] = {"client_s": 0.0, **data, **spent}
        return found

    def _straight(self, prompts: list[list[int]], new: int, arrivals: list[float]) -> dict[str, Any]:
        marks, tokens, _ = asyncio.run(read_engine(self._engine, prompts, new, arrivals))
        return {"marks": marks, "tokens": tokens}

    def _streamed(self, prompts: list[list[int]], new: int, arrivals: list[float]) -> dict[str, Any]:
        body = {"model": "bench", "max_tokens": new, "stream": True, "temperature": 0, "ignore_eos": True}
        body |= {"stream_options": {"include_usage": True}}
        bodies = [body | {"prompt": prompt} for prompt in prompts]
        request = {"port": self._port, "path": "/v1/completions", "bodies": bodies, "arrivals": arrivals}
        found = self._client.ask(request)
        counts = [int(last["usage"]["completion_tokens"]) for last in found["last"]]
        marks = [[(at, 1) for at in times] for times in found["marks"]]
        return {"marks": marks, "tokens": [[0] * n for n in counts], "client_s": found["cpu_s"]}

    def _loop_seconds(self) -> float:
        """Processor time of the event loop's thread so far."""
        if self._loop is None:
            return 0.0

        async def now() -> float:
            return time.thread_time()

        return asyncio.run_coroutine_threadsafe(now(), self._loop).result()


class Generator(Protocol):
    """A peer's batch generator: `add` a request, `step` until none is left."""

    def add(self, prompt: list[int], new: int) -> int:
        """Returns its id."""

    def step(self) -> list[tuple[int, int]]:
        """(id, token) of every row that got one."""

    def close(self) -> None:
        """No more."""


def drive(generator: Generator, prompts: list[list[int]], new: int, arrivals: list[float]) -> dict[str, Any]:
    """Serve with a generator that is stepped from here."""
    marks: Marks = [[] for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    order: dict[int, int] = {}
    arrived = done = 0
    begin = time.perf_counter()
    while done < len(prompts):
        while arrived < len(prompts) and time.perf_counter() - begin >= arrivals[arrived]:
            order[generator.add(prompts[arrived], new)] = arrived
            arrived += 1
        if arrived == done:
            time.sleep(max(begin + arrivals[arrived] - time.perf_counter(), 0))
            continue
        for request, token in generator.step():
            row = order[request]
            marks[row].append((time.perf_counter() - begin, 1))
            tokens[row].append(token)
            done += len(tokens[row]) == new
    generator.close()
    mx.synchronize()
    return {"marks": marks, "tokens": tokens}


class MlxLm:
    """mlx-lm, plain."""

    def __init__(self, target: str, drafter: str | None, depth: str) -> None:
        from mlx_lm.utils import load_model

        self._model, _ = load_model(Path(target))
        self._model.set_dtype(mx.float32)

    def serve(self, prompts: list[list[int]], new: int, arrivals: list[float], rows: int) -> dict[str, Any]:
        """Through `BatchGenerator`."""
        from mlx_lm.generate import BatchGenerator

        inner = BatchGenerator(self._model, completion_batch_size=rows, prefill_batch_size=rows)

        class Adapter:
            def add(self, prompt: list[int], new: int) -> int:
                uid: int = inner.insert([prompt], [new])[0]
                return uid

            def step(self) -> list[tuple[int, int]]:
                return [(r.uid, int(r.token)) for r in inner.next()[1]]  # type: ignore[no-untyped-call]

            def close(self) -> None:
                inner.close()  # type: ignore[no-untyped-call]

        return drive(Adapter(), prompts, new, arrivals)


class MlxVlm:
    """mlx-vlm, plain (depth 0) or with its drafter at a block of depth + 1."""

    def __init__(self, target: str, drafter: str | None, depth: str) -> None:
        from mlx_vlm.utils import load_model

        self._model, self._options = load_model(Path(target)), dict[str, Any]()
        self._model.set_dtype(mx.float32)
        if int(depth):
            from mlx_vlm.speculative.drafters import load_drafter

            found = load_drafter(drafter, kind="mtp")
            drafter_model = found[0] if isinstance(found, tuple) else found
            drafter_model.set_dtype(mx.float32)
            self._options = {"draft_model": drafter_model, "draft_kind": "mtp", "draft_block_size": int(depth) + 1}

    def serve(self, prompts: list[list[int]], new: int, arrivals: list[float], rows: int) -> dict[str, Any]:
        """Through `BatchGenerator`."""
        from mlx_vlm.generate.ar import BatchGenerator

        model = self._model
        inner = BatchGenerator(
            model.language_model,
            _Processor(),
            prefill_batch_size=rows,
            completion_batch_size=rows,
            compute_logprobs=False,
            **self._options,
        )

        class Adapter:
            def add(self, prompt: list[int], new: int) -> int:
                embedded = model.get_input_embeddings(mx.array([prompt]), None).to_dict()
                inputs = [{k: v for k, v in embedded.items() if v is not None}]
                uid: int = inner.insert([prompt], new, prompt_kwargs=inputs)[0]
                return uid

            def step(self) -> list[tuple[int, int]]:
                return [(r.uid, int(r.token)) for r in inner.next()[1] if r.token is not None]

            def close(self) -> None:
                inner.close()

        return drive(Adapter(), prompts, new, arrivals)


LIBRARIES: dict[str, Callable[[str, str | None, str], Arm]]
LIBRARIES = {"ours": Ours, "ours-http": OursHttp, "mlx-lm": MlxLm, "mlx-vlm": MlxVlm}


def answer(arm: Arm, request: dict[str, Any]) -> dict[str, Any]:
    """Serve once, and add the processor time it took."""
    cpu = time.process_time()
    found = arm.serve(request["prompts"], request["new"], request["arrivals"], request["rows"])
    return {**found, "cpu_s": time.process_time() - cpu}


def main(argv: Sequence[str] | None = None) -> None:
    """Load, say what it runs on, then answer one JSON line with another until stdin ends."""
    parser = argparse.ArgumentParser(description="A library that serves; see the module.")
    parser.add_argument("library", choices=list(LIBRARIES))
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter")
    parser.add_argument("--depth", default="0")
    parser.add_argument("--tune-seconds", type=float, default=0.0)
    args = parser.parse_args(argv)
    # The driver ends workers so; a server of this one's has to end, too.
    signal.signal(signal.SIGTERM, _exit)
    # What libraries print must not end up among the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(data: dict[str, Any]) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    try:
        arm = LIBRARIES[args.library](args.target, args.drafter, args.depth)
        costs = arm.tune(args.tune_seconds) if isinstance(arm, Ours) else ""
        say({"costs": costs} | about(("mlx", "mlx-lm", "mlx-vlm", "mlx-gemma-mtp", "transformers")))
    except Exception:
        say({"error": traceback.format_exc()})
        return
    for line in sys.stdin:
        try:
            say(answer(arm, json.loads(line)))
        except Exception:
            say({"error": traceback.format_exc()})


def _exit(*_: object) -> None:
    sys.exit()


if __name__ == "__main__":
    main()
