"""A library that serves, in a process of its own, driven by JSON lines on stdin and stdout; see serve.py.

    python serving.py LIBRARY --target DIR [--drafter DIR] [--depth K]     LIBRARY: ours, ours-http, mlx-lm or mlx-vlm

Requests arrive at given times. Knows nothing of other arms, repeats or results.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the peers' environment need not have this project

from mlx_gemma_mtp.benchmark.arms import _Processor, about

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

    def serve(self, prompts: list[list[int]], new: int, arrivals: list[float], rows: int) -> dict[str, Any]:
        """One engine for all runs with the same number of rows."""
        if self._engine is None or rows != self._rows:
            if self._engine is not None:
                self._engine.shutdown()
            self._engine, self._rows = self._new_engine(self._runtime, max_batch=rows, depth=self._depth), rows
        marks, tokens, stats = asyncio.run(self._serve(self._engine, prompts, new, arrivals))
        rounds = sum(s.rounds for s in stats)
        return {
            "marks": marks,
            "tokens": tokens,
            "row_rounds": rounds,
            "tokens_per_forward": sum(s.tokens - s.prefills for s in stats) / max(rounds, 1),
            "drafted_per_round": sum(s.drafted for s in stats) / max(rounds, 1),
        }

    async def _serve(
        self, engine: Any, prompts: list[list[int]], new: int, arrivals: list[float]
    ) -> tuple[Marks, list[list[int]], list[Any]]:
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
    """mlx_gemma_mtp's server, read by a thread for each request; this process is the client."""

    def __init__(self, target: str, drafter: str | None, depth: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        command = [sys.executable, "-m", "mlx_gemma_mtp", "serve", "--model", target, "--drafter", str(drafter)]
        command += ["--dtype", "float32", "--depth", depth, "--port", str(self._port), "--name", "bench"]
        # The engine beside it has no prefix cache: repeated prompts would make the server look faster than it.
        command += ["--prefix-cache", "0"]
        self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        atexit.register(self._server.terminate)
        while self._server.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port)):
                return
            time.sleep(0.2)
        raise RuntimeError(f"the server has ended with status {self._server.returncode}")

    def serve(self, prompts: list[list[int]], new: int, arrivals: list[float], rows: int) -> dict[str, Any]:
        """As many streams of /v1/completions as there are prompts; `rows` is the server's own, 8."""
        marks: Marks = [[] for _ in prompts]
        begin = time.perf_counter()

        def one(i: int) -> int:
            time.sleep(max(begin + arrivals[i] - time.perf_counter(), 0))
            body = {"model": "bench", "prompt": prompts[i], "max_tokens": new, "stream": True, "temperature": 0}
            body |= {"ignore_eos": True, "stream_options": {"include_usage": True}}
            connection = http.client.HTTPConnection("127.0.0.1", self._port)
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            last = {}
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    marks[i].append((time.perf_counter() - begin, 1))
                    last = json.loads(line[6:])
            connection.close()
            return int(last["usage"]["completion_tokens"])

        with ThreadPoolExecutor(len(prompts)) as pool:
            counts = list(pool.map(one, range(len(prompts))))
        return {"marks": marks, "tokens": [[0] * n for n in counts]}


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
        say(about(("mlx", "mlx-lm", "mlx-vlm", "mlx-gemma-mtp", "transformers")))
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
