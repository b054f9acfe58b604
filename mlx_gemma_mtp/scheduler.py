"""Requests in, token events out: admission, chunked prefill, rounds, stops. Knows no threads, text or clocks."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

import mlx.core as mx
import numpy as np

from .cache import KVCache
from .depth import DepthPolicy, RoundShape, RowOutcome, RowState
from .request import FinishReason, Request, TokenEvent, TokenLogprob
from .sampling import Constraint, History, Sampler
from .speculative import MAX_DEPTH, Block, Masks, Round, Speculator
from .stats import SpecStats


@dataclass(kw_only=True)
class Job:
    """A request on its way: waiting, being prefilled (it has a cache of its own), or a row of the batch."""

    id: int
    request: Request
    stats: SpecStats = field(default_factory=SpecStats)
    cache: KVCache | None = None
    output: list[int] = field(default_factory=list)
    constraint: Constraint | None = None

    @property
    def history(self) -> History:
        """What its sampler needs to know."""
        request = self.request
        return History(request.sampling, request.prompt, self.output, request.stop_ids, request.choice)


class Scheduler:
    """Drives rounds for requests that come and go.

    `add` and `cancel` at any moment; each `step` is either one prefill step (at most `prefill_budget` prompt tokens,
    in chunks of `chunk`) or one round of all rows, in turn where both wait, so that running rows stall for one
    prefill step at most. Requests are admitted in their order, up to `max_batch` rows. `constrain` starts a request's
    constraint, or raises ValueError.
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
        prefill_budget: int = 2048,
        constrain: Callable[[Request], Constraint | None] = lambda _: None,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("chunk", chunk), ("prefill_budget", prefill_budget)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self._speculator = speculator
        self._vocab_size, self._max_positions = vocab_size, max_positions
        self._depth, self._max_batch, self._chunk, self._budget = depth, max_batch, chunk, prefill_budget
        self._constrain = constrain
        self._cache = KVCache(speculator.spec)
        self._rows: list[Job | None] = []
        self._block: Block | None = None
        self._key = mx.random.key(secrets.randbits(63))
        self._sampler = Sampler([], vocab_size, self._key)
        self._waiting: deque[Job] = deque()
        self._ids = count()
        self._prefilled_last = False

    @property
    def busy(self) -> bool:
        """True while there is something to do."""
        return bool(self._waiting) or self.running > 0

    @property
    def next_is_prefill(self) -> bool:
        """Whether the next step prefills."""
        room = bool(self._waiting) and self.running < self._max_batch
        return room and (self.running == 0 or not self._prefilled_last)

    @property
    def running(self) -> int:
        """Rows of the batch in use."""
        return sum(job is not None for job in self._rows)

    @property
    def waiting(self) -> int:
        """Requests that are no row yet."""
        return len(self._waiting)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K/V allocated."""
        return self._cache.nbytes + sum(job.cache.nbytes for job in self._waiting if job.cache is not None)

    def add(self, request: Request) -> tuple[int, SpecStats]:
        """Queue a request; returns its id and its counters, which stay up to date. Raises ValueError."""
        job = self.prepare(request)
        self.enqueue(job)
        return job.id, job.stats

    def enqueue(self, job: Job) -> None:
        """Queue what `prepare` made."""
        self._waiting.append(job)

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
        for token in request.prompt:
            if not 0 <= token < self._vocab_size:
                raise ValueError(f"prompt has token id {token}, expected 0 to {self._vocab_size - 1}")
        constraint = self._constrain(request)
        if request.sampling.constraint is not None and constraint is None:
            raise ValueError(f"constraint is {request.sampling.constraint!r}: nothing here can honour it")
        stats = SpecStats(contracts={request.sampling.contract: 1})
        return Job(id=next(self._ids), request=request, stats=stats, constraint=constraint)

    def cancel(self, request_id: int) -> bool:
        """Drop a request at once, whatever its state; no event follows. False if it isn't there (any more)."""
        for job in self._waiting:
            if job.id == request_id:
                self._waiting.remove(job)
                return True
        for row, running in enumerate(self._rows):
            if running is not None and running.id == request_id:
                self._close(row)
                self._shrink()
                return True
        return False

    def abort(self) -> list[int]:
        """Drop all that has K/V, after a step that raised; what waits stays. Returns the ids dropped."""
        dropped = [job.id for job in self._rows if job is not None]
        dropped += [job.id for job in self._waiting if job.cache is not None]
        self._waiting = deque(job for job in self._waiting if job.cache is None)
        self._cache, self._rows, self._block = KVCache(self._speculator.spec), [], None
        self._sampler = Sampler([], self._vocab_size, self._key)
        return dropped

    def __contains__(self, request_id: int) -> bool:
        """Whether a request is here, waiting or running."""
        return any(job is not None and job.id == request_id for job in (*self._waiting, *self._rows))

    def step(self) -> list[TokenEvent]:
        """Do one prefill step or one round; returns what requests got, in the order of their rows."""
        if self.next_is_prefill:
            self._prefilled_last = True
            return self._prefill()
        self._prefilled_last = False
        return self._round() if self.running else []

    def _prefill(self) -> list[TokenEvent]:
        budget, events = self._budget, []
        ready: list[tuple[Job, Block]] = []
        while self._waiting and budget > 0 and self.running + len(ready) < self._max_batch:
            job, hidden = self._waiting[0], None
            prompt = job.request.prompt
            if job.cache is None:
                job.cache = KVCache.with_row(self._speculator.spec, len(prompt))
            while budget > 0 and (done := job.cache.lengths[0]) < len(prompt):
                chunk = prompt[done : done + min(self._chunk, budget)]
                hidden = self._speculator.prefill(job.cache, chunk)
                budget -= len(chunk)
            if job.cache.lengths[0] < len(prompt):
                break
            assert hidden is not None
            sampler = Sampler([job.history], self._vocab_size, self._fresh_key())
            masks = self._masks([job], Block(mx.zeros((1, 1), mx.int32), (0,)))
            depth = self._depth.plan([self._state(job)], width=1, context=len(prompt))[0]
            first = self._speculator.first(job.cache, hidden, depth, sampler, masks)
            self._waiting.popleft()
            job.stats.prefills += 1
            events.append(self._event(job, first, 0))
            if events[-1].finish_reason is None:
                ready.append((job, first.block))
        self._admit(ready)
        return events

    def _admit(self, ready: list[tuple[Job, Block]]) -> None:
        if not ready:
            return
        caches = [job.cache for job, _ in ready if job.cache is not None]
        rows = self._cache.admit(caches)
        places: list[tuple[Block, int] | None] = [
            (self._block, r) if job is not None and self._block is not None else None
            for r, job in enumerate(self._rows)
        ]
        places += [None] * (self._cache.rows - len(places))
        self._rows += [None] * (self._cache.rows - len(self._rows))
        for (job, block), row in zip(ready, rows, strict=True):
            self._rows[row], places[row], job.cache = job, (block, 0), None
        self._block = Block.of_rows(places, self._vocab_size)
        self._resample()

    def _round(self) -> list[TokenEvent]:
        assert self._block is not None
        depths, verified, traces = self._plan(), self._block.depth, self._speculator.traces
        context = self._context()
        offered = self._block.offered
        masks = self._masks(self._rows, self._block)
        self._depth.begin()
        result = self._speculator.run_round(self._cache, self._block, depths, self._sampler, masks)
        self._block, events, outcomes = result.block, [], []
        for row, job in enumerate(self._rows):
            if job is None:
                continue
            job.stats.add_round(drafted=offered[row], accepted=result.counts[row] - 1)
            event = self._event(job, result, row)
            events.append(event)
            # A stop token that was drafted counts; what lies behind it doesn't.
            counted = len(event.tokens) + (event.finish_reason == "stop")
            outcomes.append(
                RowOutcome(
                    request=job.id,
                    offered=min(offered[row], counted) if event.finish_reason else offered[row],
                    accepted=min(result.counts[row] - 1, counted),
                )
            )
            if event.finish_reason is not None:
                self._close(row)
        settled = self._speculator.traces == traces
        drafted = result.block.depth
        shape = RoundShape(rows=len(self._rows), verified=verified, drafted=drafted, context=context, settled=settled)
        self._depth.observe(shape, outcomes)
        self._shrink()
        return events

    def _plan(self) -> list[int]:
        """Drafts to draw for each row in the next round; 0 for free rows."""
        living = [(row, job) for row, job in enumerate(self._rows) if job is not None]
        states = [self._state(job) for _, job in living]
        depths = [0] * len(self._rows)
        chosen = self._depth.plan(states, width=len(self._rows), context=self._context())
        for (row, _), depth in zip(living, chosen, strict=True):
            depths[row] = depth
        return depths

    def _state(self, job: Job) -> RowState:
        # The next round gives one token at least: drafts beyond the rest of what is asked for are of no use.
        left = job.request.max_tokens - job.stats.tokens - 1
        return RowState(request=job.id, cap=min(MAX_DEPTH, max(left - 1, 0)), fixed=job.request.depth)

    def _context(self) -> int:
        """Mean number of tokens that the living rows hold."""
        lengths = [n for n, job in zip(self._cache.lengths, self._rows, strict=False) if job is not None]
        return sum(lengths) // max(len(lengths), 1)

    def _event(self, job: Job, result: Round, row: int) -> TokenEvent:
        """What a row's new tokens mean for its request: cut at a stop token or at max_tokens."""
        count, request = result.counts[row], job.request
        tokens, drafted = result.tokens[row][:count], [True] * (count - 1) + [False]
        reason: FinishReason | None = None
        kept = min(count, request.max_tokens - (job.stats.tokens - count))
        if not request.ignore_eos:
            stop = next((i for i, t in enumerate(tokens[:kept]) if t in request.stop_ids), None)
            if stop is not None:
                kept, reason = stop, "stop"
        job.stats.cut += count - kept
        job.output += tokens[:kept]
        if job.constraint is not None:
            job.constraint.advance(tokens[:kept])
        if reason is None and job.stats.tokens >= request.max_tokens:
            reason = "length"
        asked = request.sampling.logprobs
        logprobs = [] if asked is None else result.logprobs[row][:kept]
        return TokenEvent(
            request_id=job.id,
            tokens=tuple(tokens[:kept]),
            drafted=tuple(drafted[:kept]),
            finish_reason=reason,
            logprobs=tuple(TokenLogprob(p.token, p.logprob, p.top[:asked]) for p in logprobs),
        )

    def _masks(self, jobs: Sequence[Job | None], block: Block) -> Masks | None:
        """What the rows' constraints allow at each position of a block; None if no row has one."""
        if all(job is None or job.constraint is None for job in jobs):
            return None
        offered, words = block.offered, -(-self._vocab_size // 32)
        drafts: list[list[int]] = block.tokens[:, 1:].tolist() if block.depth else [[]] * len(jobs)  # type: ignore[assignment]

        def make() -> mx.array:
            masks = np.full((len(jobs), block.depth + 1, words), 0xFFFFFFFF, np.uint32)
            for row, job in enumerate(jobs):
                if job is not None and job.constraint is not None:
                    masks[row, : offered[row] + 1] = job.constraint.masks(drafts[row][: offered[row]])
            return mx.array(masks)

        return make

    def _close(self, row: int) -> None:
        self._cache.close_row(row)
        self._rows[row] = None

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
        self._resample()

    def _fresh_key(self) -> mx.array:
        self._key, key = mx.random.split(self._key)
        return key

    def _resample(self) -> None:
        """Lay the sampling state out anew for the rows as they are now."""
        histories = [None if job is None else job.history for job in self._rows]
        self._sampler = Sampler(histories, self._vocab_size, self._fresh_key())
