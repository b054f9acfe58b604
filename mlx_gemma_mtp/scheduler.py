"""Requests in, token events out: admission, chunked prefill, rounds, stops. Knows no threads, text or clocks."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from numbers import Integral
from typing import Any, Literal

import mlx.core as mx

from .admission import Admission
from .cache import KVCache
from .depth import DepthPolicy, RoundShape, RowOutcome, RowState
from .jobs import Job, masks
from .prefix import PrefixCache, as_tokens
from .request import Request, TokenEvent
from .sampling import Constraint, Sampler
from .speculative import MAX_DEPTH, Block, Flight, Round, Speculator
from .stats import SpecStats


@dataclass(frozen=True, kw_only=True)
class SchedulerStats:
    """What a scheduler holds and has done. Bytes are of K/V."""

    running: int
    waiting: int
    rounds: int
    preemptions: int
    prefilled_tokens: int
    kv_bytes: int
    kv_budget: int | None
    prefix_bytes: int
    prefix_entries: int
    prefix_hits: int
    prefix_tokens: int


@dataclass(frozen=True, kw_only=True)
class _Launched:
    """A round on its way: its rows as they were, and what is to be said of it afterwards."""

    flight: Flight
    rows: Sequence[Job | None]
    context: int
    traced: bool


Pipelined = Literal["all", "plain", "none"]
"""Rounds that are launched ahead. On a CPU, whose cores also build the graph, only plain ones gain by it."""

_BLOCKS = (0, 1, 2, 4)
"""Depths to which a block is cut: few, as each is a shape of its own."""


class Scheduler:
    """Drives rounds for requests that come and go.

    `add` and `cancel` at any moment; each `step` is either one prefill step (at most `prefill_budget` prompt tokens,
    in forwards of at most `chunk`) or one round of all rows, in turn where both wait, so that running rows stall for
    one prefill step at most. Up to `max_batch` requests have a row or are prefilled; their K/V stays within
    `kv_budget` bytes (None: no limit): who doesn't fit waits, and if rows outgrow it, the newest goes back to the queue
    and is computed anew later. `prefix_cache` (a count of bytes more, or one that outlives this scheduler) holds K/V of
    prompts and outputs that are over, for prompts that begin alike. `constrain` starts a request's constraint, or
    raises ValueError.

    The next round is handed to the device before the last one's tokens are read, wherever nothing that they say could
    change it (but a stop: then a row computes one round in vain); depths then lag by one round. `pipelined` says for
    which rounds: all, or those without drafts, or none.
    """

    def __init__(
        self,
        speculator: Speculator,
        *,
        vocab_size: int,
        max_positions: int,
        depth: DepthPolicy,
        max_batch: int = 8,
        chunk: int = 512,
        prefill_budget: int = 512,
        kv_budget: int | None = None,
        prefix_cache: int | PrefixCache = 0,
        constrain: Callable[[Request], Constraint | None] = lambda _: None,
        pipelined: Pipelined = "plain",
    ) -> None:
        for name, value in (("max_batch", max_batch), ("chunk", chunk), ("prefill_budget", prefill_budget)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self._speculator = speculator
        self._vocab_size, self._max_positions = vocab_size, max_positions
        self._depth, self._budget, self._constrain = depth, prefill_budget, constrain
        prefixes = PrefixCache(speculator.spec, prefix_cache) if isinstance(prefix_cache, int) else prefix_cache
        self._admission = Admission(
            speculator, max_batch=max_batch, chunk=chunk, kv_budget=kv_budget, prefixes=prefixes
        )
        self._cache = KVCache(speculator.spec)
        self._rows: list[Job | None] = []
        self._block: Block | None = None
        self._offered: list[int] = []
        self._pipelined = pipelined
        self._ahead: _Launched | None = None
        self._planned: dict[int, int] = {}
        self._closing: list[tuple[int, Job]] = []
        self._pending: list[TokenEvent] = []
        self._key = mx.random.key(secrets.randbits(63))
        self._sampler = Sampler([], vocab_size, self._key)
        self._ids = count()
        self._paused: dict[int, Job] = {}
        self._prefilled_last = False
        self._rounds, self._preemptions = 0, 0
        # Whom a step that raises may have cost their K/V: these jobs, and, if the batch was touched, all rows.
        self._at_risk: list[Job] = []
        self._batch_at_risk = False

    @property
    def busy(self) -> bool:
        """True while there is something to do."""
        admission = self._admission
        return bool(admission.waiting or admission.started or self._ahead or self._pending) or self.running > 0

    @property
    def next_is_prefill(self) -> bool:
        """Whether the next step prefills."""
        if self.running and self._prefilled_last:
            return False
        return bool(self._admission.started) or self._admission.can_start(self._lengths())

    @property
    def running(self) -> int:
        """Rows of the batch in use."""
        return sum(job is not None for job in self._rows)

    @property
    def waiting(self) -> int:
        """Requests that are no row yet."""
        return len(self._admission.waiting) + len(self._admission.started)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K/V allocated, without those of the prefix cache."""
        return self._cache.nbytes + self._admission.nbytes

    def stats(self) -> SchedulerStats:
        """How things stand."""
        admission = self._admission
        return SchedulerStats(
            running=self.running,
            waiting=self.waiting,
            rounds=self._rounds,
            preemptions=self._preemptions,
            prefilled_tokens=admission.prefilled_tokens,
            kv_bytes=self.kv_bytes,
            kv_budget=admission.kv_budget,
            prefix_bytes=admission.prefixes.nbytes,
            prefix_entries=len(admission.prefixes),
            prefix_hits=admission.prefixes.hits,
            prefix_tokens=admission.prefixes.reused_tokens,
        )

    def add(self, request: Request) -> tuple[int, SpecStats]:
        """Queue a request; returns its id and its counters, which stay up to date. Raises ValueError."""
        job = self.prepare(request)
        self.enqueue(job)
        return job.id, job.stats

    def enqueue(self, job: Job) -> None:
        """Queue what `prepare` made."""
        self._admission.add(job)

    def prepare(self, request: Request) -> Job:
        """Check a request and start its constraint. Changes nothing here: any thread may call it. Raises ValueError."""
        needed = len(request.prompt) + request.max_tokens
        if needed > self._max_positions:
            raise ValueError(
                f"prompt and max_tokens are {len(request.prompt)} + {request.max_tokens} tokens, "
                f"expected at most {self._max_positions} together"
            )
        if request.depth is not None and request.depth > MAX_DEPTH:
            raise ValueError(f"depth is {request.depth}, expected at most {MAX_DEPTH}")
        params, size = request.sampling, self._vocab_size
        named: dict[str, Iterable[Any]] = {
            "prompt": request.prompt,
            "logit_bias": params.logit_bias,
            "suppress_tokens": params.suppress_tokens,
        }
        for name, tokens in named.items():
            for token in tokens:
                if not isinstance(token, Integral) or not 0 <= int(token) < size:
                    raise ValueError(f"{name} has token id {token!r}, expected 0 to {size - 1}")
        if params.logprobs is not None and params.logprobs > size:
            raise ValueError(f"logprobs is {params.logprobs}, expected at most {size}, the size of the vocabulary")
        self._admission.check(needed)
        constraint = self._constrain(request)
        if request.sampling.constraint is not None and constraint is None:
            raise ValueError(f"constraint is {request.sampling.constraint!r}: nothing here can honour it")
        return Job(
            id=next(self._ids),
            request=request,
            stats=SpecStats(contracts={request.sampling.contract: 1}),
            constraint=constraint,
            tokens=as_tokens(request.prompt),
        )

    def cancel(self, request_id: int) -> bool:
        """Drop a request at once, whatever its state; no event follows.

        False if it isn't there any more, or has just ended: then its last event comes with the next step.
        """
        if self._admission.remove(request_id) or self._paused.pop(request_id, None) is not None:
            self._depth.forget(request_id)
            return True
        self._batch_at_risk = True
        self._pending += self._settle()
        row, running = next(((r, j) for r, j in enumerate(self._rows) if j and j.id == request_id), (0, None))
        if running is not None:
            self._close(row)
            self._shrink()
            unsaid = [event for event in self._pending if event.request_id == request_id]
            running.stats.cut += sum(len(event.tokens) for event in unsaid)
            self._pending = [event for event in self._pending if event not in unsaid]
        self._batch_at_risk = False
        return running is not None

    def pause(self, request_id: int) -> bool:
        """Take a request out until `resume`, as if it were preempted. False if it isn't there."""
        self._batch_at_risk = True
        self._pending += self._settle()
        here = (*filter(None, self._rows), *self._admission.started, *self._admission.waiting)
        job = next((job for job in here if job.id == request_id), None)
        if job is not None:
            self._withdraw(job)
            self._paused[job.id] = job
        self._batch_at_risk = False
        return job is not None

    def resume(self, request_id: int) -> None:
        """Queue a paused request again."""
        self._admission.add(self._paused.pop(request_id))

    def step(self) -> list[TokenEvent]:
        """Do one prefill step or one round; returns what requests got, in the order of their rows."""
        self._prefilled_last = self.next_is_prefill
        if self._prefilled_last:
            self._pending += self._settle()
        events = self._prefill() if self._prefilled_last else self._round()
        before, self._pending = self._pending, []
        return before + events

    def abort(self) -> list[int]:
        """After `step`, `cancel` or `pause` has raised: drop the requests that this cost their K/V; others go on.

        Returns their ids.
        """
        lost = [*self._at_risk, *(filter(None, self._rows) if self._batch_at_risk else ())]
        if self._batch_at_risk:
            self._cache, self._rows, self._block = KVCache(self._speculator.spec), [], None
            for _, job in self._closing:
                self._depth.forget(job.id)
            self._ahead, self._closing = None, []
            self._resample()
            self._depth.abort()
        self._at_risk, self._batch_at_risk = [], False
        for job in lost:
            if job in self._admission.started:
                self._admission.started.remove(job)
            self._depth.forget(job.id)
        ids = {job.id for job in lost}
        self._pending = [event for event in self._pending if event.request_id not in ids]
        return sorted(ids)

    def __contains__(self, request_id: int) -> bool:
        """Whether a request is here, waiting or running."""
        jobs = (*self._admission.waiting, *self._admission.started, *filter(None, self._rows))
        return request_id in self._paused or any(job.id == request_id for job in jobs)

    def _prefill(self) -> list[TokenEvent]:
        self._admission.start(self._lengths())
        self._tighten()
        self._at_risk = list(self._admission.started)
        ready = self._admission.prefill(self._budget, until_ready=self.running == 0)
        self._at_risk = [job for job, _ in ready]
        events = self._first(ready) if ready else []
        self._at_risk, self._batch_at_risk = [], False
        return events

    def _first(self, ready: list[tuple[Job, mx.array]]) -> list[TokenEvent]:
        """The first token of prompts that are through, which then join the batch."""
        jobs, caches = [job for job, _ in ready], [job.cache for job, _ in ready if job.cache is not None]
        alone = self.running == 0
        if alone:
            self._batch_at_risk = True
            self._cache, self._rows, self._block = KVCache(self._speculator.spec), [], None
        cache = self._cache if alone else caches[0] if len(caches) == 1 else KVCache(self._speculator.spec)
        if cache is not caches[0]:
            cache.admit(caches)
        free = cache.rows - len(jobs)
        rows: list[Job | None] = [*jobs, *[None] * free]
        hidden = mx.concatenate([h for _, h in ready] + [ready[0][1]] * free)
        states, context = [self._state(job) for job in jobs], max(len(job.tokens) for job in jobs)
        sampler = Sampler([None if j is None else j.history for j in rows], self._vocab_size, self._fresh_key())
        chosen = self._depth.plan(
            states, width=cache.rows, context=context, compiled=partial(self._speculator.has_round, cache, sampler)
        )
        depths = [*chosen, *[0] * free]
        allowed = masks(rows, Block.empty(len(rows)), [0] * len(rows), self._vocab_size)
        first = self._speculator.first(cache, hidden, depths, sampler, allowed, min_chain=self._depth.min_chain)
        events = []
        for row, job in enumerate(jobs):
            job.cache = None
            job.stats.prefills += 1
            events.append(job.take(first, row))
            if events[-1].finish_reason is not None:
                self._end(job, cache, row)
                rows[row] = None
        if alone:
            self._rows, self._block, self._sampler, self._offered = rows, first.block, sampler, first.offered
            self._shrink()
        else:
            self._admit(cache, rows, first)
        self._cut()
        return events

    def _admit(self, cache: KVCache, joining: Sequence[Job | None], first: Round) -> None:
        """Let the open rows of another cache join the batch."""
        if not any(joining):
            return
        self._batch_at_risk = True
        places: list[tuple[Block, int] | None] = [
            (self._block, r) if job is not None and self._block is not None else None
            for r, job in enumerate(self._rows)
        ]
        rows = self._cache.admit([cache])
        places += [None] * (self._cache.rows - len(places))
        self._rows += [None] * (self._cache.rows - len(self._rows))
        self._offered += [0] * (self._cache.rows - len(self._offered))
        open_rows = [(r, job) for r, job in enumerate(joining) if job is not None]
        for (r, job), row in zip(open_rows, rows, strict=True):
            self._rows[row], places[row], self._offered[row] = job, (first.block, r), first.offered[r]
        self._block = Block.of_rows(places, self._vocab_size)
        self._resample()

    def _round(self) -> list[TokenEvent]:
        launched, self._ahead = self._ahead, None
        if launched is None:
            self._batch_at_risk = True
            self._make_room()
            if self._block is None:
                self._batch_at_risk = False
                return []
            planned, self._planned = self._planned, {}
            running = {job.id for job in self._rows if job is not None}
            launched = self._launch(planned if running <= planned.keys() else self._plan())
        if self._may_go_ahead(launched.flight):
            flight, plan = launched.flight, self._plan(ahead=launched.flight.verified)
            # A CPU's launch waits for room in its queue: rounds of two kinds would hide what each of them takes.
            if self._pipelined == "all" or (flight.verified == 1 and not any(plan.values())):
                self._ahead = self._launch(plan, ahead=flight.verified)
                launched = replace(launched, traced=launched.traced or self._ahead.traced)
            else:
                self._planned = plan
        self._depth.meanwhile()
        return self._land(launched)

    def _settle(self) -> list[TokenEvent]:
        """Land the round that is ahead, if one is: afterwards rows may move."""
        launched, self._ahead = self._ahead, None
        return [] if launched is None else self._land(launched)

    def _launch(self, plan: dict[int, int], *, ahead: int = 0) -> _Launched:
        """Hand a round to the device, while the last one, if it is on its way, adds up to `ahead` tokens to a row."""
        assert self._block is not None
        self._batch_at_risk = True
        self._block = self._speculator.fitted(self._block)
        context, traces = self._context(), self._speculator.traces
        depths = [0 if job is None else plan[job.id] for job in self._rows]
        # Of a round that is ahead, what is offered isn't known yet; it has no row with a constraint.
        offered = [min(n, self._block.depth) for n in self._offered]
        allowed = masks(self._rows, self._block, offered, self._vocab_size)
        self._depth.begin()
        flight = self._speculator.launch(
            self._cache, self._block, depths, self._sampler, allowed, min_chain=self._depth.min_chain, ahead=ahead
        )
        self._rounds += 1
        self._block = flight.block
        traced = self._speculator.traces > traces
        return _Launched(flight=flight, rows=list(self._rows), context=context, traced=traced)

    def _may_go_ahead(self, flight: Flight) -> bool:
        """Whether the next round can be launched, and is likely to be of use, before this one's tokens are known."""
        if self._closing or self._depth.min_chain > 0 or self.running == 0:
            return False
        if self._pipelined == "none" or (self._pipelined == "plain" and flight.block.depth):
            return False
        jobs = [job for job in self._rows if job is not None]
        ending = sum(job.request.max_tokens - job.stats.tokens <= flight.verified for job in jobs)
        if 2 * ending > len(jobs) or any(job.constraint is not None for job in jobs):
            return False
        if self._admission.started or self._admission.can_start(self._lengths()):
            return False
        return self._cache.has_room(flight.verified + self._speculator.fitted(flight.block).depth + 1)

    def _land(self, launched: _Launched) -> list[TokenEvent]:
        """Read a round's tokens: events, counters, and what is over."""
        flight = launched.flight
        result = self._speculator.land(flight, self._cache)
        offered = [min(n, flight.verified - 1) for n in self._offered]
        events, outcomes = [], []
        for row, job in enumerate(launched.rows):
            if job is None or job is not self._rows[row]:
                continue
            accepted = result.counts[row] - 1
            job.stats.add_round(drafted=offered[row], accepted=accepted)
            event = job.take(result, row)
            events.append(event)
            # A stop token that was drafted counts; what lies behind it doesn't.
            counted = len(event.tokens) + (event.finish_reason == "stop") if event.finish_reason else accepted + 1
            tried = min(offered[row], counted)
            kept = min(accepted, tried)
            outcomes.append(RowOutcome(request=job.id, offered=tried, accepted=kept, tokens=event.tokens))
            if event.finish_reason is not None:
                self._rows[row] = None
                self._closing.append((row, job))
        shape = RoundShape(
            rows=len(launched.rows),
            verified=flight.verified - 1,
            drafted=flight.drafted,
            context=launched.context,
            settled=not launched.traced,
        )
        self._depth.observe(shape, outcomes)
        self._offered = result.offered
        if self._ahead is None:
            for row, job in self._closing:
                self._end(job, self._cache, row)
            self._closing = []
            self._shrink()
            self._cut()
            self._batch_at_risk = False
        return events

    def _cut(self) -> None:
        """Leave out drafts that no row offers."""
        if self._block is not None:
            most = max((n for n, job in zip(self._offered, self._rows, strict=False) if job is not None), default=0)
            depth = next((n for n in _BLOCKS if n >= most), self._block.depth)
            self._block = self._block.resized(min(depth, self._block.depth) + 1)

    def _make_room(self) -> None:
        """Send the newest requests back to the queue until what the next round needs is within the budget."""
        budget, started = self._admission.kv_budget, self._admission.started
        while budget is not None and self._block is not None:
            everyone = [*filter(None, self._rows), *started]
            self._tighten()
            # Room for any block: were it this one's length, which drafts are dropped would depend on what they are.
            now = self._cache.bytes_after(self._admission.spec.max_block) + self._admission.nbytes
            if max(now, self._admission.needed(self._lengths())) <= budget or len(everyone) == 1:
                return
            newest = max(everyone, key=lambda job: job.id)
            self._preemptions += 1
            self._withdraw(newest)
            self._admission.add(newest)

    def _tighten(self) -> None:
        """Where the budget is exceeded, give back what rows that are over left allocated."""
        if self._admission.kv_budget is not None and self.kv_bytes > self._admission.kv_budget:
            self._batch_at_risk = True
            self._cache.tighten()

    def _withdraw(self, job: Job) -> None:
        """Take a request's row, or its place in the queue: it can be queued again, and then goes on where it was."""
        if job in self._admission.waiting:
            self._admission.waiting.remove(job)
        elif job in self._admission.started:
            self._admission.started.remove(job)
        else:
            row = self._rows.index(job)
            self._admission.keep(job, self._cache, row, self._cache.lengths[row])
            self._cache.close_row(row)
            self._rows[row] = None
            self._depth.forget(job.id)
            self._shrink()
        job.cache, job.tokens = None, as_tokens([*job.request.prompt, *job.output])

    def _plan(self, *, ahead: int = 0) -> dict[int, int]:
        """Drafts to draw for each request in the next round."""
        living = [job for job in self._rows if job is not None]
        states = [self._state(job, certain=2 if ahead else 1) for job in living]
        chosen = self._depth.plan(
            states,
            width=len(self._rows),
            context=self._context(),
            compiled=partial(self._speculator.has_round, self._cache, self._sampler),
        )
        return {job.id: depth for job, depth in zip(living, chosen, strict=True)}

    def _state(self, job: Job, *, certain: int = 1) -> RowState:
        # Until these drafts are verified, `certain` tokens at least are given out: they may be all that is asked for.
        left = job.request.max_tokens - job.stats.tokens - certain
        return RowState(request=job.id, cap=max(left - 1, 0), fixed=job.request.depth)

    def _context(self) -> int:
        """Mean number of tokens that the living rows hold."""
        lengths = self._lengths()
        return sum(lengths) // max(len(lengths), 1)

    def _close(self, row: int) -> None:
        job = self._rows[row]
        assert job is not None
        self._end(job, self._cache, row)
        self._rows[row] = None

    def _end(self, job: Job, cache: KVCache, row: int) -> None:
        """Close a row; what it holds may serve others."""
        known = len(job.request.prompt) + len(job.output)
        self._admission.keep(job, cache, row, min(cache.lengths[row], known))
        cache.close_row(row)
        self._depth.forget(job.id)

    def _lengths(self) -> list[int]:
        """Tokens that the running rows are given room for: those held, or all that may come where none may be lost."""
        if self._speculator.alone:
            return [job.length for job in self._rows if job is not None]
        return [n for n, job in zip(self._cache.lengths, self._rows, strict=False) if job is not None]

    def _shrink(self) -> None:
        kept = self._cache.compact()
        if kept is None or self._block is None:
            return
        block = self._block
        self._rows = [self._rows[r] for r in kept]
        self._rows += [None] * (self._cache.rows - len(self._rows))
        places: list[tuple[Block, int] | None] = [(block, r) for r in kept]
        places += [None] * (self._cache.rows - len(places))
        self._block = Block.of_rows(places, self._vocab_size) if kept else None
        self._offered = [self._offered[r] for r in kept] + [0] * (self._cache.rows - len(kept))
        self._resample()

    def _fresh_key(self) -> mx.array:
        self._key, key = mx.random.split(self._key)
        return key

    def _resample(self) -> None:
        """Lay the sampling state out anew for the rows as they are now."""
        histories = [None if job is None else job.history for job in self._rows]
        self._sampler = Sampler(histories, self._vocab_size, self._fresh_key())
