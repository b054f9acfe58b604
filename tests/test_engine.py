"""The engine: many callers, one thread; who fails, leaves or reads slowly costs nobody else anything."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_gemma_mtp import (
    Engine,
    EngineClosed,
    Handle,
    QueueFull,
    Request,
    RequestFailed,
    Runtime,
    SamplingParams,
    TokenEvent,
    load,
)
from mlx_gemma_mtp.adaptive import parse_depth
from mlx_gemma_mtp.cache import KVCache
from mlx_gemma_mtp.depth import FixedDepth
from mlx_gemma_mtp.request import ConstraintError
from mlx_gemma_mtp.scheduler import Scheduler
from mlx_gemma_mtp.speculative import Flight, Round, Speculator

from .fakes import VOCAB, expected, fake_speculator

WAIT = 150.0
"""Seconds after which a test has failed; none takes as long."""


class Gate:
    """Lets the engine's thread do a number of steps, or any, and counts them. An exception in `failures` is raised."""

    def __init__(self) -> None:
        self.steps, self.looks, self.failures = 0, 0, list[Exception]()
        self._allowed = threading.Semaphore(0)
        self._open = True

    def close(self) -> None:
        self._open = False

    def open(self) -> None:
        self._open = True
        self._allowed.release()

    def allow(self, steps: int) -> None:
        for _ in range(steps):
            self._allowed.release()

    def __call__(self) -> None:
        if not self._open:
            assert self._allowed.acquire(timeout=WAIT)
        self.steps += 1
        if self.failures:
            raise self.failures.pop()


class GatedScheduler(Scheduler):
    gate: Gate

    @property
    def busy(self) -> bool:
        self.gate.looks += 1
        return super().busy

    def step(self) -> list[TokenEvent]:
        self.gate()
        return super().step()


class Models:
    """The fakes as an engine sees a runtime."""

    text = None
    stop_ids: frozenset[int] = frozenset()

    def __init__(self, constrain: Callable[[Request], Any] = lambda _: None) -> None:
        self.gate, self.claims, self.made = Gate(), 0, weakref.WeakSet[Scheduler]()
        self._constrain = constrain

    def bitwise(self) -> tuple[bool | None, tuple[str, ...]]:
        return True, ()

    @contextmanager
    def serving(self, *, depth: int | str, **options: Any) -> Iterator[Scheduler]:
        assert self.claims == 0
        self.claims += 1
        try:
            policy = parse_depth(depth) if isinstance(depth, int) else FixedDepth(3)
            made = GatedScheduler(
                fake_speculator(),
                vocab_size=VOCAB,
                max_positions=10_000,
                depth=policy,
                constrain=self._constrain,
                **options,
            )
            made.gate = self.gate
            self.made.add(made)
            yield made
        finally:
            self.claims -= 1


@pytest.fixture
def models() -> Iterator[Models]:
    made = Models()
    yield made
    assert made.claims == 0, "an engine has ended without giving its models back"


def prompt_of(seed: int) -> list[int]:
    return [(seed * 7 + i * i) % VOCAB for i in range(1 + seed % 13)]


def ask(seed: int, count: int = 20, **options: Any) -> Request:
    return Request(prompt=prompt_of(seed), max_tokens=count, **options)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "it doesn't come about"
        time.sleep(0.002)


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [t for e in events for t in e.tokens]


# --- reading ---------------------------------------------------------------------------------------------------------


def test_requests_of_many_threads_get_their_own_tokens(models: Models) -> None:
    with Engine(models, max_batch=4) as engine, ThreadPoolExecutor(12) as pool:

        def one(seed: int) -> bool:
            handle = engine.submit(ask(seed, 1 + seed % 40))
            read = tokens_of(list(handle)) if seed % 2 else handle.result(WAIT).tokens
            return read == expected(prompt_of(seed), 1 + seed % 40)

        assert all(pool.map(one, range(60)))
        stats = engine.stats()
    assert stats.ended == {"length": 60}
    assert (stats.running, stats.waiting, stats.kv_bytes, stats.failed_steps) == (0, 0, 0, 0)
    assert stats.spec.tokens == sum(1 + seed % 40 for seed in range(60))


def test_event_loops_read_without_blocking_each_other(models: Models) -> None:
    async def one(engine: Engine, seed: int) -> bool:
        handle = engine.submit(ask(seed, 30))
        if seed % 2:
            return (await handle.aresult()).tokens == expected(prompt_of(seed), 30)
        events = [event async for event in handle]
        assert [e.finish_reason for e in events[:-1]] == [None] * (len(events) - 1)
        assert {e.request_id for e in events} == {handle.id}
        return tokens_of(events) == expected(prompt_of(seed), 30)

    async def several(engine: Engine) -> list[bool]:
        return await asyncio.gather(*(one(engine, seed) for seed in range(12)))

    with Engine(models) as engine, ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: asyncio.run(several(engine)), range(3)):
            assert all(found)


def test_a_result_can_be_had_during_and_after_reading_and_again(models: Models) -> None:
    with Engine(models) as engine:
        handle = engine.submit(ask(3))
        events = iter(handle)
        first = next(events)
        result = handle.result(WAIT)
        assert result.tokens[: len(first.tokens)] == list(first.tokens)
        assert result.tokens == expected(prompt_of(3), 20) == handle.result(0).tokens
        assert result.stats is handle.stats
        assert (result.finish_reason, result.contract, result.logprobs) == ("length", "exact", None)
        assert list(events) == list(handle) == []
        assert result.timing.decode_tokens == 19


def test_a_result_that_isnt_there_in_time_goes_on(models: Models) -> None:
    models.gate.close()
    with Engine(models) as engine:
        handle = engine.submit(ask(1))
        with pytest.raises(TimeoutError, match="request 0 has not ended"):
            handle.result(0.01)
        models.gate.open()
        assert handle.result(WAIT).finish_reason == "length"


def test_giving_up_awaiting_a_result_doesnt_cancel_it(models: Models) -> None:
    models.gate.close()

    async def impatient(handle: Handle) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(handle.aresult(), 0.01)
        models.gate.open()
        assert (await handle.aresult()).finish_reason == "length"

    with Engine(models) as engine:
        asyncio.run(impatient(engine.submit(ask(1))))


# --- leaving ---------------------------------------------------------------------------------------------------------


def test_cancel_ends_one_request_within_a_step(models: Models) -> None:
    with Engine(models) as engine:
        stays, leaves = engine.submit(ask(1, 200)), engine.submit(ask(2, 9_000))
        next(iter_ := iter(leaves))
        for _ in range(3):
            leaves.cancel()
        events = list(iter_)
        assert events[-1].finish_reason == "cancelled"
        assert events[-1].tokens == ()
        result = leaves.result(0)
        assert result.finish_reason == "cancelled"
        assert result.tokens == expected(prompt_of(2), 9_000)[: len(result.tokens)]
        assert len(result.tokens) == leaves.stats.tokens
        assert stays.result(WAIT).tokens == expected(prompt_of(1), 200)
        leaves.cancel()
        assert leaves.result(0).finish_reason == "cancelled"


def test_a_waiting_request_is_cancelled_too(models: Models) -> None:
    with Engine(models, max_batch=1) as engine:
        running, waiting = engine.submit(ask(1, 50)), engine.submit(ask(2, 9_000))
        waiting.cancel()
        assert waiting.result(WAIT).tokens == []
        assert running.result(WAIT).finish_reason == "length"


def dropped_handle(engine: Engine) -> None:
    engine.submit(ask(1, 9_000))


def closed_iterator(engine: Engine) -> Handle:
    handle = engine.submit(ask(1, 9_000))
    for _ in handle:
        break
    return handle


def closed_async_iterator(engine: Engine) -> Handle:
    async def read() -> Handle:
        handle = engine.submit(ask(1, 9_000))
        async for _ in handle:
            break
        return handle

    return asyncio.run(read())


def cancelled_task(engine: Engine) -> None:
    async def read() -> list[TokenEvent]:
        return [event async for event in engine.submit(ask(1, 9_000))]

    async def cancel() -> None:
        task = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())


@pytest.mark.parametrize("leave", [dropped_handle, closed_iterator, closed_async_iterator, cancelled_task])
def test_whoever_stops_reading_cancels(models: Models, leave: Callable[[Engine], Handle | None]) -> None:
    with Engine(models) as engine:
        kept = leave(engine)
        until(lambda: engine.stats().ended == {"cancelled": 1})
        assert engine.stats().running == 0
        assert kept is None or kept.result(0).finish_reason == "cancelled"


def test_what_is_over_is_kept_by_nobody(models: Models) -> None:
    with Engine(models) as engine:
        request = ask(1)
        seen = weakref.ref(request)
        handle = engine.submit(request)
        handle.result(WAIT)
        stream = weakref.ref(handle._stream)
        del handle, request
        until(lambda: (gc.collect(), seen() is None and stream() is None)[1])


# --- slow readers ----------------------------------------------------------------------------------------------------


def test_a_slow_reader_pauses_its_own_row_only(models: Models) -> None:
    with Engine(models, max_batch=2, buffer=10) as engine:
        slow = engine.submit(ask(1, 400))
        events = iter(slow)
        read = list(next(events).tokens)
        until(lambda: engine.stats().paused == 1)
        assert slow.stats.tokens - len(read) <= 10 + 9
        # Two rows' worth of others get through beside it: it holds no row.
        others = [engine.submit(ask(seed, 30)) for seed in (2, 3, 4)]
        assert [h.result(WAIT).tokens for h in others] == [expected(prompt_of(seed), 30) for seed in (2, 3, 4)]
        assert engine.stats().paused == 1
        read += tokens_of(list(events))
        assert read == expected(prompt_of(1), 400)
        assert slow.result(0).finish_reason == "length"


def test_a_paused_request_can_be_cancelled(models: Models) -> None:
    with Engine(models, buffer=5) as engine:
        slow = engine.submit(ask(1, 400))
        events = iter(slow)
        next(events)
        until(lambda: engine.stats().paused == 1)
        slow.cancel()
        assert list(events)[-1].finish_reason == "cancelled"
        assert engine.stats().paused == 0


def test_a_row_that_ends_while_it_is_being_paused_just_ends(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its last token is in the round that is on its way when its buffer is full.
    prompt = next(p for p in map(prompt_of, range(200)) if expected(p, 6)[5] not in expected(p, 5))
    wanted = expected(prompt, 6)
    reached, read = threading.Event(), threading.Event()
    pause = Scheduler.pause

    def slowly(self: Scheduler, request_id: int) -> bool:
        done = pause(self, request_id)
        reached.set()
        assert read.wait(WAIT)
        return done

    monkeypatch.setattr(GatedScheduler, "pause", slowly)
    with Engine(models, depth=0, buffer=4) as engine:
        request = Request(prompt=prompt, max_tokens=100, stop_ids=frozenset(wanted[5:]))
        handle = engine.submit(request)
        handle._stream.streamed = True
        assert reached.wait(WAIT)
        events = iter(handle)
        got = [next(events) for _ in range(4)]
        read.set()
        got += events
        assert tokens_of(got) == wanted[:5]
        assert got[-1].finish_reason == "stop"
        assert engine.stats().paused == 0
        assert engine.submit(ask(5)).result(WAIT).finish_reason == "length"


def test_an_output_that_nobody_iterates_over_is_computed_to_its_end(models: Models) -> None:
    with Engine(models, buffer=5) as engine:
        handle = engine.submit(ask(1, 400))
        until(lambda: engine.stats().ended == {"length": 1})
        assert handle.result(0).tokens == expected(prompt_of(1), 400)


def test_draining_doesnt_wait_for_slow_readers(models: Models) -> None:
    engine = Engine(models, buffer=5)
    slow = engine.submit(ask(1, 400))
    events = iter(slow)
    read = list(next(events).tokens)
    until(lambda: engine.stats().paused == 1)
    assert engine.shutdown()
    assert read + tokens_of(list(events)) == expected(prompt_of(1), 400)


def test_no_more_than_max_waiting_wait(models: Models) -> None:
    models.gate.close()
    with Engine(models, max_batch=2, max_waiting=1) as engine:
        handles = [engine.submit(ask(seed)) for seed in range(3)]
        with pytest.raises(QueueFull, match="3 requests are in the engine") as caught:
            engine.submit(ask(4))
        assert caught.value.retry_after > 0
        models.gate.open()
        assert handles[0].result(WAIT).finish_reason == "length"
        until(lambda: not engine.stats().waiting)
        assert engine.submit(ask(4)).result(WAIT).tokens == expected(prompt_of(4), 20)


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (ask(1, 10_000), r"2 \+ 10000 tokens, expected at most 10000"),
        (Request(prompt=[VOCAB]), f"token id {VOCAB}"),
        (ask(1, depth=9), "depth is 9"),
        (ask(1, sampling=SamplingParams(constraint="a")), "nothing here can honour it"),
        (ask(1, stop=("x",)), "this checkpoint has no tokenizer"),
    ],
)
def test_what_cant_be_run_is_refused_at_once(models: Models, request_: Request, said: str) -> None:
    with Engine(models, max_waiting=0, max_batch=1) as engine:
        with pytest.raises(ValueError, match=said):
            engine.submit(request_)
        assert engine.submit(ask(1)).result(WAIT).finish_reason == "length"


def test_a_request_that_can_never_fit_is_refused_with_both_numbers(models: Models) -> None:
    with Engine(models, kv_budget=20_000) as engine:
        with pytest.raises(ValueError, match=r"need \d+ bytes of K/V, expected at most kv_budget = 20000"):
            engine.submit(ask(1, 9_000))
        assert engine.stats().kv_budget == 20_000


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"buffer": 0}, {"max_waiting": -1}, {"depth": 9}])
def test_bad_options_are_refused_and_the_models_given_back(models: Models, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is"):
        Engine(models, **options)


@pytest.mark.parametrize("failure", [RuntimeError("[malloc] Unable to allocate"), MemoryError("all gone"), KeyError(1)])
def test_a_failed_step_ends_its_rows_and_nothing_else(models: Models, failure: Exception) -> None:
    models.gate.close()
    with Engine(models, max_batch=2) as engine:
        rows = [engine.submit(ask(seed, 500)) for seed in (1, 2)]
        waiting = engine.submit(ask(3, 30))
        models.gate.allow(4)
        until(lambda: models.gate.steps == 4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GatedScheduler, "_round", _failing(failure))
            models.gate.allow(1)
            until(lambda: engine.stats().failed_steps == 1)
        models.gate.open()
        for seed, handle in zip((1, 2), rows, strict=True):
            with pytest.raises(RequestFailed, match=type(failure).__name__) as caught:
                handle.result(WAIT)
            got = caught.value.generation
            assert got.finish_reason == "error"
            assert got.error == str(caught.value)
            assert got.tokens == expected(prompt_of(seed), 500)[: len(got.tokens)] != []
        assert waiting.result(WAIT).tokens == expected(prompt_of(3), 30)
        assert engine.submit(ask(5)).result(WAIT).tokens == expected(prompt_of(5), 20)
        assert engine.stats().ended == {"error": 2, "length": 2}
        assert engine.stats().kv_bytes == 0


def _failing(failure: Exception) -> Callable[[Scheduler], list[TokenEvent]]:
    def fail(self: Scheduler) -> list[TokenEvent]:
        self._batch_at_risk = True
        raise failure

    return fail


@pytest.mark.parametrize("doing", ["pause", "cancel"])
def test_the_round_on_its_way_may_fail_when_a_row_is_paused_or_cancelled(
    models: Models, monkeypatch: pytest.MonkeyPatch, doing: str
) -> None:
    does = {"pause": Scheduler.pause, "cancel": Scheduler.cancel}[doing]

    def lose(self: Speculator, flight: Flight, cache: KVCache) -> Round:
        raise RuntimeError("lost the device")

    def failing(self: Scheduler, request_id: int) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Speculator, "land", lose)
            return does(self, request_id)

    monkeypatch.setattr(GatedScheduler, doing, failing)
    models.gate.close()
    with Engine(models, max_batch=2, depth=0, buffer=5) as engine:
        rows = [engine.submit(ask(seed, 500)) for seed in (1, 2)]
        waiting = engine.submit(ask(3, 30))
        models.gate.allow(4)
        until(lambda: models.gate.steps == 4)
        if doing == "pause":
            rows[0]._stream.streamed = True
        else:
            rows[0].cancel()
        models.gate.open()
        until(lambda: engine.stats().failed_steps == 1)
        for handle in rows:
            with pytest.raises(RequestFailed, match="lost the device"):
                handle.result(WAIT)
        assert waiting.result(WAIT).tokens == expected(prompt_of(3), 30)
        assert engine.stats().kv_bytes == 0


def test_failing_without_an_end_ends_everything_that_is_there(models: Models) -> None:
    models.gate.close()
    with Engine(models, max_batch=1) as engine:
        handles = [engine.submit(ask(seed)) for seed in range(3)]
        until(lambda: engine.stats().waiting == 3)
        models.gate.failures.append(RuntimeError("lost the device"))
        models.gate.open()
        events = [list(h)[-1] for h in handles]
        assert [e.error for e in events] == ["a step failed: RuntimeError: lost the device"] * 3
        assert engine.submit(ask(5)).result(WAIT).finish_reason == "length"


class Faulty:
    """A constraint that allows everything, a few times."""

    def __init__(self, times: int) -> None:
        self._times = times

    def masks(self, drafts: list[int]) -> np.ndarray[Any, np.dtype[np.uint32]]:
        self._times -= 1
        if self._times < 0:
            raise ConstraintError("the grammar is stuck")
        return np.full((len(drafts) + 1, 1), 0xFFFFFFFF, np.uint32)

    def advance(self, tokens: list[int]) -> None:
        pass


def test_a_constraint_that_fails_ends_its_own_request(request: pytest.FixtureRequest) -> None:
    models = Models(lambda r: Faulty(3) if r.sampling.constraint else None)
    with Engine(models) as engine:
        other = engine.submit(ask(1, 100))
        faulty = engine.submit(ask(2, 100, sampling=SamplingParams(constraint="x")))
        with pytest.raises(RequestFailed, match="the grammar is stuck"):
            faulty.result(WAIT)
        assert other.result(WAIT).tokens == expected(prompt_of(1), 100)
        assert engine.stats().failed_steps == 0


# --- the end ---------------------------------------------------------------------------------------------------------


def test_shutdown_drains_and_refuses_what_comes_later(models: Models) -> None:
    engine = Engine(models, max_batch=2)
    handles = [engine.submit(ask(seed, 40)) for seed in range(6)]
    assert engine.shutdown()
    assert [h.result(0).tokens for h in handles] == [expected(prompt_of(seed), 40) for seed in range(6)]
    with pytest.raises(EngineClosed):
        engine.submit(ask(1))
    assert engine.shutdown(), "again"
    assert engine.stats().ended == {"length": 6}
    assert models.claims == 0


@pytest.mark.parametrize("options", [{"drain": False}, {"drain": True, "timeout": 0.0}])
def test_shutdown_in_the_middle_of_a_prefill_cancels_everything(models: Models, options: dict[str, Any]) -> None:
    models.gate.close()
    engine = Engine(models, prefill_budget=100)
    handles = [engine.submit(Request(prompt=[seed] * 2_000, max_tokens=10)) for seed in range(3)]
    models.gate.allow(3)
    until(lambda: models.gate.steps == 3)
    models.gate.allow(1)
    assert not engine.shutdown(**options)
    assert [h.result(0).finish_reason for h in handles] == ["cancelled"] * 3
    assert engine.stats().ended == {"cancelled": 3}


def test_new_requests_are_refused_while_it_drains(models: Models) -> None:
    models.gate.close()
    engine = Engine(models)
    handle = engine.submit(ask(1, 40))
    closing = threading.Thread(target=engine.shutdown)
    closing.start()
    until(lambda: engine._loop._closed)
    with pytest.raises(EngineClosed):
        engine.submit(ask(2))
    models.gate.open()
    closing.join(WAIT)
    assert handle.result(0).finish_reason == "length"


def test_an_exception_in_the_with_block_cancels(models: Models) -> None:
    with pytest.raises(ZeroDivisionError), Engine(models) as engine:  # noqa: PT012
        handle = engine.submit(ask(1, 9_000))
        raise ZeroDivisionError
    assert handle.result(0).finish_reason == "cancelled"


def test_an_engine_that_is_dropped_ends(models: Models) -> None:
    engine = Engine(models)
    handle = engine.submit(ask(1))
    del engine
    assert handle.result(WAIT).tokens == expected(prompt_of(1), 20), "its handles keep it"
    del handle
    gc.collect()
    assert models.claims == 0
    assert not models.made


def test_threads_are_used_again(models: Models) -> None:
    for _ in range(5):
        with Engine(models) as engine:
            engine.submit(ask(1)).result(WAIT)
    before = threading.active_count()
    for _ in range(5):
        with Engine(models) as engine:
            engine.submit(ask(1)).result(WAIT)
    assert threading.active_count() <= before + 1


def test_an_idle_engine_does_nothing(models: Models) -> None:
    with Engine(models) as engine:
        engine.submit(ask(1)).result(WAIT)
        time.sleep(0.05)
        looks = models.gate.looks
        time.sleep(0.2)
        assert models.gate.looks == looks


# --- with a runtime --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rt() -> Runtime:
    return load("demo")


def test_results_are_those_of_generate(rt: Runtime) -> None:
    chats = ["Tell me a story about a squirrel.", "What is the plural of the word leaf?"]
    params = [SamplingParams(), SamplingParams(temperature=0.9, seed=5, logprobs=2)]
    wanted = [rt.generate(c, max_tokens=40, sampling=p) for c, p in zip(chats, params, strict=True)]
    with Engine(rt, depth=2) as engine:
        handles = [engine.submit(rt.request(c, max_tokens=40, sampling=p)) for c, p in zip(chats, params, strict=True)]
        got = [h.result(WAIT) for h in handles]
    for a, b in zip(got, wanted, strict=True):
        assert (a.tokens, a.text, a.thinking) == (b.tokens, b.text, b.thinking)
        assert (a.finish_reason, a.contract) == (b.finish_reason, b.contract)
        assert (a.logprobs is None, a.bitwise, a.differing_shapes) == (
            b.logprobs is None,
            b.bitwise,
            b.differing_shapes,
        )
    assert got[1].logprobs is not None
    assert [p.token for p in got[1].logprobs] == got[1].tokens


def test_stop_strings_and_the_models_own_stop_tokens_end_outputs(rt: Runtime) -> None:
    chat = "What is the plural of the word leaf?"
    whole, cut = rt.generate(chat, max_tokens=60), rt.generate(chat, max_tokens=60, stop="leaf")
    assert whole.finish_reason == cut.finish_reason == "stop"
    prompt = rt.request(chat).prompt
    with Engine(rt) as engine:
        plain = engine.submit(Request(prompt=prompt, max_tokens=60)).result(WAIT)
        read = engine.submit(rt.request(chat, max_tokens=60, stop="leaf"))
        stopped = list(read)
        result = read.result(0)
        until(lambda: engine.stats().ended == {"stop": 2})
    assert plain.text == whole.text
    assert (result.text, result.stop, result.tokens) == (cut.text, "leaf", cut.tokens)
    assert stopped[-1].finish_reason == "stop"
    assert tokens_of(stopped) == cut.tokens


def test_direct_calls_are_refused_while_an_engine_has_the_runtime(rt: Runtime) -> None:
    with Engine(rt):
        for call in (
            lambda: rt.generate([5]),
            lambda: next(rt.stream([5])),
            lambda: rt.logits([5]),
            lambda: rt.draft([5]),
            lambda: Engine(rt),
        ):
            with pytest.raises(RuntimeError, match="an Engine has this runtime"):
                call()
    assert rt.generate([5], max_tokens=2).tokens


def test_nothing_of_a_model_outlives_it_and_its_engines() -> None:
    gc.collect()
    before = mx.get_active_memory()
    rt = load("demo")
    rt.generate([5, 6], max_tokens=4)
    with Engine(rt) as engine:
        engine.submit(Request(prompt=[5, 6], max_tokens=4)).result(WAIT)
    assert mx.get_active_memory() > before + 5_000_000
    del rt, engine
    gc.collect()
    mx.clear_cache()
    assert mx.get_active_memory() < before + 10_000


@pytest.mark.parametrize("end", ["engine.shutdown()", "pass"])
def test_a_process_ends_in_order_with_and_without_shutdown(end: str) -> None:
    code = (
        "from mlx_gemma_mtp import Engine, Request, load\n"
        "engine = Engine(load('demo'))\n"
        "handle = engine.submit(Request(prompt=[2, 5, 6], max_tokens=500, ignore_eos=True))\n"
        f"next(iter(handle))\n{end}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
