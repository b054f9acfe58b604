"""Which requests get a cache, and their prompts' way into it. Knows no rounds, sampling, threads or text."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence

import mlx.core as mx

from .cache import KVCache, planned_bytes
from .jobs import Job
from .prefix import MIN_REUSED, PrefixCache, as_tokens, common_prefix
from .speculative import Speculator


class Admission:
    """Requests before they are rows of a batch.

    A waiting request is given a cache in the order of arrival, as soon as there is a row and memory for it. Those with
    a cache are prefilled together, `chunk` tokens in a forward: one half goes to the request that came first, the
    other to the one that has the fewest tokens left, so that neither long nor short prompts wait for the others.
    """

    def __init__(
        self, speculator: Speculator, *, max_batch: int, chunk: int, kv_budget: int | None, prefixes: PrefixCache
    ) -> None:
        self._speculator, self.spec = speculator, speculator.spec
        self._max_batch, self._chunk, self.kv_budget = max_batch, chunk, kv_budget
        self.prefixes = prefixes
        self.waiting: list[Job] = []
        self.started: list[Job] = []
        self.prefilled_tokens = 0

    @property
    def nbytes(self) -> int:
        """Bytes of K/V of the prompts being prefilled."""
        return sum(job.cache.nbytes for job in self.started if job.cache is not None)

    def needed(self, rows: Sequence[int], more: Sequence[int] = ()) -> int:
        """Bytes of K/V for running rows of these lengths, the prompts being prefilled, and `more`.

        As long as each prompt has its own cache, and once they have joined the rows, whichever is more.
        """
        own = [*map(self._planned, self.started), *more]
        apart = planned_bytes(self.spec, rows) + sum(planned_bytes(self.spec, [n]) for n in own)
        return max(apart, planned_bytes(self.spec, [*rows, *own]))

    def check(self, length: int) -> None:
        """Raises ValueError if a request of `length` tokens, its output included, can never fit."""
        needed = planned_bytes(self.spec, [length])
        if self.kv_budget is not None and needed > self.kv_budget:
            raise ValueError(
                f"prompt and max_tokens are {length} tokens and need {needed} bytes of K/V, "
                f"expected at most kv_budget = {self.kv_budget}"
            )

    def add(self, job: Job) -> None:
        """Queue a job: in the order of ids, so that one that was preempted comes before younger ones."""
        insort(self.waiting, job, key=lambda j: j.id)

    def remove(self, request_id: int) -> bool:
        """Drop a request; what was prefilled of it may serve others. False if it isn't here."""
        for jobs in (self.waiting, self.started):
            for job in jobs:
                if job.id == request_id:
                    jobs.remove(job)
                    if job.cache is not None and job.done:
                        self.keep(job, job.cache, 0, job.done)
                    return True
        return False

    def can_start(self, rows: Sequence[int]) -> bool:
        """Whether a waiting request can be given a cache now, beside running rows of these lengths."""
        return next(self._startable(rows), None) is not None

    def start(self, rows: Sequence[int]) -> None:
        """Give caches to as many waiting requests as can have one."""
        while (job := next(self._startable(rows), None)) is not None:
            self.waiting.remove(job)
            job.cache = self.prefixes.reuse(job.tokens, len(job.tokens))
            if not job.stats.prefills:
                job.stats.reused = job.done
            if job.cache is None:
                job.cache = KVCache.with_row(self.spec, len(job.tokens))
            job.stops = self._stops(job)
            self.started.append(job)

    def prefill(self, budget: int, *, until_ready: bool) -> list[tuple[Job, mx.array]]:
        """Compute at most `budget` prompt tokens; with `until_ready`, more if it takes more until a prompt is through.

        Returns the jobs that are through, with the hidden state (1, hidden) of their last token.
        """
        ready: list[tuple[Job, mx.array]] = []
        while self.started and (budget > 0 or (until_ready and not ready)):
            if self._speculator.alone:
                if ready:
                    break
                pieces = [(self.started[0], min(self.started[0].left, self._chunk))]
            else:
                pieces = self._share(min(budget, self._chunk) if budget > 0 else self._chunk)
            chunks = [(job.cache, job.tokens[job.done : job.done + n].tolist()) for job, n in pieces if job.cache]
            hidden = self._speculator.prefill_together(chunks)
            for i, (job, n) in enumerate(pieces):
                budget -= n
                self.prefilled_tokens += n
                self._stop_at(job)
                if job.left == 0:
                    self.started.remove(job)
                    ready.append((job, hidden[i : i + 1]))
        return ready

    def keep(self, job: Job, cache: KVCache, row: int, length: int) -> None:
        """Keep what a row that is over holds: its first `length` tokens."""
        size = self.spec.ring_bytes() + length * self.spec.bytes_per_token()
        if length >= MIN_REUSED and size <= self.prefixes.limit:
            tokens = as_tokens([*job.request.prompt, *job.output])
            self.prefixes.keep(tokens, cache.hold(row, length), job.points.values())

    def _startable(self, rows: Sequence[int]) -> Iterator[Job]:
        """Waiting requests that can be given a cache now, in their order."""
        if len(rows) + len(self.started) >= self._max_batch:
            return
        for job in self.waiting:
            others = len(rows) + len(self.started) > 0
            if others and self.kv_budget is not None and self.needed(rows, [self._planned(job)]) > self.kv_budget:
                return
            if not self._better_later(job):
                yield job

    def _planned(self, job: Job) -> int:
        """Tokens that a job is given room for; all it may come to, where none may be computed anew."""
        return job.length if self._speculator.alone else len(job.tokens)

    def _better_later(self, job: Job) -> bool:
        """Whether one that is being prefilled will soon hold more of the job's beginning than is known now."""
        if not self.prefixes.limit or not self.started:
            return False
        known = self.prefixes.known(job.tokens)
        return any(
            known < stop <= common_prefix(other.tokens, job.tokens[:-1])
            for other in self.started
            for stop in other.stops
        )

    def _stops(self, job: Job) -> list[int]:
        """Where a job's prefill stops: where requests that wait part from it, and at its own checkpoints."""
        if not self.prefixes.limit:
            return []
        shared = {common_prefix(job.tokens, other.tokens[:-1]) for other in self.waiting}
        marks = {*shared, *job.request.checkpoints}
        return sorted(n for n in marks if max(job.done, MIN_REUSED - 1) < n < len(job.tokens))

    def _stop_at(self, job: Job) -> None:
        """If a stop was reached: keep what others wait for, or the rings alone where they will be overwritten."""
        if job.cache is None or not job.stops or job.done < job.stops[0]:
            return
        at = job.stops.pop(0)
        if any(common_prefix(other.tokens[:-1], job.tokens) >= at for other in self.waiting):
            self.prefixes.keep(job.tokens, job.cache.hold(0, at))
        elif self._will_wrap(job):
            job.points[at] = job.cache.hold(0, at, rings_only=True)

    def _will_wrap(self, job: Job) -> bool:
        end = len(job.request.prompt) + job.request.max_tokens
        return any(end > self.spec.ring(self.spec.slots[i]) for i in self.spec.rings)

    def _share(self, tokens: int) -> list[tuple[Job, int]]:
        """How many tokens of which prompts the next forward takes: at most `tokens`."""
        first, shortest = self.started[0], sorted(self.started, key=lambda j: (j.left, j.id))
        taken: dict[int, int] = {}

        def take(job: Job, most: int) -> int:
            held = taken.get(job.id, 0)
            end = job.stops[0] - job.done if job.stops else job.left
            n = min(end - held, most)
            if n > 0:
                taken[job.id] = held + n
            return max(n, 0)

        free = tokens - take(first, -(-tokens // 2))
        for job in [*shortest, first]:
            free -= take(job, free)
        return [(job, taken[job.id]) for job in self.started if job.id in taken]
